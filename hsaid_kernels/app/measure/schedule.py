"""Which runs a study still needs, as a function of its design and of the runs that have finished.

Nothing here depends on the order in which runs finish, so a study that was killed and resumed, or that several workers
share, ends with the same results as an undisturbed one.

- A point (a method at some d) takes runs with the first seed at several learning rates, and runs with the other seeds
  at the rate with the best validation score. The rates form a ladder (..., 0.03, 0.1, 0.3, ...). Three of them are
  tried first; while the best one is at the end of those tried, the next one there is tried too. Of equally good ones
  the nearest to the first is the best.
- A method is measured on the grid, and then at d between the two neighbours of its crossing with the threshold, which
  halve that gap on a logarithmic scale, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean

from hsaid_kernels.app.measure.estimate import crossing
from hsaid_kernels.app.measure.runs import BASELINE, RATES, Design, Outcome, Run, nearest_rate, rate

Outcomes = Mapping[Run, Outcome]

CLOSE = 1.2  # no d is added between two that differ by less than this factor
FIRST_RATES = 3


@dataclass(frozen=True)
class Point:
    """What is known of a method at some d.

    Attributes:
        method, dim: as in `Run`.
        lr: the chosen rate; None while it is not known.
        outcomes: {seed: outcome} at the chosen rate.
        tried: {rate: outcome} of the first seed.
        missing: the runs that the point needs now.
        later: about how many runs it needs after those.
    """

    method: str
    dim: int | None
    lr: float | None
    outcomes: Mapping[int, Outcome]
    tried: Mapping[float, Outcome]
    missing: tuple[Run, ...]
    later: int

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def scores(self) -> dict[int, float]:
        """The test score of each seed, {seed: score}."""
        return {seed: outcome.scores.test for seed, outcome in self.outcomes.items() if outcome.scores is not None}


class Schedule:
    """The runs that a design consists of; see the head of this module."""

    def __init__(self, design: Design):
        self.design = design

    def baseline(self, outcomes: Outcomes) -> Point:
        return self._point(BASELINE, None, outcomes)

    def compared(self, outcomes: Outcomes) -> list[Point]:
        return [self._point(method, None, outcomes) for method in self.design.compare]

    def curve(self, method: str, outcomes: Outcomes) -> list[Point]:
        """The points of a method known to be needed so far, by increasing d."""
        points = {d: self._point(method, d, outcomes) for d in self.design.grid(method)}
        baseline = self.baseline(outcomes)
        for _ in range(self.design.refine):
            if not (baseline.complete and baseline.scores and all(point.complete for point in points.values())):
                break
            threshold = self.design.threshold * mean(baseline.scores.values())
            d = _between(points, threshold)
            if d is None:
                break
            points[d] = self._point(method, d, outcomes)
        return [points[d] for d in sorted(points)]

    def points(self, outcomes: Outcomes) -> list[Point]:
        """All points known to be needed so far, in the order in which they are to be run."""
        curves = [point for method in self.design.methods for point in self.curve(method, outcomes)]
        return [self.baseline(outcomes), *curves, *self.compared(outcomes)]

    def left(self, outcomes: Outcomes) -> tuple[list[Run], int]:
        """Returns (the runs that can start now, about how many follow them). Nothing is left if the first is empty."""
        points = self.points(outcomes)
        missing = [run for point in points for run in point.missing]
        later = sum(point.later for point in points)
        for method in self.design.methods:
            curve = [point for point in points if point.method == method]
            if not all(point.complete for point in curve):
                added = len(curve) - len(self.design.grid(method))
                later += (self.design.refine - added) * (FIRST_RATES + self.design.seeds - 1)
        return missing, later

    def _point(self, method: str, dim: int | None, outcomes: Outcomes) -> Point:
        first = Run(method, dim, 0.0, 0)
        runs = {step: replace(first, lr=rate(step)) for step in self._ladder(method, dim, outcomes)}
        tried = {step: outcomes[run] for step, run in runs.items() if run in outcomes}
        missing = [run for step, run in runs.items() if step not in tried]
        others = range(1, self.design.seeds)
        by_rate = {rate(step): outcome for step, outcome in tried.items()}
        if missing:
            return Point(method, dim, None, {}, by_rate, tuple(missing), len(others))
        # The best rate at which no seed diverges.
        values = {step: outcome.validation for step, outcome in tried.items()}
        for step in sorted(tried, key=self._goodness(method, dim, values), reverse=True):
            if tried[step].scores is None:
                break
            repeated = [replace(runs[step], seed=seed) for seed in others]
            if any(run in outcomes and outcomes[run].scores is None for run in repeated):
                continue
            known = {run.seed: outcomes[run] for run in repeated if run in outcomes}
            missing = [run for run in repeated if run not in outcomes]
            return Point(method, dim, rate(step), {0: tried[step], **known}, by_rate, tuple(missing), 0)
        return Point(method, dim, None, {}, by_rate, (), 0)  # every rate that was tried diverges for some seed

    def _goodness(self, method: str, dim: int | None, values: Mapping[int, float]) -> Callable[[int], tuple]:
        """By which numbers of rates are compared: the validation score in `values`, then the distance to the first."""
        start = self.start(method, dim)
        return lambda step: (values[step], -abs(step - start), -step)

    def _ladder(self, method: str, dim: int | None, outcomes: Outcomes) -> range:
        """The numbers of the rates to try for a point, as far as is known now, in increasing order."""
        start = self.start(method, dim)
        low, high = max(start - 1, RATES[0]), min(start + 1, RATES[-1])
        while True:
            values = {}
            for step in range(low, high + 1):
                outcome = outcomes.get(Run(method, dim, rate(step), 0))
                if outcome is None:
                    return range(low, high + 1)
                values[step] = outcome.validation
            best = max(values, key=self._goodness(method, dim, values))
            if (best == low or values[best] == -math.inf) and low > RATES[0]:  # if all diverge, lower ones may not
                low -= 1
            elif best == high and high < RATES[-1]:
                high += 1
            else:
                return range(low, high + 1)

    def start(self, method: str, dim: int | None) -> int:
        """The number of the rate in the middle of those tried first.

        An AdamW step changes each value of theta by about the rate, so all weights together by rate * sqrt(d).
        """
        lr = self.design.rates[method] if dim is None else self.design.rates["theta"] * math.sqrt(1000 / dim)
        return nearest_rate(lr)


def _between(points: Mapping[int, Point], threshold: float) -> int | None:
    """The next d to measure: the middle, in log d, of the gap in which the threshold is crossed. None if there is none.

    Points at which every rate diverges are left out.
    """
    dims = sorted(d for d, point in points.items() if point.scores)
    if not dims:
        return None
    scores = [points[d].scores.values() for d in dims]
    found = crossing(dims, [mean(values) for values in scores], threshold, [len(values) for values in scores])
    if found == 0 or math.isinf(found):
        return None
    high = next(d for d in dims if d >= found)
    low = max((d for d in dims if d < high), default=high)
    if high < CLOSE * low:
        return None
    middle = float(f"{math.sqrt(low * high):.2g}")
    return int(middle) if low < middle < high else None
