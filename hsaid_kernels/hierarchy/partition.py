"""A partition cuts the levels of a hierarchy into components, and says which multipliers make which factor."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.hierarchy.paths import HEADS, LEVELS, Path

NAMED_PARTITIONS = {"said": "+".join(LEVELS), "hsaid-3": "L1+L2|L3|L4"}  # and "did" or "none": no component


@dataclass(frozen=True)
class Component:
    """One component of a partition: its levels, and its distinct paths (a multiplier each) in order of appearance."""

    levels: tuple[str, ...]
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.levels)}: {len(self.paths)}"


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Which multipliers make which factor. A segment is what has a factor of its own: a tensor, or a head's part of it.

    spec              canonical string: `hierarchy.partition(spec, combine)` makes the partition again
    combine           "product": a factor is the product of its components' multipliers.
                      "sum": it is their sum divided by how many they are. The division belongs to the factor, not to
                      the multipliers' start (1/number), because tensors with different numbers of components share
                      multipliers (mBERT's classifier.weight has no L3): no such start makes all their factors 1.
    components        their levels and paths, in the order of the specification
    multiplier_index  int64 [segments, components], into one vector of multipliers [m] that starts with component 0's;
                      -1 where the segment has no node in the component
    """

    spec: str
    combine: str
    components: tuple[Component, ...]
    multiplier_index: Tensor
    _gather_index: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_multipliers(self) -> int:
        return sum(len(component.paths) for component in self.components)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gather_index": {}}  # a copy may be loaded where there is no such device

    def __str__(self) -> str:
        summed = ", summed" if self.combine == "sum" else ""
        return f"{', '.join(map(str, self.components)) or self.spec} -> {self.num_multipliers} multipliers{summed}"

    def initial(self) -> Tensor:
        """The multipliers to start from, float32 [m]: ones, which make every factor exactly 1 for either `combine`."""
        return torch.ones(self.num_multipliers, dtype=torch.float32)

    def factors(self, multipliers: Tensor) -> Tensor:
        """Multipliers [m] -> factors [segments], of their dtype, on their device; 1 for a segment without components.

        Equivalent to multipliers[row].prod(), or .mean() for "sum", where row is the segment's row without its -1s.
        Differentiable; forward and backward are bit-identical from run to run. Raises ValueError for another shape.
        """
        if multipliers.shape != (self.num_multipliers,):
            raise ValueError(f"multipliers must have shape [{self.num_multipliers}], got {list(multipliers.shape)}")
        product = self.combine == "product"
        index = self._gather_index_on(multipliers.device)
        table = torch.cat([multipliers, multipliers.new_full((1,), 1.0 if product else 0.0)])  # [m + 1]
        # embedding, not index_select: the latter's backward adds with atomics on CUDA, in another order every time.
        gathered = nn.functional.embedding(index, table.unsqueeze(1)).squeeze(2)  # [segments, components]
        columns = gathered.unbind(1)  # combined in their order, where prod() and sum() promise none
        if product:
            return functools.reduce(torch.mul, columns, multipliers.new_ones(len(index)))
        present = (index < self.num_multipliers).sum(1)  # [segments]
        return functools.reduce(torch.add, columns, (present == 0).to(multipliers.dtype)) / present.clamp(min=1)

    def _gather_index_on(self, device: torch.device) -> Tensor:
        """multiplier_index with m (the neutral element, after the multipliers) for -1; uploaded once per device."""
        if device not in self._gather_index:
            index = self.multiplier_index
            with torch.inference_mode(False):  # what an evaluation uploads must serve the training that follows
                self._gather_index[device] = torch.where(index < 0, self.num_multipliers, index).to(device)
        return self._gather_index[device]


def parse_partition(spec: str, known: Sequence[str]) -> list[tuple[str, ...]]:
    """Specification -> the levels of each component, within a component in the hierarchy's order."""
    expected = (
        f"partition must be did, none, {', '.join(NAMED_PARTITIONS)} or each of {', '.join(known)} at most once, "
        f"as in 'L1+L2|L3|L4'; got {spec!r}"
    )
    if not isinstance(spec, str):
        raise TypeError(expected)
    text = spec.strip()
    if text in ("did", "none"):
        return []
    text = NAMED_PARTITIONS.get(text, text)
    components = [[level.strip() for level in component.split("+")] for component in text.split("|")]
    for level, times in Counter(itertools.chain(*components)).items():
        if level == HEADS and HEADS not in known:
            raise ValueError(f"{expected} without heads: {HEADS} is there with heads=True")
        if level not in known:
            raise ValueError(f"{expected} with " + (f"unknown {level!r}" if level else "an empty place"))
        if times > 1:
            raise ValueError(f"{expected} with {level} {times} times")
    return [tuple(sorted(component, key=known.index)) for component in components]
