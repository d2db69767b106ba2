"""The row of an embedding at `padding_idx`, which fine-tuning does not train, stays W0 however a weight is read."""

import copy
import hashlib
import json
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from helpers import assert_same_bits, relative_error, sequence
from models import BACKENDS, IDS, SIZES, bert, family, gradient, mlp, moved, relative, tied_models
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hsaid_kernels import HSAID, Projection
from hsaid_kernels.compat import FastfoodWrap, intrinsic_dimension
from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE, read_config
from hsaid_kernels.wrapper.checkpoint.ranks import check_ranks
from hsaid_kernels.wrapper.weights import launches

TABLES = [1, 2**20]  # SMALLEST_TABLE: single rows are made, or the whole table
MEMORY = ["step", "block"]


@pytest.fixture(params=TABLES, ids=["rows", "whole"])
def tables(request, monkeypatch):
    monkeypatch.setattr(launches, "SMALLEST_TABLE", request.param)


class Words(nn.Module):
    """A table of 10 words, the sum of a text's words, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4, **options), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.table(ids).sum(1))


class Tied(nn.Module):
    """A language model whose head reads the embedding's weight, without holding it."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.inner = nn.Embedding(12, 6, **options), nn.Linear(6, 6)

    def forward(self, ids):
        return F.linear(self.inner(self.table(ids)).tanh(), self.table.weight)


class Two(nn.Module):
    """Two embeddings with the same table."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, ids):
        return self.first(ids) + self.second(ids)


def trained(model: nn.Module, steps: int = 10) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.0)
    torch.manual_seed(2)
    ids, labels = torch.randint(1, 10, (8, 3)), torch.randint(2, (8,))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("memory", MEMORY)
def test_padding_does_not_change_what_a_trained_model_says(tables, memory):
    torch.manual_seed(0)
    text, padded = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 0, 0]])
    model = Words(padding_idx=0)
    plain = trained(copy.deepcopy(model))
    hsaid = trained(HSAID(model, 20, "did", memory=memory))
    for one in (plain, hsaid, hsaid.merge()):
        assert torch.equal(one(text), one(padded)) and not one.table.weight[0].any()
    assert not torch.equal(hsaid.model.table.weight[1], hsaid.w0()["table.weight"][1])
    moving = trained(HSAID(hsaid.unwrap(), 20, "did", memory=memory, padding_rows={}))
    assert not torch.equal(moving(text), moving(padded))


# --- which rows


def masked() -> nn.Module:
    model = Words(padding_idx=3)
    nn.utils.prune.random_unstructured(model.table, "weight", 0.3)
    return model


def frozen() -> nn.Module:
    model = Words(padding_idx=3)
    model.table.weight.requires_grad_(False)
    return model


def outside() -> nn.Module:
    """A row that the table does not have: torch refuses a lookup then."""
    model = Words()
    model.table.padding_idx = 10
    return model


def of(*options) -> nn.Module:
    return Two(*(nn.Embedding(10, 4, padding_idx=padding) for padding in options))


class Shifted(nn.Embedding):
    """As BART's learned positions: a `forward` of its own around that of nn.Embedding."""

    def forward(self, ids):
        return super().forward(ids + 2)


ROWS = {
    "none": (Words, {}),
    "first": (lambda: Words(padding_idx=0), {"table.weight": 0}),
    "negative": (lambda: Words(padding_idx=-1), {"table.weight": 9}),
    "outside": (outside, {}),
    "bag": (lambda: nn.EmbeddingBag(10, 4, mode="sum", padding_idx=-2), {"weight": 8}),
    "subclass": (lambda: nn.Sequential(Shifted(10, 4, padding_idx=1)), {"0.weight": 1}),
    "masked": (masked, {"table.weight_orig": 3}),
    "frozen": (frozen, {}),
    "computed": (lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(10, 4, padding_idx=1)), {}),
    "same twice": (lambda: of(2, -8), {"first.weight": 2}),
    "two": (lambda: of(2, 3), {}),
    "one of two": (lambda: of(2, None), {}),
    "embedding and bag": (
        lambda: Two(nn.Embedding(10, 4, padding_idx=2), nn.EmbeddingBag(10, 4, padding_idx=2)),
        {"first.weight": 2},
    ),
    "functional head": (lambda: Tied(padding_idx=1), {"table.weight": 1}),
    "head": (lambda: Two(nn.Embedding(10, 4, padding_idx=2), nn.Linear(4, 10)), {}),
    "language model": (tied_models()["bert"], {}),
    "bert": (bert, {"bert.embeddings.word_embeddings.weight": 0}),
    "roberta": (
        lambda: family("Roberta"),
        {"embeddings.word_embeddings.weight": 0, "embeddings.position_embeddings.weight": 0},
    ),
}


@pytest.mark.parametrize("what", ROWS)
def test_which_rows_stay(what):
    make, expected = ROWS[what]
    hsaid = HSAID(make(), 80)
    assert hsaid.padding_rows == expected
    moved(hsaid)
    for name, w0 in hsaid.w0().items():
        same = (hsaid.weights()[name] == w0).view(len(w0), -1).all(1).nonzero().flatten().tolist()
        assert same == ([expected[name]] if name in expected else []), name


def test_what_is_trained_fully_is_torchs_own():
    model = Words(padding_idx=3)
    hsaid = trained(HSAID(model, 20, train_fully="table"))
    assert hsaid.padding_rows == {} and not hsaid.full["table.weight"][3].any()


@pytest.mark.parametrize("memory", MEMORY)
def test_roberta_keeps_the_row_of_positions_too(memory, tables):
    sizes = SIZES | dict(pad_token_id=1, max_position_embeddings=16)
    model = transformers.RobertaModel(transformers.RobertaConfig(**sizes)).eval()
    hsaid = moved(HSAID(model, 80, memory=memory))
    assert set(hsaid.padding_rows.values()) == {1} and len(hsaid.padding_rows) == 2
    ids, merged = torch.tensor([[5, 6, 7, 1, 1]]), hsaid.merge()
    with torch.no_grad():
        assert torch.equal(hsaid.embeddings(ids), merged.embeddings(ids))
        for name in hsaid.padding_rows:
            assert torch.equal(merged.get_parameter(name)[1], hsaid.w0()[name][1])


# --- every way to read


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_read_has_w0_in_this_row_and_the_others_are_as_before(backend, memory, dtype, tables):
    torch.manual_seed(0)
    model = Words(padding_idx=3)
    with torch.no_grad():
        model.table.weight[3] = torch.tensor([-0.0, 1e-42, 1 / 3, torch.inf])
    options = dict(memory=memory, backend=backend, dtype=dtype)
    before = HSAID(copy.deepcopy(model), 20, padding_rows={}, **options)
    hsaid = HSAID(model, 20, **options)
    for one in (before, hsaid):
        torch.manual_seed(1)
        moved(one)
    expected = before.weights()
    assert torch.equal(expected["head.weight"], hsaid.weights()["head.weight"])
    expected = expected["table.weight"].detach().clone()
    assert not torch.equal(expected[3], hsaid.w0()["table.weight"][3].to(expected.dtype))
    expected[3] = hsaid.w0()["table.weight"][3]
    ids = torch.tensor([9, 3, 0])
    with torch.no_grad():
        for weight in (hsaid.weights()["table.weight"], model.table.weight, hsaid.merge().table.weight):
            assert_same_bits(weight, expected)
        for copied in (copy.deepcopy(hsaid), pickle.loads(pickle.dumps(hsaid))):
            assert_same_bits(copied.weights()["table.weight"], expected)
        assert_same_bits(model.table(ids), expected[ids])
        assert_same_bits(F.embedding(ids, model.table.weight), expected[ids])
        if dtype is None:
            assert_same_bits(hsaid.merge(inplace=True).table.weight, expected)
            hsaid.unmerge()
            assert_same_bits(hsaid.model.table(ids), expected[ids])
    assert_same_bits(model.table(ids), expected[ids])  # with a graph
    assert_same_bits(hsaid.weights()["table.weight"], expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_leave_the_row_out_and_it_stays(mode, tables):
    torch.manual_seed(0)
    hsaid = moved(HSAID(nn.EmbeddingBag(10, 4, mode=mode, padding_idx=3), 20))
    merged = hsaid.merge()
    ids = torch.tensor([[3, 1, 3, 2], [3, 3, 3, 3]])
    with torch.no_grad():
        assert torch.equal(hsaid(ids), merged(ids)) and torch.equal(hsaid(ids[:, 1:2]), merged(ids[:, 1:2]))
    assert_same_bits(merged.weight[3], hsaid.w0()["weight"][3])
    assert gradient(hsaid, lambda: hsaid(ids)).any()


def test_with_heads():
    hsaid = moved(HSAID(bert().eval(), 300, "L1+L5|L3|L4"))
    (name,) = hsaid.padding_rows
    assert torch.equal(hsaid.weights()[name][0], hsaid.w0()[name][0])
    ids = torch.tensor([[0, 7, 0]])
    assert torch.equal(hsaid.model.bert.embeddings(ids), hsaid.merge().bert.embeddings(ids))


@pytest.mark.parametrize("memory", MEMORY)
def test_a_compiled_hsaid(memory):
    torch.compiler.reset()
    hsaid = moved(HSAID(Words(padding_idx=3), 20, memory=memory))
    other = moved(HSAID(Words(padding_idx=3), 20, padding_rows={}))
    ids, found = torch.tensor([[1, 3, 3], [2, 9, 3]]), []
    for one in (hsaid, other):
        compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids), one(ids))
        found.append(gradient(one, lambda: compiled(ids)))  # noqa: B023
        assert relative(found[-1], gradient(one, lambda: one(ids))) <= 1e-6  # noqa: B023
    compiled = torch.compile(hsaid, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        row = hsaid.w0()["table.weight"][3]
        assert torch.equal(
            compiled(torch.tensor([[3]])), F.linear(row[None], hsaid.model.head.weight, hsaid.model.head.bias)
        )


def test_a_compiled_part():
    torch.compiler.reset()
    hsaid = moved(HSAID(Words(padding_idx=3), 20))
    ids = torch.tensor([[1, 3, 3], [2, 9, 3]])
    expected = hsaid(ids), gradient(hsaid, lambda: hsaid(ids))
    hsaid.model.table.compile(backend="aot_eager")
    assert torch.equal(hsaid(ids), expected[0])
    assert relative(gradient(hsaid, lambda: hsaid(ids)), expected[1]) <= 1e-6


# --- gradients


def exact_gradients(hsaid: HSAID, plain: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of theta and the multipliers, in float64: of the definition with dense matrices, where the row is a constant."""
    theta, multipliers = (p.detach().double().requires_grad_() for p in (hsaid.theta, hsaid.multipliers))
    projection = Projection(hsaid.plan, backend="reference", dtype=torch.float64)
    columns = [projection.forward(e) for e in torch.eye(hsaid.plan.dim, dtype=torch.float64)]
    factors = hsaid.partition.factors(multipliers)
    weights = {}
    for i, (name, w0) in enumerate(hsaid.w0().items()):
        matrix = torch.stack([column[name] for column in columns], -1)
        weights[name] = w0.double() + factors[i] * (matrix @ theta)
        if name in hsaid.padding_rows:
            row = torch.arange(len(w0)) == hsaid.padding_rows[name]
            weights[name] = torch.where(row.view(-1, *[1] * (w0.dim() - 1)), w0.double(), weights[name])
    torch.func.functional_call(plain.double(), weights, (ids,)).square().mean().backward()
    return [theta.grad, multipliers.grad]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_who_reads_the_whole_table(backend, sparse, memory, tables):
    """The head's gradient has something in the row, which is a constant."""
    torch.manual_seed(0)
    model = Tied(padding_idx=1, sparse=sparse)
    with torch.no_grad():
        model.table.weight[1] = 2.0
    plain = copy.deepcopy(model)
    hsaid = moved(HSAID(model, 40, memory=memory, backend=backend))
    ids = torch.tensor([[1, 2, 11], [5, 1, 1]])
    hsaid(ids).square().mean().backward()
    for parameter, exact in zip(hsaid.parameters(), exact_gradients(hsaid, plain, ids), strict=True):
        assert relative_error(parameter.grad, exact) <= 1e-5


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, memory, tables):
    torch.manual_seed(0)
    hsaid = moved(HSAID(bert().eval(), 80, memory=memory))
    ids = torch.tensor([[3, 14, 0, 0], [2, 0, 0, 0]])
    expected = gradient(hsaid, lambda: hsaid(ids).logits)
    embeddings = hsaid.model.bert.embeddings
    run = embeddings.forward
    anchor = torch.zeros((), requires_grad=True)  # a reentrant checkpoint wants an input with a gradient

    def checkpointed(*args, **kwargs):
        return checkpoint(lambda _: run(*args, **kwargs), anchor, use_reentrant=reentrant)

    embeddings.forward = checkpointed
    assert relative(gradient(hsaid, lambda: hsaid(ids).logits), expected) <= 1e-6


# --- checkpoints

# What HSAID(..., 50) saved when padding rows were projected like any other, and a digest of its weights.
PROJECTED = """
{"format":1,"generator":"philox4x32-10.v1","intrinsic_dim":50,"partition":"L1+L2|L3|L4","combine":"product","skip":[],
"merge":{},"heads":false,"pruned":{},"normalize":"global","diagonal":"gaussian","width":256,"seed":0,"task":"default",
"include":null,"exclude":null,"train_fully":null,"dtype":"float32","dtype_given":false,
"tensors":{"0":{"weight":"9x20"},"1":{"weight":"3x20","bias":"3"}},"full":{},"frozen":{},
"w0_checks":"cdec c6ba e4c2"}
""".replace("\n", "")
PROJECTED_DIGEST, PROJECTED_WEIGHTS = "7ff0f888b1c545829024288e60faafed", "f2346cf80890460398a11937473edb5c"
LAST = "expected padding_rows {'0.weight': 0}, as in this HSAID, got {}: wrap the model with padding_rows={} for that"


def model_of_before(**options) -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 20, **options or {"padding_idx": 0}), nn.Linear(20, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(sequence(parameter.numel()).view(parameter.shape))
    return model


def digest_of(hsaid: HSAID) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for weight in hsaid.weights().values():
        digest.update(weight.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def of_before(tmp_path):
    saved = {"theta": sequence(46, 31, 89), "multipliers": 1 + sequence(4, 29, 97)}
    metadata = {"config": PROJECTED, "digest": PROJECTED_DIGEST}
    (tmp_path / VALUES_FILE).write_bytes(safetensors.torch.save(saved, metadata))
    return tmp_path


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_before_means_what_it_meant(of_before, backend, memory, tables, tmp_path):
    hsaid = HSAID.from_pretrained(of_before, model_of_before(), backend=backend, memory=memory)
    assert hsaid.padding_rows == {} and digest_of(hsaid) == PROJECTED_WEIGHTS
    with torch.no_grad():
        weight = hsaid.weights()["0.weight"]
        assert torch.equal(hsaid.model[0](torch.arange(9)), weight) and weight[0].ne(hsaid.w0()["0.weight"][0]).all()
    hsaid.save_pretrained(tmp_path / "again")
    with safetensors.safe_open(tmp_path / "again" / VALUES_FILE, "pt") as again:
        assert again.metadata() == {"config": PROJECTED, "digest": PROJECTED_DIGEST}


def test_a_state_or_a_task_of_before_is_refused_with_the_way_out(of_before):
    before = HSAID.from_pretrained(of_before, model_of_before())
    hsaid = HSAID(model_of_before(), 50, task="new")
    with pytest.raises(ValueError, match="expected padding_rows.*wrap the model with padding_rows={} for that"):
        hsaid.load_task(of_before)
    again = HSAID(model_of_before(), 50)
    with pytest.raises(RuntimeError) as refused:
        again.load_state_dict(before.state_dict())
    assert LAST in str(refused.value) and not again.theta.any()
    again = HSAID(model_of_before(), 50, padding_rows={})
    again.load_state_dict(before.state_dict())
    assert digest_of(again) == PROJECTED_WEIGHTS


def test_a_checkpoint_says_which_rows_stay(tmp_path):
    hsaid = moved(HSAID(model_of_before(), 50))
    hsaid.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["padding_rows"] == {"0.weight": 0}
    assert read_config(tmp_path)["padding_rows"] == {"0.weight": 0}
    for other in (model_of_before(), model_of_before(padding_idx=4)):  # the rows of training, whatever the model has
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = HSAID.from_pretrained(tmp_path, other)
        assert loaded.padding_rows == {"0.weight": 0} and digest_of(loaded) == digest_of(hsaid)
    again = HSAID(model_of_before(), 50)
    again.load_state_dict(hsaid.state_dict())
    assert digest_of(again) == digest_of(hsaid)


@pytest.mark.parametrize("make", [mlp, Words, tied_models()["bert"]])
def test_a_checkpoint_without_such_rows_does_not_mention_them(make, tmp_path):
    hsaid = HSAID(make(), 80)
    hsaid.save_pretrained(tmp_path)
    assert all(b"padding_rows" not in path.read_bytes() for path in tmp_path.iterdir())
    assert b"padding_rows" not in bytes(hsaid.state_dict()["_extra_state"].tolist())


def test_ranks_are_compared():
    found = [HSAID(Words(padding_idx=0), 20, padding_rows=rows).configuration() for rows in (None, {})]
    with pytest.raises(ValueError, match="padding_rows: expected the same on all ranks, got .* on rank 0, {} on rank"):
        check_ranks(found)


# --- given by name


def test_rows_that_are_given():
    """Of a table that a head holds too, its row for padding is trained, unless it is named."""
    model = tied_models()["bert"]().eval()
    name = "bert.embeddings.word_embeddings.weight"
    hsaid = moved(HSAID(model, 80, padding_rows={name: 0}))
    weight = hsaid.model.cls.predictions.decoder.weight
    assert torch.equal(weight[0], hsaid.w0()[name][0]) and not torch.equal(weight[1], hsaid.w0()[name][1])
    hsaid(input_ids=IDS, labels=IDS).loss.backward()
    assert hsaid.theta.grad.any()


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ("projected", TypeError, "padding_rows: expected rows by tensor, {name: row}, got 'projected'"),
        (
            {"table": 0},
            ValueError,
            "padding_rows: expected a tensor with rows, of the 3 that are projected .*got 'tabl",
        ),
        ({"table.weight": 10}, ValueError, "padding_rows: row of 'table.weight': expected an integer from 0 to 9, got"),
        ({"table.weight": True}, TypeError, "padding_rows: row of 'table.weight': expected an integer, got bool True"),
    ],
)
def test_rows_that_are_not_there(rows, error, message):
    with pytest.raises(error, match=f"^{message}"):
        HSAID(Words(padding_idx=0), 20, padding_rows=rows)


def test_the_published_interfaces_project_the_row():
    model = Words(padding_idx=0)
    wrapped = FastfoodWrap(copy.deepcopy(model), 20, "cpu")
    module = intrinsic_dimension(model, 20, None, set(), "fastfood")
    for hsaid in (wrapped, module.hsaid):
        moved(hsaid)
        assert hsaid.padding_rows == {} and hsaid.model.table.weight[0].all()
