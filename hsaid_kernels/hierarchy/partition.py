"""`Partition`: divides the levels of a hierarchy into components, and computes factors from multipliers.

A *component* is a group of levels. Each distinct path through these levels has one *multiplier*, a trained number. The
*factor* lambda_i of a tensor combines the multipliers of its components.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.hierarchy.paths import EXPERTS, HEADS, LEVELS, Path

NAMED_PARTITIONS = {"said": "+".join(LEVELS), "hsaid-3": "L1+L2|L3|L4"}  # also "did" and "none", without components


@dataclass(frozen=True)
class Component:
    """One component of a partition.

    levels  names of its levels
    paths   the distinct paths through these levels, in order of first appearance; each has one multiplier
    """

    levels: tuple[str, ...]
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.levels)}: {len(self.paths)}"


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """A partition of a hierarchy: which multipliers form the factor of each segment.

    A segment is a part of the model with its own factor: a tensor, or an attention head's or an expert's part of
    one.

    spec              canonical specification: `hierarchy.partition(spec, combine)` creates the partition again
    combine           "product": a factor is the product of its components' multipliers.
                      "sum": a factor is the mean of its components' multipliers. Multipliers that begin at
                      1 / number could not replace the division: tensors with different numbers of components share
                      multipliers (mBERT's classifier.weight has no L3).
    components        the components, in the order of the specification
    multiplier_index  int64 [segments, components], indices into the vector of all multipliers [m], which begins with
                      those of component 0; -1 if the segment has no node in the component
    scale             None: what is trained are the multipliers. A number: their distances from 1, divided by it
    """

    spec: str
    combine: str
    components: tuple[Component, ...]
    multiplier_index: Tensor
    scale: float | None = None
    _gather_index: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_multipliers(self) -> int:
        return sum(len(component.paths) for component in self.components)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_gather_index": {}}  # the loading machine may lack the other devices

    def __str__(self) -> str:
        summed = ", summed" if self.combine == "sum" else ""
        return f"{', '.join(map(str, self.components)) or self.spec} -> {self.num_multipliers} multipliers{summed}"

    def initial(self) -> Tensor:
        """The initial multipliers, float32 [m]: ones, or distances of zero with a `scale`.

        Every factor is then exactly 1, for both values of `combine`.
        """
        return torch.full((self.num_multipliers,), 1.0 if self.scale is None else 0.0, dtype=torch.float32)

    def factors(self, multipliers: Tensor) -> Tensor:
        """Multipliers [m] -> factors [segments], with the same dtype and device.

        For each segment this is equivalent to multipliers[row].prod(), or .mean() for "sum", where `row` is the
        segment's row of `multiplier_index` without entries of -1. An empty row gives 1. Differentiable; forward and
        backward are deterministic to the bit. Raises ValueError if the shape is not [m].
        """
        if multipliers.shape != (self.num_multipliers,):
            raise ValueError(f"multipliers: expected shape [{self.num_multipliers}], got {list(multipliers.shape)}")
        if self.scale is not None:
            multipliers = 1 + self.scale * multipliers
        product = self.combine == "product"
        index = self._gather_index_on(multipliers.device)
        table = torch.cat([multipliers, multipliers.new_full((1,), 1.0 if product else 0.0)])  # [m + 1]
        # embedding instead of index_select, whose backward on CUDA adds with atomics, in a different order every time.
        gathered = nn.functional.embedding(index, table.unsqueeze(1)).squeeze(2)  # [segments, components]
        columns = gathered.unbind(1)  # combined one by one, because prod() and sum() do not guarantee an order
        if product:
            return functools.reduce(torch.mul, columns, multipliers.new_ones(len(index)))
        present = (index < self.num_multipliers).sum(1)  # [segments]
        return functools.reduce(torch.add, columns, (present == 0).to(multipliers.dtype)) / present.clamp(min=1)

    def _gather_index_on(self, device: torch.device) -> Tensor:
        """multiplier_index with -1 replaced by m, the index of the neutral element. Copied once per device."""
        if device not in self._gather_index:
            index = self.multiplier_index
            with torch.inference_mode(False):  # a copy made in evaluation must also be usable in training
                self._gather_index[device] = torch.where(index < 0, self.num_multipliers, index).to(device)
        return self._gather_index[device]


def parse_partition(spec: str, known: Sequence[str]) -> list[tuple[str, ...]]:
    """The levels of each component of a specification, ordered within a component as in `known`.

    `known` are the levels of the hierarchy, outermost first. Raises TypeError if `spec` is not a string, ValueError for
    an unknown or repeated level or an empty component.
    """
    expected = (
        f"partition: expected did, none, {', '.join(NAMED_PARTITIONS)} or each of {', '.join(known)} at most once, "
        f"as in 'L1+L2|L3|L4', got {spec!r}"
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
        if level == EXPERTS and EXPERTS not in known:
            raise ValueError(f"{expected} without experts: {EXPERTS} is there with experts=True")
        if level not in known:
            raise ValueError(f"{expected} with " + (f"unknown {level!r}" if level else "an empty place"))
        if times > 1:
            raise ValueError(f"{expected} with {level} {times} times")
    return [tuple(sorted(component, key=known.index)) for component in components]
