"""HSAID trains theta and the multipliers alone, and leaves W0 as it is."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from models import BACKENDS, IDS, bert, mlp, moved, reads, same, snapshot, tied_models
from torch import nn

from hsaid_kernels.fastfood.projection import Projection
from hsaid_kernels.wrapper.hsaid import HSAID


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# --- training


def test_parameters_are_theta_and_multipliers():
    hsaid = HSAID(bert(), 60)
    assert {name: (p.shape, p.dtype) for name, p in hsaid.named_parameters()} == {
        "theta": ((44,), torch.float32),
        "multipliers": ((16,), torch.float32),
    }
    assert hsaid.intrinsic_dim == 60 and hsaid.partition.num_multipliers == 16
    assert not hsaid.theta.any() and (hsaid.multipliers == 1).all()
    assert list(hsaid.modules()) == [hsaid, *hsaid.model.modules()]


def test_theta_is_float32_whatever_the_default():
    model = mlp()
    torch.set_default_dtype(torch.float64)
    try:
        hsaid = HSAID(model, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in hsaid.parameters()} == {torch.float32}


def test_starts_at_w0(backend):
    model = bert().eval()
    hsaid = HSAID(model, 60, backend=backend)
    assert same(hsaid.weights(), dict(model.named_parameters()))
    assert torch.equal(hsaid(IDS).logits, model(IDS).logits)


def test_wrapping_and_training_leave_w0_where_and_as_it_is(backend):
    model = bert()
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    objects = list(model.parameters())
    hsaid = HSAID(model, 60, backend=backend)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = hsaid(IDS, labels=torch.tensor([0, 1])).loss
        loss.backward()
        optimizer.step()
        hsaid.zero_grad()
        losses.append(loss.item())
    assert hsaid.theta.grad is None and losses[-1] < losses[0] and hsaid.theta.all()
    assert same(model.state_dict(), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p is q and p.grad is None for p, q in zip(model.parameters(), objects, strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert hsaid.unwrap() is model and all(p.requires_grad for p in model.parameters())


def test_training_twice_gives_the_same_losses(backend):
    def train() -> list[float]:
        torch.manual_seed(1)
        hsaid = HSAID(bert(), 60, backend=backend)
        optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = hsaid(IDS, labels=torch.tensor([0, 1])).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train() == train()


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
def test_loss_and_gradients_against_a_dense_matrix(backend, combine, diagonal):
    model, x = mlp(), torch.randn(5, 4)
    hsaid = moved(HSAID(model, 24, combine=combine, diagonal=diagonal, seed=3, backend=backend))
    loss = hsaid(x).square().mean()
    loss.backward()

    columns = [Projection(hsaid.plan, backend="reference").forward(e) for e in torch.eye(hsaid.plan.dim)]
    theta = hsaid.theta.detach().double().requires_grad_()
    multipliers = hsaid.multipliers.detach().double().requires_grad_()
    weights = {}
    for i, (name, w0) in enumerate(model.named_parameters()):
        matrix = torch.stack([column[name].flatten() for column in columns], 1).double()  # [D_i, dim]
        own = torch.stack([multipliers[j] for j in hsaid.partition.multiplier_index[i] if j >= 0])
        factor = own.prod() if combine == "product" else own.mean()
        weights[name] = w0.detach().double() + factor * (matrix @ theta).view(w0.shape)
    dense = torch.func.functional_call(copy.deepcopy(model).double(), weights, (x.double(),)).square().mean()
    dense.backward()
    for got, expected in [(loss, dense), (hsaid.theta.grad, theta.grad), (hsaid.multipliers.grad, multipliers.grad)]:
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_did_has_no_multipliers_to_train():
    hsaid = HSAID(mlp(), 24, "did", backend="reference")
    assert hsaid.multipliers.shape == (0,) and not hsaid.multipliers.requires_grad and hsaid.theta.shape == (24,)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.1)
    hsaid(torch.randn(5, 4)).square().mean().backward()
    for norm in (2.0, torch.inf):
        assert nn.utils.clip_grad_norm_(hsaid.parameters(), 1.0, norm_type=norm) > 0
    optimizer.step()
    assert hsaid.theta.all()


def test_unused_weights_and_nan_gradients(backend):
    hsaid = HSAID(bert(), 60, backend=backend)
    hsaid(IDS, output_hidden_states=True).hidden_states[0].sum().backward()  # nothing above the embeddings is used
    assert hsaid.theta.grad.isfinite().all() and hsaid.theta.grad.any()
    for bad in (torch.nan, torch.inf):
        hsaid.zero_grad()
        (hsaid(IDS).logits * bad).sum().backward()
        assert not hsaid.theta.grad.isfinite().any()


def test_excluded_parameters_are_frozen(backend):
    model = mlp()
    hsaid = moved(HSAID(model, 24, exclude=r"^2\.", backend=backend))
    seen = {}
    model.register_forward_hook(lambda module, *_: seen.update(reads(module)))
    hsaid(torch.randn(5, 4)).sum().backward()
    assert list(hsaid.weights()) == ["0.weight", "0.bias"]
    assert {name: tensor.requires_grad for name, tensor in seen.items()} == {
        "0.weight": True,
        "0.bias": True,
        "2.weight": False,
        "2.bias": False,
    }
    assert torch.equal(seen["2.weight"], model[2].weight) and model[2].weight.grad is None
    assert torch.equal(seen["0.weight"], hsaid.weights()["0.weight"])


@pytest.mark.parametrize("enable_on", ["model", "hsaid"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_on_the_projected_weights(enable_on, reentrant):
    model = bert(hidden_dropout_prob=0.1)
    hsaid = moved(HSAID(model, 60, backend=BACKENDS[0])).train()

    def gradient() -> torch.Tensor:
        torch.manual_seed(2)
        hsaid.zero_grad()
        hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
        return hsaid.theta.grad

    expected = gradient()
    (model if enable_on == "model" else hsaid).activation_checkpointing_enable({"use_reentrant": reentrant})
    function = model.bert.encoder.layer[0]._gradient_checkpointing_func
    runs = []
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: runs.append(1))
    assert torch.allclose(gradient(), expected, rtol=1e-5, atol=0)
    assert len(runs) == 2
    assert model.bert.encoder.layer[0]._gradient_checkpointing_func is function


# --- dtype and device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_moves_the_model_and_keeps_theta_float32(dtype, backend):
    model = bert().eval()
    hsaid = moved(HSAID(model, 60, backend=backend))
    theta, multipliers, values = hsaid.theta, hsaid.multipliers, hsaid.theta.clone()
    assert hsaid.to(dtype) is hsaid
    assert hsaid.theta is theta and hsaid.multipliers is multipliers and torch.equal(theta, values)
    assert {p.dtype for p in hsaid.parameters()} == {torch.float32} and {p.dtype for p in model.parameters()} == {dtype}
    assert hsaid.dtype == dtype and {w.dtype for w in hsaid.weights().values()} == {dtype}
    logits = hsaid(IDS).logits
    assert logits.dtype == dtype
    logits.float().sum().backward()
    assert theta.grad.dtype == torch.float32 and theta.grad.any()
    hsaid.float()
    assert hsaid.dtype == torch.float32 and hsaid(IDS).logits.dtype == torch.float32
    hsaid.zero_grad()
    hsaid.bfloat16().half()
    assert hsaid.dtype == torch.float16


def test_weights_of_another_dtype_than_w0(backend):
    model = bert()
    hsaid = moved(HSAID(model, 60, dtype=torch.bfloat16, backend=backend))
    full = moved(HSAID(copy.deepcopy(model), 60, backend=backend))
    full.load_state_dict(hsaid.state_dict())
    assert hsaid.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(hsaid.weights(), {name: w.bfloat16() for name, w in full.weights().items()})
    assert hsaid(IDS).logits.dtype == torch.bfloat16
    assert hsaid.bfloat16().weights()["classifier.bias"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype of the model's tensors \(torch.float16\) or None, got torch.bfloat16"):
        hsaid.half().weights()


def test_double_is_refused_and_can_be_undone(backend):
    hsaid = HSAID(mlp(), 24, backend=backend).double()
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got torch.float64"):
        hsaid(torch.randn(5, 4))
    assert hsaid.float()(torch.randn(5, 4)).shape == (5, 3)


def test_a_model_moved_by_itself_is_noticed():
    hsaid = HSAID(mlp(), 24, backend="reference")
    hsaid.model.to("meta")
    with pytest.raises(RuntimeError, match="expected '0.weight' to keep its values, got a tensor on the meta device"):
        hsaid.weights()


# --- copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(way, backend):
    model = bert().eval()
    hsaid = moved(HSAID(model, 60, backend=backend))
    with torch.no_grad():
        expected = hsaid(IDS).logits
    if way == "deepcopy":
        other = copy.deepcopy(hsaid)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(hsaid))
    else:
        file = io.BytesIO()
        torch.save(hsaid, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, expected) and other.model is not model
        other.theta.zero_()
        other.w0()["classifier.bias"].add_(1)
        assert torch.equal(hsaid(IDS).logits, expected)
    other(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert other.theta.grad.any() and hsaid.theta.grad is None
    assert not other.training and repr(other) == repr(hsaid)
    with pytest.raises(ValueError, match="no HSAID wraps"):
        HSAID(other.model, 60)


def test_a_deepcopy_of_tied_weights_is_tied():
    other = copy.deepcopy(HSAID(tied_models()["gpt2"](), 80, backend="reference"))
    assert other.model.lm_head.weight is other.model.transformer.wte.weight


def test_merge_makes_an_ordinary_model(backend):
    model = tied_models()["bert"]().eval()
    model.bert.pooler = None
    model.bert.embeddings.LayerNorm.requires_grad_(False)
    before, names = snapshot(model), dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in names.items()}
    plain = copy.deepcopy(model)
    hsaid = moved(HSAID(model, 60, exclude=r"query\.bias", backend=backend))
    merged = hsaid.merge()
    assert type(merged) is type(plain) and merged.state_dict().keys() == model.state_dict().keys()
    assert merged.cls.predictions.decoder.weight is merged.bert.embeddings.word_embeddings.weight
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == flags
    assert torch.equal(merged(IDS).logits, hsaid(IDS).logits) and not torch.equal(merged(IDS).logits, plain(IDS).logits)
    assert same(model.state_dict(), before)
    own = dict(merged.named_parameters())
    assert all(type(p) is nn.Parameter and p.is_leaf and p._base is None for p in own.values())
    assert len({p.untyped_storage().data_ptr() for p in own.values()}) == len(own)
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in names.values()}
    merged(IDS).logits.sum().backward()
    HSAID(merged, 60)
    assert "hsaid" not in str(pickle.dumps(hsaid.merge()))


def test_merge_has_the_weights_dtype():
    merged = HSAID(mlp(), 24, dtype=torch.bfloat16, backend="reference").merge()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


# --- state_dict


def test_state_dict_has_theta_multipliers_and_the_configuration(backend, tmp_path):
    model = bert()
    hsaid = moved(HSAID(model, 60, backend=backend))
    state = hsaid.state_dict()
    assert list(state) == ["theta", "multipliers", "_extra_state"]
    assert sum(t.numel() * t.element_size() for t in state.values()) < 3000
    torch.save(state, tmp_path / "state.pt")
    other = HSAID(copy.deepcopy(model), 60, backend=backend)
    assert other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)).missing_keys == []
    assert same(other.weights(), hsaid.weights())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(seed=1), "expected seed 1, as in this HSAID, got 0"),
        (dict(intrinsic_dim=61), "expected intrinsic_dim 61, .* got 60"),
        (dict(partition="L1|L2|L3|L4"), r"expected partition 'L1\|L2\|L3\|L4', .* got 'L1\+L2\|L3\|L4'"),
        (dict(combine="sum"), "expected combine 'sum', .* got 'product'"),
        (dict(diagonal="rademacher"), "expected diagonal 'rademacher', .* got 'gaussian'"),
        (dict(normalize="tensor"), "expected normalize 'tensor', .* got 'global'"),
        (dict(width=128), "expected width 128, .* got 256: wrap the model with width=256 for that"),
        (dict(skip=["attention"]), r"expected skip \['attention'\], .* got \[\]"),
        (dict(exclude="classifier.bias"), "'classifier.bias' of shape .* is missing"),
        (dict(model=dict(hidden_size=32)), r"word_embeddings.weight' has shape \(50, 32\) in place of"),
    ],
)
def test_a_state_dict_of_another_configuration_is_refused_whole(changes, reason, strict):
    model = bert()
    state = moved(HSAID(model, 60)).state_dict()
    if "model" in changes:
        config = copy.deepcopy(model.config)
        config.update(changes["model"])
        other = HSAID(transformers.BertForSequenceClassification(config), 60)
    else:
        other = HSAID(copy.deepcopy(model), **{"intrinsic_dim": 60, **changes})
    with pytest.raises(RuntimeError, match=reason) as raised:
        other.load_state_dict(state, strict=strict)
    assert not other.theta.any() and (other.multipliers == 1).all(), raised


def test_a_state_dict_is_looked_at_in_a_larger_module():
    inner, fresh = moved(HSAID(mlp(), 24)), HSAID(mlp(), 24)
    outer = nn.ModuleDict({"wrapped": inner})
    with pytest.warns(UserWarning, match="W0 is not what was trained from in 4 of 4 tensors"):
        nn.ModuleDict({"wrapped": fresh}).load_state_dict(outer.state_dict())
    assert torch.equal(inner.theta, fresh.theta)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({"theta": inner.theta})


# --- what cannot be wrapped


def test_a_model_is_wrapped_once():
    model = mlp()
    first = HSAID(model, 24)
    with pytest.raises(TypeError, match="is or holds an HSAID"):
        HSAID(first, 24)
    with pytest.raises(TypeError, match="is or holds an HSAID"):
        HSAID(nn.Sequential(first), 24)
    with pytest.raises(
        ValueError, match=r"no HSAID wraps, .* unwrap\(\) the first one .* or wrap copy.deepcopy\(model\)"
    ):
        HSAID(model, 24)
    with pytest.raises(ValueError, match="no HSAID wraps"):
        copy.copy(first)
    HSAID(copy.deepcopy(model), 24)
    del first
    HSAID(model, 24)  # not kept: the next one may wrap it again
    with pytest.raises(ValueError, match="intrinsic_dim"):
        HSAID(model, 2)
    HSAID(model, 24)


@pytest.mark.parametrize(
    "model, arguments, error, reason",
    [
        (bert, dict(intrinsic_dim=16), ValueError, r"more than the 16 multipliers of 'L1\+L2\|L3\|L4', got 16"),
        (bert, dict(intrinsic_dim=0), ValueError, "intrinsic_dim: expected an integer from 1 to 16777216, got 0"),
        (bert, dict(intrinsic_dim=2**24 + 1), ValueError, "from 1 to 16777216, got 16777217"),
        (bert, dict(intrinsic_dim=60.0), TypeError, "intrinsic_dim: expected an integer, got float 60.0"),
        (bert, dict(seed=-1), ValueError, "seed: expected an integer from 0 to 18446744073709551615, got -1"),
        (bert, dict(seed=2**64), ValueError, "seed: expected an integer from 0 to"),
        (bert, dict(width=48), ValueError, "width: expected a power of two"),
        (bert, dict(partition="L1+L9"), ValueError, "L9"),
        (bert, dict(partition="L1|L1"), ValueError, "L1 2 times"),
        (bert, dict(combine="max"), ValueError, "combine: expected"),
        (bert, dict(skip=["nowhere"]), ValueError, "nowhere"),
        (bert, dict(include="nothing"), ValueError, "include: 'nothing' matches none of the 25 tensors"),
        (bert, dict(exclude="nothing"), ValueError, "exclude: 'nothing' matches none"),
        (bert, dict(dtype=torch.float64), TypeError, "dtype: expected torch.float32, bfloat16, .* got torch.float64"),
        (bert, dict(dtype="bfloat16"), TypeError, "dtype: expected .* got bfloat16"),
        (bert, dict(backend="gpu"), ValueError, "backend: expected one of .* got 'gpu'"),
        (lambda: nn.Tanh(), {}, ValueError, "at least one parameter, got a Tanh"),
        (lambda: "bert", {}, TypeError, "model: expected a torch.nn.Module, got str"),
        (lambda: mlp().to("meta"), {}, ValueError, "meta device"),
        (lambda: mlp().to(torch.complex64), {}, TypeError, "floating-point tensor, got torch.complex64"),
        (lambda: nn.Linear(0, 3), dict(include="weight"), ValueError, "at least one element"),
        (lambda: nn.Linear(0, 3, bias=False), {}, ValueError, "got all 1 frozen or empty"),
        (lambda: mlp().double(), {}, TypeError, "float32, bfloat16 or float16, got torch.float64"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()),
            dict(dtype=torch.bfloat16),
            ValueError,
            r"dtype: expected the dtype of the model's tensors \(torch.float16, torch.float32\) or None",
        ),
        (
            lambda: mlp().requires_grad_(False),
            {},
            ValueError,
            "a parameter with requires_grad=True and elements, or include= .* got all 4 frozen or empty",
        ),
        (bert, dict(frozen=["nowhere"]), ValueError, "frozen: expected names of the model's parameters, got 'nowhere'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of complex and of empty modules
def test_bad_arguments(model, arguments, error, reason):
    with pytest.raises(error, match=reason):
        HSAID(model(), **{"intrinsic_dim": 60, **arguments})


def test_integer_parameters_are_refused_unless_excluded():
    model = mlp()
    model.register_parameter("steps", nn.Parameter(torch.arange(3), requires_grad=False))
    with pytest.raises(TypeError, match="'steps'.*expected a floating-point tensor, got torch.int64"):
        HSAID(model, 24, include=".")
    for options in ({}, dict(exclude="steps")):  # frozen tensors are left out
        with HSAID(model, 24, backend="reference", **options) as hsaid:
            assert hsaid(torch.ones(1, 4)).shape == (1, 3)


def test_patterns_may_be_any_iterable():
    hsaid = HSAID(mlp(), 24, include=(pattern for pattern in ["weight"]), exclude=("^2",))
    assert hsaid.plan.names == ("0.weight",) and hsaid.include == ["weight"]


def test_a_changed_model_is_refused_by_name():
    model = mlp()
    hsaid = HSAID(model, 24, backend="reference")
    with pytest.raises(ValueError, match=r"expected '2' in a Sequential to keep its tensors .* got others .*5, 6"):
        model[2] = nn.Linear(6, 5)
    model._modules["2"] = nn.Linear(6, 5)  # of which the model is not told
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(5, 6\) in place of \(3, 6\), '2.bias' has"):
        hsaid(torch.ones(1, 4))
    model._modules["2"] = nn.Identity()
    with pytest.raises(ValueError, match=r"'2.weight' of shape \(3, 6\) is missing"):
        hsaid.weights()


def test_data_parallel_is_refused():
    """transformers' Trainer takes it by itself where it sees several devices."""
    with pytest.raises(RuntimeError, match="HSAID does not run in torch.nn.DataParallel.*DistributedDataParallel"):
        HSAID(mlp(), 24)._replicate_for_data_parallel()  # what nn.parallel.replicate calls


def test_a_tensor_that_comes_untied_is_refused_by_name():
    model = tied_models()["gpt2"]()
    hsaid = HSAID(model, 80)
    hsaid(IDS)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="expected 'lm_head.weight' to be tied as it was when it was wrapped"):
        hsaid(IDS)


def test_weights_in_float64_are_not_saved_and_given_back(tmp_path):
    """hsaid.double() is PyTorch's, and calls refuse what it makes; the model can be had back all the same."""
    model = mlp()
    hsaid = HSAID(model, 10).double()
    message = "^model: expected weights in float32, bfloat16, float16, got float64"
    with pytest.raises(TypeError, match=message):
        hsaid.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    hsaid.float().save_pretrained(tmp_path)
    assert hsaid.double().unwrap() is model and model[0].weight.dtype == torch.float64


def test_repr():
    assert repr(HSAID(bert(), 60, seed=5)) == (
        "HSAID(BertForSequenceClassification, 25 tensors, 3,650 weights, intrinsic_dim=60 (16 multipliers), "
        "partition='L1+L2|L3|L4', seed=5, dtype=torch.float32)"
    )
