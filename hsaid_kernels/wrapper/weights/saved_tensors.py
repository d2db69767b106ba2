"""What autograd keeps of a model whose weights live while their block runs (memory="block").

Backward needs most weights once more. In place of each, autograd is given a `SavedWeight`, which says which weight
it was. Backward then makes the weights of that block again, from the same values, so with the same bits.

FSDP2 frees and refills one storage instead (`resize_`), which needs no records of views. But whoever has read
`w = layer.weight`, or another thread, would then hold a tensor whose memory is gone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from hsaid_kernels.wrapper.isolation import runs_eagerly
from hsaid_kernels.wrapper.w0.values import has_own_memory
from hsaid_kernels.wrapper.weight import Weight
from hsaid_kernels.wrapper.weights.cache import WeightCache
from hsaid_kernels.wrapper.weights.launches import Launch


@dataclass
class SavedWeight:
    """Stands in for a tensor that autograd saves, and that shares the memory of a launch's weights.

    Or of the copy of a weight with which autocast computes.

    Attributes:
        again: `WeightMaker.fill`.
        cache, launch: where the memory is from.
        layout: (size, stride, offset) of the tensor in that memory.
        name, dtype: of what autocast takes: the weight that it was cast from, and its own dtype; None of others.
    """

    again: Callable[[WeightCache, Launch], Tensor]
    cache: WeightCache
    launch: Launch
    layout: tuple[tuple[int, ...], tuple[int, ...], int]
    name: str | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, tensor: Tensor, cache: WeightCache, again: Callable[[WeightCache, Launch], Tensor]
    ) -> SavedWeight | None:
        """None if the tensor is no weight, or a view of one as another dtype."""
        plain = tensor.layout == torch.strided and not (tensor.is_neg() or tensor.is_conj()) and has_own_memory(tensor)
        if not plain or tensor.device.type == "meta" or tensor.numel() == 0:
            return None
        address = tensor.untyped_storage().data_ptr()
        layout = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        launch = cache.launch_at(address)
        if launch is not None and tensor.dtype == launch.projection.dtype:
            return cls(again, cache, launch, layout)
        lowered = _lowered.get(address)
        if lowered is None or lowered[0].expired() or lowered[1]() is not cache or tensor.dtype != lowered[3]:
            return None
        return cls(again, cache, cache.launch_of[lowered[2]], layout, *lowered[2:])

    def tensor(self) -> Tensor:
        """The tensor, once more."""
        buffer = self.again(self.cache, self.launch)
        size, stride, offset = self.layout
        if self.name is None:
            return buffer.as_strided(size, stride, offset)
        (weight,) = self.launch.whole.plan.views(buffer, [self.name])
        return weight.to(self.dtype).as_strided(size, stride, offset)


@dataclass
class SavedTensor:
    """Any other tensor that autograd saves.

    Autograd itself refuses one that has been written to since, but not where hooks have taken it: so the version is
    compared here.
    """

    tensor: Tensor
    version: int | None

    def unpacked(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; expected "
                f"version {self.version} instead"
            )
        return self.tensor


def recomputes_what_was_saved() -> bool:
    """Whether hooks of torch.utils.checkpoint(use_reentrant=False) take what a recomputation would save: only that."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and str(getattr(hooks[0], "__qualname__", "")).startswith("_recomputation_hook")


@contextmanager
def keeping_no_weights(
    cache: Callable[[], WeightCache | None], again: Callable[[WeightCache, Launch], Tensor]
) -> Iterator[None]:
    """While this is active, autograd keeps a `SavedWeight` in place of each weight.

    Args:
        cache: gives the weights of now, if there are any.
        again: `WeightMaker.fill`.

    Hooks for saved tensors that were active before, such as `torch.autograd.graph.save_on_cpu`, get all other tensors.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # inside transforms of torch.func
        yield
        return
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        now = cache()
        saved = None if now is None else SavedWeight.of(tensor, now, again)
        if saved is not None:
            return saved
        if outer is not None:
            return outer[0](tensor)
        return SavedTensor(tensor.detach(), None if tensor.is_inference() else tensor._version)

    def unpack(kept: Any) -> Tensor:
        if type(kept) is SavedWeight:
            with torch.no_grad():
                return kept.tensor()
        if type(kept) is SavedTensor:
            return kept.unpacked()
        assert outer is not None
        unpacked: Tensor = outer[1](kept)
        return unpacked

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# Functions whose weights autocast computes in its own dtype, on every device.
_NAMES = ("matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm")
_LOWERED = {getattr(kind, name) for kind in (torch, Tensor) for name in _NAMES}
_LOWERED |= {Tensor.__matmul__, Tensor.__rmatmul__, F.linear}
_LOWERED |= {getattr(F, f"{name}{d}d") for name in ("conv", "conv_transpose") for d in (1, 2, 3)}

# {address: (what lives there, whose weight it is, its name, dtype)}
_lowered: dict[int, tuple[StorageWeakRef, weakref.ref[WeightCache], str, torch.dtype]] = {}


class BlockWeight(Weight):
    """A weight that lives while its block runs.

    Autocast computes with copies of weights in another dtype, which autograd would keep. The copies made here are known
    by their addresses.
    """

    of_model: tuple[weakref.ref[WeightCache], str]  # and its name there

    @classmethod
    @runs_eagerly
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in _LOWERED:
                args = tuple(map(_lower, args))
                kwargs = {key: _lower(value) for key, value in kwargs.items()}
            return function(*args, **kwargs)


as_block_weight: Callable[[Tensor], BlockWeight] = functools.partial(torch.Tensor._make_subclass, BlockWeight)


def _lower(value: Any) -> Any:
    """The weight in autocast's dtype, where that is active; any other value as it is."""
    if not isinstance(value, BlockWeight) or value.dim() < 2 or not torch.is_autocast_enabled(value.device.type):
        return value
    if torch._C._are_functorch_transforms_active():  # which do not know `Lowered`: autocast makes the copy itself
        return value
    dtype = torch.get_autocast_dtype(value.device.type)
    return value if value.dtype == dtype else Lowered.apply(value, dtype)


class Lowered(torch.autograd.Function):
    """A weight in another dtype, as `weight.to(dtype)`."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.dtype = weight.dtype
        lowered = weight.detach().to(dtype)
        storage = lowered.untyped_storage()
        for address in [address for address, (ref, *_) in _lowered.items() if ref.expired()]:
            _lowered.pop(address, None)
        _lowered[storage.data_ptr()] = (StorageWeakRef(storage), *weight.of_model, dtype)
        return lowered

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None
