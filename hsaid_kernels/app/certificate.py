"""A bound on the error of a classifier on new data, from its errors in training and the bits that describe it.

Over all descriptions that nobody's data has changed, prefix-free ones weigh together at most 1, one of b bits 2**-b.
So with probability 1 - delta, for every description at once, b ln 2 + ln(1 / delta) nats limit how far the error on
new data can be above that on n examples that are drawn independently from the same distribution (docs/certificates.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from hsaid_kernels.wrapper.checkpoint.packing import unpack
from hsaid_kernels.wrapper.hsaid import HSAID

DELTA = 0.05


@dataclass(frozen=True)
class Certificate:
    """The numbers that a bound is made of.

    Attributes:
        errors: how many of the examples of training are classified wrongly.
        examples: their number n.
        bits: which describe the classifier, given what was fixed before the data was seen.
        delta: the probability with which the bound may fail.
    """

    errors: int
    examples: int
    bits: float
    delta: float = DELTA

    def __post_init__(self) -> None:
        if self.examples < 1 or not 0 <= self.errors <= self.examples:
            raise ValueError(
                f"errors: expected 0 to the number of examples, 1 or more, got {self.errors} of {self.examples}"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: expected a probability between 0 and 1, got {self.delta}")
        if not 0 <= self.bits < math.inf:
            raise ValueError(f"bits: expected a number, 0 or more, got {self.bits}")

    @property
    def training_error(self) -> float:
        """The share of the examples of training that are classified wrongly."""
        return self.errors / self.examples

    @property
    def nats(self) -> float:
        """bits * ln 2."""
        return self.bits * math.log(2)

    @property
    def catoni(self) -> float:
        """Catoni's form (2007), at its best parameter.

        Of a single classifier, not a random one, the parameter may be chosen after the data was seen: the best value is
        the inverse of kl(training error, error) = (nats + ln(1 / delta)) / n, which Chernoff's bound gives.
        """
        return catoni(self.training_error, (self.nats - math.log(self.delta)) / self.examples)

    @property
    def maurer(self) -> float:
        """Maurer's form (2004), kl inverse: kl(training error, error) <= (nats + ln(2 sqrt(n) / delta)) / n.

        It is proved for 8 examples or more; 1 for fewer.
        """
        if self.examples < 8:
            return 1.0
        more = math.log(2 * math.sqrt(self.examples) / self.delta)
        return kl_inverse(self.training_error, (self.nats + more) / self.examples)

    @property
    def bound(self) -> float:
        """The lower one of the two, which hold together: Maurer's is never below Catoni's at its best parameter."""
        return min(self.catoni, self.maurer)


def kl_inverse(error: float, nats: float) -> float:
    """The largest p with kl(error, p) <= nats, of Bernoulli distributions, rounded up. All in [0, 1], nats above 0."""
    low, high = error, 1.0
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        if _kl(error, middle) <= nats:
            low = middle
        else:
            high = middle


def _kl(q: float, p: float) -> float:
    first = q * math.log(q / p) if q else 0.0
    return first + ((1 - q) * (math.log1p(-q) - math.log1p(-p)) if q < 1 else 0.0)


def catoni(error: float, nats: float) -> float:
    """(1 - exp(-x error - nats)) / (1 - exp(-x)), at the x above 0 for which this is least; at most 1."""

    def bound(log_x: float) -> float:
        x = math.exp(log_x)
        return math.expm1(-x * error - nats) / math.expm1(-x)

    # It holds for every x, so that it does not matter how near the search comes to the best one.
    best = minimize_scalar(bound, bounds=(-12, 5), method="bounded", options={"xatol": 1e-9})
    return min(1.0, float(best.fun))


def certified(hsaid: HSAID, bits: int, errors: Callable[[], int], examples: int) -> dict[str, Any]:
    """{"train_error", "examples", "bits"} of an HSAID's task in few bits, for the `Scores` of a study.

    Its parameters are rounded to levels first, and stay there: after `HSAID.rounded` they are there already.

    Args:
        bits: of theta, as in `HSAID.pack`.
        errors: counts how many of the training examples the model, as it is then, classifies wrongly.
        examples: their number: all that it was trained on, and no others.
    """
    found = unpack(hsaid.pack(bits))
    put(found.values, hsaid)
    described = sum(number for what, number in found.bits.items() if what != "settings")
    return {"train_error": errors() / examples, "examples": examples, "bits": described}


def put(values: Mapping[str, Tensor], hsaid: HSAID) -> None:
    """Gives an HSAID the parameters of a packed checkpoint."""
    with torch.no_grad():
        for name, parameter in hsaid.named_parameters():
            parameter.copy_(values[name])
