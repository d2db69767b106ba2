"""hsaid.model has W0 among its parameters(): what was meant for theta is said, once, and nothing else is."""

import copy
import functools
import warnings

import pytest
import torch
from models import bert, change, mlp, moved
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hsaid_kernels import HSAID

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def said():
    """The warnings of a test."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def of_ours(said) -> list:
    return [str(one.message) for one in said if str(one.message).startswith("hsaid.model: ")]


def train(model, hsaid, *, steps=3, before=lambda: None, parameters=None) -> None:
    trained = list(hsaid.parameters() if parameters is None else parameters)
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(steps):
        before()
        model(X).square().mean().backward()
        optimizer.step()


@functools.cache
def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model)


@pytest.mark.parametrize(
    "meant",
    [
        lambda model, hsaid: model.zero_grad(),
        lambda model, hsaid: train(model, hsaid, parameters=model.parameters()),
        lambda model, hsaid: train(hsaid, hsaid, before=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
        lambda model, hsaid: train(hsaid, hsaid, before=lambda: sum(p.norm() for p in model[2].parameters())),
        lambda model, hsaid: train(hsaid, hsaid, before=lambda: dict(model.named_parameters())),
        lambda model, hsaid: train(hsaid, hsaid, before=lambda: copy.deepcopy(model.state_dict())),
        lambda model, hsaid: train(hsaid, hsaid, before=functools.partial(averaged(model).update_parameters, model)),
    ],
)
def test_what_was_meant_for_theta_is_said_once(meant, said):
    hsaid = moved(HSAID(mlp(), 24))
    meant(hsaid.model, hsaid)
    assert len(of_ours(said)) == 1, of_ours(said)
    assert "hand over the HSAID itself" in of_ours(said)[0]
    meant(hsaid.model, hsaid), hsaid.model.zero_grad()
    assert len(of_ours(said)) == 1


def test_the_place_is_named(said):
    hsaid = HSAID(mlp(), 24)
    hsaid.model.zero_grad()
    (one,) = [one for one in said if str(one.message).startswith("hsaid.model: zero_grad() acts on W0")]
    assert one.filename == __file__ and one.category is UserWarning


def test_saved_as_a_model(said, tmp_path):
    hsaid = HSAID(bert(), 60)
    hsaid.save_pretrained(tmp_path / "ours")
    assert not of_ours(said)
    hsaid.model.save_pretrained(tmp_path / "w0")
    assert len(of_ours(said)) == 1 and "save_pretrained() saves W0" in of_ours(said)[0]


def test_a_teacher_inside_the_model(said):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(4, 3)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                for mine, theirs in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                    theirs.lerp_(mine, 0.5)
            return self.student(x) - self.teacher(x)

    hsaid = HSAID(Pair(), 15, "did")
    train(hsaid, hsaid)
    assert len(of_ours(said)) == 1 and "parameters() gives W0" in of_ours(said)[0]


def test_what_is_right_is_not_said(said, tmp_path):
    hsaid = HSAID(bert(), 60)
    ids, model = torch.ones(1, 4, dtype=torch.long), hsaid.model
    optimizer = torch.optim.AdamW(hsaid.parameter_groups())
    outer = nn.ModuleDict({"hsaid": hsaid, "head": nn.Linear(2, 2)})
    print(sum(p.numel() for p in model.parameters()), len(list(model.named_parameters())))
    average, best = AveragedModel(hsaid), None
    for _ in range(4):
        for _ in range(2):  # gradient accumulation
            hsaid(ids, labels=torch.zeros(1, dtype=torch.long)).loss.backward()
        nn.utils.clip_grad_norm_(hsaid.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), hsaid.zero_grad(), outer.zero_grad()
        next(model.parameters()).device, next(iter(model[0].parameters() if isinstance(model, nn.Sequential) else [1]))
        model.num_parameters(), model.dtype, model.device, hsaid.num_parameters()
        average.update_parameters(hsaid)
        best = copy.deepcopy(hsaid.state_dict())
        hsaid.save_pretrained(tmp_path), outer.state_dict(), hsaid.merge(), copy.deepcopy(hsaid)
        hsaid.train().eval().requires_grad_(True), hsaid.to("cpu"), hsaid.weights()
        torch.func.functional_call(model, {"classifier.bias": torch.zeros(2)}, (ids,))
    hsaid.load_state_dict(best)
    with hsaid.unwrapped() as plain:
        plain.zero_grad(), plain.state_dict()
    assert not of_ours(said)


@pytest.mark.parametrize("rounds", [1, 5])
def test_optimizers_of_others_are_not_taken_for_it(rounds, said):
    """A critic that steps several times for each step of the generator, whose theta gets gradients from all."""
    hsaid, critic = HSAID(mlp(), 24), nn.Linear(3, 1)
    own, others = torch.optim.SGD(hsaid.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.1)
    for _ in range(4):
        for _ in range(rounds):
            critic(hsaid(X)).sum().backward()
            others.step(), others.zero_grad()
        own.zero_grad()
        critic(hsaid(X)).sum().backward()
        own.step(), own.zero_grad()
        hsaid.model.requires_grad_(False)
    change(hsaid)
    assert not of_ours(said)
