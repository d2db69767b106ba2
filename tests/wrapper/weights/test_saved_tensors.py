"""memory="block": weights live while their block runs, and backward makes them again, with the same bits.

Run as a script, this file is a process for each measurement.
"""

import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ENVIRONMENT, memory, reset_peak
from models import FAMILIES, IDS, SIZES, bert, family, gradient, mlp, moved, relative, tied_models
from processes import forked
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops
from hsaid_kernels.wrapper.weights import launches
from hsaid_kernels.wrapper.weights.saved_tensors import Lowered, SavedWeight, _lowered

LABELS = torch.tensor([0, 1])


def deep_bert(**changes) -> nn.Module:
    return bert(num_hidden_layers=4, **changes)


def both(make, **options) -> list[HSAID]:
    """The same HSAID with memory="step" and "block"."""
    found = []
    for kind in ("step", "block"):
        torch.manual_seed(0)
        hsaid = HSAID(make(), 80, memory=kind, **options)
        torch.manual_seed(1)
        found.append(moved(hsaid))
    return found


@pytest.fixture
def alive(monkeypatch):
    """A function: bytes of weights, in blocks of the largest's size. Notes the most so far, as its attribute `most`."""
    storages = []
    forward = ops.fastfood_forward

    def count() -> float:
        sizes = [size for ref, size in storages if not ref.expired()]
        return sum(sizes) / max(size for _, size in storages)

    def watched(*arguments):
        flat = forward(*arguments)
        storages.append((StorageWeakRef(flat.untyped_storage()), flat.nbytes))
        count.most = max(count.most, count())
        return flat

    count.most = 0.0
    monkeypatch.setattr(ops, "fastfood_forward", watched)
    return count


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name):
    """Outputs bit for bit. In some models blocks come again, and their gradients are added in another order."""
    if name == "ViT":
        inputs = dict(pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    else:
        inputs = dict(input_ids=IDS % 30)
    inputs |= dict(decoder_input_ids=IDS % 30) if name in ("T5", "Bart") else {}
    step, block = both(lambda: family(name))
    for _ in range(2):
        outputs = [hsaid(**inputs)[0] for hsaid in (step, block)]
        assert torch.equal(*outputs)
        assert relative(*(gradient(hsaid, lambda: hsaid(**inputs)[0]) for hsaid in (block, step))) <= 1e-6  # noqa: B023
        for hsaid in (step, block):
            with torch.no_grad():
                hsaid.theta.mul_(0.7)


@pytest.mark.parametrize("kind", tied_models())
def test_tied_models(kind):
    """A tied weight that is used twice is made twice, and its two gradients are added up behind the projection."""
    step, block = both(lambda: tied_models()[kind]().eval())
    ids = IDS % 40
    with torch.no_grad():
        assert torch.equal(step(input_ids=ids, labels=ids).loss, block(input_ids=ids, labels=ids).loss)
    got = [gradient(hsaid, lambda: hsaid(input_ids=ids, labels=ids).loss) for hsaid in (block, step)]  # noqa: B023
    assert relative(*got) <= 1e-5


OPTIONS = {
    "fully trained": dict(train_fully="classifier"),
    "heads": dict(partition="L1+L5|L3|L4"),
    "did": dict(partition="did"),
    "bfloat16": dict(dtype=torch.bfloat16),
    "some tensors": dict(include="layer.[12]"),
    "reference": dict(backend="reference"),
    "chunks": dict(width=32),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(what):
    dtype = OPTIONS[what].get("dtype", torch.float32)
    losses, gradients = [], []
    for hsaid in both(lambda: deep_bert(dtype=dtype).eval().to(dtype), **OPTIONS[what]):
        losses.append(hsaid(IDS, labels=LABELS).loss.detach())
        hsaid(IDS, labels=LABELS).loss.backward()
        gradients.append(hsaid.theta.grad)
    assert torch.equal(*losses) and torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_about_one_block_lives_at_a_time(alive, autocast, checkpointed):
    model = deep_bert().eval()
    block = moved(HSAID(model, 80, memory="block"))
    if checkpointed:
        model.activation_checkpointing_enable()
    with torch.autocast("cpu", enabled=autocast):
        loss = block(IDS, labels=LABELS).loss
    assert alive() <= 1.25 and alive.most <= 1.25
    loss.backward()
    assert alive.most <= 1.25 and block.theta.grad.any()
    assert len(block._source.maker.parts) >= 5


def test_evaluation_keeps_about_one_block(alive):
    block = moved(HSAID(deep_bert().eval(), 80, memory="block"))
    with torch.no_grad():
        first = block(IDS).logits
        assert alive.most <= 1.25
        assert torch.equal(block(IDS).logits, first)
    step = HSAID(deep_bert().eval(), 80)
    assert step.memory == "step" and block.memory == "block"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_no_copies_of_weights(dtype):
    """Autocast computes with copies in another dtype, which autograd would keep."""
    step, block = both(lambda: deep_bert().eval())
    weights = {parameter.shape for parameter in block.w0().values() if parameter.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    losses = []
    for hsaid in (step, block):
        hsaid.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype):
            loss = hsaid(IDS, labels=LABELS).loss
        of_weights = [t for t in kept if t.shape in weights and t.numel() > 200]  # larger than any activation
        assert bool(of_weights) == (hsaid is step)
        kept.clear()
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses) and torch.equal(step.theta.grad, block.theta.grad)


def test_what_comes_to_lie_where_a_copy_of_a_weight_was_is_no_weight():
    """Such as an activation in autocast's dtype, which is as large."""
    hsaid = moved(HSAID(mlp(), 24, memory="block"))
    with torch.autocast("cpu", torch.bfloat16):
        out = hsaid(torch.randn(2, 4))
        weight = hsaid.model[0].weight
        lowered = Lowered.apply(weight, torch.bfloat16)
    cache, address = weight.of_model[0](), lowered.untyped_storage().data_ptr()
    assert SavedWeight.of(lowered, cache, lambda *_: None).name == "0.weight"
    assert SavedWeight.of(weight.detach(), cache, lambda *_: None).name is None
    assert SavedWeight.of(weight.detach().view(torch.int32), cache, lambda *_: None) is None
    note, other = _lowered.pop(address), torch.zeros_like(lowered)
    del lowered, out
    _lowered[other.untyped_storage().data_ptr()] = note  # as if it had got the same address
    assert note[0].expired() and SavedWeight.of(other, cache, lambda *_: None) is None


def test_several_graphs_at_once():
    """Each backward makes the weights of its own forward, also after theta has moved on with another one."""
    step, block = both(lambda: deep_bert().eval())
    for hsaid in (step, block):
        hsaid.results = []
        one, other = hsaid(IDS, labels=LABELS).loss, hsaid(IDS + 1, labels=LABELS).loss
        (one * other).backward()
        hsaid.results.append(hsaid.theta.grad.clone())
        loss = hsaid(IDS, labels=LABELS).loss
        for _ in range(2):
            loss.backward(retain_graph=True)
        hsaid.results.append(hsaid.theta.grad.clone())
        with torch.no_grad():
            hsaid(IDS)
    assert all(map(torch.equal, step.results, block.results))


@pytest.mark.parametrize("memory", ["step", "block"])
def test_hooks_for_saved_tensors_get_all_but_the_weights(memory):
    """As those of activation offloading, which leave the parameters of a model where they are."""
    block = dict(zip(("step", "block"), both(lambda: deep_bert().eval())))[memory]
    expected = gradient(block, lambda: block(IDS).logits)
    offloaded = []

    def pack(tensor):
        offloaded.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = block(IDS).logits.square().mean()
    block.zero_grad()
    loss.backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in block.parameters()]), expected)
    assert len(offloaded) > 20 and block.w0()["bert.encoder.layer.0.intermediate.dense.weight"].shape not in offloaded


class Writing(nn.Module):
    """Writes to what autograd has kept."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.one(x).exp()
        out = self.other(hidden)
        hidden.add_(1.0)
        return out


def test_an_activation_written_to_in_place_is_autograds_error():
    for hsaid in both(Writing):
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            hsaid(torch.ones(2, 4)).sum().backward()


class Flipped(nn.Module):
    """Saves a view of its weight that is negated lazily."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 40).view(20, 2))

    def forward(self, x):
        return torch.view_as_complex(self.weight).conj().imag * x


def test_lazily_negated_views():
    step, block = both(Flipped)
    x = torch.linspace(1, 2, 20, requires_grad=True)
    found = []
    for hsaid in (step, block):
        (of_x,) = torch.autograd.grad(hsaid(x).square().sum(), x)
        found.append((of_x, gradient(hsaid, lambda: hsaid(x))))  # noqa: B023
    assert all(map(torch.equal, *found))


class Outer(nn.Module):
    """Runs another HSAID, which is not its own, in its forward."""

    def __init__(self, inner):
        super().__init__()
        self.a, self.inner = nn.Linear(5, 5), [inner]

    def forward(self, x):
        return self.inner[0](self.a(torch.tanh(self.inner[0](self.a(x)))))


def test_one_inside_the_forward_of_another():
    found = []
    for kind in ("step", "block"):
        torch.manual_seed(0)
        inner = moved(HSAID(nn.Linear(5, 5), 30, memory=kind))
        outer = moved(HSAID(Outer(inner), 30, memory=kind))
        x = torch.linspace(-1, 1, 5)
        outer(x).square().sum().backward()
        found.append((inner.theta.grad, outer.theta.grad))
    assert all(map(torch.equal, *found))


def test_w0_that_changes_before_backward_is_refused():
    _, block = both(lambda: deep_bert().eval())
    loss = block(IDS, labels=LABELS).loss
    with torch.no_grad():
        block.model.state_dict()["bert.encoder.layer.1.output.dense.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="'bert.encoder.layer.1.output.dense.weight' to stay as it is"):
        loss.backward()
    assert gradient(block, lambda: block(IDS).logits).any()


def test_w0_that_changes_between_reads_is_read_anew():
    step, block = both(lambda: deep_bert().eval())
    for hsaid in (step, block):
        layers = hsaid.model.bert.encoder.layer
        with torch.no_grad():
            layers[0].output.dense.weight, layers[1].output.dense.weight  # noqa: B018  # the first is not kept
            hsaid.w0()["bert.encoder.layer.0.output.dense.bias"].add_(1.0)
            hsaid.read = [layers[0].output.dense.weight.clone(), layers[0].output.dense.bias.clone()]
    assert all(map(torch.equal, step.read, block.read))


def test_theta_that_changes_before_backward_is_refused():
    _, block = both(lambda: deep_bert().eval())
    loss = block(IDS, labels=LABELS).loss
    with torch.no_grad():
        block.theta.add_(1.0)
    with pytest.raises(RuntimeError, match="theta has been changed in place"):
        loss.backward()


def test_a_weight_written_to_is_refused():
    _, block = both(mlp)
    with torch.no_grad():
        weight = block.model[0].weight
        weight.add_(1.0)
        with pytest.raises(RuntimeError, match="read only"):
            block(torch.ones(1, 4))
    assert block(torch.ones(1, 4)).isfinite().all()


def test_a_weight_written_to_before_backward_is_refused():
    for hsaid, said in zip(both(mlp), ("inplace operation", "read only"), strict=True):
        loss = hsaid(torch.ones(1, 4)).sum()
        with torch.no_grad():
            hsaid.model[-1].weight.add_(1.0)
        with pytest.raises(RuntimeError, match=said):
            loss.backward()
        assert hsaid.theta.grad is None


def test_no_memory_in_backward_leaves_theta_untouched(monkeypatch):
    step, block = both(lambda: deep_bert().eval())
    expected = gradient(step, lambda: step(IDS).logits)
    before = block.theta.detach().clone()
    loss = block(IDS).logits.square().mean()
    forward, calls = ops.fastfood_forward, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("numel: no memory for weights of 1 bytes")
        return forward(*arguments)

    monkeypatch.setattr(ops, "fastfood_forward", failing)
    with pytest.raises(RuntimeError, match="no memory for weights"):
        loss.backward()
    assert torch.equal(block.theta, before)
    assert torch.equal(gradient(block, lambda: block(IDS).logits), expected)


def test_inside_transforms_of_torch_func_weights_are_kept():
    _, block = both(mlp)
    x = torch.linspace(-1, 1, 4)
    jacobian = torch.func.jacrev(block)(x)
    assert jacobian.shape == (3, 4) and torch.equal(jacobian, torch.func.jacrev(block)(x))


def test_a_block_that_comes_again_is_made_again():
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.other(torch.tanh(self.one(x))))
            return x

    step, block = both(Looping)
    x = torch.linspace(-1, 1, 5)
    assert torch.equal(step(x), block(x))
    assert relative(gradient(block, lambda: block(x)), gradient(step, lambda: step(x))) <= 1e-6


def test_what_memory_may_be():
    for wrong in ("all", None, True):
        with pytest.raises(ValueError, match="memory: expected one of 'step', 'block', got"):
            HSAID(mlp(), 24, memory=wrong)


WIDE = dict(hidden_size=256, num_hidden_layers=16, num_attention_heads=4, intermediate_size=1024)  # 3.2 MB a layer
TABLE = dict(vocab_size=60_000)  # 61 MB


CASES = [(kind, autocast) for kind in ("step", "block") for autocast in ("", "autocast")]


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], list[float]]:
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(CASES, (list(map(float, line.split())) for line in ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("autocast", ["", "autocast"])
def test_memory_of_a_step(autocast, measured):
    """A step takes W0, the activations, and about two blocks: neither all weights, nor those of the embeddings."""
    step, *_ = measured["step", autocast]
    block, layer, _, weights = measured["block", autocast]
    assert block <= 2 * layer + 40e6 < weights  # the rest is activations and the allocator
    assert step - block >= 0.6 * weights


def measure(kind: str, autocast: str) -> None:
    config = transformers.BertConfig(**SIZES | WIDE | TABLE, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config)
    hsaid = HSAID(model, 200, memory=kind)
    groups_of = hsaid._source.maker.parts
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layer = 4 * max(sum(numels[name] for name in names) for names in groups_of)
    table = 4 * max(numels.values())
    # What the first forward makes once: tables of the plan, imports.
    small = HSAID(bert(), 60, memory=kind)
    small(IDS, labels=LABELS).loss.backward()
    before = reset_peak()
    for _ in range(2):
        with torch.autocast("cpu", enabled=bool(autocast)):
            loss = hsaid(IDS, labels=LABELS).loss
        loss.backward()
    print(memory("VmHWM") - before, layer, table, 4 * sum(numels.values()) - table)


if __name__ == "__main__":
    assert launches.SMALLEST_TABLE <= TABLE["vocab_size"] * WIDE["hidden_size"]
    for case in CASES:
        forked(measure, *case)
