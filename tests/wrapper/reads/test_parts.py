"""Parts of a wrapped model in other hands: copied, tied, taken for parameters, given another class."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch
from models import bert, change, mlp, moved, same
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hsaid_kernels import HSAID


def memory_of_tensors() -> int:
    gc.collect()
    storages = {}
    for held in gc.get_objects():
        if type(held) in (torch.Tensor, nn.Parameter) and held.layout == torch.strided:
            with contextlib.suppress(NotImplementedError):  # of torch.func's wrappers, which other tests may have left
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


def convolved() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 500)).eval()


@pytest.mark.parametrize("memory", ["step", "block"])
def test_a_copy_of_a_layer_is_a_plain_layer(memory):
    hsaid, x = moved(HSAID(convolved(), 40, "did", memory=memory)), torch.randn(2, 3, 8, 8)
    expected, before = hsaid.model[0](x).detach(), memory_of_tensors()
    layer = copy.deepcopy(hsaid.model[0])
    assert memory_of_tensors() - before < 2000  # of 580,000 that the model takes
    assert type(layer) is nn.Conv2d and type(layer.weight) is nn.Parameter and layer.weight.requires_grad
    change(hsaid)
    assert torch.equal(layer(x), expected) and not torch.equal(hsaid.model[0](x), expected)
    layer.weight = nn.Parameter(layer.weight.detach() / 2)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)
    several = nn.ModuleList(copy.deepcopy(hsaid.model[3]) for _ in range(2))
    assert several[0].weight is not several[1].weight and torch.equal(several[0].weight, hsaid.model[3].weight)
    copied = copy.deepcopy(hsaid.model)  # which is a copy of the tuned model as before
    assert torch.equal(copied(x), hsaid(x)) and torch.equal(copy.deepcopy([hsaid.model[0]])[0](x), hsaid.model[0](x))


def test_copies_of_blocks_are_as_of_a_merged_model():
    model = bert().eval()
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    hsaid = moved(HSAID(model, 60))
    merged = hsaid.merge()
    for name in ("bert.encoder.layer.0", "bert.embeddings", "classifier"):
        copied, expected = copy.deepcopy(hsaid.model.get_submodule(name)), merged.get_submodule(name)
        assert same(dict(copied.state_dict()), dict(expected.state_dict())) and type(copied) is type(expected)
        flags = [[p.requires_grad for p in module.parameters()] for module in (copied, expected)]
        assert flags[0] == flags[1]
        assert not any("_hsaid" in module.__dict__ for module in copied.modules())


def test_a_convolution_is_fused_with_its_norm():
    hsaid, x = moved(HSAID(convolved(), 40, "did")), torch.randn(2, 3, 8, 8)
    merged = hsaid.merge()
    fused = fuse_conv_bn_eval(hsaid.model[0], hsaid.model[1])
    assert torch.equal(fused(x), fuse_conv_bn_eval(merged[0], merged[1])(x)) and type(fused) is nn.Conv2d
    assert torch.allclose(fused(x), hsaid.model[:2](x), atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("memory", ["step", "block"])
def test_a_parameter_of_a_weight_is_a_plain_one(grad, memory):
    model = nn.ModuleDict({"table": nn.Embedding(10, 6), "layer": nn.Linear(6, 6)})
    hsaid = moved(HSAID(model, 40, "did", memory=memory))
    with torch.set_grad_enabled(grad):
        weight = model["layer"].weight
        for requires_grad in (True, False):
            made = nn.Parameter(weight, requires_grad)
            assert type(made) is nn.Parameter and made.requires_grad is requires_grad and made.is_leaf
        other = nn.Linear(6, 6)
        other.weight = nn.Parameter(weight)
        table = nn.Embedding.from_pretrained(model["table"].weight)
    assert torch.equal(other.weight, weight) and torch.equal(table.weight, model["table"].weight)
    assert type(weight.detach()) is torch.Tensor and weight.detach().data_ptr() == weight.data_ptr()
    before = other.weight.detach().clone()
    with torch.no_grad():
        other.weight.add_(1)  # memory of its own
    assert torch.equal(model["layer"].weight, before) and torch.equal(hsaid.merge()["layer"].weight, before)
    change(hsaid)
    assert torch.equal(other.weight, before + 1)
    with pytest.raises(RuntimeError, match="a projected weight is trained through theta"):
        weight.requires_grad_(True)
    restored = pickle.loads(pickle.dumps(weight))
    assert type(restored) is nn.Parameter and torch.equal(restored, weight)


def test_a_module_outside_is_tied_to_the_weight_of_now():
    model = nn.ModuleDict({"table": nn.Embedding(10, 6), "layer": nn.Linear(6, 6)})
    hsaid, outside, x = moved(HSAID(model, 40, "did")), nn.Linear(6, 10, bias=False), torch.ones(1, 6)
    w0 = hsaid.w0()["table.weight"]
    with torch.no_grad():
        outside.weight = model["table"].weight
    for _ in range(2):
        assert torch.equal(outside.weight, model["table"].weight) and torch.equal(outside(x), x @ outside.weight.T)
        change(hsaid)
    outside(x).sum().backward()
    found = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    (x @ model["table"].weight.T).sum().backward()
    assert torch.equal(found, hsaid.theta.grad) and found.any()
    hsaid.unwrap()
    assert outside.weight is w0 is model["table"].weight and type(outside) is nn.Linear


class Faster(nn.Linear):
    """The same computation, as a library of kernels swaps it in."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("call", [True, False])
def test_a_class_that_is_swapped_keeps_reading_the_weights_of_now(call):
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    layer, expected = hsaid.model[2], hsaid(x)
    layer.__class__ = Faster
    run = hsaid if call else hsaid.model
    assert torch.equal(run(x), expected) and isinstance(layer, Faster) and "Faster" in repr(hsaid.model)
    change(hsaid)
    assert torch.equal(run(x), hsaid.merge()(x)) and not torch.equal(run(x), expected)
    assert torch.equal(copy.deepcopy(hsaid)(x), hsaid(x)) and torch.equal(
        pickle.loads(pickle.dumps(hsaid))(x), hsaid(x)
    )
    plain = hsaid.unwrap()
    assert type(plain[2]) is Faster and type(plain[0]) is nn.Linear and plain(x).shape == (1, 3)
    plain[2].__class__ = nn.Linear
    assert type(plain[2]) is nn.Linear
