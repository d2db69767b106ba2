"""From wrapping to unwrap(), every read of a weight gives that of now: from anywhere, at any time, in any thread."""

import asyncio
import copy
import threading

import pytest
import torch
import transformers
from models import (
    FAMILIES,
    IDS,
    bert,
    change,
    family,
    gradient,
    mlp,
    moved,
    reads,
    relative,
    same,
    snapshot,
    tied_models,
)
from torch import nn

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


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures_of_transformers(name):
    """Each runs on its weights of now, can be trained and copied, and is itself again afterwards."""
    model = family(name)
    pixels = torch.randn(2, 3, 16, 16)
    inputs = {"pixel_values": pixels} if name == "ViT" else {"input_ids": IDS}
    if name in ("T5", "Bart"):
        inputs["decoder_input_ids"] = IDS
    before, plain = snapshot(model), model(**inputs)[0].detach()
    hsaid = moved(HSAID(model, 200))
    out = hsaid(**inputs)[0]
    assert torch.equal(out, hsaid.merge()(**inputs)[0]) and not torch.allclose(out, plain, atol=1e-4)
    assert torch.equal(out, hsaid.model(**inputs)[0]) and torch.equal(out, copy.deepcopy(hsaid)(**inputs)[0])
    expected = gradient(
        hsaid, lambda: torch.func.functional_call(copy.deepcopy(hsaid).unwrap(), hsaid.weights(), (), inputs)[0]
    )
    assert relative(gradient(hsaid, lambda: hsaid(**inputs)[0]), expected) < 1e-5
    assert torch.equal(hsaid.unwrap()(**inputs)[0], plain) and same(snapshot(model), before)


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
