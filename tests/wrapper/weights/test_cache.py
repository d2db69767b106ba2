"""Projected weights are made once while theta, the multipliers and W0 stay, and again when one of them changes."""

import pytest
import torch
from models import BACKENDS, IDS, bert, mlp, moved, reads, same, snapshot
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops
from hsaid_kernels.wrapper.weights.cache import Trained


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The storage, weakly held, of every buffer of weights that is made."""
    made = []
    forward = ops.fastfood_forward

    def counted(*args):
        flat = forward(*args)
        made.append(StorageWeakRef(flat.untyped_storage()))
        return flat

    monkeypatch.setattr(ops, "fastfood_forward", counted)
    return made


def test_weights_are_made_once_while_nothing_changes(calls, backend):
    model = bert().eval()
    hsaid = HSAID(model, 60, backend=backend)

    def made(**_) -> int:
        """Op calls for three forwards without gradients, in different modes."""
        del calls[:]
        with torch.no_grad():
            first = hsaid(IDS).logits
        with torch.inference_mode():
            assert torch.equal(hsaid(IDS).logits, first)
        with torch.no_grad():
            assert torch.equal(hsaid(IDS).logits, first)
        return len(calls)

    assert made() == 1
    assert made() == 0
    classifier, square = model.classifier, "bert.encoder.layer.0.attention.self.query.weight"
    changes = {
        "theta": lambda: hsaid.theta.normal_(),
        "multipliers": lambda: hsaid.multipliers.mul_(2),
        "theta in inference mode": lambda: torch.inference_mode()(hsaid.theta.normal_)(),
        "theta replaced": lambda: setattr(hsaid, "theta", nn.Parameter(torch.randn(44))),
        "W0 in place": lambda: hsaid.w0()["classifier.bias"].add_(1),
        "theta at the start": lambda: hsaid.theta.zero_(),  # where W0 may be set
        "W0 loaded": lambda: model.load_state_dict(snapshot(bert())),
        "W0's data": lambda: setattr(hsaid.w0()["classifier.bias"], "data", torch.randn(2)),
        "W0's data where it was, transposed": lambda: setattr(hsaid.w0()[square], "data", hsaid.w0()[square].data.t()),
        "W0 replaced": lambda: setattr(classifier, "bias", nn.Parameter(torch.randn(2))),
        "module replaced": lambda: setattr(model, "classifier", nn.Linear(16, 2)),
        "theta again": lambda: hsaid.theta.normal_(),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        assert made() == 1, name
        assert made() == 0, name
        assert same(hsaid.weights(), dict(hsaid.merge().named_parameters())), name
        assert same(hsaid.weights(), reads(model)), name
        made()
    hsaid.theta.data.fill_(1)
    hsaid.train().eval()
    assert made() == 1


@pytest.mark.parametrize("memory", ["step", "block"])
def test_w0_that_comes_to_lie_otherwise_is_read_anew(memory):
    """A read outside of a call, of which nothing but the weight's own W0 is compared."""
    hsaid = HSAID(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), 40, memory=memory)
    layer, w0 = hsaid.model[0], hsaid.w0()["0.weight"]
    before = layer.weight.detach().clone()
    added = before - w0.data
    w0.data = w0.data.t()
    assert torch.allclose(layer.weight, w0.data + added) and not torch.equal(layer.weight, before)
    assert torch.equal(hsaid.merge()[0].weight, layer.weight)


@pytest.mark.parametrize("change", [lambda w0: w0[:4], lambda w0: w0.view(4, 16), lambda w0: torch.ones(16, 8)])
@pytest.mark.parametrize("read", [lambda hsaid: hsaid(torch.ones(1, 8)), lambda hsaid: hsaid.model[0].weight])
def test_w0_of_another_shape_is_refused_by_name(change, read):
    """Rows cut off in place, for instance: neither address nor version are others, and more rows would be enough."""
    hsaid = HSAID(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), 40)
    read(hsaid)
    w0 = hsaid.w0()["0.weight"]
    w0.data = change(w0.data)
    with pytest.raises(ValueError, match=r"model: expected '0.weight' of shape \(8, 8\), as it was"):
        read(hsaid)


def test_a_new_mode_takes_w0_that_was_written_to_behind_torchs_back():
    """By `.data`, of which torch counts no version."""
    hsaid, x = HSAID(mlp(), 24, backend="reference"), torch.ones(1, 4)
    for mode in (False, True):
        hsaid(x)
        hsaid.w0()["0.weight"].data.add_(1.0)
        hsaid.train(mode)
        hsaid(x)
        assert torch.equal(hsaid.model[0].weight, hsaid.w0()["0.weight"])


def test_inference_weights_made_first_serve_training_later(backend):
    hsaid = HSAID(bert(), 60, backend=backend)
    with torch.inference_mode():
        hsaid(IDS)
    hsaid.requires_grad_(False)
    embedded = torch.randn(2, 4, 16, requires_grad=True)
    hsaid(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.any()
    hsaid.requires_grad_(True)(IDS).logits.sum().backward()
    assert hsaid.theta.grad.any()


def test_without_anything_to_train_the_weights_are_kept(calls):
    hsaid = HSAID(mlp(), 24, backend="reference").requires_grad_(False)
    assert torch.equal(hsaid(torch.ones(1, 4)), hsaid(torch.ones(1, 4))) and len(calls) == 1
    hsaid.multipliers.requires_grad_()
    hsaid(torch.ones(1, 4)).sum().backward()
    assert len(calls) == 1 and hsaid.theta.grad is None and hsaid.multipliers.grad is not None


@pytest.mark.parametrize("first", ["theta", "multipliers"])
def test_what_is_trained_may_change_between_reads(calls, first):
    """The weights stay, and hang on what requires gradients now."""
    hsaid = HSAID(mlp(), 24, backend="reference")
    trained = {"theta": hsaid.theta, "multipliers": hsaid.multipliers}
    chosen = trained.pop(first)
    (other,) = trained.values()
    for tensor, left_out in ((chosen, other), (other, chosen)):
        left_out.requires_grad_(False)
        tensor.requires_grad_()
        hsaid.model(torch.ones(1, 4)).sum().backward()
        assert tensor.grad is not None and left_out.grad is None
        tensor.grad = None
    assert len(calls) == 1


def test_parameters_without_version_are_not_relied_on(calls):
    with torch.inference_mode():
        model = mlp()
    hsaid = HSAID(model, 24, backend="reference")
    with torch.no_grad():
        first = hsaid(torch.ones(1, 4))
    with torch.inference_mode():
        hsaid.w0()["0.weight"].add_(1)
        assert not torch.equal(hsaid(torch.ones(1, 4)), first)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True)])
def test_weights_are_made_again_after_an_optimizer_that_torch_does_not_count(options):
    hsaid, x = HSAID(mlp(), 24, backend="reference"), torch.ones(1, 4)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.1, **options)
    hsaid(x).sum().backward()
    with torch.no_grad():
        before = hsaid(x)
        optimizer.step()
        assert not torch.equal(hsaid(x), before) and torch.equal(hsaid(x), hsaid.merge()(x))
        hsaid.theta.data.zero_()
        assert torch.equal(hsaid(x), hsaid.merge()(x))


@pytest.mark.parametrize("memory", ["step", "block"])
def test_steps_of_optimizers_are_heard_outside_of_calls(memory, monkeypatch):
    """As on a GPU, where a read outside of a call compares no values; and a fused optimizer counts no version."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    hsaid, x = moved(HSAID(model, 24, backend="reference", memory=memory)), torch.ones(1, 4)
    monkeypatch.setattr(Trained, "has", lambda *_: True)
    optimizer, other = (torch.optim.AdamW(of, lr=0.1, fused=True) for of in (hsaid.parameters(), [nn.Parameter(x)]))
    for _ in range(3):
        hsaid(x).sum().backward()
        before, version = model[0].weight.detach().clone(), hsaid.theta._version
        optimizer.step()
        assert hsaid.theta._version == version
        read = model[2].weight.detach().clone()
        assert not torch.equal(read, before) and torch.equal(model(x), hsaid.merge()(x))
        assert torch.equal(model[0].weight, read)
        made = hsaid._source._cache
        other.step()  # of another model
        assert torch.equal(model[0].weight, read) and hsaid._source._cache is made is not None


def test_the_weights_of_one_theta_are_kept(calls):
    """For evaluation, several training steps (gradient accumulation) and reads; they go before the next are made."""
    hsaid, x = HSAID(mlp(), 24, backend="reference"), torch.ones(1, 4)
    with torch.no_grad():
        hsaid(x)
    for _ in range(2):
        hsaid(x).sum().backward()
    assert [call.expired() for call in calls] == [False]
    twice = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    (hsaid(x).sum() + hsaid.model(x).sum()).backward()
    assert torch.allclose(hsaid.theta.grad, twice) and len(calls) == 1
    with torch.no_grad():
        hsaid.theta.add_(1)
    made = ops.fastfood_forward
    ops.fastfood_forward = lambda *args: (alive.append([call.expired() for call in calls]), made(*args))[1]
    alive = []
    try:
        hsaid(x).sum().backward()
    finally:
        ops.fastfood_forward = made
    assert alive == [[True]] and len(calls) == 2
    hsaid.merge()
    assert calls.pop().expired()


class Twice(nn.Module):
    """Runs a layer without gradients, and then with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            self.layer(x)
        with torch.enable_grad():
            return self.layer(x)


@pytest.mark.parametrize("memory", ["step", "block"])
def test_gradients_that_are_enabled_inside_a_call(memory):
    hsaid = moved(HSAID(Twice(), 24, memory=memory))
    with torch.no_grad():
        out = hsaid(torch.ones(1, 4))
    out.sum().backward()
    assert hsaid.theta.grad.any()
