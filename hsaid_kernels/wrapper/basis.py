"""`Settings`, the options of an HSAID; `basis_of`, from these and a model to hierarchy, partition and plan.

Together these define what theta and the multipliers mean: the tensors that are projected, which multipliers form the
factor of each, and the random matrices P_i.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hsaid_kernels.fastfood.limits import CHUNKS, DIAGONALS, MAX_DIM, NORMALIZATIONS
from hsaid_kernels.fastfood.ops import BACKENDS, WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import Plan, check_choice, check_int
from hsaid_kernels.fastfood.projection import check_kept
from hsaid_kernels.fastfood.selection import Patterns, split_tensors
from hsaid_kernels.hierarchy import Hierarchy, Partition
from hsaid_kernels.hierarchy.attention import find_divisions
from hsaid_kernels.hierarchy.hierarchy import pruned_pieces
from hsaid_kernels.hierarchy.layouts import LATEST
from hsaid_kernels.hierarchy.paths import EXPERTS, HEADS
from hsaid_kernels.wrapper.experts import check_experts, pruned_experts
from hsaid_kernels.wrapper.heads import Heads, check_heads, pruned_heads
from hsaid_kernels.wrapper.w0.values import is_frozen
from hsaid_kernels.wrapper.weight import LOOKUPS

MEMORY = ("step", "block")
COMBINE = ("product", "sum")
# Names of parameters that a table of an embedding can have; the latter if torch.nn.utils.prune masks it.
TABLE = ("weight", "weight_orig")


@dataclass(frozen=True)
class Settings:
    """The options of an `HSAID`, whose docstring explains them. In `Basis.settings` no field before `task` is None.

    A checkpoint stores them in this order: first those that define what theta means, then the task, then those that
    select tensors.

    lr_scale: None, or how far the weights move with theta and the multipliers, in units of an `HSAID`. These are then
        trained as theta / lr_scale and (multipliers - 1) / lr_scale, by learning rates that are smaller by as much.
    """

    intrinsic_dim: int
    partition: str
    combine: str
    skip: Iterable[str]
    merge: Mapping[str, Iterable[str]] | None
    heads: bool | None
    experts: bool | None
    layouts: int | None
    names: Mapping[str, Any] | None
    pruned: Heads | None
    padding_rows: Mapping[str, int] | None
    normalize: str
    diagonal: str
    width: int | None
    chunks: str | None
    seed: int

    task: str

    include: Patterns
    exclude: Patterns
    train_fully: Patterns

    frozen: Iterable[str] | None
    dtype: torch.dtype | None
    backend: str
    memory: str
    lr_scale: float | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what is wrong whatever the model is, before anybody has touched one."""
        check_int("intrinsic_dim", self.intrinsic_dim, 1, MAX_DIM)
        check_int("seed", self.seed, 0, 2**64 - 1)
        check_choice("combine", self.combine, COMBINE)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        check_choice("diagonal", self.diagonal, DIAGONALS)
        if self.chunks is not None:
            check_choice("chunks", self.chunks, CHUNKS)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("memory", self.memory, MEMORY)
        if self.heads is not None and not isinstance(self.heads, bool):
            raise TypeError(f"heads: expected True, False or None, got {self.heads!r}")
        if self.experts is not None and not isinstance(self.experts, bool):
            raise TypeError(f"experts: expected True, False or None, got {self.experts!r}")
        if self.layouts is not None:
            check_int("layouts", self.layouts, 1, LATEST)
        if self.dtype is not None and self.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype: expected torch.float32, bfloat16, float16 or None, got {self.dtype}")
        if self.lr_scale is not None and not 0 < self.lr_scale < math.inf:
            raise ValueError(f"lr_scale: expected a positive number, got {self.lr_scale!r}")
        if not isinstance(self.task, str) or not self.task:
            raise TypeError(f"task: expected a name, got {self.task!r}")


_NAMES = tuple(field.name for field in fields(Settings))
BASIS = _NAMES[: _NAMES.index("task")]
CHOICE = _NAMES[_NAMES.index("task") + 1 : _NAMES.index("frozen")]


@dataclass(frozen=True)
class Basis:
    """What theta and the multipliers of a model mean.

    Attributes:
        settings: the options, where None has been replaced by what it stands for, as a checkpoint stores them.
        hierarchy, partition, plan: what they define.
        pruned: {module: [numbers]}, the heads and experts that receive no update.
        padding_rows: {name: row}, the rows that receive no update.
        full: names of the fully trained tensors.
        frozen: {name: shape} of the tensors that are left out because they were frozen or have no elements.
    """

    settings: Settings
    hierarchy: Hierarchy
    partition: Partition
    plan: Plan
    pruned: dict[str, list[int]]
    padding_rows: dict[str, int]
    full: tuple[str, ...]
    frozen: dict[str, tuple[int, ...]]


def basis_of(model: nn.Module, given: Settings) -> Basis:
    """The basis for a model. Raises what `HSAID` raises."""
    include, exclude, train_fully = map(_as_json, (given.include, given.exclude, given.train_fully))
    left_out = _frozen_in(model, include) if given.frozen is None else list(given.frozen)
    tensors, full = split_tensors(model, include, exclude, train_fully, left_out)
    layouts = given.layouts or LATEST
    if given.pruned is None:
        gone, pruned = pruned_experts(model), pruned_heads(model)
    else:
        gone, of_heads = check_experts(model, given.pruned, "pruned")
        pruned = check_heads(model, of_heads, "pruned", layouts)
    heads = _divided("heads", given.heads, pruned, HEADS in str(given.partition))
    experts = _divided("experts", given.experts, gone, EXPERTS in str(given.partition))
    pruned |= gone
    if given.layouts is None and (not heads or find_divisions(model, 1) == find_divisions(model)):
        layouts = 1  # as versions divide that know no other
    hierarchy = Hierarchy.from_model(model, given.skip, given.merge, heads, experts, layouts, given.names)
    hierarchy = hierarchy.select(tensors, without=pruned_pieces(model, pruned, layouts))
    partition = replace(hierarchy.partition(given.partition, given.combine), scale=given.lr_scale)
    m = partition.num_multipliers
    if given.intrinsic_dim <= m:
        raise ValueError(
            f"intrinsic_dim: expected more than the {m} multipliers of {partition.spec!r}, got {given.intrinsic_dim}"
        )
    plan = Plan(
        {name: tensor.shape for name, tensor in tensors.items()},
        given.intrinsic_dim - m,
        given.seed,
        width=given.width,
        chunks=given.chunks,
        diagonal=given.diagonal,
        normalize=given.normalize,
        scale=given.lr_scale or 1.0,
        segments=hierarchy.segments,
    )
    rows = find_padding_rows(model, plan.shapes) if given.padding_rows is None else given.padding_rows
    rows = check_kept("padding_rows", rows, plan)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    others = {name: shapes[name] for name in left_out if name in shapes and name not in full}
    settings = replace(
        given,
        intrinsic_dim=plan.dim + m,
        partition=partition.spec,
        combine=partition.combine,
        skip=hierarchy.skip,
        merge=hierarchy.merge,
        heads=HEADS in hierarchy.levels,
        experts=EXPERTS in hierarchy.levels,
        layouts=layouts,
        names=dict(given.names or {}),
        pruned=pruned,
        padding_rows=rows,
        width=plan.width,
        chunks="one" if plan.one_chunk else "all",
        seed=plan.seed,
        include=include,
        exclude=exclude,
        train_fully=train_fully,
        frozen=left_out,
    )
    return Basis(settings, hierarchy, partition, plan, pruned, rows, tuple(full), others)


def _divided(argument: str, given: bool | None, pruned: Mapping[str, Collection[int]], named: bool) -> bool:
    """Whether tensors are divided among heads or experts: as given, or else if some are pruned or the partition is."""
    if pruned and given is False:
        raise ValueError(f"{argument}: expected True or None where {argument} are pruned ({pruned}), got {given}")
    return bool(pruned) or named if given is None else given


def _frozen_in(model: nn.Module, include: Patterns) -> list[str]:
    """Names of the parameters that are left out: frozen or without elements. None are if `include` is given.

    Quantized parameters, which cannot require gradients, do not count as frozen.
    """
    if not isinstance(model, nn.Module) or include is not None:
        return []
    empty = {name for name, p in model.named_parameters() if not is_lazy(p) and p.numel() == 0}
    return [name for name, p in model.named_parameters() if name in empty or is_frozen(p)]


def _as_json(given: Patterns) -> str | list[str] | None:
    """Converts an iterable of patterns to a list, the form that a checkpoint's JSON stores."""
    return given if given is None or isinstance(given, str) else list(given)


def find_padding_rows(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """{name: row} of those of these tensors that only embeddings hold, all with the same `padding_idx`.

    Another layer that holds the table, such as a language model's tied head, or an embedding with another
    `padding_idx`, trains the row.
    """
    rows: dict[int, set[int | None]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                rows.setdefault(id(parameter), set()).add(_row(module, key, parameter))
    found = {name: rows[id(parameter)] for name, parameter in model.named_parameters() if name in names}
    return {name: row for name, (row, *others) in found.items() if row is not None and not others}


def _row(module: nn.Module, key: str, parameter: nn.Parameter) -> int | None:
    """The row of this parameter that the module does not train."""
    row: int | None = getattr(module, "padding_idx", None)
    if key not in TABLE or not isinstance(module, tuple(LOOKUPS)) or row is None:
        return None
    count = parameter.shape[0]
    return row % count if -count <= row < count else None  # torch counts negative ones from the end
