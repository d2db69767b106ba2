"""Bounds of a study's runs: what each is charged for, and how table, JSON and picture show them."""

import io
import math

import pytest
from PIL import Image

from hsaid_kernels.app.measure.bounds import best_dim, certificate, settings_bits
from hsaid_kernels.app.measure.runs import Design, Outcome, Run, Scores
from hsaid_kernels.app.measure.study import Study
from hsaid_kernels.measure import Measurement

DESIGN = Design(
    methods=("did", "said"),
    dims=(10, 100, 1000),
    seeds=2,
    threshold=0.9,
    refine=1,
    compare=(),
    rates={"full": 0.01, "theta": 0.3},
    multipliers={"did": 0, "said": 20},
)


def outcomes(**parts):
    """Every run of the grid at three rates; more values make fewer errors in training, and are described by more."""
    runs = [Run("full", None, lr, seed) for lr in (0.003, 0.01, 0.03) for seed in (0, 1)]
    for method in DESIGN.methods:
        for d in DESIGN.grid(method):
            for lr in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
                runs += [Run(method, d, lr, seed) for seed in (0, 1)]
    found = {}
    for run in runs:
        d = run.dim or 1
        known = {"train_error": 0.4 / math.sqrt(d), "examples": 5000, "bits": 3.0 * d + run.seed}
        scores = Scores(0.9 - abs(run.lr - (0.3 if run.dim else 0.01)), 0.8, **({**known, **parts} if run.dim else {}))
        found[run] = Outcome(run, scores, 1.0)
    return found


def test_every_run_of_the_design_is_charged_for_its_index():
    grid = math.log2(5 * 2 * 21)  # five pairs of method and d, two seeds, 21 rates
    assert settings_bits(DESIGN, "did", 100) == settings_bits(DESIGN, "said", 1000) == pytest.approx(1 + grid)
    assert settings_bits(DESIGN, "did", 316) == pytest.approx(1 + 24 + math.log2(2 * 2 * 21))
    weight = 5 * 2 * 21 * 2.0 ** -settings_bits(DESIGN, "did", 100)
    weight += 2 * 2**24 * 2 * 21 * 2.0 ** -settings_bits(DESIGN, "did", 316)
    assert weight == pytest.approx(1)


def test_what_a_run_certifies():
    run = Run("did", 100, 0.3, 1)
    found = certificate(DESIGN, outcomes()[run])
    assert (found.errors, found.examples) == (200, 5000)
    assert found.bits == pytest.approx(301 + settings_bits(DESIGN, "did", 100))
    assert certificate(DESIGN, Outcome(run, None, 1.0)) is None
    assert certificate(DESIGN, Outcome(run, Scores(0.5, 0.5), 1.0)) is None


def test_table_json_and_picture():
    found = Measurement.of(DESIGN, outcomes(), 0.1)
    bounds = found.certificates["did"]
    assert list(bounds) == [10, 100, 1000] and best_dim(bounds) == 100
    table = found.table()
    mean = (bounds[100][0].bound + bounds[100][1].bound) / 2
    assert f"DID: an error of at most {mean:.4f} on new data at d = 100 (0.0400 in training, " in table
    row = next(line for line in table.splitlines() if line.startswith("| DID") and "|   100 |" in line)
    assert row.endswith(f"| {mean:.4f} |")
    assert next(line for line in table.splitlines() if "full" in line).endswith(" |        |")
    point = next(point for point in found.to_json()["points"] if (point["method"], point["d"]) == ("did", 100))
    assert point["runs"][0]["bound"] == bounds[100][0].bound and point["runs"][0]["training_error"] == 0.04
    picture = found.bound_picture("png", "title")
    assert Image.open(io.BytesIO(picture)).size == (1170, 676)
    assert picture != found.picture("png", "title")


def test_a_study_without_training_errors():
    found = Measurement.of(DESIGN, outcomes(train_error=None, examples=None, bits=None), 0.1)
    assert not found.certificates and "bound" not in found.table()
    with pytest.raises(
        ValueError, match=r"study: expected runs with a training error \(Scores, hsaid measure --bits\)"
    ):
        found.bound_picture("png")


@pytest.mark.parametrize("parts", [{"train_error": 0.1}, {"train_error": 0.1, "bits": 4.0}, {"examples": 5}])
def test_scores_with_half_of_what_a_bound_needs(parts):
    with pytest.raises(ValueError, match="train_error, examples, bits: expected all or none, got"):
        Scores(0.5, 0.5, **parts)


def test_a_study_keeps_them(storage):
    study = Study(storage, "a", {})
    run = Run("did", 10, 0.3, 0)
    scores = Scores(0.5, 0.6, 10, train_error=0.25, examples=48, bits=33.5)
    assert study.claim(run).finish(scores, 1.0, {})
    assert study.read()[0][run].scores == scores
    plain = Run("did", 10, 0.1, 0)
    assert study.claim(plain).finish(Scores(0.5, 0.6), 1.0, {})
    assert study.read()[0][plain].scores == Scores(0.5, 0.6)
