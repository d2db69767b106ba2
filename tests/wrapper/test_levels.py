"""Levels: which are chosen, that values on them stay, and that training on them learns."""

import pytest
import torch
from models import mlp, moved
from torch import nn

from hsaid_kernels.wrapper.hsaid import HSAID
from hsaid_kernels.wrapper.levels import Levels, fit_levels, rounded_after_steps


def test_levels_by_hand():
    whole, shifted = Levels(2, 0, 0), Levels(2, 3, 1, centre=1.0)
    assert (whole.distance, shifted.distance, Levels(4, -21, 0).distance) == (8.0, 11.0, 11 / 8)
    assert whole.values(torch.arange(4)).tolist() == [-16, -8, 0, 8]
    assert shifted.values(torch.arange(4)).tolist() == [-15.5, -4.5, 6.5, 17.5]
    assert whole.numbers(torch.tensor([-99.0, -4.1, 3.9, 99.0])).tolist() == [0, 1, 2, 3]
    assert shifted.round(torch.tensor([6.4, 0.9])).tolist() == [6.5, -4.5]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e4])
def test_fitted_levels_are_near_and_are_found_again(bits, scale):
    values = torch.randn(500) * scale
    levels = fit_levels(values, bits)
    rounded = levels.round(values)
    # Of the best quantizer of normal values in R bits it is below 2.72 * 4**-R (Panter and Dite 1951). Levels of equal
    # distance are worse the more there are of them, and wider ones are taken where that saves bits.
    assert (rounded.double() - values).square().mean() < (2.72 + bits) * 4.0**-bits * scale**2
    assert fit_levels(rounded, bits).round(rounded).equal(rounded)


def test_bits_are_weighed_against_the_error():
    """Among all distances, none has a lower error times 2**(1.5 entropy)."""
    values = torch.randn(1000).double()

    def cost(levels):
        numbers = levels.numbers(values)
        shares = numbers.bincount() / len(values)
        return (levels.values(numbers) - values).square().mean().log2() + torch.special.entr(shares).sum() / 0.462098

    best = cost(fit_levels(values, 4))
    assert all(cost(Levels(4, index, shifted)) >= best - 1e-5 for index in range(-60, -20) for shifted in (0, 1))


def test_values_that_are_nothing_or_not_finite():
    assert fit_levels(torch.zeros(5), 4).round(torch.zeros(5)).tolist() == [0] * 5
    assert fit_levels(torch.ones(3), 1, 1.0).round(torch.ones(3)).tolist() == [1] * 3
    assert fit_levels(torch.zeros(0), 4).round(torch.zeros(0)).tolist() == []
    with pytest.raises(ValueError, match="expected finite values, got nan or inf"):
        fit_levels(torch.tensor([1.0, float("nan")]), 4)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_that_cannot_be(bits):
    with pytest.raises(ValueError, match=f"bits: expected .*1 .*16.*, got {bits}"):
        fit_levels(torch.randn(3), bits)


def test_gradients_are_taken_at_the_levels_and_applied_behind():
    parameter = nn.Parameter(torch.tensor([0.3, -0.2]))
    levels = Levels(2, -24, 0)  # a distance of 1
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    seen = []
    with rounded_after_steps(optimizer, {parameter: levels}):
        for _ in range(3):
            seen.append(parameter.tolist())
            (0.5 * (parameter - 1.0)).sum().mul(-1).backward()  # a gradient of -0.5: 0.25 a step
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [[0, 0], [1, 0], [1, 0]]  # behind: 0.3 -0.2, 0.55 0.05, 0.8 0.3
    assert parameter.tolist() == [1, 1]  # 1.05 0.55
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_tuning_undoes_half_of_rounding():
    """A classifier of 150 values in 2 bits: the loss after rounding, and after 100 steps on the levels."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    inputs = torch.randn(400, 20)
    labels = (inputs[:, :3] + 0.3 * torch.randn(400, 3)).argmax(1)
    hsaid = HSAID(model, 150, "did")

    def loss():
        return nn.functional.cross_entropy(hsaid(inputs), labels)

    def train(optimizer, count):
        lr = optimizer.param_groups[0]["lr"]
        for step in range(count):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / count)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    train(torch.optim.Adam([hsaid.theta], lr=0.3), 150)
    trained, theta = loss().item(), hsaid.theta.detach().clone()
    levels = fit_levels(theta, 2)
    with torch.no_grad():
        hsaid.theta.copy_(levels.round(theta))
    rounded = loss().item()
    with torch.no_grad():
        hsaid.theta.copy_(theta)
    optimizer = torch.optim.Adam([hsaid.theta], lr=0.15)
    with hsaid.rounded(optimizer, 2):
        train(optimizer, 100)
        assert levels.round(hsaid.theta).equal(hsaid.theta)
    assert levels.round(hsaid.theta).equal(hsaid.theta)
    assert trained < 0.1 and rounded > 0.6 and loss() < 0.7 * rounded, (trained, rounded, loss())


def test_what_is_no_optimizer_leaves_the_parameters_as_they_are():
    hsaid = moved(HSAID(mlp(), 10))
    theta = hsaid.theta.detach().clone()
    with pytest.raises(TypeError, match="^optimizer: expected a torch.optim.Optimizer, got int 4"), hsaid.rounded(4):
        pass
    assert torch.equal(hsaid.theta, theta)
