"""Groups a model's tensors for the adjoint: one call per block of the model, or per several small neighbouring blocks.

A block here is a node on level L1 of the hierarchy, such as a transformer layer. (In `fastfood`, "block" means `width`
consecutive values of a segment.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hsaid_kernels.hierarchy import Hierarchy


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """The tensors `names` by the block of the model that has them."""
    hierarchy = Hierarchy.from_model(model).select(names)
    blocks: dict[str | None, list[str]] = defaultdict(list)
    for name, (block, *_) in zip(hierarchy.tensors, hierarchy.paths, strict=True):
        blocks[block].append(name)
    return list(blocks.values())


def joined(blocks: Iterable[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Joins neighbouring blocks, each the names of its tensors, up to half the size of the largest block.

    Fewer calls of the adjoint have less overhead. Peak memory does not grow noticeably: the gradients of the largest
    block have to be held in any case, and memory freed by the others is not always reused for them.
    """
    sized = [(names, sum(math.prod(shapes[name]) for name in names)) for names in blocks]
    largest, room = max(size for _, size in sized), 0
    joined: list[list[str]] = []
    for names, size in sized:
        if size > room:
            joined.append([])
            room = max(size, largest // 2)
        joined[-1].extend(names)
        room -= size
    return joined
