"""What is said on a parameter is heard, or refused by name."""

import functools

import pytest
import torch
from models import mlp, moved, same, snapshot
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper.checkpoint.configuration import FIRST


def test_frozen_parameters_stay_unless_they_are_named(tmp_path):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        model[1].requires_grad_(False)
        return model

    ids = torch.tensor([1, 8])
    hsaid = HSAID(net(), 40)
    assert hsaid.plan.names == ("0.weight", "2.weight", "2.bias") and list(hsaid.frozen) == ["1.weight", "1.bias"]
    moved(hsaid)(ids).sum().backward()
    assert torch.equal(hsaid.model[1].weight, net()[1].weight) and not torch.equal(
        hsaid.model[0].weight, net()[0].weight
    )
    assert all(p.grad is None for p in hsaid.model.parameters())
    assert HSAID(net(), 40, include=".").plan.names == tuple(dict(net().named_parameters()))
    assert HSAID(net(), 40, train_fully="1.weight").full.keys() == {"1.weight"}
    hsaid.save_pretrained(tmp_path)
    trainable = net().requires_grad_(True)  # in the process that loads it, nothing may be frozen
    loaded = HSAID.from_pretrained(tmp_path, trainable)
    assert same(loaded.weights(), hsaid.weights()) and torch.equal(loaded.model[1].weight, net()[1].weight)
    assert all(p.requires_grad for p in loaded.unwrap().parameters())
    assert [p.requires_grad for p in hsaid.unwrap().parameters()] == [True, False, False, True, True]


def test_checkpoints_from_before_frozen_tensors_were_left_out(tmp_path):
    def net():
        torch.manual_seed(0)
        model = mlp()
        model[0].requires_grad_(False)
        return model

    hsaid = moved(HSAID(net(), 24, frozen=()))  # as all were projected then, and "frozen" is empty in their checkpoints
    assert len(hsaid.plan.names) == 4 and hsaid.configuration()["frozen"] == FIRST["frozen"] == {}
    hsaid.save_pretrained(tmp_path)
    assert same(HSAID.from_pretrained(tmp_path, net()).weights(), hsaid.weights())


def test_what_would_not_be_heard_is_refused_by_name():
    model = mlp()
    handle = model[0].weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(ValueError, match="without gradient hooks, got '0.weight' with one"):
        HSAID(model, 24)
    handle.remove()
    model[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="without gradient hooks, got '2.bias' with one"):
        HSAID(model, 24)
    hsaid = HSAID(model, 24, exclude="2.bias")  # which gets no gradient
    dict(model.named_parameters())["0.bias"].requires_grad_(True).register_hook(lambda gradient: None)
    with pytest.raises(ValueError, match="without gradient hooks, got '0.bias' with one"):
        hsaid(torch.ones(1, 4))
    hsaid = HSAID(mlp(), 24, exclude="2.bias")
    for call in ("requires_grad_", "register_hook"):
        with pytest.raises(RuntimeError, match="a projected weight is"):
            getattr(hsaid.model[0].weight, call)(False)
    with pytest.raises(RuntimeError, match="freeze tensors before HSAID wraps the model"):
        hsaid.model[0].weight.requires_grad = False
    hsaid.model[2].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="expected '2.bias' to stay frozen, because the HSAID leaves it out"):
        hsaid(torch.ones(1, 4))


def test_another_parameter_that_was_put_there_in_silence_is_refused():
    hsaid = moved(HSAID(mlp(), 24))
    own = hsaid.model[0]._parameters["weight"]
    hsaid.model[0]._parameters["weight"] = nn.Parameter(own.detach().clone(), requires_grad=False)
    for read in (lambda: hsaid(torch.ones(1, 4)), lambda: hsaid.model[0].weight):
        with pytest.raises(RuntimeError, match="expected the parameter '0.weight' of the model, got another nn.Param"):
            read()
    hsaid.model[0]._parameters["weight"] = own
    assert torch.equal(hsaid(torch.ones(1, 4)), hsaid.merge()(torch.ones(1, 4)))


def test_shared_memory_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(ValueError, match="got '0.weight' and '1.weight', which share memory"):
        HSAID(model, 24)
    whole = torch.randn(4, 8)
    model[0].weight, model[1].weight = nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])
    assert HSAID(model, 24)(torch.ones(1, 4)).shape == (1, 4)  # columns of one matrix, but no value twice


def test_layers_that_write_their_own_weight_are_refused_by_name():
    for layer, kind in (
        (nn.Embedding(9, 4, max_norm=1.0), "Embedding"),
        (nn.EmbeddingBag(9, 4, max_norm=1.0), "EmbeddingBag"),
    ):
        model = nn.Sequential(layer, nn.Linear(4, 2))
        with pytest.raises(ValueError, match=rf"got '0', a {kind} with max_norm=1.0: set max_norm to None"):
            HSAID(model, 24)
        hsaid = HSAID(model, 24, train_fully="0.weight")  # its own copy
        before = snapshot(model)
        hsaid(torch.tensor([[1, 2]])).sum().backward()
        assert hsaid.full["0.weight"].grad.any() and same(snapshot(model), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: layer.reset_parameters(),
        lambda layer: layer.weight.data.normal_(),
        lambda layer: layer.weight.data.copy_(torch.ones(6, 4)),
        lambda layer: layer.weight.detach().zero_(),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_writes_to_a_projected_weight_are_not_lost_in_silence(write, grad):
    hsaid = moved(HSAID(mlp(), 24))
    before = snapshot(hsaid.model)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="read only, because theta makes it"):
        write(hsaid.model[0])
        hsaid(torch.ones(1, 4))
    assert torch.equal(hsaid(torch.ones(1, 4)), hsaid.merge()(torch.ones(1, 4))) and same(snapshot(hsaid.model), before)
    with pytest.raises(RuntimeError, match="read only"):
        hsaid.model[0].weight.data = torch.ones(6, 4)


def test_parameters_without_elements_are_left_out():
    """As the register tokens of a DINOv3 that has none."""
    model = mlp()
    model.tokens = nn.Parameter(torch.empty(1, 0, 4))
    hsaid, x = moved(HSAID(model, 24)), torch.ones(1, 4)
    assert (
        torch.equal(hsaid(x), hsaid.merge()(x))
        and "tokens" not in hsaid.plan.names
        and list(hsaid.frozen) == ["tokens"]
    )
    assert model.tokens.shape == (1, 0, 4) and hsaid.unwrap().tokens.requires_grad


def test_parameters_that_a_module_keeps_by_itself_are_refused():
    for keep in (lambda p: [p], lambda p: {"p": p}, lambda p: functools.partial(nn.functional.linear, weight=p)):
        model = mlp()
        model.kept = keep(model[2].weight)
        with pytest.raises(
            ValueError, match="read '2.weight' as their parameter, got 'kept', which keeps it by itself"
        ):
            HSAID(model, 24)
        assert HSAID(model, 24, exclude="2.weight")(torch.ones(1, 4)).shape == (1, 3)
