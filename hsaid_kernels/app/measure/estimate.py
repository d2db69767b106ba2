"""The intrinsic dimension from measured scores: where a monotone curve through them crosses the threshold.

Li et al. 2018 (arXiv 1804.08838) define d90 as the smallest d at which training in a random subspace of d dimensions
reaches 90% of the score of training all weights. Scores of neighbouring d differ by noise, so the curve is the monotone
least-squares fit (isotonic regression) of the means over the seeds, interpolated linearly in log d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

RESAMPLES = 2000
CONFIDENCE = 0.95
ROUNDING = 1e-9  # scores that differ by less are equal: 0.9 * 1.0 and the mean of 17/20 and 19/20

BySeed = Mapping[int, float]  # {seed: score}


@dataclass(frozen=True)
class Estimate:
    """An intrinsic dimension and its bootstrap interval over the seeds.

    `d` and the ends of `interval` are 0 if the lowest measured d is above the threshold already ("below the grid"), and
    infinite if no measured d reaches it. `interval` is None with fewer than two seeds.
    """

    d: float
    interval: tuple[float, float] | None
    grid: tuple[int, int]  # lowest and highest measured d

    @property
    def answer(self) -> str:
        """ "found", "below the grid" or "not reached"."""
        return {0.0: "below the grid", math.inf: "not reached"}.get(self.d, "found")

    def __str__(self) -> str:
        if self.interval is None:
            return self._named(self.d)
        low, high = map(self._named, self.interval)
        if low == high == self._named(self.d):
            return low
        return f"{self._named(self.d)} ({low} to {high})"

    def _named(self, d: float) -> str:
        low, high = self.grid
        return f"< {low:,}" if d == 0 else f"> {high:,}" if d == math.inf else f"{d:,.0f}"


def crossing(dims: Sequence[int], scores: Sequence[float], threshold: float, weights: Sequence[float]) -> float:
    """The smallest d at which the monotone fit of `scores` reaches `threshold`, up to rounding.

    `dims` are increasing and above 0, `weights` the numbers of runs behind the scores. Returns 0 if the fit is above
    the threshold at the lowest d already, infinity if it never reaches it.
    """
    fit = isotonic_regression(scores, weights=weights).x
    reached = fit >= threshold - ROUNDING
    if not reached.any():
        return math.inf
    above = int(np.argmax(reached))
    if fit[above] <= threshold + ROUNDING:
        return float(dims[above])
    if above == 0:
        return 0.0
    below = above - 1
    share = (threshold - fit[below]) / (fit[above] - fit[below])
    found = math.exp((1 - share) * math.log(dims[below]) + share * math.log(dims[above]))
    return min(max(found, dims[below]), dims[above])


def estimate(curve: Mapping[int, BySeed], baseline: BySeed, threshold: float) -> Estimate:
    """The smallest d whose score reaches `threshold` times the baseline's.

    The interval is a percentile bootstrap over seeds, with 95% confidence. A seed is drawn with all its runs, those of
    the baseline too, because runs of one seed have the same initial weights and order of data. It can only tell how
    much the seeds at hand differ: with two or three it is too narrow.

    Args:
        curve: {d: {seed: test score}}, with at least one seed for each d.
        baseline: {seed: test score} of training all weights.
        threshold: share of the baseline's score, such as 0.9.

    Raises ValueError if there is no score.
    """
    dims = sorted(curve)
    if not dims or not baseline or not all(curve.values()):
        raise ValueError("curve: expected scores of a baseline and of at least one d, got none")
    seeds = sorted({*baseline, *(seed for scores in curve.values() for seed in scores)})
    index = {seed: column for column, seed in enumerate(seeds)}
    table = np.full((1 + len(dims), len(seeds)), np.nan)  # [baseline and dims, seeds]
    for row, scores in zip(table, [baseline, *(curve[d] for d in dims)], strict=True):
        for seed, score in scores.items():
            row[index[seed]] = score

    def dimension(counts: np.ndarray) -> float:  # counts: how often each seed was drawn, [seeds]
        weights = (~np.isnan(table) * counts).sum(1)
        sums = (np.nan_to_num(table) * counts).sum(1)
        if not weights[0] or not weights[1:].any():
            return math.nan
        known = np.flatnonzero(weights[1:])
        means = sums[1:][known] / weights[1:][known]
        return crossing([dims[i] for i in known], means, threshold * sums[0] / weights[0], weights[1:][known])

    interval = None
    if len(seeds) > 1:
        draws = np.random.default_rng(0).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), RESAMPLES)
        unique, times = np.unique(draws, axis=0, return_counts=True)  # few seeds can be drawn in few ways
        values = np.repeat([dimension(counts) for counts in unique], times)
        tails = (1 - CONFIDENCE) / 2
        low, high = np.quantile(values[~np.isnan(values)], [tails, 1 - tails], method="inverted_cdf")
        interval = (float(low), float(high))
    return Estimate(dimension(np.ones(len(seeds))), interval, (dims[0], dims[-1]))
