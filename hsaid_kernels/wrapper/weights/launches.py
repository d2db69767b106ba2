"""`Launch`: the tensors whose weights one kernel launch makes; and how a model's tensors are divided into launches.

With memory="step" one launch makes all weights of a dtype, with "block" each launch makes those of one part. A *part*
is what one node of the autograd graph and one call of the adjoint take: a block of the model, or several small ones.
Tables of which single rows are looked up are launches of their own.

A block here is a node on level L1 of the hierarchy, such as a transformer layer. (In `fastfood`, "block" means `width`
consecutive values of a segment.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import has_rows
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.wrapper.w0.values import has_own_memory
from hsaid_kernels.wrapper.weight import LOOKUPS

# Elements of the smallest table whose rows are made by themselves. What finding the rows of a batch takes, some 0.5 ms,
# makes and differentiates a million weights on two cores.
SMALLEST_TABLE = 2**20


class Launch:
    """Tensors whose weights have the same dtype, and are made together, in one buffer.

    Attributes:
        whole: all of them, as a part of the plan.
        parts: the same tensors divided: backward calls the adjoint once for each.
        part_of: {name: the part that has the tensor}.
        projection: makes their weights.
        names: of the tensors.
        nbytes: of the buffer.
        on_read: True if they are made when one of them is first read, False if when the HSAID is called.
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
        self.part_of = {name: part for part in self.parts for name in part.plan.names}
        self.names = self.whole.plan.names
        self.nbytes = self.whole.plan.numel * dtype.itemsize
        self.on_read = on_read


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
        and has_own_memory(parameter)
        and has_rows(plan, name)
    ]


def parts_of(model: nn.Module, names: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """The tensors `names` by the block of the model that has them, small neighbouring blocks joined."""
    if not names:
        return []
    hierarchy = Hierarchy.from_model(model).select(names)
    blocks: dict[str | None, list[str]] = defaultdict(list)
    for name, (block, *_) in zip(hierarchy.tensors, hierarchy.paths, strict=True):
        blocks[block].append(name)
    return joined(blocks.values(), shapes)


def joined(blocks: Iterable[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Joins neighbouring blocks, each the names of its tensors, up to half the size of the largest block.

    Fewer calls of the adjoint have less overhead. Peak memory does not grow noticeably: the gradients of the largest
    block have to be held in any case, and memory freed by the others is not always reused for them.
    """
    sized = [(names, sum(math.prod(shapes[name]) for name in names)) for names in blocks]
    largest, room = max(size for _, size in sized), 0
    found: list[list[str]] = []
    for names, size in sized:
        if size > room:
            found.append([])
            room = max(size, largest // 2)
        found[-1].extend(names)
        room -= size
    return found


def divided(parts: Iterable[Sequence[str]], together: Mapping[str, int]) -> list[list[str]]:
    """The parts, divided where FSDP2 does not gather their tensors at the same time. `together`: see `gathering_of`."""
    found: list[list[str]] = []
    for part in parts:
        by_time: dict[int, list[str]] = {}
        for name in part:
            by_time.setdefault(together[name], []).append(name)
        found += by_time.values()
    return found


def launches_of(
    plan: Plan,
    parts: Sequence[Sequence[str]],
    tables: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    given: torch.dtype | None,
    backend: str,
    memory: str,
    padding_rows: Mapping[str, int],
) -> list[Launch]:
    """The launches for a plan's tensors, by the dtype of their weights: `given`, or that of W0, `dtypes`.

    Args:
        parts: the names of the tensors of each call of the adjoint.
        tables: names of the tables of which single rows are made.
        memory: "step" or "block", see `HSAID`.
        padding_rows: {name: row} that stay W0.

    Raises ValueError if W0 has a dtype other than `given` and float32, TypeError for a dtype that cannot be projected.
    """
    every = set(dtypes.values())
    found = ", ".join(sorted(map(str, every)))
    if not every <= set(WEIGHT_DTYPES):
        raise TypeError(f"model: expected tensors in float32, bfloat16 or float16, got {found}")
    if given is not None and not every <= {given, torch.float32}:
        raise ValueError(f"dtype: expected the dtype of the model's tensors ({found}) or None, got {given}")
    launches = []
    options = backend, padding_rows
    for dtype in dict.fromkeys(dtypes.values()) if given is None else [given]:
        chosen = [[name for name in part if given is not None or dtypes[name] == dtype] for part in parts]
        chosen = [part for part in chosen if part]
        if memory == "block":
            launches += [Launch(plan, [part], dtype, *options, True) for part in chosen]
        elif chosen:
            launches.append(Launch(plan, chosen, dtype, *options, False))
        own = [name for name in tables if given is not None or dtypes[name] == dtype]
        launches += [Launch(plan, [[name]], dtype, *options, True) for name in own]
    return launches
