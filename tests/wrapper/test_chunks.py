"""An HSAID whose theta is longer than a block, each block made from one chunk of it, wherever weights come from: whole,
by blocks of the model, rows on demand, heads, tasks, merging, checkpoints."""

import json

import pytest
import torch
from models import BACKENDS, IDS, bert, gradient, moved, relative, same
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.compat import FastfoodWrap
from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE
from hsaid_kernels.wrapper.weights import launches

D = 1000


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wrapped(model: nn.Module | None = None, chunks: str | None = "one", **options) -> HSAID:
    hsaid = HSAID(bert(num_hidden_layers=2).eval() if model is None else model, D, width=64, chunks=chunks, **options)
    assert hsaid.plan.one_chunk == (chunks == "one")
    return moved(hsaid)


def outputs(hsaid: HSAID) -> torch.Tensor:
    return hsaid(IDS).logits


@pytest.mark.parametrize("partition", ["said", "L1+L2|L3|L4", "L1+L5|L3|L4"])
@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_that_of_the_loss(backend, memory, partition, monkeypatch):
    """By differences along a direction, with rows of the embeddings on demand."""
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 1)
    hsaid = wrapped(backend=backend, memory=memory, partition=partition)
    gradients = gradient(hsaid, lambda: outputs(hsaid)).double()
    trained = list(hsaid.parameters())
    start, step = [p.detach().clone() for p in trained], [torch.randn_like(p) for p in trained]

    def loss(at: float) -> float:
        with torch.no_grad():
            for p, a, b in zip(trained, start, step, strict=True):
                p.copy_(a + at * b)
            return outputs(hsaid).double().square().mean().item()

    along = torch.dot(gradients, torch.cat([b.flatten() for b in step]).double()).item()
    assert (loss(5e-4) - loss(-5e-4)) / 1e-3 == pytest.approx(along, rel=2e-2, abs=1e-5)


def test_blocks_of_the_model_give_the_same_weights_and_gradients():
    model = bert(num_hidden_layers=2).eval()
    step = wrapped(model)
    expected, gradients, weights = outputs(step).detach(), gradient(step, lambda: outputs(step)), step.weights()
    theta, multipliers = step.theta.detach().clone(), step.multipliers.detach().clone()
    step.unwrap()
    block = wrapped(model, memory="block")
    with torch.no_grad():
        block.theta.copy_(theta)
        block.multipliers.copy_(multipliers)
    assert torch.equal(outputs(block), expected) and same(block.weights(), weights)
    assert relative(gradient(block, lambda: outputs(block)), gradients) < 1e-5


def test_tasks_and_merging():
    hsaid = wrapped()
    first = outputs(hsaid)
    hsaid.add_task("other")
    hsaid.set_task("other")
    assert torch.equal(outputs(moved(hsaid)), outputs(hsaid)) and not torch.equal(outputs(hsaid), first)
    hsaid.set_task("default")
    assert torch.equal(outputs(hsaid), first)
    assert torch.equal(hsaid.merge()(IDS).logits, first)


def test_a_checkpoint_says_which(tmp_path):
    model = bert(num_hidden_layers=2).eval()
    one = wrapped(model)
    expected = outputs(one)
    one.save_pretrained(tmp_path / "one")
    state = one.state_dict()
    one.unwrap()
    assert json.loads((tmp_path / "one" / CONFIG_FILE).read_text())["chunks"] == "one"
    loaded = HSAID.from_pretrained(tmp_path / "one", model)
    assert loaded.plan.one_chunk and torch.equal(outputs(loaded), expected)
    loaded.unwrap()

    every = wrapped(model, chunks="all")
    every.save_pretrained(tmp_path / "all")
    assert "chunks" not in json.loads((tmp_path / "all" / CONFIG_FILE).read_text())
    assert b'"chunks"' not in (tmp_path / "all" / VALUES_FILE).read_bytes()
    with pytest.raises(RuntimeError, match="expected chunks 'all', as in this HSAID, got 'one': .* chunks='one'"):
        every.load_state_dict(state)


def test_checkpoints_of_before_have_all_chunks_in_every_block(tmp_path):
    """A theta of more than 16,384 values, which by default is made otherwise now."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3))
    before = moved(HSAID(model, 17_000, "did", chunks="all"))
    weights = {name: weight.clone() for name, weight in before.weights().items()}
    before.save_pretrained(tmp_path)
    before.unwrap()
    loaded = HSAID.from_pretrained(tmp_path, model)
    assert not loaded.plan.one_chunk and same(loaded.weights(), weights)
    loaded.unwrap()
    assert HSAID(model, 17_000, "did").plan.one_chunk


def test_the_published_call_keeps_all_chunks():
    assert not FastfoodWrap(nn.Sequential(nn.Linear(300, 400)), 17_000, device="cpu").plan.one_chunk


def test_what_would_leave_parts_of_theta_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"^chunks: expected blocks that use each of 2 chunks of theta, got 2 blocks"):
        HSAID(nn.Linear(20, 40), 17_000, "did")
    with pytest.raises(ValueError, match="^chunks: expected one of 'all', 'one', got 'some'"):
        HSAID(nn.Linear(20, 40), 100, "did", chunks="some")
