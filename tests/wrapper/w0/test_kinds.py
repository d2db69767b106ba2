"""Layers whose weight is no float parameter, of a class that `register_quantized` is told of."""

import copy
import pickle
import threading
import types

import pytest
import torch
import torch.distributed as dist
from few_bits import Int8
from models import IDS, bert, moved, relative
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import hsaid_kernels
from hsaid_kernels import HSAID
from hsaid_kernels.compat import FastfoodWrap
from hsaid_kernels.wrapper.heads import prune_heads, remove_heads
from hsaid_kernels.wrapper.importance import head_importance
from hsaid_kernels.wrapper.w0 import kinds, stored

LABELS = torch.tensor([0, 1])


class Codes(nn.Module):
    """As layers of hqq: codes in a parameter, scales in a dict, a bias that is no parameter, and methods of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.meta, self.bias = {"scale": scale}, linear.bias.detach().clone()

    def matrix(self):
        return self.codes * self.meta["scale"]

    def twice_the_bias(self):
        return (lambda: 2 * self.bias)()

    def forward(self, x):
        return x @ self.matrix().t() + self.bias


class Byte(nn.Linear):
    """Derived from a layer of torch, and with codes in the place of the weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        codes = (linear.weight.detach() * 64).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias

    def forward(self, x):
        return F.linear(x, self.weight / 64, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "largest"] = self.weight.abs().max()


class Convolution(nn.Conv1d):
    def forward(self, x):
        raise NotImplementedError


class Table(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.codes) / 64


KINDS = {Codes: Codes.matrix, Byte: lambda layer: layer.weight / 64, Table: lambda layer: layer.codes / 64}


@pytest.fixture(autouse=True)
def registered():
    for cls, dequantize in KINDS.items():
        hsaid_kernels.register_quantized(cls, dequantize)
    yield
    kinds._registered_layers.clear()
    kinds._registered_tensors.clear()


def model_of(kind: type, dtype=torch.float32) -> nn.Module:
    """A BERT whose layers of attention are of this kind."""
    torch.manual_seed(0)
    model = bert(hidden_size=32, num_hidden_layers=2).eval().to(dtype)
    for layer in model.bert.encoder.layer:
        for module in (layer.attention.self, layer.attention.output):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child))
    return model


def pair(kind: type) -> tuple[HSAID, HSAID]:
    """Over the quantized model, and over the float model of its values, moved alike."""
    few = HSAID(model_of(kind), 100, memory="block")
    many = HSAID(few.merge(), 100)
    moved(few)
    for own, other in zip(few.parameters(), many.parameters(), strict=True):
        other.data.copy_(own)
    return few, many


def state_of(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [Codes, Byte])
def test_trains_as_over_the_float_model(kind):
    few, many = pair(kind)
    assert few.plan.names == many.plan.names and few.plan.shapes == many.plan.shapes
    assert "bert.encoder.layer.0.attention.self.query.bias" in few.plan.names
    loss, other = few(IDS, labels=LABELS).loss, many(IDS, labels=LABELS).loss
    loss.backward()
    other.backward()
    assert torch.equal(loss, other)
    assert torch.equal(few.theta.grad, many.theta.grad) and torch.equal(few.multipliers.grad, many.multipliers.grad)


@pytest.mark.parametrize("kind", [Codes, Byte])
def test_at_the_start_it_is_the_model_itself(kind):
    model = model_of(kind)
    expected, before = model(IDS).logits, state_of(model)
    names = [name for name, _ in model.named_parameters()]
    with HSAID(model, 100, memory="block") as hsaid:
        assert torch.equal(hsaid(IDS).logits, expected)
        assert [name for name, _ in model.named_parameters()] == names
        assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
        moved(hsaid)(IDS, labels=LABELS).loss.backward()
        assert not torch.equal(hsaid(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)
    assert type(model.bert.encoder.layer[0].attention.self.query) is kind
    assert not any(key.startswith("_hsaid") for module in model.modules() for key in module.__dict__)


def test_a_task_goes_from_one_format_to_another(tmp_path):
    few, many = pair(Codes)
    few.save_pretrained(tmp_path)
    loaded = HSAID.from_pretrained(tmp_path, many.unwrap())
    assert torch.equal(loaded(IDS).logits, few(IDS).logits)
    with pytest.warns(UserWarning, match="W0 is not what was trained from in 8 of 41 tensors"):
        HSAID.from_pretrained(tmp_path, model_of(lambda linear: linear))
    again = HSAID.from_pretrained(tmp_path, few.unwrap(), memory="block")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_reads_give_the_weight_and_methods_of_the_library_what_it_stores():
    hsaid = moved(HSAID(model_of(Codes), 100, memory="block"))
    layer = hsaid.model.bert.encoder.layer[0].attention.self.query
    assert layer.weight.shape == (32, 32) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, hsaid.weights()["bert.encoder.layer.0.attention.self.query.weight"])
    w0 = hsaid.w0()["bert.encoder.layer.0.attention.self.query.weight"]
    assert torch.equal(w0.dequantize(), layer.matrix()) and torch.equal(w0 + 0, layer.matrix())
    assert not torch.equal(layer.weight, layer.matrix())
    assert torch.equal(layer.twice_the_bias(), 2 * layer.__dict__["bias"]) and not torch.equal(
        layer.bias, layer.__dict__["bias"]
    )
    with pytest.raises(RuntimeError, match=r"got W0 of a Codes"):
        w0.zero_()
    with pytest.raises(RuntimeError, match=r"got W0 of a Codes"):
        w0.data = torch.zeros(32, 32)


@pytest.mark.parametrize("kind", [Codes, Byte])
def test_copies_and_merges(kind, tmp_path):
    hsaid = moved(HSAID(model_of(kind), 100, memory="block"))
    expected = hsaid(IDS).logits
    merged = hsaid.merge()
    assert type(merged.bert.encoder.layer[0].attention.self.query) is nn.Linear
    assert all(type(p) is nn.Parameter and p.requires_grad for p in merged.parameters())
    assert torch.equal(merged(IDS).logits, expected)
    for copied in (copy.deepcopy(hsaid), pickle.loads(pickle.dumps(hsaid))):
        assert torch.equal(copied(IDS).logits, expected)
        with torch.no_grad():
            copied.theta.zero_()
            copied.model.bert.encoder.layer[0].attention.self.query.codes.zero_() if kind is Codes else None
        assert torch.equal(hsaid(IDS).logits, expected)
    alone = copy.deepcopy(hsaid.w0()["bert.encoder.layer.0.attention.self.query.weight"])
    assert type(alone) is nn.Parameter


def test_what_is_left_out_runs_as_its_library_has_it():
    model = model_of(Codes)
    called = []
    own = Codes.forward
    query, key = (getattr(model.bert.encoder.layer[0].attention.self, name) for name in ("query", "key"))
    hsaid = moved(HSAID(model, 100, memory="block", exclude=[r"query\.", r"key\.weight"]))
    try:
        Codes.forward = lambda self, x: called.append(self) or own(self, x)
        logits = hsaid(IDS, labels=LABELS)
    finally:
        Codes.forward = own
    assert query in called and key not in called
    logits.loss.backward()
    merged = hsaid.merge()
    assert torch.allclose(merged(IDS).logits, logits.logits, atol=1e-6)
    assert torch.equal(merged.bert.encoder.layer[0].attention.self.query.weight, query.matrix())


@pytest.mark.parametrize("options", [{}, dict(train_fully="query"), dict(exclude=r"(query|key|value|dense)\.weight")])
def test_no_merge_in_place(options):
    """Neither into codes, nor into biases that the library has elsewhere."""
    hsaid = HSAID(model_of(Codes), 100, memory="block", **options)
    with pytest.raises(RuntimeError, match=r"^merge\(\): expected plain parameters"):
        hsaid.merge(inplace=True)


def test_the_same_codes_may_be_set_and_loaded():
    hsaid = moved(HSAID(model_of(Byte), 100, memory="block"))
    expected, state = hsaid(IDS).logits, hsaid.model.state_dict()
    hsaid.model.load_state_dict(state, strict=False)  # without "largest"
    layer = hsaid.model.bert.encoder.layer[0].attention.self.query
    layer.load_state_dict(layer.state_dict(), strict=False)
    layer.weight = nn.Parameter(layer._parameters["weight"].clone(), requires_grad=False)
    assert torch.equal(hsaid(IDS).logits, expected)
    state = {name: value.neg() if value.dtype == torch.int8 else value for name, value in state.items()}
    with pytest.raises(RuntimeError, match=r"^load_state_dict\(\): expected .*query.weight' to stay"):
        hsaid.model.load_state_dict(state, strict=False)
    assert torch.equal(hsaid(IDS).logits, expected)


def test_heads_of_quantized_attention():
    few = moved(HSAID(model_of(Codes), 200, memory="block", heads=True))
    many = HSAID(HSAID(model_of(Codes), 10, "did", memory="block").merge(), 200, heads=True)
    for own, other in zip(few.parameters(), many.parameters(), strict=True):
        other.data.copy_(own)
    batches = [dict(input_ids=IDS, labels=LABELS)]
    found, expected = head_importance(few, batches), head_importance(many, batches)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for prune in (prune_heads, remove_heads):
        with pytest.raises(TypeError, match=r"_heads\(\): expected float weights, got a Codes: prune heads before"):
            prune(model_of(Codes), {0: [1]})


def test_a_layer_that_changes_is_noticed():
    hsaid = HSAID(model_of(Codes), 100, memory="block")
    layer = hsaid.model.bert.encoder.layer[0].attention.self.query
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.meta["scale"].mul_(2)
    assert torch.equal(layer.weight, 2 * weight)
    before = hsaid(IDS).logits
    with torch.no_grad():
        layer.codes.neg_()
    assert not torch.equal(hsaid(IDS).logits, before)
    loss = moved(hsaid)(IDS, labels=LABELS).loss
    with torch.no_grad():
        layer.meta["scale"].mul_(2)
    with pytest.raises(RuntimeError, match="expected .*query.weight' to stay as it is between forward and backward"):
        loss.backward()
    before, codes = hsaid(IDS).logits, layer.codes
    with pytest.raises(RuntimeError, match=r"expected .*query.weight' to stay, because a projected weight"):
        layer.codes = nn.Parameter((layer.weight * 64).round().to(torch.int8), requires_grad=False)
    assert layer.codes is codes and torch.equal(hsaid(IDS).logits, before)


def test_another_matrix_is_refused():
    hsaid = HSAID(model_of(Codes), 100, memory="block")
    layer = hsaid.model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(ValueError, match=r"expected 'codes' in a Codes to keep its tensors .*: unwrap\(\) it first"):
        layer.codes = nn.Parameter(layer.codes[:8], requires_grad=False)
    layer.codes.data, layer.meta["scale"] = layer.codes.data[:8], layer.meta["scale"][:8]
    with pytest.raises(RuntimeError, match=r"a Codes with a weight of shape \(32, 32\), as it was.*got \(8, 32\)"):
        hsaid(IDS)


def test_lower_precision():
    for dtype in (torch.bfloat16, torch.float16):
        model = model_of(Codes, dtype)
        hsaid = moved(HSAID(model, 100, memory="block"))
        output = hsaid(IDS, labels=LABELS)
        output.loss.backward()
        assert output.logits.dtype == dtype and hsaid.theta.grad.all()
        assert {p.dtype for p in hsaid.merge().parameters()} == {dtype}
    hsaid = HSAID(model_of(Codes), 100, memory="block", dtype=torch.bfloat16)
    assert hsaid.model.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16


def test_a_layer_of_torch_runs_with_its_own_forward():
    torch.manual_seed(0)
    convolution, table = nn.Conv1d(4, 6, 3, padding=1), nn.Embedding(20, 4, padding_idx=0)
    few = nn.Sequential(Table(20, 4, padding_idx=0), Convolution(4, 6, 3, padding=1))
    few[0].codes = nn.Parameter((table.weight.detach() * 64).round().to(torch.int8), requires_grad=False)
    del few[0].weight
    few[1].codes = nn.Parameter((convolution.weight.detach() * 64).round().to(torch.int8), requires_grad=False)
    few[1].bias = convolution.bias
    del few[1].weight
    hsaid_kernels.register_quantized(Convolution, lambda layer: layer.codes / 64)

    class Both(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, ids):
            return self.layers[1](self.layers[0](ids).transpose(1, 2))

    model = Both(few)
    hsaid = moved(HSAID(model, 10, "did", memory="block"))
    ids = torch.tensor([[1, 2, 0, 5]])
    merged = hsaid.merge()
    assert type(merged.layers[0]) is nn.Embedding and type(merged.layers[1]) is nn.Conv1d
    assert torch.equal(hsaid(ids), merged(ids))
    assert torch.equal(merged.layers[0].weight[0], few[0].codes[0] / 64)  # the row of padding


def test_threads_read_while_another_saves():
    hsaid = moved(HSAID(model_of(Byte), 100, memory="block"))
    with torch.no_grad():
        expected = hsaid(IDS).logits
        stop, wrong = threading.Event(), []

        def save():
            while not stop.is_set():
                wrong.append(hsaid.model.state_dict()["bert.encoder.layer.0.attention.self.key.largest"].dtype)

        thread = threading.Thread(target=save)
        thread.start()
        try:
            outputs = [hsaid(IDS).logits for _ in range(20)]
        finally:
            stop.set()
            thread.join()
    assert all(torch.equal(output, expected) for output in outputs) and set(wrong) == {torch.int8}


def test_what_is_refused(tmp_path):
    kinds._registered_layers.clear()
    match = r"got 8 test_kinds\.Codes \(8,192 weights\) with others.*hsaid_kernels\.register_quantized"
    model = model_of(Codes)
    with pytest.raises(TypeError, match=match):
        HSAID(model, 100, memory="block")
    assert torch.equal(HSAID(model, 100, include="embeddings|classifier")(IDS).logits, model_of(Codes)(IDS).logits)
    for given, message in ((str, "cls: expected a subclass"), (Codes(nn.Linear(2, 2)), "cls: expected a subclass")):
        with pytest.raises(TypeError, match=message):
            hsaid_kernels.register_quantized(given, Codes.matrix)
    with pytest.raises(TypeError, match="dequantize: expected a function"):
        hsaid_kernels.register_quantized(Codes, 1)
    for dequantize, message in (
        (lambda layer: layer.codes, r"dequantize: .*query'.*, got \(32, 32\) in torch\.int8"),
        (lambda layer: 1, "dequantize: .*got 1"),
        (
            lambda layer: layer.nothing,
            "can be dequantized, got 'bert.encoder.layer.0.attention.self.query', a Codes: Attr",
        ),
    ):
        hsaid_kernels.register_quantized(Codes, dequantize)
        fresh = model_of(Codes)
        with pytest.raises(TypeError, match=message):
            HSAID(fresh, 100, memory="block")
        assert not any(key.startswith("_hsaid") for module in fresh.modules() for key in module.__dict__)
    hsaid_kernels.register_quantized(Codes, Codes.matrix)
    with pytest.raises(ValueError, match='memory: expected "block" for a quantized model'):
        HSAID(model_of(Codes), 100)
    fresh = model_of(Codes)
    fresh.bert.encoder.layer[1].attention.self.key.forward = lambda x: x
    with pytest.raises(TypeError, match=r"forward of their class, got 'bert\.encoder\.layer\.1\.attention\.self\.key'"):
        HSAID(fresh, 100, memory="block")


class Listed(Codes):
    """With its tensors in a list, and one that all layers share."""

    one = torch.ones(1)

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.held, self.codebook = [self.codes.data, self.meta.pop("scale")], self.one
        del self.codes

    def matrix(self):
        return self.held[0] * self.held[1] * self.codebook


class Object(Listed):
    """With codes where nobody finds them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.held = types.SimpleNamespace(codes=self.held[0], scale=self.held[1])

    def matrix(self):
        return self.held.codes * self.held.scale * self.codebook


class Inside(Listed):
    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.inner = nn.LayerNorm(1)


def test_where_a_registered_layer_holds_its_tensors():
    for kind in (Listed, Object):
        hsaid_kernels.register_quantized(kind, kind.matrix)
        model = model_of(kind)
        expected = model(IDS).logits
        hsaid = HSAID(model, 100, memory="block")
        assert torch.equal(hsaid(IDS).logits, expected) and len(hsaid.plan.names) == 41
    hsaid = HSAID(model_of(Listed), 100, memory="block")
    hsaid.model.bert.encoder.layer[0].attention.self.query.held[0].neg_()
    assert not torch.equal(hsaid(IDS).logits, expected)
    hsaid_kernels.register_quantized(Inside, Inside.matrix)
    with pytest.raises(TypeError, match="a Inside with its tensors in a module inside of it"):
        HSAID(model_of(Inside), 100, memory="block")
    hsaid_kernels.register_quantized(nn.Identity, lambda layer: torch.zeros(2, 2))
    with pytest.raises(TypeError, match="a Identity with its tensors in no parameter, buffer, attribute, list or dict"):
        HSAID(nn.Sequential(nn.Linear(2, 2), nn.Identity()), 2, "did", memory="block")


def test_other_ways_to_wrap_are_refused():
    with pytest.raises(TypeError, match=r"^module: expected float weights, got a Codes: HSAID\(.*memory='block'\)"):
        FastfoodWrap(model_of(Codes), 100, "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = model_of(Codes)
        fully_shard(model.classifier, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"FSDP2 \(fully_shard\) .* got 8 quantized ones, such as a Codes"):
            HSAID(model, 100, memory="block")
    finally:
        dist.destroy_process_group()


class Doubled(Int8):
    """Whose dequantize() is wrong."""

    def dequantize(self):
        return 2 * super().dequantize()


def test_tensors_are_registered_too():
    model = model_of(lambda linear: linear)
    model.classifier.weight = nn.Parameter(Doubled.of(model.classifier.weight.detach()), requires_grad=False)
    weight = model.classifier.weight
    hsaid_kernels.register_quantized(Doubled, lambda tensor: Int8.dequantize(tensor))
    hsaid = HSAID(model, 100, memory="block")
    assert torch.equal(hsaid.weights()["classifier.weight"], Int8.dequantize(weight))
    assert relative(hsaid.merge().classifier.weight, weight.dequantize()) == 0.5


def test_a_layer_that_moves_shows_where_it_is(monkeypatch):
    model = model_of(Codes)
    hsaid = moved(HSAID(model, 100, memory="block"))
    expected, name = hsaid(IDS).logits, "bert.encoder.layer.0.attention.self.query.weight"
    layer = model.bert.encoder.layer[0].attention.self.query
    on = {layer: "meta"}  # as if it were another device
    look = stored._look_of
    monkeypatch.setattr(
        stored,
        "_look_of",
        lambda n, of, kind, before: (*look(n, of, kind, before)[:2], torch.device(on.get(of, "cpu"))),
    )
    hsaid.to("cpu")
    assert stored.shown_in(layer)["weight"].device.type == "meta"
    on.clear()
    hsaid.to("cpu")
    assert hsaid.w0()[name].device.type == "cpu" and torch.equal(hsaid(IDS).logits, expected)


def test_autocast_is_that_of_the_float_model():
    few, many = pair(Codes)
    logits = []
    for hsaid in (few, many):
        with torch.autocast("cpu", torch.bfloat16):
            output = hsaid(IDS, labels=LABELS)
        output.loss.backward()
        logits.append(output.logits)
    assert logits[0].dtype == torch.bfloat16 and torch.equal(*logits)
    assert torch.equal(few.theta.grad, many.theta.grad)


def test_wrapping_again_dequantizes_nothing(monkeypatch):
    hsaid = moved(HSAID(model_of(Codes), 100, memory="block"))
    expected, w0, dequantized = hsaid(IDS).logits, hsaid.w0(), []
    own = stored.Stored.dequantize
    monkeypatch.setattr(stored.Stored, "dequantize", lambda self: dequantized.append(self) or own(self))
    with hsaid.unwrapped():
        dequantized.clear()  # its values were hashed for the configuration
    again = hsaid.w0()
    assert not dequantized
    assert all(again[name] is tensor for name, tensor in w0.items() if isinstance(tensor, stored.Stored))
    assert torch.equal(hsaid(IDS).logits, expected)
    layer = hsaid.model.bert.encoder.layer[0].attention.self.query
    with hsaid.unwrapped(), torch.no_grad():
        layer.codes.neg_()
    assert not torch.equal(hsaid(IDS).logits, expected)
    assert torch.equal(hsaid.merge()(IDS).logits, hsaid(IDS).logits)
