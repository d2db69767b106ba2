"""Groups a model's tensors for the adjoint: one call per block of the model, or per several small neighbouring blocks.

A block here is a node on level L1 of the hierarchy, such as a transformer layer. (In `fastfood`, "block" means `width`
consecutive values of a segment.)
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hsaid_kernels.hierarchy import Hierarchy


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """[(module name, tensor names)] for each block of the model that has any of the tensors `names`.

    The module is the innermost one that contains all these tensors and has a `forward` (a ModuleList has none).
    """
    hierarchy = Hierarchy.from_model(model).select(names)
    blocks: dict[str | None, list[str]] = defaultdict(list)
    for name, (block, *_) in zip(hierarchy.tensors, hierarchy.paths, strict=True):
        blocks[block].append(name)
    found = []
    for own in blocks.values():
        # os.path.commonprefix accepts sequences of any kind, here lists of the parts of module names
        module = ".".join(os.path.commonprefix([name.split(".")[:-1] for name in own]))
        while module and not _is_called(model.get_submodule(module)):
            module = module.rpartition(".")[0]
        found.append((module, own))
    return found


def joined(
    blocks: Iterable[tuple[str, list[str]]], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[list[str], list[str]]]:
    """[(module names, tensor names)]: joins neighbouring blocks up to half the size of the largest block.

    Fewer calls of the adjoint have less overhead. Peak memory does not grow noticeably: the gradients of the largest
    block have to be held in any case, and memory freed by the others is not always reused for them.
    """
    sized = [(module, names, sum(math.prod(shapes[name]) for name in names)) for module, names in blocks]
    largest, room = max(size for *_, size in sized), 0
    joined: list[tuple[list[str], list[str]]] = []
    for module, names, size in sized:
        if size > room:
            joined.append(([], []))
            room = max(size, largest // 2)
        joined[-1][0].append(module)
        joined[-1][1].extend(names)
        room -= size
    return joined


def _is_called(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward
