"""After a change of a wrapped model that is refused, and whatever has been taken out, everything of the HSAID works."""

import copy
import gc
import weakref

import pytest
import torch
from models import moved, same, snapshot
from torch import nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

from hsaid_kernels import HSAID

X = torch.linspace(-1, 1, 30).view(5, 6)


def plain(change=None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3)
    )
    with torch.no_grad():
        if change is not None:
            change(model[0])
    return model.eval()


def halve(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() / 2)


def fold(model: nn.Module) -> None:
    inner = fuse_linear_bn_eval(model[2][0], model[2][1])
    model[2] = nn.Sequential(inner, nn.Identity())


def copied(model: nn.Module) -> None:
    layer = nn.Linear(6, 8)
    layer.load_state_dict({"weight": model[0].weight.detach(), "bias": model[0].bias.detach()})
    model[0] = layer


REFUSED = {
    "weight_norm": (plain, lambda m, h: weight_norm(m[0])),
    "spectral_norm": (plain, lambda m, h: spectral_norm(m[0])),
    "parametrized weight_norm": (plain, lambda m, h: parametrizations.weight_norm(m[0])),
    "parametrized spectral_norm": (plain, lambda m, h: parametrizations.spectral_norm(m[0])),
    "orthogonal": (plain, lambda m, h: parametrizations.orthogonal(m[0])),
    "remove_weight_norm": (lambda: plain(weight_norm), lambda m, h: remove_weight_norm(m[0])),
    "remove_spectral_norm": (lambda: plain(spectral_norm), lambda m, h: remove_spectral_norm(m[0])),
    "remove_parametrizations": (
        lambda: plain(parametrizations.weight_norm),
        lambda m, h: parametrize.remove_parametrizations(m[0], "weight"),
    ),
    "prune": (plain, lambda m, h: prune.l1_unstructured(m[0], "weight", 0.3)),
    "prune.remove": (
        lambda: plain(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)),
        lambda m, h: prune.remove(m[0], "weight"),
    ),
    "pop": (plain, lambda m, h: m.pop(3)),
    "del model[2]": (plain, lambda m, h: m.__delitem__(2)),
    "del of a module inside": (plain, lambda m, h: delattr(m[2], "0")),
    "a module set to None": (plain, lambda m, h: setattr(m, "0", None)),
    "bias = None": (plain, lambda m, h: setattr(m[0], "bias", None)),
    "bias registered as None": (plain, lambda m, h: m[0].register_parameter("bias", None)),
    "del bias": (plain, lambda m, h: delattr(m[0], "bias")),
    "halved": (plain, lambda m, h: halve(m[0])),
    "halved, inside": (plain, lambda m, h: halve(m[2][0])),
    "halved, registered": (
        plain,
        lambda m, h: m[0].register_parameter("weight", nn.Parameter(m[0].weight.detach() / 2)),
    ),
    "another dtype": (plain, lambda m, h: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().half()))),
    "a new layer with copied weights": (plain, lambda m, h: copied(m)),
    "folded into one layer": (plain, lambda m, h: fold(m)),
    "merged state": (plain, lambda m, h: m.load_state_dict(h.merge().state_dict())),
    "merged state, assigned": (plain, lambda m, h: m.load_state_dict(h.merge().state_dict(), assign=True)),
    "merged state of a layer": (plain, lambda m, h: m[0].load_state_dict(h.merge()[0].state_dict())),
    "append": (plain, lambda m, h: m.append(nn.Linear(3, 3))),
}
# Into torch's own dictionaries, past what could hear of it: the next call is refused, and unwrap() puts it back.
TAKEN = {
    "a parameter": (plain, lambda m, h: m[0]._parameters.pop("weight")),
    "a module": (plain, lambda m, h: m._modules.pop("3")),
}


def every_public_method(hsaid: HSAID, folder) -> None:
    """What works in any state; `unwrap` comes last."""
    repr(hsaid), hsaid.configuration(), hsaid.buffers_changed(), hsaid.parameter_groups(), hsaid.w0_checks()
    assert hsaid.intrinsic_dim == 60 and hsaid.dtype == torch.float32 and not hsaid.merged
    assert list(dict(hsaid.named_parameters())) == ["theta", "multipliers"] == list(hsaid.state_dict())[:2]
    hsaid.save_pretrained(folder)
    assert hsaid.unwrap() is hsaid.model
    hsaid.save_pretrained(folder), hsaid.state_dict()


@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_changes_leave_everything_as_it_was(what, grad, memory, tmp_path):
    make, change = REFUSED[what]
    model = make()
    before, order = snapshot(model), list(dict(model.named_parameters()))
    hsaid = moved(HSAID(model, 60, "did", memory=memory))
    expected, weights = hsaid(X).detach(), {name: weight.detach().clone() for name, weight in hsaid.weights().items()}
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError, AttributeError)):
        change(model, hsaid)
    for run in (hsaid, model, hsaid.merge()):
        assert torch.equal(run(X), expected)
    assert same(hsaid.weights(), weights) and same(dict(model.named_parameters()), hsaid.w0())
    hsaid(X).sum().backward()
    hsaid.add_task("b")
    hsaid.set_task("b")
    hsaid.set_task("default")
    with hsaid.unwrapped() as inner:
        assert same(snapshot(inner), before)
    copy.deepcopy(hsaid)(X)
    hsaid.load_state_dict(hsaid.state_dict())
    assert hsaid.train().eval() is hsaid and hsaid.to("cpu") is hsaid
    every_public_method(hsaid, tmp_path)
    assert same(snapshot(model), before) and list(dict(model.named_parameters())) == order
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded = HSAID.from_pretrained(tmp_path, model)
    assert torch.equal(loaded(X), expected)


@pytest.mark.parametrize("what", TAKEN)
def test_what_was_taken_out_in_silence_is_put_back_by_unwrap(what, tmp_path):
    make, take = TAKEN[what]
    model = make()
    before, order = snapshot(model), list(dict(model.named_parameters()))
    hsaid = moved(HSAID(model, 60, "did"))
    expected = hsaid(X).detach()
    take(model, hsaid)
    with pytest.raises(ValueError, match=r"expected the tensors that it had when it was wrapped, .* unwrap\(\)"):
        hsaid(X)
    every_public_method(hsaid, tmp_path)
    assert same(snapshot(model), before) and list(dict(model.named_parameters())) == order
    assert torch.equal(HSAID.from_pretrained(tmp_path, model)(X), expected)


def test_a_sweep_goes_on_after_a_trial_that_is_refused():
    model, shapes = plain(), []
    for d in (10, 20):
        try:
            with HSAID(model, d, "did") as hsaid:
                if d == 10:
                    weight_norm(model[0])
                shapes.append(hsaid(X).shape)
        except ValueError as error:
            assert "expected 'weight_g' in a Linear to keep its tensors" in str(error)
    assert shapes == [(5, 3)] and type(model[0]) is nn.Linear


def test_where_theta_moves_nothing_w0_may_be_set():
    model = plain()
    hsaid = HSAID(model, 60, "did")
    halve(model[0])
    expected = model(X)
    assert torch.equal(hsaid(X), expected)
    moved(hsaid)
    assert torch.equal(hsaid(X), hsaid.merge()(X)) and not torch.equal(hsaid(X), expected)
    halved = dict(model.named_parameters())["0.weight"]
    assert hsaid.unwrap()[0].weight is halved and torch.equal(model(X), expected)


def test_the_same_values_may_be_set():
    """As load_state_dict(assign=True) of the model's own state, and conversions of modules, do."""
    model = plain()
    hsaid = moved(HSAID(model, 60, "did"))
    expected = hsaid(X)
    model.load_state_dict(model.state_dict(), assign=True)
    model[0].weight = nn.Parameter(hsaid.w0()["0.weight"].clone())
    assert torch.equal(hsaid(X), expected) and torch.equal(hsaid.merge()(X), expected)
    with hsaid.unwrapped() as inner:
        inner.load_state_dict(plain().state_dict())
    assert torch.equal(hsaid(X), expected)


def test_what_is_trained_fully_is_not_set_as_w0():
    hsaid = HSAID(plain(), 60, "did", train_fully="^3")
    with torch.no_grad():
        hsaid.full["3.weight"].add_(1)
    with pytest.raises(RuntimeError, match=r"'3.weight' to stay, which is trained fully: write to hsaid.full\["):
        halve(hsaid.model[3])
    assert torch.equal(hsaid.model[3].weight, hsaid.full["3.weight"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_tensors_that_hooks_offload_are_refused(when):
    """As accelerate's cpu_offload leaves them."""
    model = plain()
    hsaid = moved(HSAID(model, 60, "did")) if when == "after" else None
    model[0]._parameters["weight"] = nn.Parameter(torch.empty(8, 6, device="meta"), requires_grad=False)
    with pytest.raises((RuntimeError, ValueError), match=r"hooks of accelerate offload \(cpu_offload, disk_offload"):
        hsaid(X) if hsaid else HSAID(model, 60, "did", include=".")
    if hsaid:
        assert hsaid.unwrap() is model and torch.equal(model(X), plain()(X))  # W0 is back


def test_what_was_taken_out_rightly_stays_out():
    """Modules and buffers that no weight needs."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3))
    model.register_buffer("cache", torch.ones(3))
    hsaid = moved(HSAID(model, 40, "did"))
    expected = hsaid.eval()(X)
    model[1], model.cache = nn.Identity(), None
    del model._modules["1"]
    with pytest.raises(RuntimeError):
        halve(model[0])
    assert torch.equal(hsaid(X), expected) and model.cache is None and list(model._modules) == ["0", "2"]
    assert list(hsaid.unwrap()._modules) == ["0", "2"] and model.cache is None


@pytest.mark.parametrize("moves", [True, False])
def test_modules_and_parameters_of_the_model_do_not_change_places(moves, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    before, flags = snapshot(model), [True] * 4
    hsaid = HSAID(model, 60, "did")
    expected = moved(hsaid)(X) if moves else hsaid(X)
    for change in (
        lambda: model.__setitem__(0, model[2]),
        lambda: setattr(model[0], "weight", model[2].weight),
        lambda: setattr(model[0], "weight", hsaid.w0()["2.weight"]),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="while an HSAID wraps the model"):
            change()
        assert torch.equal(hsaid(X), expected)
    model[0], model[0].weight = model[0], model[0].weight
    every_public_method(hsaid, tmp_path)
    assert same(snapshot(model), before) and [p.requires_grad for p in model.parameters()] == flags


def test_nan_is_equal_to_itself():
    model = plain()
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    hsaid = moved(HSAID(model, 60, "did"))
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        hsaid.theta[0] = float("nan")
    loss = checkpoint(hsaid.model, X, use_reentrant=False).sum()
    loss.backward()  # is not taken for that of another theta
    assert hsaid.theta.grad is not None and loss.isnan()


@pytest.mark.parametrize("replace", [lambda model: setattr(model, "big", torch.zeros(9)), lambda model: model.half()])
def test_buffers_that_are_replaced_are_freed(replace):
    model = plain()
    model.register_buffer("big", torch.ones(9))
    hsaid = moved(HSAID(model, 60, "did"))
    hsaid(X)
    before = weakref.ref(model.big)
    replace(model)
    hsaid.model.train().eval()
    gc.collect()
    assert before() is None


def test_a_larger_module_does_not_load_what_would_count_twice():
    """As a LightningModule that holds hsaid.model, and a model's own state in half."""
    hsaid = moved(HSAID(plain(), 60, "did"))
    before, outer = snapshot(hsaid.model), nn.ModuleDict({"net": hsaid.model})
    merged = {f"net.{name}": value for name, value in hsaid.merge().state_dict().items()}
    for state in (merged, {f"net.{name}": value.half().float() for name, value in before.items()}):
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\): expected '0.weight' to stay, because"):
            outer.load_state_dict(state)
        assert same(snapshot(hsaid.model), before)
    with pytest.raises(RuntimeError, match=r"expected '0.weight' to stay, because"):
        hsaid.model.load_state_dict({name: value.half() for name, value in before.items()})
    outer.load_state_dict(outer.state_dict())
    hsaid.add_task("b")
    hsaid.set_task("b")  # whose theta is 0
    with pytest.raises(RuntimeError, match=r"expected '0.weight' to stay, because"):
        halve(hsaid.model[0])


@pytest.mark.parametrize("accepted", [halve, lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(8)))])
def test_a_refusal_after_a_change_that_was_accepted_puts_back_what_was_set(accepted, tmp_path):
    model = plain()
    hsaid = HSAID(model, 60, "did")
    hsaid(X)
    accepted(model[0])
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected 'weight_g' in a Linear to keep its tensors"):
        weight_norm(model[0])
    assert torch.equal(moved(hsaid)(X), hsaid.merge()(X)) and same(snapshot(model), before)
    every_public_method(hsaid, tmp_path)
    assert same(snapshot(model), before)
