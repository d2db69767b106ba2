"""The tree of modules is the model's, its buffers are saved, and modules that are put into it belong to it."""

import copy

import pytest
import safetensors.torch
import torch
from models import IDS, bert, change, mlp, moved, normed, same, snapshot
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

from hsaid_kernels import HSAID


def test_the_tree_is_the_models():
    model = normed()
    names, buffers = [name for name, _ in model.named_modules()], list(dict(model.named_buffers()))
    hsaid = HSAID(model, 40)
    assert list(hsaid.modules()) == [hsaid, *model.modules()] and list(hsaid.children()) == [model]
    assert [n for n, _ in hsaid.named_modules()] == ["", *(f"model.{name}" if name else "model" for name in names)]
    assert list(dict(hsaid.named_buffers())) == [f"model.{name}" for name in buffers]
    assert [n for n, _ in hsaid.named_parameters()] == ["theta", "multipliers"] == list(hsaid._parameters)
    assert len(list(hsaid.parameters())) == 2
    seen = []
    hsaid.apply(seen.append)
    assert seen == [*reversed(list(model.children())), model, hsaid] or set(seen) == {hsaid, *model.modules()}
    assert hsaid.get_submodule("1") is model[1] and hsaid.get_submodule("model.1") is model[1]
    outer = nn.Sequential(hsaid, nn.Linear(2, 2))
    assert {n for n, p in outer.named_parameters() if p.requires_grad} == {
        "0.theta",
        "0.multipliers",
        "1.weight",
        "1.bias",
    }
    statistics = [f"0.model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    own = ["0.theta", "0.multipliers", "0._extra_state", *statistics]
    assert list(outer.state_dict()) == [*own, "1.weight", "1.bias"]
    assert outer.load_state_dict(outer.state_dict()).missing_keys == []


def test_modes_hooks_and_statistics_are_as_on_the_plain_model():
    """What Lightning does after validation, MC dropout, frozen BatchNorm, and update_bn of averaged weights."""
    torch.manual_seed(0)
    plain, x = normed(), torch.randn(16, 8)
    hsaid = HSAID(copy.deepcopy(plain), 40)
    for module in (plain, hsaid):
        modes = {name: inner.training for name, inner in module.named_modules()}
        module.eval()
        for name, inner in module.named_modules():
            inner.training = modes[name]
        assert all(inner.training for inner in module.modules())
        for inner in module.modules():
            inner.train(isinstance(inner, nn.Dropout))
        assert (
            not torch.equal(module(x), module(x))
            and not module.state_dict().get("1.running_mean", torch.zeros(1)).any()
        )
        module.train()
    averaged = [AveragedModel(module) for module in (plain, hsaid)]
    for swa in averaged:
        update_bn([x, 2 * x], swa)
    statistics = [averaged[0].module[1], averaged[1].module.model[1]]
    assert torch.allclose(statistics[0].running_mean, statistics[1].running_mean) and statistics[0].running_mean.any()
    assert torch.equal(statistics[1].num_batches_tracked, torch.tensor(2)) and not hsaid.model[1].running_mean.any()
    outputs = []
    hsaid.model[0].register_forward_hook(lambda module, args, output: outputs.append((module.weight, output)))
    hsaid(x)
    assert torch.equal(nn.functional.linear(x, outputs[0][0], hsaid.model[0].bias), outputs[0][1])


def test_converted_modules_keep_w0():
    plain = normed()
    hsaid = moved(HSAID(copy.deepcopy(plain), 40).eval())
    x, expected = torch.randn(4, 8), hsaid(torch.ones(4, 8))
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm,):
        assert convert(hsaid) is hsaid and type(hsaid.model[1]).__name__ == "SyncBatchNorm"
    assert torch.equal(hsaid(torch.ones(4, 8)), expected) and torch.equal(hsaid.model(x), hsaid.merge()(x))
    assert (
        same(dict(hsaid.unwrap().state_dict()), dict(plain.state_dict()))
        and type(hsaid.model[1].weight) is nn.Parameter
    )


def test_changed_buffers_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    plain, x = normed(), torch.randn(16, 8)
    hsaid = moved(HSAID(copy.deepcopy(plain), 40))
    names = ["theta", "multipliers", "model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"]
    hsaid.save_pretrained(tmp_path)
    assert list(safetensors.torch.load_file(tmp_path / "hsaid.safetensors")) == sorted(names[:2])
    state = hsaid.state_dict()
    assert list(state) == [*names[:2], "_extra_state", *names[2:]]
    hsaid(x)
    assert torch.equal(state["model.1.running_mean"], hsaid.model[1].running_mean)  # no copy, as of any module
    hsaid.save_pretrained(tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / "hsaid.safetensors")) == set(names)
    expected = hsaid.eval()(x)
    loaded = HSAID.from_pretrained(tmp_path, copy.deepcopy(plain)).eval()
    assert torch.equal(loaded(x), expected)
    other = HSAID(copy.deepcopy(plain), 40).eval()
    fresh = copy.deepcopy(other.state_dict())
    assert other.load_state_dict(hsaid.state_dict()).unexpected_keys == [] and torch.equal(other(x), expected)
    other.load_state_dict(fresh)
    assert same(dict(other.model.state_dict()), dict(plain.state_dict()))
    outer, wrong = nn.Sequential(hsaid), hsaid.state_dict() | {"model.1.running_mean": torch.zeros(9)}
    assert outer.load_state_dict(outer.state_dict()).missing_keys == []
    assert not other.theta.any()
    with pytest.raises(RuntimeError, match="state_dict: expected buffers of the model, got '1.running_mean' of shape"):
        other.load_state_dict(wrong)
    assert not other.theta.any()
    assert same(dict(hsaid.unwrap().state_dict()), dict(plain.state_dict()))


def test_each_task_has_its_statistics():
    torch.manual_seed(0)
    model, x = normed(), torch.randn(16, 8)
    before = snapshot(model)
    hsaid = HSAID(model, 40, task="a")
    hsaid.add_task("b")
    hsaid(x)
    of_a = snapshot(model)
    hsaid.set_task("b")
    assert same(snapshot(model), before)
    hsaid(3 * x)
    of_b = snapshot(model)
    for task, expected in (("a", of_a), ("b", of_b), ("a", of_a)):
        hsaid.set_task(task)
        assert same(snapshot(model), expected)
    with hsaid.unwrapped() as plain:
        assert same(snapshot(plain), before)
    assert same(snapshot(model), of_a)


def test_modules_of_the_wrapper_are_refused():
    hsaid = HSAID(mlp(), 24)
    with pytest.raises(TypeError, match="score: expected a module that is set on the model before it is wrapped"):
        hsaid.score = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="model: expected the one that this HSAID wraps to stay"):
        hsaid.model = mlp()
    with pytest.raises(TypeError, match="bias: expected a parameter of the model"):
        hsaid.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="seen: expected a buffer that is set on the model"):
        hsaid.register_buffer("seen", torch.ones(3))
    assert [name for name, _ in hsaid.named_modules()] == ["", "model", "model.0", "model.1", "model.2"]


@pytest.mark.parametrize("put", ["setattr", "item", "add_module", "append", "directly"])
def test_a_module_that_is_put_in_place_of_another_belongs_to_the_model_at_once(put):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    hsaid, x, new = HSAID(Net(), 24), torch.ones(1, 4), nn.Linear(4, 4)
    hsaid(x)
    weight, bias = new.weight, new.bias
    layers = hsaid.model.layers
    if put == "append":
        with pytest.raises(ValueError, match="expected '1' in a ModuleList to keep its tensors .* unwrap"):
            layers.append(new)
        assert len(layers) == 1 and torch.equal(hsaid.model(x), hsaid.merge()(x))
        return
    {
        "setattr": lambda: setattr(layers, "0", new),
        "item": lambda: layers.__setitem__(0, new),
        "add_module": lambda: layers.add_module("0", new),
        "directly": lambda: layers._modules.__setitem__("0", new),
    }[put]()
    run = hsaid if put == "directly" else hsaid.model
    if put == "directly":
        hsaid(x)  # which notices it
    moved(hsaid)
    out = run(x)
    assert hsaid.w0()["layers.0.weight"] is weight and not torch.equal(out, nn.functional.linear(x, weight, bias))
    assert torch.equal(out, hsaid.merge()(x)) and torch.equal(run(x), hsaid.model(x))


def test_what_would_change_the_tensors_is_refused_before_anything_changes():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    model, expected = hsaid.model, hsaid(x)
    for grad in (True, False):
        for alter in (
            lambda: setattr(model, "2", nn.Linear(6, 5)),
            lambda: setattr(model[0], "bias", nn.Parameter(torch.ones(5))),
            lambda: setattr(model[0], "lora", nn.Parameter(torch.ones(2, 4))),
            lambda: setattr(model, "3", nn.Linear(3, 3)),
            lambda: delattr(model[0], "bias"),
            lambda: prune.l1_unstructured(model[0], "weight", 0.3),
        ):
            with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError, TypeError)):
                alter()
            assert torch.equal(hsaid(x), expected) and torch.equal(model(x), expected)
    other = HSAID(mlp(), 24)
    with pytest.raises(ValueError, match="expected '0' to be a plain module, got one that is wrapped in another model"):
        model[0] = other.model[0]
    model.add_module("3", nn.Identity())  # without tensors
    assert torch.equal(model(x), expected)


def test_a_weight_that_is_set_again_is_w0_again():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    w0 = dict(hsaid.w0())
    with torch.no_grad():
        hsaid.model[0].weight = hsaid.model[0].weight
        hsaid.model[0].register_parameter("bias", hsaid.model[0].bias)
    change(hsaid)
    assert torch.equal(hsaid(x), hsaid.merge()(x)) and all(a is b for a, b in zip(hsaid.w0().values(), w0.values()))
    assert all(a is b for a, b in zip(hsaid.unwrap().parameters(), w0.values(), strict=True))


def test_a_module_that_has_left_is_itself_again():
    hsaid, x = HSAID(mlp(), 24), torch.ones(1, 4)
    old, w0 = hsaid.model[0], dict(hsaid.w0())
    hsaid.model[0] = nn.Linear(4, 6)
    out = moved(hsaid)(x)
    assert old.weight is w0["0.weight"] and old.weight.requires_grad and type(old) is nn.Linear
    copied = copy.copy(hsaid.model[2])
    plain = hsaid.unwrap()
    expected = plain(x)
    assert copied.weight is plain[2].weight and torch.equal(plain(x), expected) and not torch.equal(out, expected)
    assert all(p.requires_grad for p in plain.parameters())


def test_mixins_that_change_the_model_are_refused_before_anything_changes():
    hsaid = HSAID(bert(), 60)
    names = list(dict(hsaid.model.named_parameters()))
    for method, arguments in {
        "add_adapter": (None,),
        "load_adapter": ("nowhere",),
        "resize_token_embeddings": (60,),
        "set_input_embeddings": (nn.Embedding(50, 16),),
        "tie_weights": (),
    }.items():
        with pytest.raises(
            RuntimeError, match=rf"{method}\(\): expected a plain model, got one that an HSAID wraps: unwrap"
        ):
            getattr(hsaid, method)(*arguments)
    assert list(dict(hsaid.model.named_parameters())) == names and hsaid(IDS).logits.shape == (2, 2)
