"""Gradients of the weights are used, and freed, as backward leaves the blocks of the model.

Run as a script, this file is a process for each measurement.
"""

import re
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ENVIRONMENT, memory
from models import IDS, SIZES, bert, mlp, moved, tied_models
from processes import forked
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops

MARGIN = 64e6  # bytes
BLOCK = re.compile(r"(?:bert\.)?(?:encoder\.)?(layer\.\d+|\w+)")
LAYERS = [f"layer.{i}" for i in range(4)]


@pytest.fixture
def adjoints(monkeypatch):
    """For each call of the adjoint: the tensors that it is for, and how many gradients of earlier ones still live."""
    calls, gradients = [], []
    adjoint = ops.fastfood_adjoint

    def watched(plan, theta, factors, grads, *others):
        calls.append((plan.names, sum(not gradient.expired() for gradient in gradients)))
        gradients.extend(StorageWeakRef(grad.untyped_storage()) for grad in grads if grad is not None)
        return adjoint(plan, theta, factors, grads, *others)

    monkeypatch.setattr(ops, "fastfood_adjoint", watched)
    return calls


def deep_bert(**changes) -> nn.Module:
    sizes = SIZES | dict(num_hidden_layers=4, max_position_embeddings=16) | changes
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def blocks(calls: list) -> list[list[str]]:
    """Of each call, the blocks of the model that it is for."""
    return [list(dict.fromkeys(BLOCK.match(name)[1] for name in names)) for names, _ in calls]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_backward_uses_the_gradients_of_a_block_before_it_enters_the_next(adjoints, checkpointed):
    model = deep_bert()
    hsaid = HSAID(model, 100)
    if checkpointed:
        model.activation_checkpointing_enable()
    entered = []
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.dense.register_full_backward_hook(lambda *_, i=i: entered.append((i, len(adjoints))))
    hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert blocks(adjoints) == [["pooler", "classifier"], *([layer] for layer in reversed(LAYERS)), ["embeddings"]]
    assert entered == [(3, 1), (2, 2), (1, 3), (0, 4)]
    assert [alive for _, alive in adjoints] == [0] * 6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_neighbours_share_a_call_up_to_half_the_largest_block(adjoints, checkpointed):
    layer = sum(parameter.numel() for parameter in deep_bert().bert.encoder.layer[0].parameters())
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = deep_bert(vocab_size=6 * layer // SIZES["hidden_size"], **no_dropout)
    hsaid = moved(HSAID(model, 100))
    labels = torch.tensor([0, 1])
    torch.func.functional_call(model, hsaid.weights(), (IDS,), {"labels": labels}).loss.backward()
    expected = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    adjoints.clear()
    if checkpointed:
        model.activation_checkpointing_enable()
    hsaid(IDS, labels=labels).loss.backward()
    assert blocks(adjoints) == [["layer.3", "pooler", "classifier"], LAYERS[:3], ["embeddings"]]
    assert [alive for _, alive in adjoints] == [0] * 3
    assert (hsaid.theta.grad - expected).norm() <= 1e-6 * expected.norm()


def test_the_sum_over_the_blocks_is_the_gradient(adjoints):
    model = deep_bert().eval()
    hsaid = moved(HSAID(model, 100, train_fully="pooler"))
    hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
    got = {name: parameter.grad for name, parameter in hsaid.named_parameters()}
    assert len(adjoints) == 6
    hsaid.zero_grad()
    tensors = hsaid.weights() | hsaid.full  # the nodes are all there before any block runs
    torch.func.functional_call(model, tensors, (IDS,), {"labels": torch.tensor([0, 1])}).loss.backward()
    assert len(adjoints) == 12
    for name, parameter in hsaid.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name


@pytest.mark.parametrize("kind", tied_models())
def test_tied_weights_belong_to_the_block_that_runs_first(kind, adjoints):
    hsaid = HSAID(tied_models()[kind](), 80)
    hsaid(input_ids=IDS, labels=IDS).loss.backward()
    names = [name for names, _ in adjoints for name in names]
    assert len(set(names)) == len(names) and set(names) <= set(hsaid.plan.names)
    assert hsaid.theta.grad.any()


def test_the_first_use_may_be_without_gradients():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.layer(x)
            with torch.inference_mode():
                self.layer(x)
            return self.layer(x)

    hsaid, x = moved(HSAID(Peeking(), 24)), torch.randn(2, 4)
    hsaid(x).sum().backward()
    assert hsaid.theta.grad.any() and torch.equal(hsaid(x), hsaid.merge()(x))


def test_weights_that_a_block_is_not_asked_for(adjoints):
    """Taken by the root module and not by the block that owns them."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(nn.functional.linear(x, self.first.weight))

    hsaid = moved(HSAID(Root(), 24))
    hsaid(torch.randn(2, 4)).sum().backward()
    assert [names for names, _ in adjoints] == [("second.weight", "second.bias"), ("first.weight", "first.bias")]
    got = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    assert got.any()


def test_blocks_inside_transforms_of_torch_func():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x):
            return torch.func.vmap(self.net)(x) + torch.func.jacrev(lambda y: self.net(y).sum(0))(x).sum()

    hsaid, x = moved(HSAID(Mapped(), 24)), torch.randn(2, 4)
    out = hsaid(x)
    out.square().sum().backward()
    assert torch.equal(out, hsaid.merge()(x)) and hsaid.theta.grad.any()


def test_the_model_has_no_hooks_afterwards():
    model = deep_bert()
    HSAID(model, 100)(IDS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_theta_changed_before_backward_is_refused():
    hsaid = HSAID(mlp(), 24)
    loss = hsaid(torch.ones(1, 4)).sum()
    with torch.no_grad():
        hsaid.theta.add_(1)
    with pytest.raises(RuntimeError, match="theta has been changed in place between forward and backward"):
        loss.backward()


DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], list[int]]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return dict(zip(DTYPES, (list(map(int, line.split())) for line in done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("of_weights, of_w0", DTYPES)
def test_peak_of_a_step(of_weights, of_w0, measured):
    peak, w0, weights, largest, activations = measured[of_weights, of_w0]
    assert w0 > 1.5 * MARGIN  # or the margin would hide the gradients of all
    assert peak <= w0 + weights + activations + largest + MARGIN


def measure(*dtypes: str) -> None:
    of_weights, of_w0 = (getattr(torch, name) for name in dtypes)
    with torch.no_grad():
        HSAID(bert(), 60)(IDS)  # what loads when it is first used
    before = memory("VmRSS")
    sizes = dict(vocab_size=1000, hidden_size=640, intermediate_size=2560, num_attention_heads=8, num_hidden_layers=12)
    with torch.device("meta"):
        model = deep_bert(**sizes)
    model = model.to_empty(device="cpu").to(of_w0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.bert.embeddings.position_ids = torch.arange(16)[None]
    model.bert.embeddings.token_type_ids = torch.zeros(1, 16, dtype=torch.long)
    hsaid = HSAID(model, 1000, dtype=of_weights if of_weights != of_w0 else None)
    kept: dict[int, int] = {}  # of activations

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() if storage.nbytes() < 1e7 else 0  # the weights are one large buffer
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
    hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
    size = of_weights.itemsize
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    largest = max(sum(numels[name] for name in names) for names in hsaid._source.maker.parts) * size
    print(
        memory("VmHWM") - before,
        sum(numels.values()) * of_w0.itemsize,
        hsaid.plan.numel * size,
        largest,
        sum(kept.values()),
    )


if __name__ == "__main__":
    for dtypes in DTYPES:
        forked(measure, *dtypes)
