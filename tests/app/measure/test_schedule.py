"""Which runs a study consists of."""

import itertools
import math
import random

import pytest

from hsaid_kernels.app.measure.runs import Design, Outcome, Run, Scores, nearest_rate, rate, split_method
from hsaid_kernels.app.measure.schedule import Schedule

RATES = {"full": 1e-4, "theta": 0.1, "lora:1": 0.01}


def design(**changes):
    options = dict(
        methods=("did", "said"),
        dims=(30, 100, 1000),
        seeds=3,
        threshold=0.9,
        refine=2,
        compare=("lora:1",),
        rates=RATES,
        multipliers={"did": 0, "said": 40},
    )
    return Design(**{**options, **changes})


def value(run, best=0.1, half=50):
    """A score with its best rate at `best`, that reaches half of the baseline's at d = half."""
    if run.lr > 10:
        return None
    top = 0.8 if run.dim is None else 0.8 * run.dim / (run.dim + half)
    return top - 0.02 * abs(math.log(run.lr / best)) + 0.001 * run.seed


def study(design, value, seed=0):
    """The outcomes of a study whose runs finish in a random order, several at a time."""
    schedule, chance, outcomes = Schedule(design), random.Random(seed), {}
    for _ in range(1000):
        missing, later = schedule.left(outcomes)
        assert later >= 0 and len(set(missing)) == len(missing) and not outcomes.keys() & set(missing)
        if not missing:
            assert later == 0
            return schedule, outcomes
        for run in chance.sample(missing, chance.randint(1, len(missing))):
            score = value(run)
            outcomes[run] = Outcome(run, None if score is None else Scores(score, score, 10), 1.0)
    raise AssertionError("no end")


def test_the_rates_are_a_ladder():
    assert [rate(step) for step in range(-3, 4)] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    assert all(nearest_rate(rate(step)) == step for step in range(-14, 7))
    assert rate(nearest_rate(0.05)) == 0.03 and rate(nearest_rate(0.06)) == 0.1


def test_the_same_runs_in_whatever_order_they_finish():
    sets = [frozenset(study(design(), value, seed)[1]) for seed in range(20)]
    assert len(set(sets)) == 1


def test_the_same_results_in_whatever_order_runs_diverge():
    def diverges(run):
        return None if run.seed and random.Random(f"{run} diverges").random() < 0.3 else value(run)

    results = []
    for seed in range(10):
        schedule, outcomes = study(design(), diverges, seed)
        results.append([(p.method, p.dim, p.lr, sorted(p.scores.items())) for p in schedule.points(outcomes)])
    assert all(result == results[0] for result in results)
    assert len({lr for _, _, lr, _ in results[0]}) > 1  # the best rate was not always taken


def test_a_plateau_is_not_walked_along():
    for plateau in (0.2, 1.0):
        schedule, outcomes = study(design(refine=0), lambda run: 0.9 if run.dim is None else plateau)  # noqa: B023
        for point in schedule.points(outcomes):
            assert len(point.tried) == 3
            assert point.lr == rate(schedule.start(point.method, point.dim))


def test_a_tie_with_the_goal_ends():
    scores = {(None, 0): 29 / 30, (None, 1): 19 / 20, (10_000, 0): 13 / 15, (10_000, 1): 103 / 120}
    tie = design(methods=("did",), dims=(100, 1000, 10_000), seeds=2, refine=3, compare=())
    schedule, outcomes = study(tie, lambda run: scores.get((run.dim, run.seed), 0.3))
    assert len(schedule.curve("did", outcomes)) == 6


def test_every_point_has_all_seeds_at_the_rate_with_the_best_validation_score():
    for best in (1e-4, 0.003, 0.1, 3.0):
        schedule, outcomes = study(design(), lambda run: value(run, best))  # noqa: B023
        for point in schedule.points(outcomes):
            assert point.lr == best and set(point.scores) == {0, 1, 2}
            step = nearest_rate(best)
            assert {rate(step - 1), rate(step), rate(step + 1)} <= set(point.tried)
        assert {run.seed for run in outcomes if run.lr != best} == {0}


def test_the_test_score_chooses_nothing():
    schedule = Schedule(design(refine=0))
    outcomes = {}
    while missing := schedule.left(outcomes)[0]:
        for run in missing:
            outcomes[run] = Outcome(run, Scores(value(run), random.Random(str(run)).random(), 10), 1.0)
    assert {point.lr for point in schedule.points(outcomes)} == {0.1}


def test_new_d_lie_where_the_curve_crosses():
    schedule, outcomes = study(design(methods=("did",), refine=4, dims=(10, 100, 10_000)), value)
    points = schedule.curve("did", outcomes)
    dims = [point.dim for point in points]
    goal = 0.9 * 0.8 - 0.0001  # about; reached at d = 450
    assert len(dims) == 7 and dims == sorted(dims)
    below = max(d for d in dims if 0.8 * d / (d + 50) < goal)
    above = min(d for d in dims if 0.8 * d / (d + 50) >= goal)
    assert below < 450 <= above and above / below < 2
    assert all(100 < d < 10_000 for d in set(dims) - {10, 100, 10_000})


def test_neighbours_are_not_divided_for_ever():
    schedule, outcomes = study(design(methods=("did",), refine=50), value)
    dims = [point.dim for point in schedule.curve("did", outcomes)]
    assert len(dims) < 15
    assert min(b / a for a, b in itertools.pairwise(dims)) > 1.05


def test_no_d_is_added_where_the_threshold_is_not_crossed():
    for half in (100_000, 0.001):
        schedule, outcomes = study(design(), lambda run: value(run, half=half))  # noqa: B023
        assert [point.dim for point in schedule.curve("did", outcomes)] == [30, 100, 1000]


def test_a_method_starts_above_its_multipliers():
    schedule, outcomes = study(design(refine=0), value)
    assert [point.dim for point in schedule.curve("said", outcomes)] == [100, 1000]
    with pytest.raises(ValueError, match="dims: expected some d above the 40 multipliers of 'said', got at most 40"):
        design(dims=(10, 40))


def test_a_rate_at_which_a_seed_diverges_is_not_chosen():
    def diverges(run):
        return None if run.method == "did" and run.seed == 2 and run.lr == 0.1 else value(run)

    schedule, outcomes = study(design(), diverges)
    for point in schedule.curve("did", outcomes):
        assert point.lr in (0.03, 0.3) and set(point.scores) == {0, 1, 2}
    assert Run("did", 100, 0.1, 2) in outcomes  # it was tried


def test_a_point_at_which_every_rate_diverges_has_no_scores():
    schedule, outcomes = study(design(), lambda run: None if run.dim == 1000 else value(run))
    last = schedule.curve("did", outcomes)[-1]
    assert last.dim == 1000 and last.scores == {} and last.lr is None


def test_the_search_starts_lower_for_larger_d():
    schedule = Schedule(design())
    assert [rate(schedule.start("did", d)) for d in (10, 100, 1000, 10_000)] == [1.0, 0.3, 0.1, 0.03]
    assert rate(schedule.start("full", None)) == 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dims": ()}, "dims: expected increasing numbers above 0"),
        ({"dims": (100, 100)}, "dims: expected increasing numbers above 0"),
        ({"dims": (0, 100)}, "dims: expected increasing numbers above 0"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"seeds": "3"}, "dims, seeds, refine: expected integers, got '3'"),
        ({"dims": (100.5,)}, "dims, seeds, refine: expected integers, got 100.5"),
        ({"methods": "did"}, "methods: expected a list, got the string 'did'"),
        ({"threshold": 1.5}, "threshold: expected a share"),
        ({"refine": -1}, "refine: expected 0 or more"),
        ({"methods": ("did", "did")}, "methods: expected each once"),
        ({"compare": ("lora:1", "lora:1")}, "compare: expected each once"),
    ],
)
def test_bad_designs(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        design(**changes)


def test_dims_of_numpy():
    import numpy as np

    assert design(dims=np.logspace(2, 4, 3).astype(int)).dims == (100, 1000, 10_000)


def test_a_design_survives_json():
    import json

    assert Design.from_json(json.loads(json.dumps(design().to_json()))) == design()


def test_a_baseline_that_diverges_beside_complete_curves():
    schedule, outcomes = study(design(), lambda run: None if run.method == "full" else value(run))
    assert schedule.baseline(outcomes).scores == {}
    assert [point.dim for point in schedule.curve("did", outcomes)] == [30, 100, 1000]


def test_the_table_is_one_whatever_the_partition():
    from hsaid_kernels.app.measure.report import Measurement

    flat = design(methods=("L1|L2|L3|L4",), multipliers={"L1|L2|L3|L4": 3})
    schedule, outcomes = study(flat, value)
    table = Measurement.of(flat, outcomes, 0.1).table()
    bars = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
    assert "L1\\|L2\\|L3\\|L4" in table and bars == {3, 8}


def test_the_table_says_where_every_rate_diverges():
    from hsaid_kernels.app.measure.report import Measurement

    schedule, outcomes = study(design(), lambda run: None if run.dim == 1000 else value(run))
    found = Measurement.of(schedule.design, outcomes, 0.1)
    rows = [line for line in found.table().splitlines() if "1,000 | diverges at every rate tried" in line]
    assert len(rows) == 2 and found.left == 0
    assert found.dimensions["did"].answer == "not reached" and found.dimensions["did"].grid == (30, 100)


def test_a_method_with_options_of_its_own():
    assert split_method("L1+L2|L3|L4") == ("L1+L2|L3|L4", {})
    options = {"chunks": "one", "width": 1024, "diagonal": "rademacher"}
    assert split_method("hsaid-3:one:1024:rademacher") == ("hsaid-3", options)


@pytest.mark.parametrize(
    "method, message",
    [
        (
            "did:signs",
            "methods: expected options after the partition of gaussian, .*, one, 32, .*, 16384, got 'signs' in ",
        ),
        ("did:1000", "methods: expected .*, got '1000' in 'did:1000'"),
        ("did:", "methods: expected .*, got '' in 'did:'"),
        ("did:all:one", "methods: expected one chunks, got two in 'did:all:one'"),
    ],
)
def test_options_that_are_none(method, message):
    with pytest.raises(ValueError, match=message):
        split_method(method)
