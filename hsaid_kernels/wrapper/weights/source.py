"""`WeightSource`: answers every read of a wrapped model's weights with the weight of now.

It holds an `Attachment` (the model), `Surroundings` (what runs around the HSAID), a `WeightMaker` (computes) and a
`WeightCache` (the weights of one theta), and knows what runs: calls of the HSAID, and layers that backward recomputes.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.rows import rows_of
from hsaid_kernels.wrapper.basis import Basis
from hsaid_kernels.wrapper.callers import is_inside_module
from hsaid_kernels.wrapper.isolation import isolated, runs_eagerly
from hsaid_kernels.wrapper.merging import merged_copy
from hsaid_kernels.wrapper.reads.embedding_rows import EmbeddingRows
from hsaid_kernels.wrapper.tasks import Tasks
from hsaid_kernels.wrapper.w0.beside import forget_derived
from hsaid_kernels.wrapper.w0.quantized import as_floats, others_dtype
from hsaid_kernels.wrapper.w0.stored import parameters_of
from hsaid_kernels.wrapper.weight import Weight
from hsaid_kernels.wrapper.weights.attachment import Attachment
from hsaid_kernels.wrapper.weights.cache import WeightCache
from hsaid_kernels.wrapper.weights.compute import UNWRAPPED, WeightMaker
from hsaid_kernels.wrapper.weights.graph import Graph, begin_pass
from hsaid_kernels.wrapper.weights.outside import Surroundings
from hsaid_kernels.wrapper.weights.saved_tensors import keeping_no_weights, recomputes_what_was_saved

OTHER_THETA = (
    "backward(): expected the task and the theta of forward, because torch.utils.checkpoint recomputes a part of the "
    "model: call set_task() and change theta after backward(), and backward() inside of use_task()"
)


class _Call:
    """A call of the HSAID, which runs on the theta of its beginning, whatever other threads do meanwhile.

    Attributes:
        cache: its weights; None while merged in place.
        graph: of these weights, once one with a graph has been asked for.
        recomputes: whether torch.utils.checkpoint(use_reentrant=False) runs it again.
    """

    def __init__(self, recomputes: bool):
        self.cache: WeightCache | None = None
        self.graph: Graph | None = None
        self.recomputes = recomputes


class _Thread(threading.local):
    """What a thread is doing.

    Attributes:
        call: the call that it is inside of, or None.
        last_read: (theta, values of theta and the multipliers) at its last read outside of backward. Layers that
            backward recomputes must see the same ones.
    """

    call: _Call | None = None
    last_read: tuple[nn.Parameter, list[Tensor]] | None = None


class WeightSource:
    """Answers the reads of a model.

    Args:
        model: the model whose parameters are W0.
        tasks: theta, the multipliers and the fully trained tensors of all tasks. They own them: what is kept here of a
            theta is kept to notice a change.
        basis: which tensors are projected, and how.
        own_full: whether the fully trained tensors are the model's own parameters, and not copies.
    """

    def __init__(self, model: nn.Module, tasks: Tasks, basis: Basis, own_full: bool = False):
        self.tasks, self.basis = tasks, basis
        memory = basis.settings.memory
        self.attachment = Attachment(model, basis.plan, tasks, basis.full, own_full=own_full, memory=memory)
        self.around = Surroundings(tasks, self.attachment)
        self.maker = WeightMaker(basis, tasks, self.attachment, self.around.reduced_once)
        self._start()

    def _start(self) -> None:
        """Makes what is not copied with this object."""
        self.attachment.answer_by(self)
        self._lock = self.attachment.lock
        self._thread = _Thread()
        self._cache: WeightCache | None = None  # the weights of now, of reads outside of calls
        self._last_read: tuple[nn.Parameter, list[Tensor]] | None = None  # that of `_Thread`, by any thread
        self._last_task = self.tasks.registered  # the task of that read
        # {id of a backward pass: (theta, its version) of the weights that were recomputed in it}, to compare with those
        # of forward
        self._recomputed: dict[int, tuple[nn.Parameter, int]] = {}
        self._running: Counter[str] = Counter()  # calls that run now, by task

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("tasks", "basis", "attachment", "around", "maker")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def tables(self) -> Collection[str]:
        return self.maker.tables

    # --- reads

    def read(self, name: str | None, parameter: nn.Parameter) -> Tensor:
        attachment = self.attachment
        if not attachment.attached:
            return parameter  # of a module that had left the model before it was unwrapped
        if self._thread.call is None:
            self._check_thread()
            self.around.check_read(name, parameter)
        if name is None:
            with self._lock:
                name = next((name for name, own in attachment.verified().items() if own is parameter), None)
        attachment.check_merged_task()
        if attachment.merged is not None or name is None:
            return parameter
        if name in self.basis.plan.shapes:
            return self._read(name, parameter)
        if name not in self.basis.full or attachment.own_full:
            return parameter
        full = self.tasks.full_now()[name]
        if attachment.ranks is not None:
            attachment.ranks.average(full)
        return full

    def quickly(self, name: str | None, parameter: nn.Parameter | None) -> Tensor | None:
        call = self._thread.call
        if call is None or name is None or (cache := call.cache) is None or torch._C._current_graph_task_id() != -1:
            return None
        graph, weights = call.graph, cache.weights
        if torch.is_grad_enabled():
            if graph is not None:
                weights = graph.nodes
            elif cache.trained.wanted:  # a call that has begun without gradients
                return None
        weight = weights.get(name)
        return weight if weight is not None and cache.current(name, parameter, True) else None

    def table(self, name: str | None, parameter: nn.Parameter) -> EmbeddingRows | nn.Parameter:
        self.attachment.check_merged_task()
        if not self.attachment.attached or self.attachment.merged is not None or name is None:
            return parameter
        return EmbeddingRows(self, name, parameter)

    @runs_eagerly
    def rows(self, name: str, parameter: nn.Parameter, rows: Tensor) -> Tensor:
        with self._lock, self._task_of_forward():
            cache = self._now(name, parameter)
            launch = cache.launch_of[name]
            (base,) = cache.w0.values([name], launch.projection.dtype)
            if not (torch.is_grad_enabled() and cache.trained.wanted):
                factors = self.maker.factors(cache)
                return rows_of(launch.projection, cache.trained.values[0], factors, launch.whole, base, rows)
            graph = self._graph(cache)
            with isolated(grad=True):
                check = self._check(cache)
                return rows_of(launch.projection, graph.theta, graph.factors, launch.whole, base, rows, check)

    def part_copy(self, module: nn.Module) -> nn.Module | None:
        if module is self.attachment.model_in_use() or not self.attachment.attached:
            return None
        cache = self._cache
        with torch.no_grad():
            own, names = parameters_of(module), {id(p): name for name, p in self.attachment.own().items()}
            inside = {key: names[id(parameter)] for key, parameter in own.items() if id(parameter) in names}
            now = {key: self.read(name, own[key]).detach() for key, name in inside.items()}
            flags = {key: self.attachment.flags[name] for key, name in inside.items()}
            dtype = self.basis.settings.dtype or others_dtype(self.attachment.parameters)
            floats, trained = as_floats(own, now, dtype)
            copied = merged_copy(module, own, floats, flags | trained)
        self._cache = cache  # weights that nobody else has read are not kept
        return copied

    @runs_eagerly
    def now(self) -> dict[str, Tensor]:
        """{name: projected weight}, differentiable if gradients are enabled."""
        if self._thread.call is None:
            self._begin(False)
        own = self.attachment.own()
        if self.attachment.merged is not None:
            return {name: own[name].detach() for name in self.basis.plan.names}
        return {name: self._read(name, own[name]) for name in self.basis.plan.names}

    def _read(self, name: str, parameter: nn.Parameter) -> Weight:
        with self._lock, self._task_of_forward():  # or another thread could drop the weight in between
            cache = self._now(name, parameter)
            self.maker.fill(cache, cache.launch_of[name])
            wanted = cache.trained.wanted
            if torch.is_grad_enabled() and wanted:
                return self.maker.join(cache, self._graph(cache), name, self._check(cache))
            if cache.graph is None and self._thread.call is None and wanted and self.maker.delivers_once(cache):
                cache.graph = self.maker.new_graph(cache)  # before the nodes of layers that will be recomputed
            return cache.weight(name)

    def _now(self, name: str, parameter: nn.Parameter) -> WeightCache:
        """The weights of now, compared with the model as far as this weight needs it."""
        call = self._thread.call
        cache = self._cache if call is None else call.cache
        if cache is None or not cache.current(name, parameter, call is not None):
            cache = self._cache = None  # frees the memory before the new weights need it
            if call is not None:
                call.cache = call.graph = None
            cache = self._make()
            if call is not None:
                call.cache = cache
            if not cache.w0.is_of(name, parameter):
                raise RuntimeError(
                    f"model: expected the parameter {name!r} of the model, got another nn.Parameter in its place, "
                    "which the model was not told of: use setattr(), or call functional_call with ordinary tensors"
                )
        if torch._C._current_graph_task_id() != -1:
            self._note_recomputed(cache)
        else:
            self._note_read(cache)
        return cache

    def _make(self) -> WeightCache:
        """Computes the weights of now, but those that are made when they are read."""
        with self._lock, isolated():
            self._cache = self.maker.new_cache(self.attachment.verified())
            return self._cache

    def _graph(self, cache: WeightCache) -> Graph:
        """The graph that weights read now hang on."""
        call = self._thread.call
        if call is not None:
            call.graph = call.graph or self.maker.new_graph(cache)
            return call.graph
        backward = torch._C._current_graph_task_id() != -1
        if backward and not recomputes_what_was_saved() and self.maker.delivers_once(cache):
            return self.maker.late_graph(cache)
        trained = cache.trained
        wanting = trained.theta.requires_grad, trained.multipliers.requires_grad
        if cache.graph is None or cache.graph.wanting != wanting:
            cache.graph = self.maker.new_graph(cache)
        return cache.graph

    def drop_cache(self) -> None:
        """Discards the weights, so that the next read makes them again."""
        self._cache = None

    def hear(self, module: nn.Module, call: str, frame: FrameType | None) -> None:
        self.around.hear(module, call, frame)

    def _check_thread(self) -> None:
        """Raises RuntimeError in a thread that a model's forward may have started, and that does not know its task."""
        if not self._running or self.tasks.is_set() or torch._C._current_graph_task_id() != -1:
            return
        other = [task for task in self._running if task != self.tasks.registered]
        if other and is_inside_module():
            raise RuntimeError(
                "task: expected one in all threads, or one that each thread has set, got a module that runs in a "
                f"thread without, while another runs {other[0]!r}: call set_task() or use_task() there"
            )

    # --- calls

    @contextmanager
    def call(self, training: bool) -> Iterator[None]:
        """A call of the HSAID: compares everything once, so that reads inside it need not."""
        thread = self._thread
        if thread.call is not None:
            yield
            return
        with self._task_of_forward(), self.tasks.using(task := self.tasks.current):  # whatever other threads set
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
            call = _Call(hooks is not None and recomputes_what_was_saved())
            call.cache = self._begin(training)
            with self._lock:
                self._running[task] += 1
            thread.call = call
            try:
                if call.cache is not None and torch.is_grad_enabled() and call.cache.trained.wanted:
                    call.graph = self.maker.new_graph(call.cache)  # before all other nodes
                # With memory="step" weights stay in memory anyway: kept from hooks that would move them elsewhere.
                stay = self.basis.settings.memory == "step" and hooks is None
                if stay or call.cache is None or not torch.is_grad_enabled():
                    yield
                else:
                    with keeping_no_weights(lambda: call.cache, self.maker.fill):
                        yield
            finally:
                thread.call = call.cache = call.graph = None  # hooks of what was saved may keep the call
                with self._lock:
                    self._running[task] -= 1
                    if not self._running[task]:
                        del self._running[task]

    @runs_eagerly
    def _begin(self, training: bool) -> WeightCache | None:
        """Verifies the model and returns the weights of now; None while merged in place."""
        attachment = self.attachment
        if not attachment.attached:
            attachment.check_on_w0("HSAID")
        gradients = torch.is_grad_enabled()
        with self._lock:
            if attachment.merged is not None:
                attachment.check_merged_task()
                if training and gradients:
                    attachment.check_on_w0("training")
                return None
            trained = self.tasks.trained()
            slow = trained[0].device.type != "cpu" and gradients and any(tensor.requires_grad for tensor in trained)
            # A training step on a GPU makes new weights in any case: comparing values would wait for it. W0 in shards
            # has no version to compare.
            if slow or attachment.ranks is not None or (self._cache and not self._cache.all_current()):
                self._cache = None
            if self._cache is None and not training:
                forget_derived(attachment.model)
            cache = self._cache or self._make()
            if torch._C._current_graph_task_id() == -1:
                self._note_read(cache)
            return cache

    def factors(self) -> Tensor:
        """The factors of all segments, multiplied by the plan's scales, on which the weights of this call depend."""
        call = self._thread.call
        assert call is not None and call.cache is not None
        return self._graph(call.cache).factors

    def runs_elsewhere(self) -> bool:
        """Whether another thread is inside a call of the HSAID."""
        return sum(self._running.values()) > (self._thread.call is not None)

    def check_outside(self, call: str) -> None:
        """Raises RuntimeError, which names `call`, inside a call of the HSAID in this thread."""
        if self._thread.call is not None:
            raise RuntimeError(f"{call}: expected to be called between calls of the HSAID, got called inside of one")

    # --- backward, which may recompute parts of the model

    @runs_eagerly
    def _task_of_forward(self) -> AbstractContextManager[None]:
        """A context with forward's task, for backward in a thread that has neither set one nor run forward.

        Such is the thread of a device.
        """
        thread = self._thread
        if torch._C._current_graph_task_id() == -1 or thread.last_read is not None or self.tasks.is_set():
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

    def _note_read(self, cache: WeightCache) -> None:
        self._last_read = self._thread.last_read = (cache.trained.theta, cache.trained.values)
        self._last_task = self.tasks.current

    def _note_recomputed(self, cache: WeightCache) -> None:
        """Notes a read in backward. Raises RuntimeError if its theta is not that of forward."""
        thread, call, trained = self._thread, self._thread.call, cache.trained
        self._recomputed[torch._C._current_graph_task_id()] = (trained.theta, trained.versions[0])
        if len(self._recomputed) > 64:  # of which at most a few still run
            self._recomputed.pop(next(iter(self._recomputed)), None)
        if self.maker.delivers_once(cache) and call is None:
            begin_pass()
        last = thread.last_read or self._last_read  # a device's backward runs in a thread of its own
        # Another theta that was read since: what was saved of forward's is compared by `_check_backward`.
        recomputes = recomputes_what_was_saved() if call is None else call.recomputes
        if last is None or (last[0] is not trained.theta and recomputes):
            return
        if last[0] is not trained.theta or not trained.has(last[1]):
            raise RuntimeError(OTHER_THETA)

    def _check(self, cache: WeightCache) -> Callable[[], None]:
        return partial(_check_backward, weakref.ref(self), cache.trained.theta, cache.trained.versions[0])


def _check_backward(source: weakref.ref[WeightSource], theta: nn.Parameter, version: int) -> None:
    """Raises RuntimeError if backward has, or could have, recomputed parts of the model on other weights than forward.

    `theta` and its version counter are those of forward.
    """
    weights = source()
    if weights is None:
        return
    if not weights.attachment.attached:
        raise RuntimeError(UNWRAPPED)
    weights.around.reached = weights.tasks.steps
    found = weights._recomputed.get(torch._C._current_graph_task_id())
    if found is not None and (found[0] is not theta or found[1] != version):
        raise RuntimeError(OTHER_THETA)
