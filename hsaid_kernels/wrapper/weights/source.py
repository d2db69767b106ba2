"""`ProjectedWeights`: answers reads of a wrapped model's weights, which it computes and keeps while nothing changes."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hsaid_kernels.fastfood.rows import rows_of
from hsaid_kernels.wrapper.isolation import runs_eagerly, undisturbed
from hsaid_kernels.wrapper.reads.embedding_rows import Table
from hsaid_kernels.wrapper.w0.fsdp2 import gathered, is_gathered, is_sharded
from hsaid_kernels.wrapper.w0.quantized import is_quantized, stamp_of
from hsaid_kernels.wrapper.w0.snapshot import forget_derived
from hsaid_kernels.wrapper.weight import Weight
from hsaid_kernels.wrapper.weights import optimizers
from hsaid_kernels.wrapper.weights.cache import Made, layout_of
from hsaid_kernels.wrapper.weights.compute import UNWRAPPED, Maker
from hsaid_kernels.wrapper.weights.graph import Graph, begin_pass, scaled_factors
from hsaid_kernels.wrapper.weights.launches import Group
from hsaid_kernels.wrapper.weights.outside import (
    check_outside_of_calls,
    inside_module,
    other_model,
    warn_of_other_model,
)
from hsaid_kernels.wrapper.weights.saved_tensors import has_hooks, keeping_places, recomputes_what_was_saved

OTHER_THETA = (
    "backward(): expected the task and the theta of forward, because torch.utils.checkpoint recomputes a part of the "
    "model: call set_task() and change theta after backward(), and backward() inside of use_task()"
)


class _Inside(threading.local):
    """Whether a thread is inside a call of the HSAID, and the weights of that call.

    A call runs on the theta of its beginning, whatever other threads do meanwhile.
    """

    calls = False
    made: Made | None = None
    graph: Graph | None = None  # of `made`, once a weight with a graph has been asked for
    recomputes: bool = False  # whether the call is one that torch.utils.checkpoint(use_reentrant=False) runs again
    last_read: tuple[nn.Parameter, list[Tensor]] | None = None  # as that of `ProjectedWeights`, by this thread


class ProjectedWeights(Maker):
    """Answers the reads of a model by its projected weights, which it keeps while nothing changes; see `Maker`."""

    def _start(self) -> None:
        super()._start()
        optimizers.listen(self)
        self._inside = _Inside()
        self._made: Made | None = None  # the weights of now, of reads outside of calls
        # theta, and its value and the multipliers', when a weight was last read outside of backward
        self._last_read: tuple[nn.Parameter, list[Tensor]] | None = None
        # {backward's number: theta and its version of the weights that were read last in it}, of the latest
        self._recomputed: dict[int, tuple[nn.Parameter, int]] = {}
        self._last_task = self.tasks.registered  # the task of that read
        self._running: Counter[str] = Counter()  # calls that run now, by task
        self.steps = 0  # of optimizers that train theta
        self._warned_of_other = False
        self._reached = False  # whether gradients have reached theta since

    def __getstate__(self) -> dict[str, Any]:
        made_again = {"_inside", "_made", "_last_read", "_recomputed", "_last_task", "_running"}
        made_again |= {"steps", "_reached", "_warned_of_other"}
        return {key: value for key, value in super().__getstate__().items() if key not in made_again}

    # --- reads

    def read(self, name: str | None, parameter: nn.Parameter) -> Tensor:
        if not self.attached:
            return parameter  # of a module that had left the model before it was unwrapped
        if not self._inside.calls:
            theta, multipliers = self.trained("theta"), self.trained("multipliers")
            trains = theta.requires_grad or multipliers.requires_grad
            owner = self.owner() if self.owner else None
            check_outside_of_calls(owner, trains)
            self._check_thread()
            if owner is not None and trains and torch._C._current_graph_task_id() == -1:
                self.reduced_once.expect(owner, (theta, multipliers))
            model = self._model()
            if model is not None:
                with self.lock:
                    self.snapshot()  # after a change that was accepted: what a refusal of the next one puts back
            if not self._warned_of_other and model is not None and (other := other_model(model, owner)) is not None:
                self._warned_of_other = True
                warn_of_other_model(*other, name)
            waits = self.kept is None and is_sharded(parameter) and torch._C._current_graph_task_id() == -1
            if waits and not inside_module():
                raise RuntimeError(
                    f"model: expected weights in shards to be read while the model runs, got a read of {name!r} "
                    "elsewhere, which would wait for all ranks: call hsaid.weights() on all of them"
                )
        if name is None:
            with self.lock:
                name = next((name for name, own in self._verified().items() if own is parameter), None)
        if self.kept is not None:
            self._check_merged()
        if self.kept is not None or name is None:
            return parameter
        if name in self.plan.shapes:
            return self._read(name, parameter)
        if name not in self.full or self.own_full:
            return parameter
        full = self.trained(self.full[name])
        if self.ranks is not None:
            self.ranks.average(full)
        return full

    def quickly(self, name: str | None, parameter: nn.Parameter | None) -> Tensor | None:
        made = self._inside.made  # which only calls have
        if made is None or torch._C._current_graph_task_id() != -1:
            return None
        stamp = made.quick.get(name)
        if name is None or parameter is None or stamp is None:
            return None
        own, layout, version, flat, written = stamp
        if (
            parameter is own
            and parameter._version == version
            and layout_of(parameter) == layout
            and flat._version == written
            and self.kept is None
        ):
            graph = self._inside.graph
            return (graph.nodes if graph is not None and torch.is_grad_enabled() else made.weights).get(name)
        return None

    def table(self, name: str | None, parameter: nn.Parameter) -> Table | nn.Parameter:
        if self.kept is not None:
            self._check_merged()
        if not self.attached or self.kept is not None or name is None:
            return parameter
        return Table(self, name, parameter)

    def rows(self, name: str, parameter: nn.Parameter, rows: Tensor) -> Tensor:
        """Rows [U, D] of a weight of `tables`, for U different numbers in rising order."""
        with self.lock, self._task_of_forward():
            made = self._now(name, parameter)
            group, base = made.group_of[name], gathered(parameter)
            if not (torch.is_grad_enabled() and made.wanted):
                return rows_of(group.projection, made.values[0], self.scaled(made), group.whole, base, rows)
            graph = self._graph(made)
            with torch.inference_mode(False), torch.enable_grad(), undisturbed():
                check = self._check(made)
                return rows_of(group.projection, graph.theta, graph.factors, group.whole, base, rows, check)

    def _read(self, name: str, parameter: nn.Parameter) -> Weight:
        with self.lock, self._task_of_forward():  # or another thread could drop the weight in between
            made = self._now(name, parameter)
            if made.group_of[name] not in made.flats:
                self.fill(made, made.group_of[name])
            if torch.is_grad_enabled() and made.wanted:
                return self.join(made, self._graph(made), name, self._check(made))
            if made.graph is None and not self._inside.calls and made.wanted and self.delivers_once(made):
                made.graph = self.new_graph(made)  # before the nodes of layers that will be recomputed
            return made.weight(name)

    def _graph(self, made: Made) -> Graph:
        """What the weights with a graph hang on that are read now."""
        inside = self._inside
        if inside.calls:
            inside.graph = inside.graph or self.new_graph(made)
            return inside.graph
        backward = torch._C._current_graph_task_id() != -1
        if backward and not recomputes_what_was_saved() and self.delivers_once(made):
            return self.late_graph(made)
        if made.graph is None or made.graph.wanting != (made.theta.requires_grad, made.multipliers.requires_grad):
            made.graph = self.new_graph(made)
        return made.graph

    @runs_eagerly
    def _task_of_forward(self) -> AbstractContextManager[None]:
        """Of a backward pass in a thread that has set no task and run no forward, as a device's: the last forward's."""
        inside = self._inside
        if torch._C._current_graph_task_id() == -1 or inside.last_read is not None or self.tasks.is_set():
            return nullcontext()
        if not self.tasks.threaded or self._last_task == self.tasks.registered:
            return nullcontext()
        if not recomputes_what_was_saved():  # whose result nothing compares with the theta of forward
            raise RuntimeError(
                f"backward(): expected {self._last_task!r}, the task of forward, to be set for all threads, got "
                f"{self.tasks.registered!r}: checkpoint with use_reentrant=False, or call set_task() in place of "
                "use_task()"
            )
        return self.tasks.using(self._last_task)

    def _check_thread(self) -> None:
        """Raises RuntimeError in a thread that a model's forward may have started, and that does not know its task."""
        if not self._running or self.tasks.is_set() or torch._C._current_graph_task_id() != -1:
            return
        other = [task for task in self._running if task != self.tasks.registered]
        if other and inside_module():
            raise RuntimeError(
                "task: expected one in all threads, or one that each thread has set, got a module that runs in a "
                f"thread without, while another runs {other[0]!r}: call set_task() or use_task() there"
            )

    def _now(self, name: str, parameter: nn.Parameter) -> Made:
        """What the weights of now are made of, compared with the model as far as this weight needs it."""
        inside = self._inside
        made = inside.made if inside.calls else self._made
        if made is None or not self._current(made, name, parameter):
            made = inside.made = inside.graph = self._made = None  # frees the memory before the new weights need it
            made = self._make()
            if inside.calls:
                inside.made = made
            if made.w0[name] is not parameter and not (made.sharded and is_gathered(parameter, made.w0[name])):
                raise RuntimeError(
                    f"model: expected the parameter {name!r} of the model, got another nn.Parameter in its place, "
                    "which the model was not told of: use setattr(), or call functional_call with ordinary tensors"
                )
        if (task := torch._C._current_graph_task_id()) != -1:  # in backward, as torch.utils.checkpoint recomputes
            self._recomputed[task] = (made.theta, made.versions[0])
            if len(self._recomputed) > 64:  # of which at most a few still run
                self._recomputed.pop(next(iter(self._recomputed)), None)
            if self.delivers_once(made) and not inside.calls:
                begin_pass()
            with undisturbed():
                last = inside.last_read or self._last_read  # a device's backward runs in a thread of its own
                # Another theta that was read since: what was saved of forward's is compared by `_check_backward`.
                recomputes = inside.recomputes if inside.calls else recomputes_what_was_saved()
                if last is not None and last[0] is not made.theta and recomputes:
                    return made
                if last is not None and not (last[0] is made.theta and made.has(last[1])):
                    raise RuntimeError(OTHER_THETA)
        else:
            self._note_read(made)
        return made

    def _note_read(self, made: Made) -> None:
        self._last_read = self._inside.last_read = (made.theta, made.values)
        self._last_task = self.tasks.current

    def _current(self, made: Made, name: str, parameter: Tensor) -> bool:
        """Whether a weight is that of now. Runs at every read that `quickly` does not answer.

        Compares what can be compared quickly: identities, version counters, and whether an optimizer has stepped.
        Inside a call of the HSAID, whose theta stays, only W0. Outside, the values of theta and the multipliers too; on
        a GPU, where this would wait for it, only if a weight is read again.
        """
        theta, multipliers = self.trained("theta"), self.trained("multipliers")
        inside = self._inside.calls
        same = inside or (theta is made.theta and multipliers is made.multipliers and not made.stepped)
        if same and made.tracked and not inside:
            same = theta._version == made.versions[0] and multipliers._version == made.versions[1]
        own, layout, version = made.stamps[name]
        if same and made.tracks_w0:
            same = parameter is own and parameter._version == version and layout_of(parameter) == layout
        elif same:
            same = parameter is own or (made.sharded and is_gathered(parameter, own))
        group = made.group_of[name]
        self._check_unwritten(made, group)
        if same and group not in made.flats:  # all of it will be made
            same = made.changed(group.names) is None
        if same and not inside:
            if name in made.seen:
                made.seen.clear()
                same = self._serves(made)
            elif theta.device.type == "cpu" or made.sharded:  # FSDP2 writes to a theta in shards behind torch's back
                same = self._equal(made, theta, multipliers)
            made.seen.add(name)
        return same

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes that the optimizer may have changed theta, whose version counter a fused one does not increase.

        Warns where it changes W0 in the place of theta, though gradients reach theta.
        """
        changed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.tasks.has(changed):
            self.steps += 1
            self._reached = False
            self.reduced_once.step()
            if self._made is not None:
                self._made.stepped = True
        elif self._reached and any(map(self.owns, changed)):
            self.heard_optimizer()

    def _serves(self, made: Made) -> bool:
        """Whether these weights are those of now. Compares everything; raises as `_verified` does."""
        theta, multipliers = self.trained("theta"), self.trained("multipliers")
        for group in made.flats:
            self._check_unwritten(made, group)
        if not (made.tracked and made.tracks_w0) or theta is not made.theta or multipliers is not made.multipliers:
            return False
        if made.stepped:
            return False
        if [theta._version, multipliers._version] != made.versions:
            return False
        own = self._verified()
        return (
            all(
                (parameter := own[name]) is w0 and parameter._version == version and layout_of(parameter) == layout
                for name, (w0, layout, version) in made.stamps.items()
            )
            and all(stamp_of(own[name]) == stamp for name, stamp in made.stored.items())
            and self._equal(made, theta, multipliers)
        )

    @staticmethod
    def _equal(made: Made, theta: Tensor, multipliers: Tensor) -> bool:
        if not torch._C._len_torch_dispatch_stack() and not torch._C._are_functorch_transforms_active():
            return made.has((theta, multipliers))
        with undisturbed():
            return made.has((theta, multipliers))

    def _check_unwritten(self, made: Made, group: Group) -> None:
        """Raises RuntimeError, once, if somebody has written to a weight: the next read makes the weights again."""
        try:
            made.check_unwritten(group)
        except RuntimeError:
            if self._made is made:
                self._made = None
            if self._inside.made is made:
                self._inside.made = None
            raise

    def _make(self) -> Made:
        """Computes the weights of now, but those that are made when they are read."""
        with self.lock, torch.inference_mode(False), torch.no_grad(), undisturbed():
            own, theta, multipliers = self._verified(), self.trained("theta"), self.trained("multipliers")
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (theta, multipliers))):
                raise RuntimeError(
                    "theta: expected an ordinary tensor, got one inside a transform of torch.func, which cannot "
                    "differentiate a projection: use torch.autograd"
                )
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(theta).tangent is not None:
                raise RuntimeError(
                    "theta: expected a tensor without a tangent, because a projection has no forward-mode derivative"
                )
            self._made = self.new_made(own)
            return self._made

    def _check(self, made: Made) -> Callable[[], None]:
        return partial(_check_backward, weakref.ref(self), made.theta, made.versions[0])

    @contextmanager
    def inside(self, training: bool) -> Iterator[None]:
        """A call of the HSAID: compares everything once, so that reads inside it need not."""
        inside = self._inside
        if inside.calls:
            yield
            return
        with self._task_of_forward(), self.tasks.using(task := self.tasks.current):  # whatever other threads set
            inside.recomputes = recomputes_what_was_saved()
            inside.made = self.enter(training)
            with self.lock:
                self._running[task] += 1
            inside.calls = True
            try:
                if inside.made is not None and torch.is_grad_enabled() and inside.made.wanted:
                    inside.graph = self.new_graph(inside.made)  # before all other nodes
                # With memory="step" weights stay in memory anyway: kept from hooks that would move them elsewhere.
                if self.kept is not None or not torch.is_grad_enabled() or (self.memory == "step" and not has_hooks()):
                    yield
                else:
                    with keeping_places(lambda: inside.made, self.fill):
                        yield
            finally:
                inside.calls, inside.made, inside.graph = False, None, None
                with self.lock:
                    self._running[task] -= 1
                    if not self._running[task]:
                        del self._running[task]

    def factors(self) -> Tensor:
        """The factors of all segments, multiplied by the plan's scales, on which the weights of this call depend."""
        made = self._inside.made
        assert made is not None
        return self._graph(made).factors

    def _check_merged(self) -> None:
        """Raises RuntimeError if the model holds the weights of another task than this thread's."""
        if self.tasks.current != self.merged_task:
            raise RuntimeError(
                f"task: expected {self.merged_task!r}, whose weights merge(inplace=True) has put into the model, got "
                f"{self.tasks.current!r}: unmerge() first"
            )

    def runs_elsewhere(self) -> bool:
        """Whether another thread is inside a call of the HSAID."""
        return sum(self._running.values()) > self._inside.calls

    def check_outside(self, call: str) -> None:
        """Raises RuntimeError, which names `call`, inside a call of the HSAID in this thread."""
        if self._inside.calls:
            raise RuntimeError(f"{call}: expected to be called between calls of the HSAID, got called inside of one")

    @runs_eagerly
    def enter(self, training: bool) -> Made | None:
        """Verifies the model and returns the weights of now; None while merged in place."""
        if not self.attached:
            self.check_on_w0("HSAID")
        wanted = torch.is_grad_enabled()
        with self.lock:
            if self.kept is not None:
                self._check_merged()
                if training and wanted:
                    self.check_on_w0("training")
                return None
            theta, multipliers = self.trained("theta"), self.trained("multipliers")
            wanted = wanted and (theta.requires_grad or multipliers.requires_grad)
            # A training step on a GPU makes them in any case: to compare values would wait for it.
            if self.ranks is not None:  # whose W0 has no version
                self._made = None
            if self._made is not None and ((wanted and theta.device.type != "cpu") or not self._serves(self._made)):
                self._made = None
            if self._made is None and not training:
                forget_derived(self.model)
            made = self._made or self._make()
            if torch._C._current_graph_task_id() == -1:
                self._note_read(made)
            return made

    @runs_eagerly
    def now(self) -> dict[str, Tensor]:
        """{name: projected weight}, differentiable if gradients are enabled."""
        if not self._inside.calls:
            self.enter(False)
        own = self.own()
        if self.kept is not None:
            return {name: own[name].detach() for name in self.plan.names}
        return {name: self._read(name, own[name]) for name in self.plan.names}

    def drop_cache(self) -> None:
        """Discards the weights, so that the next read recomputes them."""
        self._made = None

    def part_copy(self, module: nn.Module) -> nn.Module | None:
        made = self._made
        copied = super().part_copy(module)
        self._made = made  # weights that nobody else has read are not kept
        return copied

    # --- other ways to run the model

    def run_on(self, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the model on the given tensors in place of its parameters of these names."""
        # All names of tied parameters are given explicitly, with tie_weights=False. If functional_call looked for them
        # itself, it would swap the parameters of a module that occurs twice in the model once too often, and leave a
        # projected weight in the place of W0.
        tensors = dict(tensors) | {a: tensors[name] for a, name in self._aliases.items() if name in tensors}
        return torch.func.functional_call(self.model, tensors, tuple(args), dict(kwargs), tie_weights=False)

    def call_traced(self, training: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the model on newly computed weights, for torch.compile, which cannot trace the lock or the cache."""
        own = dict(self.model.named_parameters())
        tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in own.items()}
        if self.kept is not None:
            if training and torch.is_grad_enabled():
                self.check_on_w0("training")
        else:
            trained: Any = self.tasks.own  # a thread's own task cannot be traced
            theta, multipliers = trained["theta"], trained["multipliers"]
            scaled = scaled_factors(self.plan, self.partition, multipliers)
            for group in self.groups({name: own[name] for name in self.plan.names}, theta):
                flat = group.projection.flat(theta, group.whole.own(scaled), [own[name] for name in group.names])
                for part in group.parts:
                    weights = group.projection.part(theta, scaled, part, flat)
                    tensors |= zip(part.plan.names, weights, strict=True)
            # views, because a parameter in the place of a parameter would be taken for W0
            tensors |= {name: trained[key].view_as(trained[key]) for name, key in self.full.items()}
        return self.run_on(tensors, args, kwargs)

    def prepare_tracing(self) -> None:
        """What torch.compile cannot trace: checks the model, and makes what would change attributes while it traces."""
        if not self.attached:
            self.enter(False)  # which raises
        if self.kept is None:
            with self.lock:
                own = self._verified()
            if self.ranks is not None or any(map(is_quantized, own.values())):
                raise RuntimeError(
                    "torch.compile: expected whole parameters, which a compiled HSAID projects at once, got sharded or "
                    "quantized ones: compile the model's layers by themselves, as in layer.compile()"
                )
            self.upload()


def _check_backward(source: weakref.ref[ProjectedWeights], theta: nn.Parameter, version: int) -> None:
    """Raises RuntimeError if backward has, or could have, recomputed parts of the model on other weights than forward.

    `theta` and its version counter are those of forward.
    """
    weights = source()
    if weights is None:
        return
    if not weights.attached:
        raise RuntimeError(UNWRAPPED)
    weights._reached = True
    found = weights._recomputed.get(torch._C._current_graph_task_id())
    if found is not None and (found[0] is not theta or found[1] != version):
        raise RuntimeError(OTHER_THETA)
