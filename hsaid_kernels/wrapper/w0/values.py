"""W0: what the model's own tensors are worth as ordinary ones, and whether they are still what they were.

A tensor of W0 is plain, or a shard that FSDP2 gathers (fsdp2.py), or in few bits and to be dequantized (quantized.py).
The rest of the wrapper asks here, and does not ask which of these it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Size, Tensor, nn

from hsaid_kernels.wrapper.w0.fsdp2 import gathered, is_gathered, is_sharded, sampled
from hsaid_kernels.wrapper.w0.quantized import dequantized, is_quantized, parts_of, stamp_of


def value_of(tensor: Tensor) -> Tensor:
    """The values of a tensor as an ordinary one. Of a shard, all ranks must call this together."""
    return dequantized(gathered(tensor))


def is_frozen(parameter: nn.Parameter) -> bool:
    """Whether somebody has frozen the parameter. One in few bits cannot require gradients anyway."""
    return not (parameter.requires_grad or is_quantized(parameter))


def has_own_memory(tensor: Tensor) -> bool:
    """Whether the tensor is one strided piece of memory, and not an object that holds other tensors."""
    return not is_quantized(tensor)


def stands_for(now: object, before: object) -> bool:
    """Whether `now` is the parameter `before`, or what FSDP2 has gathered from it."""
    return now is before or is_gathered(now, before)


def same_values(own: Tensor, value: Tensor, converted: bool = False) -> bool:
    """Whether `value` has the values of `own`. `converted`: what becomes of them in its dtype."""
    if own.shape != value.shape or own.is_meta or value.is_meta:
        return False
    now, new = value_of(own.detach()), value_of(value.detach())
    if converted:
        now = now.to(new)
    else:
        new = new.to(now)
    return bool(((now == new) | (now.isnan() & new.isnan())).all())


def can_compare(*tensors: Tensor) -> bool:
    """Whether this rank can compare the values by itself."""
    return not any(map(is_sharded, tensors))


def samples_of(tensors: Iterable[Tensor], count: int) -> list[Tensor]:
    """Up to `count` values of each tensor, evenly spaced, float32 on the CPU. Of shards, all ranks must call this."""
    return sampled(map(dequantized, tensors), count)


class W0:
    """The projected tensors, as they were when weights were made from them.

    They are compared by identity, layout (`layout_of`) and version counter. References to them, and to their memory,
    are kept, so that no other tensor can get the same address.

    Args:
        parameters: {name: nn.Parameter}, those of the model.
        gathered: gives by name what FSDP2 has put in place of a shard by now; None if nothing is sharded.

    Attributes:
        tracked: whether torch counts their versions: not those of inference tensors, nor, for us, those of shards.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], gathered: Callable[[str], nn.Parameter] | None = None):
        self.parameters, self._gathered = parameters, gathered
        sharded = gathered is not None
        self.tracked = not sharded and not any(tensor.is_inference() for tensor in parameters.values())
        self._stamps = {
            name: (tensor, None if sharded else layout_of(tensor), tensor._version if self.tracked else 0)
            for name, tensor in parameters.items()
        }
        others = {name: tensor for name, tensor in parameters.items() if type(tensor) is not nn.Parameter}
        self._stored = {name: stamp_of(tensor) for name, tensor in others.items() if is_quantized(tensor)}
        self._plain = not (others or sharded)
        held = [] if sharded else list(parameters.values())
        self._memory = [tensor.detach() for tensor in (*held, *(t for n in self._stored for t in parts_of(others[n])))]

    @property
    def sharded(self) -> bool:
        return self._gathered is not None

    def values(self, names: Iterable[str], dtype: torch.dtype) -> list[Tensor]:
        """The values of these tensors as ordinary ones. Quantized ones in `dtype`, unless they are in float32."""
        if self._plain:
            return [self.parameters[name] for name in names]
        now = self.parameters.__getitem__ if self._gathered is None else self._gathered
        values = [(name, value_of(now(name))) for name in names]
        lower = {name for name, value in values if name in self._stored and value.dtype != torch.float32}
        return [value.to(dtype) if name in lower else value for name, value in values]

    def holds(self, name: str, parameter: object) -> bool:
        """Whether `parameter` is this tensor, unchanged as far as can be told quickly. Runs at every read."""
        own, layout, version = self._stamps[name]
        if not self.tracked:
            return self.is_of(name, parameter)
        # `layout_of`, without calling it
        return parameter is own and own._version == version and (own.data_ptr(), own.shape, own.stride()) == layout

    def is_of(self, name: str, parameter: object) -> bool:
        """Whether `parameter` is this tensor, or what FSDP2 has gathered from it."""
        own = self.parameters[name]
        return parameter is own or (self.sharded and is_gathered(parameter, own))

    def changed(self, names: Sequence[str]) -> str | None:
        """The first of these tensors whose memory, version or stored parts have changed."""
        for name in names:
            tensor, layout, before = self._stamps[name]
            same = self.sharded or (layout_of(tensor) == layout and (not self.tracked or tensor._version == before))
            if not same or (name in self._stored and stamp_of(tensor) != self._stored[name]):
                return name
        return None

    def is_all_of(self, own: Mapping[str, nn.Parameter]) -> bool:
        """Whether the parameters `own` of the model are these tensors, unchanged."""
        same = all(self.holds(name, own[name]) for name in self.parameters)
        return same and self.changed(tuple(self._stored)) is None


def layout_of(tensor: Tensor) -> tuple[int, Size, tuple[int, ...]]:
    """Address, shape and strides: where a tensor's elements lie.

    `w.data = w.data.t()` changes neither the address nor the version, `w.data = w.data[:n]` not even the strides.
    """
    return tensor.data_ptr(), tensor.shape, tensor.stride()
