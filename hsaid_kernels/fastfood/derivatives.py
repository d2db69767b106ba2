"""Derivatives of the op hadamard_transform: backward and forward mode, torch.func, vmap, to any order.

The transform is linear, and its own adjoint: the leading block of the symmetric H is symmetric. An op whose backward is
registered by torch.library.register_autograd silently drops the tangents of forward mode, and does not support
torch.func. This op has a kernel for the dispatch key Autograd instead, as torch's own operations do. The kernel
differentiates by one level of nested transforms; then the dispatcher calls the op for the next level.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled


class _Transform(torch.autograd.Function):
    """One level of autograd of `transform`, which is linear and its own adjoint."""

    @staticmethod
    def forward(ctx, x: Tensor, transform: Callable[[Tensor], Tensor], backward_mode: bool, forward_mode: bool):
        ctx.transform = transform
        # Autograd switches both modes off in a Function's forward. The levels below this one need them as they were.
        with (
            torch._C._AutoDispatchBelowAutograd(),
            torch.set_grad_enabled(backward_mode),
            _set_fwd_grad_enabled(forward_mode),
        ):
            return transform(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.transform(grad), None, None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_):
        return ctx.transform(tangent)


def register(name: str, op: Callable[..., Tensor]) -> None:
    """Registers the derivatives and the vmap rule of `op`, a hadamard_transform of this name ("namespace::op").

    `op` takes the tensor, and after it what says which transform it is.
    """

    def differentiated(x: Tensor, *which: Any) -> Tensor:
        modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():  # Function.apply would begin with the first level again
            return super(torch.autograd.Function, _Transform).apply(x, lambda x: op(x, *which), *modes)

    def batched(info, in_dims: Sequence[Any], x: Tensor, *which: Any) -> tuple[Tensor, int]:
        # Second to last, not first: there, the dimension of a batch of scalars would be taken for the one to transform.
        return op(x.movedim(in_dims[0], -2), *which), x.dim() - 2

    torch.library.impl(name, "Autograd")(differentiated)
    torch.library.register_vmap(name, batched)


def refuse(name: str, op: Callable[..., None]) -> None:
    """Makes `op`, a hadamard_transform_into of this name, raise where its result would need a derivative."""

    def written(x: Tensor, scale: float, out: Tensor, order: int = 1) -> None:
        if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
            raise RuntimeError(f"out: {name} has no derivative, expected tensors that do not require grad")
        with torch._C._AutoDispatchBelowAutograd():
            op(x, scale, out, order)

    torch.library.impl(name, "Autograd")(written)
