"""unwrap() gives the plain model back; copies of a wrapped model are tuned, too."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from models import IDS, bert, change, mlp, moved, normed, same, snapshot
from torch import nn

from hsaid_kernels import HSAID


def test_unwrap_gives_the_model_back_as_it_was():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    kinds, flags = [type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]
    before, objects = snapshot(model), list(model.parameters())
    keys = [list(module.__dict__) for module in model.modules()]
    hsaid = HSAID(model, 60)
    assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in kinds]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    optimizer = torch.optim.AdamW(hsaid.parameter_groups())
    hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    theta = hsaid.theta.detach().clone()
    with hsaid.unwrapped() as plain:
        assert plain is model and [type(module) for module in model.modules()] == kinds
        with pytest.raises(RuntimeError, match=r"got one after unwrap\(\): wrap the model again"):
            hsaid(IDS)
    assert not torch.equal(hsaid(IDS).logits, plain(IDS).logits) or hsaid.training
    assert hsaid.unwrap() is model and hsaid.unwrap() is model
    assert [type(module) for module in model.modules()] == kinds and [
        p.requires_grad for p in model.parameters()
    ] == flags
    assert same(snapshot(model), before) and all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert [list(module.__dict__) for module in model.modules()] == keys
    assert all(type(module.weight) is nn.Parameter for module in model.modules() if isinstance(module, nn.Linear))
    for call in (lambda: hsaid(IDS), hsaid.weights, hsaid.merge):
        with pytest.raises(RuntimeError, match=r"after unwrap\(\)"):
            call()
    assert torch.equal(hsaid.theta, theta)


def test_unwrap_takes_merged_weights_back():
    model = mlp()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hsaid = moved(HSAID(model, 24, train_fully=r"2\.bias"))
    with torch.no_grad():
        hsaid.full["2.bias"].add_(1.0)
    hsaid.merge(inplace=True)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    plain = hsaid.unwrap()
    assert plain is model and not hsaid.merged
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_other_attributes_are_left_alone():
    model = mlp()
    model.seen = torch.zeros(2)
    hsaid = HSAID(model, 24)
    model.seen, model.layer_of_now = torch.ones(2), model[0]
    with hsaid.unwrapped():
        assert model.seen.all()
    assert hsaid.seen.all() and hsaid.unwrap().seen.all() and model.layer_of_now is model[0]


def test_a_module_whose_class_cannot_be_replaced():
    class Fixed(nn.Linear):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("__class__ is fixed")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(4, 4), Fixed(4, 2))
    with pytest.raises(TypeError, match="__class__ is fixed"):
        HSAID(model, 24)
    assert [type(module) for module in model] == [nn.Linear, Fixed] and all(p.requires_grad for p in model.parameters())
    assert not any("_hsaid" in module.__dict__ for module in model.modules())


def test_an_unwrapped_hsaid_is_saved_as_it_was(tmp_path):
    torch.manual_seed(0)
    plain, x = normed(), torch.randn(16, 8)
    with HSAID(copy.deepcopy(plain), 40, task="a") as hsaid:
        hsaid.add_task("b")
        moved(hsaid)(x)
        expected = copy.deepcopy(hsaid).eval()(x)
        state = copy.deepcopy(hsaid.state_dict())
    model = hsaid.model
    with torch.no_grad():
        model[0].weight.add_(1)  # trained further by itself, for example
    hsaid.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of another W0
        assert torch.equal(HSAID.from_pretrained(tmp_path, copy.deepcopy(plain)).eval()(x), expected)
        other = HSAID(copy.deepcopy(plain), 40, task="a")
        other.load_state_dict(hsaid.state_dict())
    assert torch.equal(other.eval()(x), expected) and set(hsaid.state_dict()) == set(state)
    before = snapshot(model)
    for call in (
        lambda: hsaid.set_task("b"),
        lambda: hsaid.add_task("c"),
        lambda: hsaid.load_state_dict(state),
        lambda: hsaid.half(),
        lambda: hsaid.merge(),
    ):
        with pytest.raises(RuntimeError, match=r"expected an HSAID that wraps a model, got one after unwrap\(\)"):
            call()
    assert same(snapshot(model), before) and hsaid.task == "a"


def test_a_sweep_over_one_model():
    model, x = mlp(), torch.ones(1, 4)
    before, found = snapshot(model), []
    for dim in (10, 20):
        with HSAID(model, dim, "did") as hsaid:
            found.append(moved(hsaid)(x))
            with pytest.raises(ValueError, match=r"unwrap\(\) the first one \(`with HSAID\(model, d\) as hsaid:`"):
                HSAID(model, 30)
            with pytest.raises(ValueError, match="expected one that no HSAID wraps, got one of which its '0'"):
                HSAID(nn.Sequential(model), 30)
        assert same(snapshot(model), before)
    assert not torch.equal(*found)


def test_a_model_whose_hsaid_is_gone_stays_tuned_until_it_is_wrapped_again():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    model, expected, w0 = hsaid.model, hsaid(x), snapshot(hsaid.model)
    gone = weakref.ref(hsaid)
    del hsaid
    assert gone() is None and torch.equal(model(x), expected)  # freed without the garbage collector
    again = HSAID(model, 24)
    assert same(again.weights(), w0) and not torch.equal(model(x), expected)


def test_nothing_keeps_a_model_alive():
    gc.collect()
    gc.disable()
    try:
        hsaid = moved(HSAID(mlp(), 24))
        hsaid(torch.ones(1, 4)).sum().backward()
        hsaid.model(torch.ones(1, 4))
        model = weakref.ref(hsaid.model)
        del hsaid
        assert model() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_alone_are_tuned_too(way):
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    expected = hsaid(x)
    if way == "deepcopy":
        other, layer = copy.deepcopy(hsaid.model), copy.deepcopy(hsaid.model[0])
    elif way == "pickle":
        other, layer = pickle.loads(pickle.dumps(hsaid.model)), pickle.loads(pickle.dumps(hsaid.model[0]))
    else:
        file = io.BytesIO()
        torch.save(hsaid.model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
        layer = other[0]
    gc.collect()
    weight = hsaid.model[0].weight.detach().clone()
    change(hsaid)
    assert torch.equal(other(x), expected) and torch.equal(layer.weight, weight)
    assert not torch.equal(hsaid(x), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"intrinsic_dim": -1}, {"seed": -1}, {"memory": "x"}, {"combine": "x"}, {"normalize": "x"}, {"backend": "x"}),
        *({"diagonal": "x"}, {"dtype": torch.int8}, {"task": ""}, {"heads": 3}),
    ],
    ids=str,
)
def test_arguments_that_are_refused_leave_the_model_as_it_was(wrong):
    """Tuned, where its HSAID is gone and another one would begin with the plain model."""
    model = mlp()
    tuned = moved(HSAID(model, 20)).weights()["0.weight"].detach().clone()
    gc.collect()
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}: expected"):
        HSAID(model, **{"intrinsic_dim": 20, **wrong})
    assert torch.equal(model[0].weight, tuned)
