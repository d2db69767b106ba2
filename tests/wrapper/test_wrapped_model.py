"""From wrapping to unwrap(), every read of a weight gives the projected weight of now; W0 stays where it is."""

import asyncio
import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import safetensors.torch
import torch
import transformers
from models import IDS, bert, mlp, moved, reads, same, snapshot, tied_models
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hsaid_kernels import HSAID


class Recurrent(nn.Module):
    """Reads its weights when a generator, a coroutine or a `map` comes to them."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.scale

    @torch.no_grad()
    def stream(self, x, times):
        for _ in range(times):
            x = self(x)
            yield x

    def chat(self, x, times):
        return self.stream(x, times)

    def lazily(self, xs):
        return map(self.layer, xs)

    async def later(self, x):
        await asyncio.sleep(0)
        return self(x)


def change(hsaid: HSAID) -> None:
    with torch.no_grad():
        hsaid.theta.add_(torch.randn(len(hsaid.theta)))


def gradient(hsaid: HSAID, compute) -> torch.Tensor:
    hsaid.zero_grad()
    compute().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in hsaid.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- reads from anywhere, at any time


@pytest.mark.parametrize("build", [mlp, bert, *tied_models().values()])
def test_every_weight_reads_as_that_of_now(build):
    model = build().eval()
    names = dict(model.named_parameters(remove_duplicate=False))
    hsaid = HSAID(model, 80)
    for _ in range(3):
        change(hsaid)
        merged, read = hsaid.merge(), reads(model)
        for name, parameter in merged.named_parameters(remove_duplicate=False):
            assert torch.equal(read[name], parameter) and isinstance(read[name], nn.Parameter), name
            assert read[name].requires_grad and not torch.equal(read[name], names[name]), name
        assert all(p is names[n] for n, p in model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            assert not any(weight.requires_grad for weight in reads(model).values())


@pytest.mark.parametrize("how", ["theta", "data", "fused", "by hand", "multipliers", "W0", "load_state_dict"])
def test_a_read_sees_every_change(how):
    hsaid = moved(HSAID(mlp(), 24))
    other = moved(HSAID(copy.deepcopy(hsaid.model), 24)).state_dict()
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.1, fused=how == "fused")
    hsaid.model(torch.ones(1, 4)).sum().backward()
    before = {name: weight.clone() for name, weight in reads(hsaid.model).items()}
    with torch.no_grad():
        {
            "theta": lambda: hsaid.theta.mul_(2),
            "data": lambda: hsaid.theta.data.mul_(2),
            "fused": optimizer.step,
            "by hand": lambda: [p.data.sub_(p.grad) for p in hsaid.parameters()],
            "multipliers": lambda: hsaid.multipliers.mul_(2),
            "W0": lambda: [w0.add_(1) for w0 in hsaid.w0().values()],
            "load_state_dict": lambda: hsaid.load_state_dict(other),
        }[how]()
    for name, weight in hsaid.merge().named_parameters():
        assert torch.equal(reads(hsaid.model)[name], weight) and not torch.equal(before[name], weight), name


def test_parts_of_the_model_run_on_it_and_are_differentiable():
    hsaid = moved(HSAID(bert().eval(), 60))
    expected = gradient(hsaid, lambda: hsaid(IDS).logits)
    merged = hsaid.merge()

    def by_parts():
        hidden = hsaid.bert.encoder(hsaid.model.bert.embeddings(IDS)).last_hidden_state
        return hsaid.model.classifier(hsaid.bert.pooler(hidden))

    assert torch.equal(by_parts(), merged(IDS).logits)
    assert relative(gradient(hsaid, by_parts), expected) < 1e-6
    embeddings = hsaid.get_input_embeddings()
    assert torch.equal(embeddings(IDS), merged.get_input_embeddings()(IDS))


def test_single_weights_in_a_loss():
    gpt2 = moved(HSAID(tied_models()["gpt2"]().eval(), 80))
    hidden = gpt2.transformer(IDS).last_hidden_state
    logits = hidden @ gpt2.lm_head.weight.T
    assert torch.allclose(logits, gpt2.merge()(IDS).logits, atol=1e-6)
    assert gradient(gpt2, lambda: gpt2.lm_head.weight).any()
    clip = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
        projection_dim=8,
    )
    hsaid = moved(HSAID(transformers.CLIPModel(clip), 120))
    assert torch.equal(hsaid.logit_scale, hsaid.merge().logit_scale) and hsaid.logit_scale.requires_grad
    assert hsaid.logit_scale != hsaid.w0()["logit_scale"]


def test_an_encoder_first_as_generation_does():
    hsaid = moved(HSAID(tied_models()["t5"]().eval(), 80))
    encoded = hsaid.get_encoder()(input_ids=IDS)
    merged = hsaid.merge()
    expected = merged(encoder_outputs=merged.get_encoder()(input_ids=IDS), labels=IDS).loss
    assert torch.equal(hsaid(encoder_outputs=encoded, labels=IDS).loss, expected)


@pytest.mark.parametrize("method", ["stream", "chat"])
def test_streams_see_the_weights_of_now(method):
    hsaid, x = moved(HSAID(Recurrent(), 20)), torch.randn(2, 4)
    expected = list(hsaid.merge().stream(x, 4))
    one, two = getattr(hsaid, method)(x, 3), getattr(hsaid.model, method)(x, 4)
    first, second = [next(one)], [next(two), next(two)]
    first += one
    second += two
    assert all(map(torch.equal, first, expected)) and all(map(torch.equal, second, expected)) and len(second) == 4
    half = getattr(hsaid, method)(x, 3)
    x = next(half)
    change(hsaid)
    assert torch.equal(next(half), hsaid.merge()(x))  # left half read, nothing waits for it


def test_lazy_results_and_coroutines():
    hsaid, x = moved(HSAID(Recurrent(), 20)), torch.randn(2, 4)
    mapped, later = hsaid.lazily([x, x]), hsaid.later(x)
    change(hsaid)
    assert torch.equal(next(mapped), hsaid.merge().layer(x))
    assert torch.equal(asyncio.run(later), hsaid.merge()(x))
    change(hsaid)
    assert torch.equal(next(mapped), hsaid.merge().layer(x))


def test_threads_do_not_wait_for_each_other():
    hsaid, x = moved(HSAID(Recurrent(), 20)), torch.randn(2, 4)
    stream = hsaid.stream(x, 3)
    next(stream)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(20)

    handle = hsaid.model.register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: found.append(hsaid(x)))
    first.start()
    assert inside.wait(20)
    second = threading.Thread(target=lambda: found.append(hsaid(x)))
    second.start()
    second.join(20)
    assert not second.is_alive() and first.is_alive() and len(found) == 1
    go_on.set()
    first.join(20)
    handle.remove()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], hsaid.merge()(x))


def test_tasks_are_added_and_moved_while_others_read():
    hsaid = moved(HSAID(mlp(), 24, train_fully="2"))
    expected, wrong, done = {name: w.clone() for name, w in reads(hsaid.model).items()}, [], threading.Event()

    def serve():
        while not done.is_set():
            with torch.no_grad():
                if not same(reads(hsaid.model), expected):
                    wrong.append("read")

    server = threading.Thread(target=serve)
    server.start()
    for number in range(100):
        hsaid.add_task(str(number))
        hsaid.float()
    done.set()
    server.join()
    assert not wrong and len(hsaid.tasks) == 101


def test_training_and_inference_in_two_threads():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(3, 4)
    wrong, done = [], threading.Event()

    def serve():
        while not done.is_set():
            with torch.no_grad():
                weight = hsaid.model[0].weight
                if torch.equal(weight, hsaid.w0()["0.weight"]):
                    wrong.append("W0")

    server = threading.Thread(target=serve)
    server.start()
    optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.01)
    try:
        for _ in range(50):
            optimizer.zero_grad()
            hsaid(x).square().mean().backward()
            optimizer.step()
            assert torch.equal(hsaid(x), hsaid.merge()(x))
    finally:
        done.set()
        server.join()
    assert not wrong


# --- recomputation in backward


class Checkpointed(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.first, self.rest = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)),
        )

    def forward(self, x):
        x = self.first(x)
        if self.how == "plain":
            return self.rest(x)
        if self.how == "sequential":
            return checkpoint_sequential(self.rest, 2, x, use_reentrant=False)
        return checkpoint(self.rest, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "saved tensors", "sequential"])
def test_a_model_that_checkpoints_itself(how):
    hsaid, x = moved(HSAID(Checkpointed("plain"), 60)), torch.randn(8, 8)
    expected = gradient(hsaid, lambda: hsaid(x))
    hsaid.how = how
    for run in (hsaid, hsaid.model):
        assert relative(gradient(hsaid, lambda run=run: run(x)), expected) < 1e-6
    loss = hsaid(x).sum()
    hsaid.theta.data.add_(1)  # which torch does not count
    with pytest.raises(
        RuntimeError, match=r"theta has been changed in place|expected the task and the theta of forward"
    ):
        loss.backward()


def test_several_backwards_of_one_theta():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(3, 4)
    once = gradient(hsaid, lambda: hsaid.model(x))
    hsaid.zero_grad()
    losses = [hsaid.model(x).square().mean() for _ in range(2)] + [hsaid(x).square().mean()]
    for loss in losses:
        loss.backward()
    assert relative(torch.cat([p.grad.flatten() for p in hsaid.parameters()]), 3 * once) < 1e-6
    loss = hsaid(x).square().mean()
    with torch.no_grad():
        hsaid.multipliers.add_(1)
    with pytest.raises(RuntimeError, match="the multipliers have been changed in place between forward and backward"):
        loss.backward()


# --- the tree of modules


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


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


# --- what is said on a parameter


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


# --- layers that keep or copy weights


LAYERS = {
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2, batch_first=True),
    "gru": lambda: nn.GRU(4, 5),
    "rnn cell": lambda: nn.RNNCell(4, 4),
    "attention": lambda: SelfAttention(),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), 2),
    "weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(),
    "new weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.3),
    "list": lambda: Listed(),
}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": torch.ones(4)})

    def forward(self, x):
        for matrix in self.matrices:
            x = x @ matrix
        return x * self.named["scale"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_keep_weights(kind, mode):
    torch.manual_seed(0)
    model, x = LAYERS[kind](), torch.randn(2, 3, 4)
    if kind == "rnn cell":
        x = x[0]
    model.train(mode == "train" and kind != "spectral norm")
    with torch.no_grad():
        untouched = model(x)
    plain = copy.deepcopy(model) if "norm" not in kind or "new" in kind else None
    untouched = untouched[0] if isinstance(untouched, tuple) else untouched
    hsaid = moved(HSAID(model, 60))

    def first(module):
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    for _ in range(2):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for run in (hsaid, model):
                    assert torch.allclose(first(run), first(hsaid.merge()), atol=1e-6), (grad, run is model)
                    assert not torch.allclose(first(run), untouched, atol=1e-4)
        assert gradient(hsaid, lambda: first(model)).any()
        change(hsaid)
    model = hsaid.unwrap()
    with torch.no_grad():
        assert torch.equal(first(model), untouched)
    if plain is not None:
        assert type(model) is type(plain) or kind in ("new weight norm", "orthogonal")


@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if "norm" not in kind and kind not in ("orthogonal", "pruned")]
)
def test_layers_that_keep_weights_are_copied(kind):
    hsaid, x = (
        moved(HSAID(nn.Sequential(LAYERS[kind]()), 60).eval()),
        torch.randn(2, 4) if "cell" in kind else torch.randn(2, 3, 4),
    )
    with torch.no_grad():
        expected = hsaid(x)
        for copied in (
            copy.deepcopy(hsaid),
            pickle.loads(pickle.dumps(hsaid)),
            copy.deepcopy(hsaid.model),
            pickle.loads(pickle.dumps(hsaid.model)),
            hsaid.merge(),
        ):
            out = copied(x)
            pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
            for a, b in pairs:
                a, b = (torch.cat([t.flatten() for t in c]) if isinstance(c, tuple) else c for c in (a, b))
                assert torch.allclose(a, b, atol=1e-6)


class Caching(nn.Module):
    """As LeViT: derives a tensor from its weight at the first evaluation, and forgets it when training begins."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.randn(4)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return x * self.weight[[3, 2, 1, 0]]
        if x.device not in self.cache:
            self.cache[x.device] = self.weight[[3, 2, 1, 0]]
        return x * self.cache[x.device]


@torch.no_grad()
def test_what_modules_derive_from_their_weights(tmp_path):
    model, x = nn.Sequential(Caching(), nn.Linear(4, 4)).eval(), torch.ones(1, 4)
    plain = model(x)

    def truth(hsaid):
        return torch.func.functional_call(copy.deepcopy(hsaid).train().model, hsaid.weights(), (x,))

    hsaid = HSAID(model, 24, task="a")
    hsaid.add_task("b")
    for change in (
        lambda: hsaid.theta.normal_(),
        lambda: hsaid.set_task("b"),
        lambda: hsaid.theta.normal_(),
        lambda: hsaid.set_task("a"),
        lambda: hsaid.load_state_dict(copy.deepcopy(hsaid.state_dict()) | {"theta": torch.ones(len(hsaid.theta))}),
    ):
        change()
        assert torch.allclose(hsaid(x), truth(hsaid), atol=1e-6) and torch.allclose(
            hsaid.merge()(x), hsaid(x), atol=1e-6
        )
        assert not model.training and not model[0].training
    expected = hsaid(x)
    assert torch.allclose(hsaid.merge(inplace=True)(x), expected, atol=1e-6)
    hsaid.unmerge()
    assert torch.allclose(hsaid(x), expected, atol=1e-6)
    hsaid.save_pretrained(tmp_path)
    assert torch.equal(hsaid.unwrap()(x), plain)
    assert torch.allclose(HSAID.from_pretrained(tmp_path, model)(x), expected, atol=1e-6)


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


def test_masks_stay_while_the_model_is_wrapped():
    with torch.no_grad():  # or what prune stores could not be copied
        model = nn.Sequential(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.3))
    plain, x = copy.deepcopy(model), torch.ones(1, 8)
    hsaid = moved(HSAID(model, 40))
    assert (model[0].weight == 0).sum() == 19 and torch.equal(model[0].weight, hsaid.merge()[0].weight)
    with pytest.raises(RuntimeError, match=r"the mask of 'weight' to stay .* unwrap\(\) before prune.remove\(\)"):
        prune.remove(model[0], "weight")
    assert torch.equal(hsaid(x), hsaid.merge()(x)) and same(snapshot(model), snapshot(plain))
    prune.remove(hsaid.unwrap()[0], "weight")
    assert torch.equal(model(x), plain(x))


# --- modules that are set later


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

    hsaid, x, new = moved(HSAID(Net(), 24)), torch.ones(1, 4), nn.Linear(4, 4)
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
    out = run(x)
    assert hsaid.w0()["layers.0.weight"] is weight and not torch.equal(out, nn.functional.linear(x, weight, bias))
    assert torch.equal(out, hsaid.merge()(x)) and torch.equal(run(x), hsaid.model(x))


def test_what_would_change_the_tensors_is_refused_before_anything_changes():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    model, expected = hsaid.model, hsaid(x)
    for grad in (True, False):
        for change in (
            lambda: setattr(model, "2", nn.Linear(6, 5)),
            lambda: setattr(model[0], "bias", nn.Parameter(torch.ones(5))),
            lambda: setattr(model[0], "lora", nn.Parameter(torch.ones(2, 4))),
            lambda: setattr(model, "3", nn.Linear(3, 3)),
            lambda: delattr(model[0], "bias"),
            lambda: prune.l1_unstructured(model[0], "weight", 0.3),
        ):
            with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError, TypeError)):
                change()
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
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    old, w0 = hsaid.model[0], dict(hsaid.w0())
    hsaid.model[0] = nn.Linear(4, 6)
    out = hsaid(x)
    assert old.weight is w0["0.weight"] and old.weight.requires_grad and type(old) is nn.Linear
    copied = copy.copy(hsaid.model[2])
    plain = hsaid.unwrap()
    expected = plain(x)
    assert copied.weight is plain[2].weight and torch.equal(plain(x), expected) and not torch.equal(out, expected)
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("optimizer", ["fused", "by hand"])
def test_a_model_that_trains_itself(optimizer):
    class Trained(Recurrent):
        def fit(self, step, x):
            losses = []
            for _ in range(4):
                loss = self(x).square().mean()
                loss.backward()
                step()
                losses.append(loss.item())
            return losses

    found = []
    for through in (lambda hsaid: hsaid, lambda hsaid: hsaid.model):
        torch.manual_seed(0)
        hsaid, x = moved(HSAID(Trained(), 20)), torch.randn(3, 4)
        fused = torch.optim.AdamW(hsaid.parameters(), lr=0.01, fused=True)

        def by_hand(hsaid=hsaid):
            for parameter in hsaid.parameters():
                parameter.data -= 0.5 * parameter.grad

        found.append(through(hsaid).fit(fused.step if optimizer == "fused" else by_hand, x))
    assert found[0] == found[1] and len(set(found[0])) == 4


@pytest.mark.parametrize("how", ["reentrant", "saved tensors"])
def test_calls_of_the_hsaid_and_of_its_model_may_alternate(how):
    hsaid, x = HSAID(Checkpointed(how), 60), torch.randn(8, 8)
    optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.1)
    for run in (hsaid, hsaid.model, hsaid.model.rest, hsaid):
        before = hsaid.theta.detach().clone()
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(hsaid.theta, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["set_task", "unwrap"])
def test_backward_of_another_task_is_refused_where_it_recomputes(between, reentrant):
    hsaid, x = moved(HSAID(Checkpointed("reentrant" if reentrant else "saved tensors"), 60)), torch.randn(8, 8)
    hsaid.add_task("b")
    loss = hsaid(x).sum()
    hsaid.set_task("b") if between == "set_task" else hsaid.unwrap()
    reason = r"backward\(\): expected " + ("the task" if between == "set_task" else r"a call before unwrap\(\)")
    with pytest.raises(RuntimeError, match=reason):
        loss.backward()
    if between == "set_task":
        for task in hsaid.tasks:  # without recomputation, tasks may share a backward pass
            hsaid.how = "plain"
            hsaid.set_task(task)
            loss = loss + hsaid(x).sum() if task == "b" else hsaid(x).sum()
        loss.backward()
        assert hsaid.theta.grad.any()


@pytest.mark.parametrize("saved", [torch.ops.aten.addmm.default, torch.ops.aten.tanh.default, None])
def test_selective_activation_checkpointing(saved):
    policy = torch.utils.checkpoint.CheckpointPolicy
    save = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts,
        lambda ctx, op, *args, **kwargs: policy.MUST_SAVE if saved in (None, op) else policy.PREFER_RECOMPUTE,
    )
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(3, 4)
    expected = gradient(hsaid, lambda: hsaid(x))
    for run in (hsaid, hsaid.model):
        out = lambda run=run: checkpoint(run, x, use_reentrant=False, context_fn=save)  # noqa: E731
        assert relative(gradient(hsaid, out), expected) < 1e-6


def test_derivatives_that_there_are_not_are_refused():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    theta = hsaid.theta.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta, torch.ones_like(theta))
        with pytest.raises(RuntimeError, match="theta: expected a tensor without a tangent"):
            torch.func.functional_call(hsaid, {"theta": dual}, (x,))
    with pytest.raises(
        RuntimeError, match="theta: expected an ordinary tensor, got one inside a transform of torch.func"
    ):
        torch.func.grad(lambda t: torch.func.functional_call(hsaid, {"theta": t}, (x,)).sum())(theta)
    other = {name: nn.Parameter(torch.ones_like(w0)) for name, w0 in hsaid.w0().items()}
    with pytest.raises(RuntimeError, match="got another nn.Parameter in its place"):
        torch.func.functional_call(hsaid.model, other, (x,))
    for export in (torch.jit.trace, torch.export.export):
        with pytest.raises(Exception, match=r"trace or export hsaid.merge\(\)"):
            export(hsaid, (x,))
    assert torch.equal(hsaid(x), hsaid.merge()(x))


def test_parameters_that_a_module_keeps_by_itself_are_refused():
    for keep in (lambda p: [p], lambda p: {"p": p}, lambda p: functools.partial(nn.functional.linear, weight=p)):
        model = mlp()
        model.kept = keep(model[2].weight)
        with pytest.raises(
            ValueError, match="read '2.weight' as their parameter, got 'kept', which keeps it by itself"
        ):
            HSAID(model, 24)
        assert HSAID(model, 24, exclude="2.weight")(torch.ones(1, 4)).shape == (1, 3)


class Copying(nn.Linear):
    def __deepcopy__(self, memo):
        made = Copying(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


class Reducing(nn.Linear):
    def __reduce__(self):
        return nn.Linear, (self.in_features, self.out_features), self.__dict__


@pytest.mark.parametrize("kind", [Copying, Reducing])
def test_modules_with_copies_of_their_own(kind):
    hsaid, x = moved(HSAID(nn.Sequential(kind(4, 4)), 24)), torch.ones(1, 4)
    for copied in (hsaid, hsaid.model, hsaid.model[0]):
        with pytest.raises(RuntimeError, match=f"got a {kind.__name__} with copies of its own"):
            copy.deepcopy(copied)
    assert torch.equal(hsaid.merge()(x), hsaid(x))
    assert copy.deepcopy(hsaid.unwrap())(x).shape == (1, 4)


def test_compiled_parts_in_several_threads():
    torch.compiler.reset()
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(2, 4)
    for layer in (hsaid.model[0], hsaid.model[2]):
        layer.compile(backend="eager")
    expected, wrong, done = gradient(hsaid, lambda: hsaid(x)), [], threading.Event()

    def serve():
        with torch.no_grad():
            out = hsaid(x)
            while not done.is_set():
                if not torch.equal(hsaid(x), out):
                    wrong.append("served")

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(60):
        if relative(gradient(hsaid, lambda: hsaid(x)), expected) > 1e-6:
            wrong.append("gradient")
    done.set()
    server.join()
    assert not wrong


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


# --- unwrapping


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


def in_another_process(hsaid: HSAID, x: torch.Tensor) -> list[torch.Tensor]:
    torch.set_num_threads(1)
    out = hsaid.model(x)
    out.sum().backward()
    return [out.detach(), hsaid.model[0].weight.detach().clone(), hsaid.theta.grad]


def test_another_process():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        out, weight, grad = pool.apply(in_another_process, (hsaid, x))
    hsaid(x).sum().backward()
    assert torch.equal(out, hsaid(x)) and torch.equal(weight, hsaid.model[0].weight)
    assert torch.equal(grad, hsaid.theta.grad)


# --- several dtypes


def test_each_tensor_keeps_its_dtype(tmp_path):
    """As of T5 in float16, of which transformers keeps the layers "wo" in float32."""
    model = tied_models()["t5"]().eval().bfloat16()
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert len(set(dtypes.values())) == 2
    hsaid = moved(HSAID(model, 80))
    assert {name: weight.dtype for name, weight in hsaid.weights().items()} == dtypes
    whole = moved(HSAID(copy.deepcopy(hsaid.unwrapped().__enter__()).float(), 80))
    hsaid._claim()
    whole.load_state_dict(hsaid.state_dict())
    for name, weight in hsaid.weights().items():
        assert torch.equal(weight, whole.weights()[name].to(weight.dtype)), name
    layer = model.encoder.block[0].layer[1].DenseReluDense
    (layer.wo(torch.ones(1, 32)).sum() + layer.wi(torch.ones(1, 16, dtype=torch.bfloat16)).float().sum()).backward()
    assert hsaid.theta.grad.any() and hsaid.multipliers.grad.any()
    hsaid.save_pretrained(tmp_path)
    loaded = HSAID.from_pretrained(tmp_path, copy.deepcopy(hsaid.unwrap()))
    assert {name: weight.dtype for name, weight in loaded.weights().items()} == dtypes
    assert {weight.dtype for weight in loaded.half().weights().values()} == {torch.float16}


# --- torch.compile of parts, and functional calls


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_parts_run_on_the_weights_of_now(outside):
    torch.compiler.reset()
    hsaid, x = moved(HSAID(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 24)), torch.randn(2, 4)
    run = hsaid.model if outside else hsaid
    hsaid.model[0].compile(backend="aot_eager")
    hsaid.model[2].compile(backend="aot_eager")
    for _ in range(3):
        with torch.no_grad():
            assert torch.allclose(run(x), hsaid.merge()(x), atol=1e-6)
        expected = gradient(hsaid, lambda: torch.func.functional_call(hsaid.model, hsaid.weights(), (x,)))
        assert relative(gradient(hsaid, lambda: run(x)), expected) < 1e-5
        change(hsaid)
    plain = hsaid.unwrap()
    assert torch.allclose(plain(x), nn.Sequential(*copy.deepcopy(plain))(x))


@pytest.mark.parametrize("part", ["model", "layer"])
def test_what_is_compiled_around_a_part_is_right_too(part):
    torch.compiler.reset()
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(2, 4)
    chosen = {"model": hsaid.model, "layer": hsaid.model[0]}[part]
    compiled = torch.compile(chosen, backend="aot_eager")
    for _ in range(3):
        merged = hsaid.merge()
        assert torch.allclose(compiled(x), (merged if part == "model" else merged[0])(x), atol=1e-6)
        assert gradient(hsaid, lambda: compiled(x)).any()
        change(hsaid)


def test_functional_call_runs_on_what_it_is_given():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(2, 4)
    old, before = hsaid.weights(), hsaid(x)
    change(hsaid)
    assert torch.equal(torch.func.functional_call(hsaid.model, old, (x,)), before)
    w0 = {name: tensor.detach() for name, tensor in hsaid.w0().items()}
    plain = torch.func.functional_call(hsaid.model, w0, (x,))
    hsaid.model.add_module("more", nn.Identity())  # so that the model is looked at again, in the midst of the call
    leaf = {"0.weight": w0["0.weight"].clone().requires_grad_()}
    assert (
        not torch.equal(torch.func.functional_call(hsaid.model, leaf, (x,)), hsaid(x))
        and leaf["0.weight"].requires_grad
    )
    some = torch.func.functional_call(hsaid.model, {"0.weight": w0["0.weight"]}, (x,))
    assert torch.equal(hsaid(x), hsaid.merge()(x)) and same(dict(hsaid.w0()), w0)
    assert torch.equal(plain, hsaid.unwrap()(x)) and not torch.equal(some, plain)
