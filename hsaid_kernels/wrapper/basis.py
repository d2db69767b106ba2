"""`basis_of`: from a model and the arguments of `HSAID` to hierarchy, partition and plan.

Together these define what theta and the multipliers mean: the tensors that are projected, which multipliers form the
factor of each, and the random matrices P_i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from hsaid_kernels.fastfood.plan import MAX_DIM, Plan, check_int
from hsaid_kernels.fastfood.projection import check_kept
from hsaid_kernels.fastfood.selection import Patterns, split_tensors
from hsaid_kernels.hierarchy import Hierarchy, Partition
from hsaid_kernels.hierarchy.attention import pieces_of
from hsaid_kernels.hierarchy.paths import HEADS
from hsaid_kernels.wrapper.heads import Heads, check_heads, pruned_heads
from hsaid_kernels.wrapper.padding import find_padding_rows
from hsaid_kernels.wrapper.w0.quantized import is_quantized


@dataclass(frozen=True)
class Basis:
    """What theta and the multipliers of a model mean.

    pruned        {attention module: [heads]}, the heads that receive no update
    padding_rows  {name: row}, the rows that receive no update
    full          names of the fully trained tensors
    frozen        {name: shape} of the tensors that are left out because they were frozen or have no elements
    """

    hierarchy: Hierarchy
    partition: Partition
    plan: Plan
    pruned: dict[str, list[int]]
    padding_rows: dict[str, int]
    full: tuple[str, ...]
    frozen: dict[str, tuple[int, ...]]


def basis_of(
    model: nn.Module,
    intrinsic_dim: int,
    partition: str,
    seed: int,
    *,
    skip: Iterable[str],
    merge: Mapping[str, Iterable[str]] | None,
    combine: str,
    normalize: str,
    diagonal: str,
    width: int | None,
    include: Patterns,
    exclude: Patterns,
    train_fully: Patterns,
    frozen: Iterable[str] | None,
    heads: bool | None,
    pruned: Heads | None,
    padding_rows: Mapping[str, int] | None,
) -> Basis:
    """The basis for a model. Arguments and exceptions are those of `HSAID`."""
    left_out = frozen_of(model, include) if frozen is None else list(frozen)
    tensors, full = split_tensors(model, include, exclude, train_fully, left_out)
    check_int("intrinsic_dim", intrinsic_dim, 1, MAX_DIM)
    if heads is not None and not isinstance(heads, bool):
        raise TypeError(f"heads: expected True, False or None, got {heads!r}")
    without = pruned_heads(model) if pruned is None else check_heads(model, pruned, "pruned")
    if without and heads is False:
        raise ValueError(f"heads: expected True or None where heads are pruned ({without}), got {heads}")
    with_heads = bool(without) or HEADS in str(partition) if heads is None else heads
    hierarchy = Hierarchy.from_model(model, skip, merge, with_heads).select(tensors, without=pieces_of(model, without))
    cut = hierarchy.partition(partition, combine)
    m = cut.num_multipliers
    if intrinsic_dim <= m:
        raise ValueError(f"intrinsic_dim: expected more than the {m} multipliers of {cut.spec!r}, got {intrinsic_dim}")
    plan = Plan(
        {name: tensor.shape for name, tensor in tensors.items()},
        intrinsic_dim - m,
        seed,
        width=width,
        diagonal=diagonal,
        normalize=normalize,
        segments=hierarchy.segments,
    )
    kept = find_padding_rows(model, plan.shapes) if padding_rows is None else padding_rows
    kept = check_kept("padding_rows", kept, plan)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    others = {name: shapes[name] for name in left_out if name in shapes and name not in full}
    return Basis(hierarchy, cut, plan, without, kept, tuple(full), others)


def frozen_of(model: nn.Module, include: Patterns) -> list[str]:
    """Names of the parameters that are left out: frozen or without elements. None are if `include` is given.

    Quantized parameters, which cannot require gradients, do not count as frozen.
    """
    if not isinstance(model, nn.Module) or include is not None:
        return []
    empty = {name for name, p in model.named_parameters() if not is_lazy(p) and p.numel() == 0}
    return [name for name, p in model.named_parameters() if name in empty or not (p.requires_grad or is_quantized(p))]


def as_json(given: Patterns) -> str | list[str] | None:
    """Converts an iterable of patterns to a list, the form that a checkpoint's JSON stores."""
    return given if given is None or isinstance(given, str) else list(given)
