"""`Group`: the tensors whose weights one launch makes; and how a model's tensors are divided into groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import has_rows
from hsaid_kernels.wrapper.w0.quantized import is_quantized
from hsaid_kernels.wrapper.weight import LOOKUPS

MEMORY = ("step", "block")
# Elements of the smallest table whose rows are made by themselves. What finding the rows of a batch takes, some 0.5 ms,
# makes and differentiates a million weights on two cores.
SMALLEST_TABLE = 2**20


class Group:
    """Tensors whose weights have the same dtype. They are made by one launch, into one buffer.

    whole     all of them, as a part of the plan
    parts     the same tensors, divided: one node of the autograd graph, and one call of the adjoint, for each
    on_read   whether they are made when one of them is read, not when a call begins
    """

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[Sequence[str]],
        dtype: torch.dtype,
        backend: str,
        padding_rows: Mapping[str, int],
        on_read: bool,
    ):
        names = {name for part in parts for name in part}
        everything = len(names) == len(plan.names)
        self.whole = Part(plan, None if everything else [name for name in plan.names if name in names])
        self.parts = [self.whole] if len(parts) == 1 else [Part(plan, part) for part in parts]
        kept = {name: row for name, row in padding_rows.items() if name in names}
        self.projection = Projection(self.whole.plan, dtype=dtype, backend=backend, kept=kept)
        self.on_read = on_read

    @property
    def names(self) -> tuple[str, ...]:
        return self.whole.plan.names

    @property
    def nbytes(self) -> int:
        return self.whole.plan.numel * self.projection.dtype.itemsize


def tables_of(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the tensors of which single rows are made: the large tables of embeddings.

    The whole of such a table is made only if another layer reads it, such as a language model's tied head.
    """
    looked_up = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, tuple(LOOKUPS))}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in looked_up
        and name in plan.shapes
        and parameter.numel() >= SMALLEST_TABLE
        and not is_quantized(parameter)
        and has_rows(plan, name)
    ]


def divide(
    plan: Plan,
    parts: Sequence[Sequence[str]],
    tables: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    given: torch.dtype | None,
    backend: str,
    memory: str,
    padding_rows: Mapping[str, int],
) -> list[Group]:
    """The tensors of a plan by the dtype of their weights: `given`, or that of W0, `dtypes`.

    Args:
        parts: the names of the tensors by the block of the model that has them.
        tables: names of the tables of which single rows are made. Each is a group of its own.
        memory: "step" for a group of all other tensors, "block" for one of each part.
        padding_rows: {name: row} that stay W0.

    Raises ValueError if W0 has a dtype other than `given` and float32, TypeError for a dtype that cannot be projected.
    """
    every = set(dtypes.values())
    found = ", ".join(sorted(map(str, every)))
    if not every <= set(WEIGHT_DTYPES):
        raise TypeError(f"model: expected tensors in float32, bfloat16 or float16, got {found}")
    if given is not None and not every <= {given, torch.float32}:
        raise ValueError(f"dtype: expected the dtype of the model's tensors ({found}) or None, got {given}")
    groups = []
    by_block, options = memory == "block", (backend, padding_rows)
    for dtype in dict.fromkeys(dtypes.values()) if given is None else [given]:
        chosen = [[name for name in part if given is not None or dtypes[name] == dtype] for part in parts]
        chosen = [part for part in chosen if part]
        if by_block:
            groups += [Group(plan, [part], dtype, *options, True) for part in chosen]
        elif chosen:
            groups.append(Group(plan, chosen, dtype, *options, False))
        own = [name for name in tables if given is not None or dtypes[name] == dtype]
        groups += [Group(plan, [[name]], dtype, *options, True) for name in own]
    return groups
