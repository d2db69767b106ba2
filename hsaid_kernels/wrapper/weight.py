"""`Weight`: the type of what a read of a wrapped model's weight gives."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.isolation import runs_eagerly

if TYPE_CHECKING:
    from typing_extensions import Self

# Modules whose `forward` passes their weight on to a lookup of rows, and the code that does so.
LOOKUPS = {nn.Embedding: nn.Embedding.forward.__code__, nn.EmbeddingBag: nn.EmbeddingBag.forward.__code__}

_NEW_PARAMETER = nn.Parameter.__new__.__code__

READ_ONLY = (
    "a projected weight is read only, because theta makes it: write to W0 (hsaid.w0()), or unwrap() the model to "
    "change it"
)
FREEZE = (
    "a projected weight is trained through theta: freeze tensors before HSAID wraps the model, or name them in exclude="
)
HOOKS = "a projected weight is made again when theta changes, and its hooks would be lost: register them on hsaid.theta"


class Weight(nn.Parameter):
    """A projected weight. For code that looks, it is an nn.Parameter; what it could not keep, it refuses.

    Writes in place increase the version counter, also those through `data`, so that the next read of the model refuses
    to go on with them. Operations on it give ordinary tensors.

    Attributes:
        w0: the parameter of the model.
        changes: gives what hears of changes in the model (`reads.link.Changes`), as long as that lives.
    """

    w0: nn.Parameter
    changes: Callable[[], Any]

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Any:
        return nn.Parameter(data, requires_grad)  # as nn.Parameter's own copies and pickles call it

    # `nn.Parameter(weight)` is a plain parameter of these values. Of a subclass, nn.Parameter makes one by detach() and
    # requires_grad_(), which must give the same subclass, and sets _is_param at last: then it becomes a plain one.

    def detach(self) -> Tensor:
        detached = super().detach()
        if sys._getframe(1).f_code is not _NEW_PARAMETER:
            return detached
        made: Tensor = torch.Tensor._make_subclass(type(self), detached.clone(), False)
        return made

    @property
    def _is_param(self) -> bool:
        return True

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        plain = torch.Tensor._make_subclass(nn.Parameter, self.data, self.requires_grad)
        return plain.__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        return super().detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise RuntimeError(READ_ONLY)

    @property
    def requires_grad(self) -> bool:
        return torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> NoReturn:
        raise RuntimeError(FREEZE)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if sys._getframe(1).f_code is _NEW_PARAMETER:
            super().requires_grad_(requires_grad)
            return self
        raise RuntimeError(FREEZE)

    def set_(self, *args: Any, **kwargs: Any) -> NoReturn:  # as torch.nn.utils.parametrize does before it registers one
        raise RuntimeError(READ_ONLY)

    def register_hook(self, hook: Any) -> NoReturn:
        raise RuntimeError(HOOKS)

    def register_post_accumulate_grad_hook(self, hook: Any) -> NoReturn:
        raise RuntimeError(HOOKS)


# A tensor as a Weight, which shares its memory and its version counter. Has no graph.
as_weight: Callable[[Tensor], Weight] = functools.partial(torch.Tensor._make_subclass, Weight)


@runs_eagerly
def as_tensor(value: Any) -> Any:
    """A weight as an ordinary tensor, for torch.compile, which does not know subclasses; any other value as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Weight) else value


@runs_eagerly
def is_given(value: object, before: Tensor | None = None) -> bool:
    """Whether a tensor in `module._parameters` was put there for the time of a call, as by functional_call.

    So is a parameter in the place of one, `before`, on the same device and in the same dtype.
    """
    if not isinstance(value, Tensor):
        return False
    if isinstance(value, Weight) or not isinstance(value, nn.Parameter):
        return True
    if before is None or type(value) is not nn.Parameter:
        return False
    return (value.dtype, value.device, value.shape) == (before.dtype, before.device, before.shape)
