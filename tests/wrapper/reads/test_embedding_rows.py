"""Embeddings look rows up in weights of which only these rows are made: as in the whole table, forward and backward."""

import copy

import pytest
import torch
from models import FAMILIES, bert, family, gradient, moved, relative, tied_models
from torch import nn
from torch.nn import functional as F

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops
from hsaid_kernels.wrapper.weights import launches

IDS = torch.tensor([[3, 14, 15, 9, 3], [2, 6, 5, 39, 2]])
MEMORY = ["step", "block"]


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 1)


@pytest.fixture
def launched(monkeypatch):
    """For each call of the forward: its tensors, and the number of blocks listed, or None for all."""
    calls = []
    forward = ops.fastfood_forward

    def watched(plan, theta, factors, base, dtype, backend, listed=None, span=1):
        calls.append((plan.names, None if listed is None else len(listed)))
        return forward(plan, theta, factors, base, dtype, backend, listed, span)

    monkeypatch.setattr(ops, "fastfood_forward", watched)
    return calls


class Bag(nn.Module):
    """An embedding, and what its output goes into."""

    def __init__(self, layer: nn.Module, *inputs):
        super().__init__()
        self.table, self.head, self.inputs = layer, nn.Linear(6, 3), inputs

    def forward(self, ids):
        return self.head(self.table(ids, *self.inputs))


class Shifted(nn.Embedding):
    """As BART's learned positions: a `forward` of its own around that of nn.Embedding."""

    def forward(self, ids):
        return 2.0 * super().forward(ids.clamp(max=37) + 2)


def embedding(**options) -> nn.Module:
    return Bag(nn.Embedding(40, 6, **options))


def bag(*inputs, **options) -> nn.Module:
    return Bag(nn.EmbeddingBag(40, 6, **options), *inputs)


FLAT = IDS.flatten()
OFFSETS = torch.tensor([0, 3, 3, 7])
MODELS = {
    "plain": (embedding, IDS),
    "padding": (lambda: embedding(padding_idx=3), IDS),
    "padding that is not there": (lambda: embedding(padding_idx=4), IDS),
    "negative padding": (lambda: embedding(padding_idx=-1), IDS),
    "by frequency": (lambda: embedding(scale_grad_by_freq=True), IDS),
    "sparse": (lambda: embedding(sparse=True), IDS),
    "int32": (embedding, IDS.int()),
    "one id": (embedding, torch.tensor(7)),
    "all ids": (embedding, torch.arange(40)),
    "subclass": (lambda: Bag(Shifted(40, 6)), IDS),
    "sum": (lambda: bag(mode="sum"), IDS),
    "mean": (lambda: bag(mode="mean", padding_idx=3), IDS),
    "max": (lambda: bag(mode="max"), IDS),
    "sparse bag": (lambda: bag(mode="sum", sparse=True), IDS),
    "offsets": (lambda: bag(OFFSETS, mode="mean", scale_grad_by_freq=True), FLAT),
    "weighted": (lambda: bag(None, torch.linspace(-1, 1, 10).view(2, 5), mode="sum"), IDS),
}


def pair(make, memory: str, **options) -> tuple[HSAID, nn.Module, dict]:
    """An HSAID whose tables are made by rows, the same model, and the whole weights by name."""
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    hsaid = moved(HSAID(model, 60, memory=memory, **options))
    with torch.no_grad():
        return hsaid, plain, hsaid.weights()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("what", MODELS)
def test_lookups_are_those_in_the_whole_table(what, memory, launched):
    """The outputs bit for bit. The gradients add the same numbers in another order."""
    make, ids = MODELS[what]
    hsaid, plain, weights = pair(make, memory)
    with torch.no_grad():
        expected = torch.func.functional_call(plain, weights, (ids,))
        assert torch.equal(hsaid(ids), expected)
    launched.clear()
    got = gradient(hsaid, lambda: hsaid(ids))
    tables = [blocks for names, blocks in launched if names == ("table.weight",)]
    assert len(tables) == 1 and tables[0] is not None
    tensors = hsaid.weights()  # whole, with a graph
    assert relative(got, gradient(hsaid, lambda: torch.func.functional_call(plain, tensors, (ids,)))) <= 1e-5


@pytest.mark.parametrize("memory", MEMORY)
def test_only_the_blocks_of_the_batch_are_made(memory, launched):
    hsaid, *_ = pair(lambda: Bag(nn.Embedding(4000, 6)), memory, width=32)
    launched.clear()
    ids = torch.tensor([0, 0, 1700, 3999])
    gradient(hsaid, lambda: hsaid(ids))
    # Values 0-5, 10,200-10,205, 23,994-23,999 in blocks of 32.
    assert dict(launched)[("table.weight",)] == len({0, 10200 // 32, 10205 // 32, 23994 // 32, 23999 // 32})
    assert all(blocks is not None or "table.weight" not in names for names, blocks in launched)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name, memory):
    """Every model's outputs and gradient, as with whole tables."""
    if name == "ViT":
        inputs = dict(pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    else:
        inputs = dict(input_ids=IDS % 30)
    inputs |= dict(decoder_input_ids=IDS % 30) if name in ("T5", "Bart") else {}
    found = []
    for smallest in (1, 2**40):
        launches.SMALLEST_TABLE = smallest
        torch.manual_seed(0)
        hsaid = HSAID(family(name), 90, memory=memory)
        torch.manual_seed(1)
        moved(hsaid)
        with torch.no_grad():
            outputs = hsaid(**inputs)[0]
        found.append((outputs, gradient(hsaid, lambda: hsaid(**inputs)[0])))  # noqa: B023
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[0][1], found[1][1]) <= 1e-5


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", tied_models())
def test_a_tied_head_reads_the_whole_table(kind, memory, launched):
    torch.manual_seed(0)
    hsaid = moved(HSAID(tied_models()[kind]().eval(), 80, memory=memory))
    ids = IDS % 40
    (table,) = [name for name in hsaid._source.maker.tables if hsaid.w0()[name].shape[0] == 50]
    launched.clear()
    hsaid(input_ids=ids, labels=ids).loss.backward()
    of_table = [blocks for names, blocks in launched if names == (table,)]
    assert None in of_table and len(of_table) > 1
    got, whole = hsaid.theta.grad.clone(), hsaid.weights()
    hsaid.zero_grad()
    torch.func.functional_call(hsaid.model, whole, (), {"input_ids": ids, "labels": ids}).loss.backward()
    assert relative(got, hsaid.theta.grad) <= 1e-5


@pytest.mark.parametrize("memory", MEMORY)
def test_other_reads_get_the_whole_weight(memory):
    hsaid, plain, weights = pair(embedding, memory)
    table = hsaid.model.table
    with torch.no_grad():
        assert torch.equal(table.weight, weights["table.weight"]) and isinstance(table.weight, nn.Parameter)
        assert torch.equal(F.embedding(IDS, table.weight), weights["table.weight"][IDS])
        assert torch.equal(table(IDS), weights["table.weight"][IDS])  # outside of a call
        rows = torch.vmap(lambda ids: table(ids))(IDS)
        assert torch.equal(rows, weights["table.weight"][IDS])
    assert table.weight.shape == (40, 6) and torch.equal(hsaid.w0()["table.weight"], plain.table.weight)


@pytest.mark.parametrize("memory", MEMORY)
def test_an_empty_batch(memory):
    hsaid, *_ = pair(embedding, memory)
    out = hsaid(torch.zeros(0, 5, dtype=torch.int64))
    assert out.shape == (0, 5, 3)
    out.sum().backward()
    assert hsaid.theta.grad is None or not hsaid.theta.grad.isnan().any()


@pytest.mark.parametrize("wrong", [-1, 40, 10**9])
@pytest.mark.parametrize("memory", MEMORY)
def test_ids_outside_the_table_are_the_plain_models_error(memory, wrong):
    hsaid, plain, _ = pair(embedding, memory)
    ids = torch.tensor([3, wrong])
    with pytest.raises(IndexError) as expected:
        plain(ids)
    with pytest.raises(IndexError) as got:
        hsaid(ids)
    assert str(got.value) == str(expected.value)
    gradient(hsaid, lambda: hsaid(IDS))  # and the HSAID goes on


def test_ids_of_another_kind_are_the_plain_models_error():
    hsaid, plain, _ = pair(embedding, "step")
    for ids in (torch.rand(3), [1, 2]):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            plain(ids)
        with pytest.raises(type(expected.value)):
            hsaid(ids)


def test_max_norm_that_was_set_later_is_refused():
    hsaid, *_ = pair(embedding, "step")
    hsaid.model.table.max_norm = 0.5
    with pytest.raises(RuntimeError, match=r"'table.weight' has max_norm, which writes .* read only"):
        hsaid(IDS)


@pytest.mark.parametrize("memory", MEMORY)
def test_activation_checkpointing(memory):
    expected = None
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = bert().eval()
        torch.manual_seed(1)
        hsaid = moved(HSAID(model, 80, memory=memory))
        if checkpointed:
            run = model.bert.embeddings.forward
            model.bert.embeddings.forward = lambda *args, run=run, **kwargs: torch.utils.checkpoint.checkpoint(
                run, *args, use_reentrant=False, **kwargs
            )
        got = gradient(hsaid, lambda: hsaid(IDS % 40).logits)  # noqa: B023
        assert expected is None or torch.equal(got, expected)
        expected = got


def test_dtypes_of_weights():
    for dtype in (torch.bfloat16, torch.float16):
        hsaid, plain, weights = pair(embedding, "step", dtype=dtype)
        plain.to(dtype)
        with torch.no_grad():
            assert torch.equal(hsaid(IDS), torch.func.functional_call(plain, weights, (IDS,)))


def test_small_tables_are_made_with_the_others(monkeypatch, launched):
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 2**20)
    hsaid, *_ = pair(embedding, "step")
    hsaid(IDS)
    assert all(blocks is None for _, blocks in launched) and not hsaid._source.maker.tables


def test_checkpoints_do_not_depend_on_how_weights_are_made(tmp_path):
    hsaid, plain, weights = pair(embedding, "step")
    hsaid.save_pretrained(tmp_path)
    launches.SMALLEST_TABLE = 2**40
    loaded = HSAID.from_pretrained(tmp_path, plain, memory="block")
    assert loaded.memory == "block"
    with torch.no_grad():
        assert all(torch.equal(loaded.weights()[name], weights[name]) for name in weights)
        assert torch.equal(loaded(IDS), hsaid(IDS))


MASKED = {
    "prune": lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5),
    "parametrization": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("what", MASKED)
def test_tables_that_are_computed_are_made_whole(what):
    torch.manual_seed(0)
    model = embedding()
    MASKED[what](model.table)
    hsaid = moved(HSAID(model, 60))
    assert "table.weight" not in hsaid._source.maker.tables
    assert gradient(hsaid, lambda: hsaid(IDS)).any()


def test_a_lookup_that_asks_its_weight(monkeypatch):
    """As tools do that replace torch's functions by their own."""
    hsaid, _, weights = pair(embedding, "step")
    lookup = F.embedding
    monkeypatch.setattr(F, "embedding", lambda ids, table, *a, **k: lookup(ids.to(table.device), table, *a, **k))
    with torch.no_grad():
        assert torch.equal(hsaid.model.table(IDS), weights["table.weight"][IDS])
