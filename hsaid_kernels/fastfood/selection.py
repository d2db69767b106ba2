"""Selects the tensors of a model that are projected, by regular expressions on the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import Tensor, nn

Patterns = str | Iterable[str] | None
ON_META = (
    "which has not been loaded yet, or which hooks of accelerate offload (cpu_offload, disk_offload, device_map): load "
    "the model whole (on the CPU from_pretrained only maps its file into memory), or name what is offloaded in exclude="
)


def select_tensors(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Parameter]:
    """{name: parameter} for the parameters that match `include` and do not match `exclude`, in the model's order.

    Names are those of `model.named_parameters()`; a tied parameter appears once.

    Args:
        model: any module.
        include, exclude: a regular expression or several, searched for anywhere in the name (`re.search`). None for
            `include` selects all parameters, None for `exclude` excludes none.

    Raises:
        ValueError: the model has no parameters, an expression is invalid or matches no name, no tensor is selected, or
            a selected tensor is empty or on the meta device.
        TypeError: model is not a module, or a selected tensor does not have a floating-point dtype.
    """
    return split_tensors(model, include, exclude)[0]


def split_tensors(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    train_fully: Patterns = None,
    frozen: Collection[str] = (),
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Returns (tensors to project, tensors to train fully), both as {name: parameter} in the model's order.

    The first are selected as in `select_tensors`, without those named in `frozen`. The second match `train_fully` and
    are never among the first. Raises as `select_tensors` does, and ValueError for an unknown name in `frozen`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    tensors = dict(model.named_parameters())
    if not tensors:
        raise ValueError(f"model: expected at least one parameter, got a {type(model).__name__} without any")

    def matching(argument: str, patterns: Patterns) -> set[str]:
        found = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            try:
                names = {name for name in tensors if re.search(pattern, name)}
            except re.error as error:
                raise ValueError(f"{argument}: expected a regular expression, got {pattern!r} ({error})") from None
            if not names:
                raise ValueError(f"{argument}: {pattern!r} matches none of the {len(tensors)} tensors of the model")
            found |= names
        return found

    if unknown := [name for name in frozen if name not in tensors]:
        raise ValueError(f"frozen: expected names of the model's parameters, got {unknown[0]!r}")
    full = matching("train_fully", train_fully)
    kept = set(tensors) if include is None else matching("include", include)
    kept -= matching("exclude", exclude) | full | set(frozen)
    if not kept and len(frozen) == len(tensors):
        raise ValueError(
            f"model: expected a parameter with requires_grad=True and elements, or include= to name what is projected, "
            f"got all {len(tensors)} frozen or empty"
        )
    if not kept:
        given = {"include": include, "exclude": exclude, "train_fully": train_fully}
        raise ValueError(
            f"{', '.join(given)}: expected them to leave a tensor to project, got "
            f"{', '.join(map(repr, given.values()))}: none left"
        )
    for name in kept | full:
        if tensors[name].is_meta:
            raise ValueError(f"model: {name!r}: expected a tensor with values, got one on the meta device, {ON_META}")
        check_tensor(f"model: {name!r}", tensors[name])
    projected, fully = ({name: tensors[name] for name in tensors if name in chosen} for chosen in (kept, full))
    return projected, fully


def check_tensor(what: str, tensor: object) -> None:
    """Raises for a tensor that cannot be projected; the message begins with `what`.

    Raises TypeError for anything but a tensor of a real floating-point dtype, ValueError for a tensor on the meta
    device or without elements.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what}: expected a tensor with values, got one on the meta device")
    if tensor.numel() == 0:
        raise ValueError(f"{what}: expected at least one element, got shape {tuple(tensor.shape)}")
