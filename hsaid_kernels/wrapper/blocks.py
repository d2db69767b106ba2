"""Which tensors of a model share a call of the adjoint: those of a block, and of small neighbouring blocks together."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from hsaid_kernels.hierarchy import Hierarchy


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(module, its tensors) for each block of the model, which is what the hierarchy has on its first level.

    The module is the innermost one that holds them all and is called (a ModuleList is not).
    """
    hierarchy = Hierarchy.from_model(model).select(names)
    blocks: dict[str | None, list[str]] = defaultdict(list)
    for name, (block, *_) in zip(hierarchy.tensors, hierarchy.paths, strict=True):
        blocks[block].append(name)
    found = []
    for own in blocks.values():
        # os.path.commonprefix compares items of any kind, here the steps of the modules' names
        module = ".".join(os.path.commonprefix([name.split(".")[:-1] for name in own]))
        while module and not _is_called(model.get_submodule(module)):
            module = module.rpartition(".")[0]
        found.append((module, own))
    return found


def joined(
    blocks: Iterable[tuple[str, list[str]]], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[list[str], list[str]]]:
    """(modules, their tensors): neighbouring blocks joined as long as they are no larger than the largest block.

    Each call of the adjoint has a cost of its own, and the gradients of the largest block have to be held anyway.
    """
    sized = [(module, names, sum(math.prod(shapes[name]) for name in names)) for module, names in blocks]
    largest, room = max(size for *_, size in sized), 0
    joined: list[tuple[list[str], list[str]]] = []
    for module, names, size in sized:
        if size > room:
            joined.append(([], []))
            room = largest
        joined[-1][0].append(module)
        joined[-1][1].extend(names)
        room -= size
    return joined


def _is_called(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward
