"""Which tensors of a model are projected: by regular expressions over the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn

Patterns = str | Iterable[str] | None


def select_tensors(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Parameter]:
    """The model's parameters (tied ones once) whose name matches `include` and not `exclude`, in the model's order.

    Both are regular expressions, or several of them, searched for anywhere in the name.

    Raises:
        ValueError: an expression matches no name or is invalid, nothing is left, or a tensor is empty or on "meta".
        TypeError: a tensor is no floating-point tensor.
    """
    return split_tensors(model, include, exclude)[0]


def split_tensors(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, train_fully: Patterns = None
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(tensors to project, as in `select_tensors`; tensors that match `train_fully`, which are not among them)."""
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

    full = matching("train_fully", train_fully)
    kept = set(tensors) if include is None else matching("include", include)
    kept -= matching("exclude", exclude) | full
    if not kept:
        given = {"include": include, "exclude": exclude, "train_fully": train_fully}
        raise ValueError(
            f"{', '.join(given)}: expected them to leave a tensor to project, got "
            f"{', '.join(map(repr, given.values()))}: none left"
        )
    for name in kept | full:
        check_tensor(f"model: {name!r}", tensors[name])
    projected, fully = ({name: tensors[name] for name in tensors if name in chosen} for chosen in (kept, full))
    return projected, fully


def check_tensor(what: str, tensor: object) -> None:
    """Refuses what has no weights to project: integer, complex, meta or empty tensors."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{what}: expected a tensor with values, got one on the meta device")
    if tensor.numel() == 0:
        raise ValueError(f"{what}: expected at least one element, got shape {tuple(tensor.shape)}")
