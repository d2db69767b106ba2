"""The estimate of the dimension, on synthetic curves whose crossing is known."""

import math

import numpy as np
import pytest

from hsaid_kernels.measure import Estimate, crossing, estimate

DIMS = (100, 200, 400, 800, 1600)


def test_a_curve_that_is_linear_in_log_d_is_crossed_where_it_should_be():
    scores = [0.1 * math.log2(d / 100) for d in DIMS]  # 0, 0.1, 0.2, 0.3, 0.4
    for d in (100, 130, 200, 555, 1600):
        assert crossing(DIMS, scores, 0.1 * math.log2(d / 100), [1] * 5) == pytest.approx(d)


def test_never_reached_and_below_the_grid_are_answers():
    scores = [0.5, 0.6, 0.7, 0.8, 0.85]
    assert crossing(DIMS, scores, 0.86, [1] * 5) == math.inf
    assert crossing(DIMS, scores, 0.49, [1] * 5) == 0
    assert crossing(DIMS, scores, 0.5, [1] * 5) == 100
    assert crossing(DIMS, scores, 0.85, [1] * 5) == 1600
    curve = {d: {0: s, 1: s} for d, s in zip(DIMS, scores)}
    never, below = estimate(curve, {0: 0.99, 1: 0.99}, 0.9), estimate(curve, {0: 0.5, 1: 0.5}, 0.9)
    assert (never.answer, str(never)) == ("not reached", "> 1,600")
    assert (below.answer, str(below)) == ("below the grid", "< 100")


def test_a_tie_is_reached_whatever_the_rounding():
    # 0.9 * 1.0 and the mean of 17/20 and 19/20 differ in the last digit.
    curve = {100: {0: 0.5, 1: 0.5}, 1000: {0: 17 / 20, 1: 19 / 20}}
    assert estimate(curve, {0: 1.0, 1: 1.0}, 0.9).d == 1000
    random = np.random.default_rng(0)
    for _ in range(300):
        n, share = int(random.integers(10, 120)), int(random.integers(1, 10)) / 10
        k = random.integers(1, n + 1, 2)
        scores = [k.mean() / n * share / 2, k.mean() / n * share]  # the upper one exactly at the goal
        found = estimate({100: {0: scores[0]}, 700: {0: scores[1]}}, {0: k[0] / n, 1: k[1] / n}, share)
        assert found.d == 700


def test_a_single_d():
    assert crossing([100], [0.5], 0.6, [1]) == math.inf
    assert crossing([100], [0.5], 0.4, [1]) == 0
    assert crossing([100], [0.5], 0.5, [1]) == 100


def test_a_point_that_is_not_monotone_is_pooled_with_its_neighbours():
    # The first crossing of the raw points would be between 200 and 400; 400 and 800 are pooled to 0.7.
    found = crossing(DIMS, [0.5, 0.6, 0.9, 0.5, 0.9], 0.75, [1] * 5)
    assert found == pytest.approx(math.exp(np.interp(0.75, [0.7, 0.9], np.log([800, 1600]))))
    # With three runs behind the 0.9 and one behind the 0.5 they are pooled to 0.8.
    found = crossing(DIMS, [0.5, 0.6, 0.9, 0.5, 0.9], 0.75, [1, 1, 3, 1, 1])
    assert found == pytest.approx(math.exp(np.interp(0.75, [0.6, 0.8], np.log([200, 400]))))


def pooled(scores, weights):
    """Isotonic regression by its max-min formula, as slow as it is simple."""
    n, mean = len(scores), lambda a, b: np.average(scores[a : b + 1], weights=weights[a : b + 1])
    return [max(min(mean(a, b) for b in range(k, n)) for a in range(k + 1)) for k in range(n)]


def test_against_the_formula_of_the_monotone_fit():
    random = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        n = random.integers(1, 8)
        dims = np.sort(random.choice(np.arange(10, 5000), n, replace=False))
        scores, weights = random.random(n), random.integers(1, 4, n)
        threshold = random.random()
        fit = pooled(scores, weights)
        found = crossing(dims.tolist(), scores, threshold, weights)
        kinds.add(math.isinf(found) - (found == 0))
        if found == 0:
            assert fit[0] > threshold
        elif math.isinf(found):
            assert fit[-1] < threshold
        else:
            assert np.interp(math.log(found), np.log(dims), fit) == pytest.approx(threshold)
            assert all(value < threshold + 1e-12 for d, value in zip(dims, fit) if d < found * (1 - 1e-12))
    assert kinds == {-1, 0, 1}


def noisy(random, true_d, seeds, noise):
    """A curve that reaches 0.9 of the baseline's 0.8 at true_d, with a part of the noise common to a seed's runs."""
    common = random.normal(0, noise / 2, seeds)
    run = lambda score: {s: score + common[s] + random.normal(0, noise) for s in range(seeds)}  # noqa: E731
    return {d: run(0.72 + 0.1 * math.log2(d / true_d)) for d in DIMS}, run(0.8)


def test_noise_moves_the_estimate_little_and_the_interval_covers_the_truth():
    random = np.random.default_rng(1)
    for true_d in (150, 500, 1200):
        found = [estimate(*noisy(random, true_d, 8, 0.02), 0.9) for _ in range(60)]
        median = np.median([e.d for e in found])
        assert median == pytest.approx(true_d, rel=0.1)
        covered = np.mean([e.interval[0] <= true_d <= e.interval[1] for e in found])
        assert covered >= 0.8  # 95% of a percentile bootstrap over eight seeds is rather less


def test_the_interval_of_few_seeds_is_too_narrow():
    """How often it holds the truth, as docs/measuring.md says."""
    random = np.random.default_rng(2)
    covered = {}
    for seeds in (2, 3, 5):
        found = [estimate(*noisy(random, 800, seeds, 0.02), 0.9) for _ in range(200)]
        covered[seeds] = np.mean([e.interval[0] <= 800 <= e.interval[1] for e in found])
    assert covered == pytest.approx({2: 0.47, 3: 0.73, 5: 0.87}, abs=0.1)


def test_the_interval_has_open_ends():
    curve = {100: {0: 0.5, 1: 0.6}, 1000: {0: 0.75, 1: 0.65}}
    found = estimate(curve, {0: 0.8, 1: 0.8}, 0.9)
    assert found.answer == "not reached" and found.interval[0] < 1000 and found.interval[1] == math.inf
    assert str(found).startswith("> 1,000 (") and str(found).endswith("to > 1,000)")
    curve = {100: {0: 0.75, 1: 0.65}, 1000: {0: 0.76, 1: 0.76}}
    found = estimate(curve, {0: 0.8, 1: 0.8}, 0.9)
    assert found.answer == "found" and found.interval[0] == 0
    assert " (< 100 to " in str(found)


def test_the_spread_of_the_baseline_counts():
    curve = {d: {s: 0.72 + 0.1 * math.log2(d / 500) for s in range(4)} for d in DIMS}
    narrow = estimate(curve, dict.fromkeys(range(4), 0.8), 0.9)
    wide = estimate(curve, {0: 0.75, 1: 0.85, 2: 0.75, 3: 0.85}, 0.9)
    assert narrow.interval == pytest.approx((500, 500)) and wide.d == pytest.approx(500)
    assert wide.interval[0] < 450 and wide.interval[1] > 550


def test_one_seed_has_no_interval_and_more_are_drawn_together():
    curve = {d: {0: 0.1 * math.log2(d / 100)} for d in DIMS}
    found = estimate(curve, {0: 0.2}, 0.9)
    assert found.interval is None and str(found) == f"{found.d:,.0f}"
    # Seeds with the same offset in all their runs: the crossing is nearly the same in each resample.
    together = {d: {s: 0.5 + 0.1 * math.log2(d / 100) + 0.1 * s for s in range(3)} for d in DIMS}
    found = estimate(together, {s: 0.8 + 0.1 * s for s in range(3)}, 1.0)
    assert found.interval == pytest.approx((800, 800))


def test_runs_that_are_missing_are_left_out():
    curve = {100: {0: 0.5, 1: 0.5, 2: 0.5}, 1000: {0: 0.9}}
    found = estimate(curve, {0: 0.9, 1: 0.9, 2: 0.9}, 0.9)
    assert 100 < found.d < 1000
    assert found == estimate(curve, {0: 0.9, 1: 0.9, 2: 0.9}, 0.9)  # deterministic


def test_no_scores_are_an_error():
    for curve, baseline in (({}, {0: 1.0}), ({100: {}}, {0: 1.0}), ({100: {0: 1.0}}, {})):
        with pytest.raises(ValueError, match="curve: expected scores of a baseline"):
            estimate(curve, baseline, 0.9)


def test_the_text_of_an_estimate():
    assert str(Estimate(1234.4, (1000.0, 2000.0), (100, 5000))) == "1,234 (1,000 to 2,000)"
    assert str(Estimate(0.0, (0.0, 150.0), (100, 5000))) == "< 100 (< 100 to 150)"
