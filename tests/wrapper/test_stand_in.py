"""An HSAID has the model's attributes, signature and class name, for code that was written for the model."""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from models import IDS, bert, mlp, moved, tied_models
from torch import nn
from transformers.utils.generic import can_return_loss, find_labels

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops


class Holding(nn.Module):
    """Has attributes of the names that HSAID uses for its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.task, self.plan, self._cache, self._lock, self.note = "theirs", "theirs", "theirs", "theirs", "theirs"
        self.theta = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, *, scale: float = 1.0):
        return self.layer(x) * scale


def test_the_signature_is_the_models():
    hsaid = HSAID(bert(), 60)
    assert inspect.signature(hsaid.forward) == inspect.signature(hsaid.model.forward)
    assert inspect.signature(type(hsaid).forward) == inspect.signature(type(hsaid.model).forward)
    assert find_labels(type(hsaid)) == find_labels(type(hsaid.model)) == ["labels"]
    assert not can_return_loss(type(hsaid)) and hsaid._get_name() == "BertForSequenceClassification"
    assert isinstance(hsaid, HSAID) and type(hsaid).__name__ == "HSAIDBertForSequenceClassification"
    assert type(HSAID(bert(), 60)) is type(hsaid)


def test_attributes_that_the_model_has_are_set_on_it():
    hsaid = HSAID(Holding(), 20, exclude="theta")
    hsaid.note, hsaid.own = "set", "own"
    assert hsaid.model.note == hsaid.note == "set" and not hasattr(hsaid.model, "own")
    hsaid.theta = nn.Parameter(torch.zeros(13))
    assert hsaid.theta.shape == (13,) and hsaid.model.theta.shape == (3,)


def test_its_own_attributes_stay_apart_from_the_models():
    model = Holding()
    hsaid = HSAID(model, 20, exclude="theta", task="ours")
    for other in (hsaid, copy.deepcopy(hsaid), pickle.loads(pickle.dumps(hsaid))):
        other.add_task("second")
        other.set_task("second")
        with torch.no_grad():
            assert other(torch.ones(1, 4), scale=2.0).shape == (1, 2)
        assert other.task == "second" and other.plan is not hsaid.model.plan and type(other) is type(hsaid)
        held = {other.model.task, other.model.plan, other.model._cache, other.model._lock}
        assert held == {"theirs"} and other.model.theta.shape == (3,)


def test_generators_of_the_model_run_on_the_projected_weights():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def stream(self, x):
            for _ in range(3):
                x = self.layer(x)
                yield x

    hsaid, x = moved(HSAID(Streaming(), 20)), torch.randn(2, 4)
    for got, expected in zip(hsaid.stream(x), hsaid.merge().stream(x), strict=True):
        assert torch.equal(got, expected)
    assert all(type(p) is nn.Parameter for p in hsaid.model.parameters())


def test_a_model_without_forward():
    class Dual(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))

        def encode_image(self, x):
            return self.image(x) * self.scale

    hsaid, x = moved(HSAID(Dual(), 20)), torch.randn(2, 4)
    hsaid.encode_image(x).sum().backward()
    assert hsaid.theta.grad.any() and torch.equal(hsaid.encode_image(x), hsaid.merge().encode_image(x))


def test_save_pretrained_takes_what_scripts_pass_to_the_models(tmp_path):
    hsaid = HSAID(bert(), 60)
    hsaid.save_pretrained(tmp_path / "other", is_main_process=False, save_function=torch.save)
    assert not (tmp_path / "other").exists()
    hsaid.save_pretrained(tmp_path / "main", is_main_process=True, save_function=torch.save, state_dict={})
    assert (tmp_path / "main" / "hsaid.safetensors").exists()


def test_generate_makes_the_weights_once(monkeypatch):
    made = []
    forward = ops.fastfood_forward
    monkeypatch.setattr(ops, "fastfood_forward", lambda *a: (made.append(1), forward(*a))[1])
    hsaid = moved(HSAID(tied_models()["t5"]().eval(), 80))
    for _ in range(3):  # with gradients enabled, as users call it
        tokens = hsaid.generate(IDS, max_new_tokens=7, min_new_tokens=7, do_sample=False)
        assert tokens.shape == (2, 8)
    assert len(made) == 1
    assert torch.equal(tokens, hsaid.merge().generate(IDS, max_new_tokens=7, min_new_tokens=7, do_sample=False))


@pytest.mark.parametrize("memory", ["step", "block"])
def test_a_forward_that_is_set_on_it_runs_inside_a_call(memory):
    """As TRL's fused heads, and Accelerate's mixed precision, which sets the one of before again at the end."""
    hsaid = moved(HSAID(mlp(), 24, memory=memory))
    x, own, seen = torch.ones(1, 4), hsaid.forward, []
    expected = hsaid(x)

    def fused(self, x, scale=1.0):
        seen.append((self, hsaid._source._thread.call is not None))
        return self.model(x) * scale

    hsaid.forward = types.MethodType(fused, hsaid)
    out = hsaid(x, scale=2.0)
    assert torch.equal(out, 2 * expected) and seen == [(hsaid, True)]
    out.sum().backward()
    assert hsaid.theta.grad.any() and "forward" not in vars(hsaid.model)
    hsaid.forward = functools.partial(fused, hsaid)
    assert torch.equal(hsaid(x, scale=3.0), 3 * expected) and seen[1:] == [(hsaid, True)]
    around = hsaid.forward
    hsaid.forward = lambda *args: around(*args)
    assert torch.equal(hsaid(x), expected) and hsaid.forward.__wrapped__ is not around
    hsaid.forward = own
    assert torch.equal(hsaid(x), expected) and len(seen) == 3 and hsaid.forward == own
    assert torch.equal(copy.deepcopy(hsaid)(x), expected)


def test_a_function_that_is_set_as_forward_keeps_nothing_alive():
    model = mlp()
    hsaid = HSAID(model, 24)
    inner = hsaid.model
    hsaid.forward = lambda x: inner(x)
    hsaid(torch.ones(1, 4))
    del hsaid
    HSAID(model, 24)
