"""`Made`: the projected weights of one theta, and what they were computed from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.isolation import undisturbed
from hsaid_kernels.wrapper.w0.quantized import is_quantized, stamp_of
from hsaid_kernels.wrapper.weight import READ_ONLY, Weight
from hsaid_kernels.wrapper.weights.graph import Graph
from hsaid_kernels.wrapper.weights.launches import Group


class Made:
    """Weights, and the tensors they were computed from, to notice when they are out of date.

    theta and the multipliers are compared by value too, because fused optimizers write to them without increasing
    torch's version counter. W0 is compared by layout (`layout_of`) and version counter. References to these tensors are
    kept, so no new tensor can get the same address.

    source    gives the object that these weights answer reads of, as long as it lives
    values    theta and the multipliers, as they were: the weights are made from these
    factors   of all segments, multiplied by the plan's scales, once they have been needed
    flats     {group: its weights, as one buffer}, those made last at the end
    written   {group: the version of its buffer}, as long as nobody writes to it
    room      bytes of buffers that are kept; None means all
    weights   {name: weight} without a graph, made group by group when one is asked for (`weight`)
    graph     the weights with a graph that reads outside of calls get
    graphs    all those that there are, also of calls and of layers that backward recomputes
    tracked   whether torch counts the versions of theta and the multipliers; it does not for inference tensors
    tracks_w0 the same of W0; nor for W0 in shards
    sharded   whether FSDP2 has sharded W0
    stored    {name: address and version of what is stored} of quantized W0
    seen      names read from outside a call since everything was last compared
    stepped   whether an optimizer has changed theta or the multipliers since
    """

    def __init__(
        self,
        theta: nn.Parameter,
        multipliers: nn.Parameter,
        w0: Mapping[str, nn.Parameter],
        groups: Sequence[Group],
        room: int | None,
        sharded: bool,
        source: Callable[[], Any],
    ):
        self.source = source
        self.theta, self.multipliers, self.w0, self.room = theta, multipliers, w0, room
        self.stepped = False
        self.tracked = not (theta.is_inference() or multipliers.is_inference())
        self.tracks_w0 = not sharded and not any(tensor.is_inference() for tensor in w0.values())
        self.values = [tensor.detach().clone() for tensor in (theta, multipliers)]
        self.versions = [tensor._version if self.tracked else 0 for tensor in (theta, multipliers)]
        self.group_of = {name: group for group in groups for name in group.names}
        self.stamps = {
            name: (tensor, None if sharded else layout_of(tensor), tensor._version if self.tracks_w0 else 0)
            for name, tensor in w0.items()
        }
        self.sharded = sharded
        self.stored = {name: stamp_of(tensor) for name, tensor in w0.items() if is_quantized(tensor)}
        self.kept = [] if sharded else [tensor.detach() for tensor in w0.values()]
        self.factors: Tensor | None = None
        self.flats: dict[Group, Tensor] = {}
        self.written: dict[Group, int] = {}
        self.quick: dict[Any, Any] = {}  # {name: what to compare} of the weights that there are
        self.weights: dict[str, Weight] = {}
        self.storages: dict[int, Group] = {}
        self.seen: set[str] = set()
        self.graph: Graph | None = None
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()

    @property
    def wanted(self) -> bool:
        """Whether the weights have anything to train."""
        return self.theta.requires_grad or self.multipliers.requires_grad

    def changed(self, names: Sequence[str]) -> str | None:
        """The first of these tensors whose W0 has changed."""
        for name in names:
            tensor, layout, before = self.stamps[name]
            same = self.sharded or (layout_of(tensor) == layout and (not self.tracks_w0 or tensor._version == before))
            if not same or (name in self.stored and stamp_of(tensor) != self.stored[name]):
                return name
        return None

    def make(self, group: Group, scaled: Tensor, base: Sequence[Tensor]) -> Tensor:
        """Makes the weights of a group of these W0, where they are not there. `scaled` is of `values`."""
        if group in self.flats:
            return self.flats[group]
        while self.room is not None and self.flats and self.nbytes() + group.nbytes > self.room:
            self._drop(next(iter(self.flats)))  # before the new ones need the memory
        flat = group.projection.flat(self.values[0], group.whole.own(scaled), base)
        self.flats[group], self.written[group] = flat, flat._version
        self.storages[flat.untyped_storage().data_ptr()] = group
        if self.tracked and self.tracks_w0:
            self.quick |= {name: (*self.stamps[name], flat, flat._version) for name in group.names}
        return flat

    def nbytes(self) -> int:
        """Of the buffers that are kept."""
        return sum(group.nbytes for group in self.flats)

    def _drop(self, group: Group) -> None:
        self.check_unwritten(group)
        flat = self.flats.pop(group)
        del self.storages[flat.untyped_storage().data_ptr()]
        for held in (self.quick, self.weights, *(graph.nodes for graph in self.graphs)):
            for name in group.names:
                held.pop(name, None)

    def check_unwritten(self, group: Group) -> None:
        """Raises RuntimeError if somebody has written to a weight of this group."""
        if group in self.flats and self.flats[group]._version != self.written[group]:
            raise RuntimeError(f"model: one of its weights was written to in place, but {READ_ONLY}")

    def weight(self, name: str) -> Weight:
        """A weight without a graph. The first call makes those of its whole group, which must have been made."""
        if name not in self.weights:
            group = self.group_of[name]
            with torch.inference_mode(False), torch.no_grad(), undisturbed():
                views = map(Weight.of, group.whole.plan.views(self.flats[group]))
                made = dict(zip(group.names, views, strict=True))
            for own, weight in made.items():
                weight.w0, weight.source = self.w0[own], self.source
            self.weights |= made
        return self.weights[name]

    def has(self, values: Sequence[Tensor]) -> bool:
        """Whether the weights were made from these values of theta and the multipliers."""
        return values is self.values or all(map(_same_bits, values, self.values))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are equal, NaN included, which no comparison finds equal to itself."""
    return torch.equal(a.detach().view(torch.int32), b.view(torch.int32))


def layout_of(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Address, shape and strides: where a tensor's elements lie.

    `w.data = w.data.t()` changes neither the address nor the version, `w.data = w.data[:n]` not even the strides.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def check_w0(w0: Mapping[str, Tensor], theta: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if W0 is not on theta's device, or no longer of these shapes."""
    if elsewhere := {tensor.device for tensor in w0.values()} - {theta.device}:
        raise ValueError(
            f"model: expected its tensors on {theta.device}, where theta is, got some on {elsewhere.pop()}: "
            "hsaid.to(device) moves both"
        )
    if other := next((name for name, tensor in w0.items() if tensor.shape != shapes[name]), None):
        raise ValueError(
            f"model: expected {other!r} of shape {shapes[other]}, as it was when it was wrapped, got one of shape "
            f"{tuple(w0[other].shape)}: unwrap() the model before changing it"
        )
