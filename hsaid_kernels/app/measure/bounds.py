"""What a study's runs certify: a bound on the error on new data for each.

The bounds of all runs hold together, because each run is charged for the bits that say which of the design's it is.
These are fixed by the design, before any training: method, d, seed and learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean

from hsaid_kernels.app.certificate import Certificate
from hsaid_kernels.app.measure.runs import RATES, Design, Outcome
from hsaid_kernels.app.measure.schedule import Point
from hsaid_kernels.fastfood.limits import MAX_DIM


def settings_bits(design: Design, method: str, dim: int) -> float:
    """The bits that say method, d, seed and rate of a run.

    Half of the weight is the grid's. A d that was added is one of all up to MAX_DIM: which are added depends
    on the data.
    """
    grids = {name: design.grid(name) for name in design.methods}
    known = dim in grids[method]
    dims = sum(map(len, grids.values())) if known else len(grids) * MAX_DIM
    return 1 + math.log2(dims * design.seeds * len(RATES))


def certificate(design: Design, outcome: Outcome) -> Certificate | None:
    """What a run certifies; None without a training error."""
    scores, run = outcome.scores, outcome.run
    if scores is None or scores.train_error is None or run.dim is None:
        return None
    n = scores.examples or 0
    bits = (scores.bits or 0.0) + settings_bits(design, run.method, run.dim)
    return Certificate(round(scores.train_error * n), n, bits)


def certificates(design: Design, point: Point) -> dict[int, Certificate]:
    """{seed: what the run certifies} of a point."""
    found = {seed: certificate(design, outcome) for seed, outcome in point.outcomes.items()}
    return {seed: its for seed, its in found.items() if its is not None}


def best_dim(bounds: Mapping[int, Mapping[int, Certificate]]) -> int:
    """The d whose mean bound is lowest, of {d: {seed: certificate}}."""
    return min(bounds, key=lambda d: mean(its.bound for its in bounds[d].values()))
