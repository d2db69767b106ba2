"""What is measured: runs, what came of them, and the design that says which runs there are."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hsaid_kernels.fastfood.limits import CHUNKS, DIAGONALS, MAX_WIDTH, MIN_WIDTH

if TYPE_CHECKING:
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)

BASELINE = "full"  # training all weights
# What may follow a partition in a method: arguments of `HSAID`. A number is the width.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"diagonal": name} for name in DIAGONALS},
    **{name: {"chunks": name} for name in CHUNKS},
    **{str(1 << q): {"width": 1 << q} for q in range(MIN_WIDTH.bit_length() - 1, MAX_WIDTH.bit_length())},
}
RATES = range(-14, 7)  # learning rates that are tried at all: 1e-7 to 1e3


class Diverged(ArithmeticError):
    """Training diverged: raise this in a training function if the loss is not finite."""


@dataclass(frozen=True)
class Run:
    """One training: what a training function is given.

    Attributes:
        method: "full" (all weights), a partition ("did", "said", "hsaid-3", "L1+L2|L3|L4", ...), also with options
            of its own ("did:rademacher"), or a method of PEFT.
        dim: intrinsic dimension d, theta and multipliers together; None for "full" and methods of PEFT.
        lr: peak learning rate.
        seed: for everything random in this run: the new weights, the subspace, the order of the data.
        directory: where the training function may save its checkpoint. It exists only if an attempt was interrupted.
    """

    method: str
    dim: int | None
    lr: float
    seed: int
    directory: Path = field(default=Path(), compare=False)

    def wrap(self, model: nn.Module, **options: Any) -> nn.Module:
        """The model as this method trains it: itself for "full", else an `HSAID`, or a model with PEFT's adapters.

        Train those of its parameters that have `requires_grad`. `options` go to `HSAID`, such as normalize="tensor";
        those of the method come first.
        """
        if self.method == BASELINE:
            return model
        if self.dim is None:
            from hsaid_kernels.app.measure.compare import adapted

            return adapted(model, self.method, self.seed)
        from hsaid_kernels.wrapper.hsaid import HSAID

        partition, own = split_method(self.method)
        return HSAID(model, self.dim, partition, self.seed, **{**options, **own})

    def __str__(self) -> str:
        dim = "" if self.dim is None else f" d={self.dim}"
        return f"{self.method}{dim} lr={self.lr:g} seed={self.seed}"


def split_method(method: str) -> tuple[str, dict[str, Any]]:
    """Splits a method such as "did:rademacher:1024" into its partition and arguments of `HSAID`.

    Raises ValueError for what is not in `OPTIONS`.
    """
    partition, *words = method.split(":")
    options: dict[str, Any] = {}
    for word in words:
        if word not in OPTIONS:
            expected = f"options after the partition of {', '.join(OPTIONS)}"
            raise ValueError(f"methods: expected {expected}, got {word!r} in {method!r}")
        option = OPTIONS[word]
        if option.keys() & options.keys():
            raise ValueError(f"methods: expected one {', '.join(option)}, got two in {method!r}")
        options |= option
    return partition, options


@dataclass(frozen=True)
class Scores:
    """What a training function returns. Higher is better, as with accuracy; not finite means that training diverged.

    Attributes:
        validation: the score by which learning rates are chosen.
        test: the score that is reported; nothing is chosen by it.
        trained: number of trained values; needed for methods of PEFT only.
        train_error, examples, bits: of the packed model, what its bound is made of (docs/certificates.md), as
            `certified` returns them: the share of wrong answers among that many training examples, and the bits that
            say which model of this d, method and seed it is. All or none.
    """

    validation: float
    test: float
    trained: int | None = None
    train_error: float | None = None
    examples: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        parts = [self.train_error, self.examples, self.bits]
        if None in parts and any(part is not None for part in parts):
            raise ValueError(f"train_error, examples, bits: expected all or none, got {', '.join(map(str, parts))}")
        for name in ("validation", "test"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, float(value))
            except (TypeError, ValueError):
                raise TypeError(f"{name}: expected a number, got {value!r}") from None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.validation) and math.isfinite(self.test)


@dataclass(frozen=True)
class Outcome:
    """A finished run. `scores` is None if it diverged. `made_with` names what else may change the last digits."""

    run: Run
    scores: Scores | None
    seconds: float
    made_with: str = ""

    @property
    def validation(self) -> float:
        return -math.inf if self.scores is None else self.scores.validation


@dataclass(frozen=True)
class Design:
    """Which runs a study consists of.

    Attributes:
        methods: partitions, such as "did", "said", "hsaid-3", also with options, as in "did:rademacher".
        dims: the grid of d, increasing. Each method is measured at those that exceed its number of multipliers.
        seeds: number of seeds; the seeds are 0, 1, ...
        threshold: share of the baseline's score that defines the dimension.
        refine: how many d are added, one after another, where a method's curve crosses the threshold.
        compare: methods of PEFT, such as "lora:1".
        rates: {method: first learning rate to try}, for "full", methods of PEFT, and "theta" for all partitions; the
            latter at d = 1,000, and in proportion to 1 / sqrt(d).
        multipliers: {method: number of multipliers}.
    """

    methods: tuple[str, ...]
    dims: tuple[int, ...]
    seeds: int
    threshold: float
    refine: int
    compare: tuple[str, ...]
    rates: Mapping[str, float]
    multipliers: Mapping[str, int]

    def __post_init__(self) -> None:
        for name in ("methods", "compare", "dims"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"{name}: expected a list, got the string {given!r}")
            object.__setattr__(self, name, tuple(map(_integer, given)) if name == "dims" else tuple(given))
        for name in ("seeds", "refine"):
            object.__setattr__(self, name, _integer(getattr(self, name)))
        for name in ("methods", "compare"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, got {', '.join(given)}")
        if not self.dims or list(self.dims) != sorted(set(self.dims)) or self.dims[0] < 1:
            raise ValueError(f"dims: expected increasing numbers above 0, got {list(self.dims)}")
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: expected a share above 0 and at most 1, got {self.threshold}")
        if self.refine < 0:
            raise ValueError(f"refine: expected 0 or more, got {self.refine}")
        for method in self.methods:
            if not self.grid(method):
                raise ValueError(
                    f"dims: expected some d above the {self.multipliers[method]} multipliers of {method!r}, "
                    f"got at most {self.dims[-1]}"
                )

    def grid(self, method: str) -> tuple[int, ...]:
        """The d at which a method is measured first: those above its number of multipliers."""
        return tuple(d for d in self.dims if d > self.multipliers[method])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Design:
        return cls(**values)


def _integer(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"dims, seeds, refine: expected integers, got {value!r}") from None


def rate(step: int) -> float:
    """The learning rates that are tried: ..., 0.01, 0.03, 0.1, 0.3, 1, ..., numbered so that `rate(0)` is 1."""
    return float(f"{(1, 3)[step % 2]}e{step // 2}")


def nearest_rate(lr: float) -> int:
    """The number of the rate nearest to `lr`."""
    return min(RATES, key=lambda step: abs(math.log(rate(step) / lr)))
