"""Bounds: the forms against their definitions, how often they fail, and what they say of easy and of random labels."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hsaid_kernels.app.certificate import kl_inverse
from hsaid_kernels.certificates import Certificate, certified
from hsaid_kernels.wrapper.hsaid import HSAID

pytest.importorskip("constriction")


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a)


@pytest.mark.parametrize("error", [0.0, 1e-4, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("nats", [1e-5, 0.01, 0.3, 4.0])
def test_kl_inverse(error, nats):
    found = kl_inverse(error, nats)
    assert error < found <= 1
    if found < 1 - 1e-9:
        assert kl(error, found) == pytest.approx(nats, rel=1e-6)
    assert kl_inverse(1.0, nats) == 1


def test_of_no_errors_it_is_in_closed_form():
    found = Certificate(0, 1000, 40.0, delta=0.01)
    assert found.catoni == pytest.approx(1 - math.exp(-(40 * math.log(2) + math.log(100)) / 1000), rel=1e-9)
    assert found.maurer == pytest.approx(1 - math.exp(-(40 * math.log(2) + math.log(2 * 1000**0.5 * 100)) / 1000))


@pytest.mark.parametrize(
    ("errors", "n", "bits"), [(0, 60_000, 2500), (1300, 60_000, 2500), (900, 4563, 3300), (3, 30, 9)]
)
def test_catoni_at_its_best_parameter_is_the_kl_inverse(errors, n, bits):
    """And so below Maurer's, which pays ln(2 sqrt(n)) for what a random classifier needs."""
    found = Certificate(errors, n, bits)
    assert found.catoni == pytest.approx(kl_inverse(errors / n, (bits * math.log(2) + math.log(20)) / n), abs=1e-7)
    assert errors / n < found.bound == found.catoni < found.maurer <= 1


def test_more_bits_more_errors_fewer_examples_or_more_certainty_bound_less():
    bound = Certificate(100, 5000, 300.0).bound
    assert Certificate(100, 5000, 301.0).bound > bound
    assert Certificate(101, 5000, 300.0).bound > bound
    assert Certificate(100, 4999, 300.0).bound > bound
    assert Certificate(100, 5000, 300.0, delta=0.01).bound > bound


def test_a_few_dozen_examples_are_vacuous():
    assert Certificate(0, 36, 3000.0).bound > 0.999
    assert Certificate(0, 7, 1.0).maurer == 1


def test_it_fails_no_more_often_than_it_says():
    """1,024 random classifiers of random labels, each wrong in half of all cases: the one with the fewest errors among
    100 examples, 1,000 times. Charged for its 10 bits, the bound holds; without them it fails again and again."""
    errors = np.random.default_rng(0).binomial(100, 0.5, (1000, 1024)).min(1)
    fails = {bits: sum(Certificate(int(e), 100, bits).bound < 0.5 for e in errors) for bits in (0.0, 10.0)}
    assert fails[10.0] <= 0.05 * 1000 and fails[0.0] > 900


@pytest.mark.parametrize("form", ["catoni", "maurer"])
def test_it_fails_no_more_often_for_a_known_error(form):
    """Thresholds k / 16 for x in [0, 1], whose label is whether x > 0.4, but for a fifth of the labels: the error of
    each is known. The best one in training is chosen, 4 bits."""
    random = np.random.default_rng(1)
    thresholds = np.arange(16) / 16
    true = 0.2 + 0.6 * np.abs(thresholds - 0.4)
    fails, bounds = 0, []
    for _ in range(1000):
        x = random.random(60)
        labels = (x > 0.4) ^ (random.random(60) < 0.2)
        errors = ((x > thresholds[:, None]) != labels).sum(1)
        bounds.append(getattr(Certificate(int(errors.min()), 60, 4.0), form))
        fails += bounds[-1] < true[errors.argmin()]
    assert fails <= 50 and np.mean(bounds) < 0.6


def trained(inputs, labels, d, seed=0):
    """What 4 bits of an MLP in a subspace certify, by `certified`, of settings that cost 30 bits."""
    torch.manual_seed(seed)
    hsaid = HSAID(nn.Sequential(nn.Linear(inputs.shape[1], 32), nn.Tanh(), nn.Linear(32, 2)), d, "did")
    optimizer = torch.optim.Adam([hsaid.theta], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(hsaid(inputs), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def errors():
        return int((hsaid(inputs).argmax(-1) != labels).sum())

    parts = certified(hsaid, 4, errors, len(labels))
    return Certificate(round(parts["train_error"] * len(labels)), len(labels), parts["bits"] + 30)


def test_random_labels_are_vacuous_and_an_easy_task_is_tight():
    torch.manual_seed(0)
    inputs = torch.randn(200, 30)
    random = trained(inputs, torch.randint(2, (200,)), 150)
    assert random.training_error < 0.2 and random.bound > 0.5
    inputs = torch.randn(20_000, 30)
    inputs[:, 0] += 3 * inputs[:, 0].sign()
    easy = trained(inputs, (inputs[:, 0] > 0).long(), 40)
    assert easy.bound < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 4, 1.0), "errors: expected 0 to the number of examples, 1 or more, got 5 of 4"),
        ((0, 0, 1.0), "got 0 of 0"),
        ((-1, 4, 1.0), "got -1 of 4"),
        ((1, 4, -1.0), "bits: expected a number, 0 or more, got -1.0"),
        ((1, 4, math.inf), "bits: expected a number, 0 or more, got inf"),
        ((1, 4, 1.0, 0.0), "delta: expected a probability between 0 and 1, got 0.0"),
        ((1, 4, 1.0, 1.0), "got 1.0"),
    ],
)
def test_numbers_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Certificate(*arguments)
