"""`WeightCache`: the projected weights of one theta, and the one place that decides whether they are those of now.

It is asked at every read, so it compares what can be compared quickly. Version counters alone are not enough: a fused
optimizer writes to theta without increasing them, so values are compared too, where that does not wait for a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.isolation import is_disturbed, isolated
from hsaid_kernels.wrapper.w0.values import W0
from hsaid_kernels.wrapper.weight import READ_ONLY, Weight, as_weight
from hsaid_kernels.wrapper.weights.attachment import Attachment
from hsaid_kernels.wrapper.weights.graph import Graph
from hsaid_kernels.wrapper.weights.launches import Launch


class Trained:
    """theta and the multipliers, as they were when weights were made from them.

    Args:
        theta, multipliers: the parameters of a task.
        steps: `Tasks.steps`.

    Attributes:
        values: their values of then, from which the weights are made.
        tracked: whether torch counts their versions; it does not for inference tensors.
    """

    def __init__(self, theta: nn.Parameter, multipliers: nn.Parameter, steps: int):
        self.theta, self.multipliers, self._steps = theta, multipliers, steps
        self.tracked = not (theta.is_inference() or multipliers.is_inference())
        self.values = [tensor.detach().clone() for tensor in (theta, multipliers)]
        self.versions = self._versions()

    def _versions(self) -> tuple[int, int]:
        return (self.theta._version, self.multipliers._version) if self.tracked else (0, 0)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to train."""
        return self.theta.requires_grad or self.multipliers.requires_grad

    def same(self, theta: nn.Parameter, multipliers: nn.Parameter, steps: int) -> bool:
        """Whether these are the parameters, and neither torch nor the number of optimizer steps tells of a change."""
        own = theta is self.theta and multipliers is self.multipliers and steps == self._steps
        return own and self.versions == self._versions()

    def has(self, values: Sequence[Tensor]) -> bool:
        """Whether the parameters had these values."""
        if values is self.values:
            return True
        if is_disturbed():
            with isolated():
                return all(map(_same_bits, values, self.values))
        return all(map(_same_bits, values, self.values))


class WeightCache:
    """The weights of one theta.

    Args:
        attachment: has the model of now, and the tasks with the theta of now, to compare with.
        trained, w0: what the weights are made from.
        launches: which are made together.
        room: bytes of buffers that are kept; None means all. The oldest one goes first.

    Attributes:
        launch_of: {name: launch}.
        buffers: {launch: (its weights in one buffer, the version of that as long as nobody writes to it)}, those made
            last at the end.
        weights: {name: weight} without a graph, made for a whole launch when one is asked for (`weight`).
        graph: the weights with a graph that reads outside of calls get.
        graphs: all graphs that there are, also of calls and of layers that backward recomputes.
        factors: of all segments, multiplied by the plan's scales, once they have been needed.
    """

    def __init__(
        self,
        attachment: Attachment,
        trained: Trained,
        w0: W0,
        launches: Sequence[Launch],
        room: int | None,
    ):
        self.attachment, self.trained, self.w0, self.room = attachment, trained, w0, room
        self.changes = weakref.ref(attachment)  # of the weights: who keeps one does not keep theta
        self.launch_of = {name: launch for launch in launches for name in launch.names}
        self.buffers: dict[Launch, tuple[Tensor, int]] = {}
        self.weights: dict[str, Weight] = {}
        self.graph: Graph | None = None
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.factors: Tensor | None = None
        self._launch_at: dict[int, Launch] = {}  # by the address of its buffer
        self._seen: set[str] = set()  # names read outside of calls since everything was last compared
        self._spoiled = False  # whether somebody has written to a weight

    def current(self, name: str, parameter: object, in_call: bool) -> bool:
        """Whether a weight is that of now. `parameter` is what the model has under its name.

        At a read inside a call of the HSAID (`in_call`), whose theta stays, W0 is compared; elsewhere theta and the
        multipliers too, on a GPU their values only at a second read of a weight. Raises RuntimeError, once, if somebody
        has written to a weight.
        """
        if self._spoiled:
            return False
        launch = self.launch_of[name]
        made = self.buffers.get(launch)
        if made is None:  # all of it will be made
            if self.w0.changed(launch.names) is not None:
                return False
        elif made[0]._version != made[1]:
            self.check_unwritten(*made)
        same = self.w0.holds(name, parameter)
        if in_call or not same:
            return same
        if self.w0.changed((name,)) is not None:  # the codes of a quantized tensor, which `holds` does not compare
            return False
        now, steps = self.attachment.tasks.trained(), self.attachment.tasks.steps
        if not self.trained.same(*now, steps):
            return False
        if name in self._seen:
            self._seen.clear()
            same = self.all_current()
        elif now[0].device.type == "cpu" or self.w0.sharded:  # FSDP2 writes to a theta in shards behind torch's back
            same = self.trained.has(now)
        self._seen.add(name)
        return same

    def all_current(self) -> bool:
        """Whether all weights are those of now. Compares everything, and raises as `current`."""
        if self._spoiled:
            return False
        for made in list(self.buffers.values()):
            self.check_unwritten(*made)
        now, steps = self.attachment.tasks.trained(), self.attachment.tasks.steps
        if not (self.trained.tracked and self.w0.tracked and self.trained.same(*now, steps)):
            return False
        return self.w0.is_all_of(self.attachment.verified()) and self.trained.has(now)

    def check_unwritten(self, buffer: Tensor, version: int) -> None:
        """Raises RuntimeError if somebody has written to weights in this buffer. The next read makes them again."""
        if buffer._version != version:
            self._spoiled = True
            raise RuntimeError(f"model: one of its weights was written to in place, but {READ_ONLY}")

    def fill(self, launch: Launch, factors: Tensor, base: Sequence[Tensor]) -> None:
        """Makes the weights of a launch from these values of W0, and first the room that they need."""
        used = sum(kept.nbytes for kept in self.buffers)
        for kept in list(self.buffers):
            if self.room is None or used + launch.nbytes <= self.room:
                break
            used -= kept.nbytes
            self._drop(kept)
        buffer = launch.projection.flat(self.trained.values[0], launch.whole.own(factors), base)
        self.buffers[launch] = buffer, buffer._version
        self._launch_at[buffer.untyped_storage().data_ptr()] = launch

    def _drop(self, launch: Launch) -> None:
        self.check_unwritten(*self.buffers[launch])
        buffer, _ = self.buffers.pop(launch)
        del self._launch_at[buffer.untyped_storage().data_ptr()]
        for held in (self.weights, *(graph.nodes for graph in self.graphs)):
            for name in launch.names:
                held.pop(name, None)

    def launch_at(self, address: int) -> Launch | None:
        """The launch whose buffer begins at this address."""
        return self._launch_at.get(address)

    def weight(self, name: str) -> Weight:
        """A weight without a graph. The first call makes those of its whole launch, which must have been filled."""
        if name not in self.weights:
            launch = self.launch_of[name]
            with isolated():
                views = map(as_weight, launch.whole.plan.views(self.buffers[launch][0]))
                made = dict(zip(launch.names, views, strict=True))
            for own, weight in made.items():
                weight.w0, weight.changes = self.w0.parameters[own], self.changes
            self.weights |= made
        return self.weights[name]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are equal, NaN included, which no comparison finds equal to itself."""
    return torch.equal(a.detach().view(torch.int32), b.view(torch.int32))
