"""Numbers in few bits: levels of equal distance, and training whose numbers stay on them.

With an entropy coder behind them, levels of equal distance are near the best there is for the same error (Gish and
Pierce 1968; docs/certificates.md).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsaid_kernels.fastfood.plan import check_int

MAX_BITS = 16
PER_OCTAVE = 8  # distances that there are between one and its double


@dataclass(frozen=True)
class Levels:
    """2**bits levels: level k is centre + (k - 2**(bits - 1) + shifted / 2) * distance.

    Attributes:
        bits: 1 to 16.
        index: says the distance, which is one of those numbers that have four significant bits.
        shifted: 0, where the centre is a level, or 1, where it lies in the middle between two.
        centre: 0, or 1 for multipliers.
    """

    bits: int
    index: int
    shifted: int
    centre: float = 0.0

    @property
    def distance(self) -> float:
        """Between neighbouring levels."""
        octave, eighth = divmod(self.index, PER_OCTAVE)
        return math.ldexp(PER_OCTAVE + eighth, octave)

    def numbers(self, values: Tensor) -> Tensor:
        """The number k of the level nearest to each value, int32."""
        nearest = ((values.double() - self.centre) / self.distance - self.shifted / 2).round() + 2 ** (self.bits - 1)
        return nearest.clamp(0, 2**self.bits - 1).int()

    def values(self, numbers: Tensor) -> Tensor:
        """The levels of these numbers, float32."""
        return (numbers.float() + (self.shifted / 2 - 2 ** (self.bits - 1))) * self.distance + self.centre

    def round(self, values: Tensor) -> Tensor:
        """The level nearest to each value, float32."""
        return self.values(self.numbers(values))


def fit_levels(values: Tensor, bits: int, centre: float = 0.0) -> Levels:
    """The levels for these values that make the mean squared error times 2**(1.5 entropy) least.

    So a bit more for each value must divide the squared error by 2.8 at least. Distances go up to those at which no
    value lies beyond the outermost levels. Values that lie on some levels keep them.

    Raises ValueError for values that are not finite, and for bits that are not 1 to 16.
    """
    check_int("bits", bits, 1, MAX_BITS)
    values = values.detach().cpu().double().reshape(-1)
    if not values.isfinite().all():
        raise ValueError("theta, multipliers: expected finite values, got nan or inf")
    largest = (values - centre).abs().max().item() if len(values) else 0.0
    if not largest:
        return Levels(bits, 0, 0, centre)
    # From a distance at which the levels reach to twice the largest value to one at which they reach to a 32nd of it.
    top = math.ceil(PER_OCTAVE * math.log2(largest / PER_OCTAVE)) + PER_OCTAVE * (2 - bits)
    candidates = [Levels(bits, top - down, shifted, centre) for down in range(6 * PER_OCTAVE) for shifted in (0, 1)]
    if bits == 1:  # one level at the centre and one on one side of it would be two in name only
        candidates = [levels for levels in candidates if levels.shifted]
    return min(candidates, key=lambda levels: _cost(levels, values))


def _cost(levels: Levels, values: Tensor) -> float:
    numbers = levels.numbers(values)
    error = (levels.values(numbers).double() - values).square().mean().item()
    shares = numbers.bincount(minlength=1).double() / len(numbers)
    entropy = torch.special.entr(shares).sum().item() / math.log(2)
    return -math.inf if error == 0 else math.log2(error) + 1.5 * entropy


@contextlib.contextmanager
def rounded_after_steps(optimizer: torch.optim.Optimizer, levels: Mapping[Tensor, Levels]) -> Iterator[None]:
    """A context manager in which parameters hold levels, and `optimizer` trains the values behind these.

    Gradients are taken at the levels and applied to the values ("straight through"). At the end the parameters hold
    levels.

    Raises TypeError, before any parameter is changed, if `optimizer` is not one.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__} {optimizer!r}")
    behind: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def keep(*_: Any) -> None:
        for parameter, its in levels.items():
            behind[parameter] = parameter.clone()
            parameter.copy_(its.round(parameter))

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for parameter, value in behind.items():
            parameter.copy_(value)

    keep()
    hooks = [optimizer.register_step_pre_hook(restore), optimizer.register_step_post_hook(keep)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
