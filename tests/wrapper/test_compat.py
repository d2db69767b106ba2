"""Training code for compacter's functions and jgamper's wrapper runs on ours, exactly and reloadably."""

import contextlib
import copy
import gc
import inspect
import io
import logging
import pickle
import weakref

import pytest
import torch
import transformers
from models import IDS, bert, mlp, reads, same, snapshot, tied_models
from torch import nn

from hsaid_kernels import HSAID, Projection
from hsaid_kernels.wrapper.compat import FastfoodWrap, intrinsic_dimension, intrinsic_dimension_said

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([[7, 21, 4, 1], [30, 9, 2, 1]])
BOTH = pytest.mark.parametrize("put", [intrinsic_dimension, intrinsic_dimension_said])
D = 90  # more than the tensors of any model here


def t5() -> nn.Module:
    return tied_models()["t5"]()


def said(module: nn.Module, str_filter=frozenset(), **options) -> nn.Module:
    return intrinsic_dimension_said(module, D, "outputs", str_filter, "fastfood", **options)


def moved(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.intrinsic_parameter.normal_()
        if hasattr(module, "intrinsic_parameter_said"):
            module.intrinsic_parameter_said.uniform_(0.5, 1.5)
    return module


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, labels=LABELS).logits


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# --- training code in the manner of compacter's: freeze, put into the subspace, say what trains; train, evaluate, save


def modify_model_after_init(model, arguments, output_dir):
    put = intrinsic_dimension_said if arguments["intrinsic_said"] else intrinsic_dimension
    model = put(model, arguments["intrinsic_dim"], output_dir, set(), arguments["intrinsic_projection"], "cpu")
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.getLogger("compacter").info("trainable parameters: %s", total)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            logging.getLogger("compacter").info("trainable: %s", name)
    return model


def make_optimizer(model, lr):
    no_decay = ("bias", "layer_norm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


@pytest.mark.parametrize("kind", ["did", "said"])
def test_compacters_training_code_runs(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, "compacter")
    model = t5()
    start, addresses = snapshot(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    arguments = {"intrinsic_said": kind == "said", "intrinsic_dim": D, "intrinsic_projection": "fastfood"}
    returned = modify_model_after_init(model, arguments, str(tmp_path))
    assert returned is model and f"trainable parameters: {D}" in caplog.text

    optimizer = make_optimizer(model, lr=0.05)
    losses = []
    for _ in range(20):
        model.train()
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=LABELS)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    generated = model.generate(IDS, max_length=6, num_beams=2)
    assert losses[-1] < 0.8 * losses[0]
    assert same({name: p for name, p in model.state_dict().items() if name in start}, start)
    assert {n: p.data_ptr() for n, p in model.named_parameters() if n in addresses} == addresses
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    again = t5()  # of other weights: the saved ones bring W0 along
    again = modify_model_after_init(again, arguments, str(tmp_path)).eval()
    assert not torch.equal(logits(again), logits(model))
    again.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    assert same(again.hsaid.weights(), model.hsaid.weights()) and torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, max_length=6, num_beams=2), generated)


def test_transformers_trainer_runs(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = said(t5())
    start = snapshot(model)
    mask = torch.ones(4, dtype=torch.int64)
    data = [{"input_ids": i, "attention_mask": mask, "labels": label} for i, label in zip(IDS, LABELS)] * 4
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        predict_with_generate=True,
        generation_max_length=5,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before and model.intrinsic_parameter.any()
    assert same(w0_of(model.state_dict()), w0_of(start))

    trainer.save_model()
    fresh = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)  # W0: it knows of no subspace
    again = Seq2SeqTrainer(said(fresh), arguments, train_dataset=data, eval_dataset=data)
    again.train(resume_from_checkpoint=True)
    assert again.evaluate()["eval_loss"] == after and same(fresh.hsaid.weights(), model.hsaid.weights())


def w0_of(state: dict) -> dict:
    return {name: value for name, value in state.items() if "intrinsic_parameter" not in name}


# --- what the functions make of the module


@BOTH
def test_what_is_registered(put):
    model = bert()
    names = list(dict(model.named_parameters()))
    modules = list(model.modules())
    assert put(model, D, None, set(), "fastfood") is model and list(model.modules()) == modules
    m = len(names) if put is intrinsic_dimension_said else 0
    new = {"intrinsic_parameter": (D - m,)} | ({"intrinsic_parameter_said": (m,)} if m else {})
    assert trained(model) == set(new) and set(dict(model.named_parameters())) == {*names, *new}
    assert {name: tuple(model.get_parameter(name).shape) for name in new} == new
    assert {model.get_parameter(name).dtype for name in new} == {torch.float32}
    assert not model.intrinsic_parameter.any() and model.hsaid.theta is model.intrinsic_parameter
    if m:
        assert (model.intrinsic_parameter_said == 1).all()
        assert model.hsaid.multipliers is model.intrinsic_parameter_said and list(model.hsaid.plan.names) == names


def test_code_that_looks_at_the_class_finds_the_modules_own():
    plain, model = transformers.T5ForConditionalGeneration, said(t5())
    assert isinstance(model, plain) and type(model) is type(said(t5())) is not plain
    assert all(getattr(type(model), key) == getattr(plain, key) for key in ("__name__", "__qualname__", "__module__"))
    for name in ("forward", "generate"):
        assert inspect.signature(getattr(type(model), name)) == inspect.signature(getattr(plain, name))


def test_starts_at_w0():
    model = t5().eval()
    before = logits(model)
    assert torch.equal(logits(said(model)), before)


def test_seeds_differ():
    w0, outputs = t5().eval(), []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        outputs.append(logits(moved(said(copy.deepcopy(w0), seed=seed))))
    first, same_seed, other = outputs
    assert torch.equal(first, same_seed) and not torch.allclose(first, other)


@BOTH
def test_gradients_against_a_dense_matrix(put):
    model, x = mlp(), torch.randn(5, 4)
    plain = copy.deepcopy(model).double()
    moved(put(model, 24, None, set(), "fastfood", seed=3))
    loss = model(x).square().mean()
    loss.backward()
    hsaid = model.hsaid
    columns = [Projection(hsaid.plan, backend="reference").forward(e) for e in torch.eye(hsaid.plan.dim)]
    theta = model.intrinsic_parameter.detach().double().requires_grad_()
    multipliers = torch.ones(4, dtype=torch.float64, requires_grad=True)
    if put is intrinsic_dimension_said:
        multipliers.data.copy_(model.intrinsic_parameter_said)
    weights = {
        name: w0.detach()
        + factor * (torch.stack([c[name].flatten() for c in columns], 1).double() @ theta).view(w0.shape)
        for factor, (name, w0) in zip(multipliers, plain.named_parameters())
    }
    dense = torch.func.functional_call(plain, weights, (x.double(),)).square().mean()
    dense.backward()
    found = [(loss, dense), (model.intrinsic_parameter.grad, theta.grad)]
    if put is intrinsic_dimension_said:
        assert (model.intrinsic_parameter_said.grad != 0).all()  # none of them is dead
        found.append((model.intrinsic_parameter_said.grad, multipliers.grad))
    for got, expected in found:
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_every_value_of_theta_reaches_every_tensor():
    model = intrinsic_dimension(nn.Linear(3, 2), 1000, None, set(), "fastfood")
    for tensor in model.hsaid.weights().values():
        (gradient,) = torch.autograd.grad(tensor.sum(), model.intrinsic_parameter)
        assert gradient.all()


def test_generate_runs_on_the_weights_of_now():
    model = said(t5()).eval()
    model(input_ids=IDS, labels=LABELS)
    moved(model)
    states, weights = [], []
    model.encoder.register_forward_hook(lambda module, inputs, output: states.append(output[0].detach()))
    model.encoder.register_forward_hook(lambda module, *_: weights.extend(module.parameters()))
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert not any(weight.requires_grad for weight in weights)  # no graph is kept for it
    merged = model.hsaid.merge()
    assert torch.equal(generated, merged.generate(IDS, max_new_tokens=4, do_sample=False))
    assert torch.allclose(states[0], states[-1], atol=1e-6) and len(states) == 2
    assert not hasattr(said(mlp()), "generate")


def test_other_methods_and_parts_run_on_the_weights_of_now():
    class Tagger(nn.Sequential):
        def encode(self, x):
            return self[0](x)

    model = Tagger(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, w0 = torch.randn(5, 4), copy.deepcopy(model)
    moved(said(model))
    assert not torch.equal(model.encode(x), w0.encode(x)) and torch.equal(model.hsaid(x), model(x))
    assert torch.equal(model.encode(x), model.hsaid.merge().encode(x))
    assert torch.equal(model.hsaid.encode(x), model.encode(x)) and torch.equal(model[:2](x), model.hsaid.merge()[:2](x))
    model.hsaid.unwrap()
    assert torch.equal(model(x), w0(x)) and type(model) is Tagger and not hasattr(model, "intrinsic_parameter")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "albert"])
def test_tied_weights_stay_tied(name):
    model = tied_models()[name]().eval()
    places = [[n for n, p in model.named_parameters(remove_duplicate=False) if p is own] for own in model.parameters()]
    assert max(map(len, places)) > 1
    moved(said(model))
    seen = {}
    model.register_forward_hook(lambda module, *_: seen.update(reads(module)))
    inputs = {"labels": LABELS} if name == "t5" else {}
    model(IDS, **inputs)
    w0, weights = dict(model.named_parameters()), model.hsaid.weights()
    for first, *others in places:
        assert all(seen[other] is seen[first] for other in others) and not torch.equal(seen[first], w0[first])
        assert torch.equal(seen[first], weights[first])


def test_gradient_checkpointing():
    model = moved(said(t5(), {"SelfAttention"})).train()
    model.config.use_cache = False

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.activation_checkpointing_enable()
    runs = []
    model.encoder.block[0].layer[0].SelfAttention.register_forward_pre_hook(lambda *_: runs.append(1))
    for got, plain in zip(gradients(), expected, strict=True):
        assert torch.allclose(got, plain, rtol=1e-4, atol=1e-6)
    assert len(runs) == 2


# --- str_filter, projection, device, and what is refused


def test_the_filter_chooses_and_the_rest_stays_as_it_is():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    start = snapshot(model)
    said(model, {"attention", "embeddings"})
    chosen = {name for name in dict(model.named_parameters()) if "attention" in name}
    assert set(model.hsaid.plan.names) == chosen and model.intrinsic_parameter_said.shape == (len(chosen),)
    others = {n for n in start if n in dict(model.named_parameters()) and n not in chosen and "embeddings" not in n}
    assert trained(model) == {"intrinsic_parameter", "intrinsic_parameter_said", *others}
    assert set(model.hsaid.full) == others and model.intrinsic_parameter.numel() + len(chosen) == D

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in others)
    optimizer.step()
    changed = {name for name, value in start.items() if not torch.equal(model.state_dict()[name], value)}
    assert "classifier.weight" in changed <= others and model.intrinsic_parameter.any()
    plain = model.eval().hsaid.merge()
    assert torch.equal(plain.classifier.weight, model.classifier.weight)
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-6)


def test_what_stays_trainable_is_in_the_small_checkpoint(tmp_path):
    model = bert().eval()
    fresh = copy.deepcopy(model)
    moved(said(model, {"bert"}))
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.hsaid.save_pretrained(tmp_path)
    again = HSAID.from_pretrained(tmp_path, fresh)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_new_head_is_the_one_that_trains():
    model = said(mlp(), {"0."})
    model[2].weight = nn.Parameter(torch.randn(3, 6))
    model(torch.randn(5, 4)).sum().backward()
    assert model[2].weight.grad.any()


@pytest.mark.parametrize(
    "arguments, error, reason",
    [
        (dict(str_filter={"nowhere"}), ValueError, r"str_filter: expected \{'nowhere'\} to choose .* none of the 25"),
        (dict(str_filter="attention"), TypeError, "str_filter: expected a set of strings, got 'attention'"),
        (dict(str_filter={3}), TypeError, r"str_filter: expected a set of strings, got \{3\}"),
        (dict(projection="random"), ValueError, "projection: expected 'fastfood', got 'random'"),
        (dict(projection=None), ValueError, "projection: expected 'fastfood', got None"),
        (dict(module="bert"), TypeError, "module: expected a torch.nn.Module, got str"),
        (dict(module=nn.Tanh()), ValueError, "none of the 0 .* in a Tanh"),
        (dict(intrinsic_dimension=25), ValueError, "expected more than the 25 multipliers .* got 25"),
        (dict(seed=-1), ValueError, "seed: expected an integer from 0"),
    ],
)
def test_bad_arguments(arguments, error, reason):
    model = bert()
    given = dict(module=model, intrinsic_dimension=D, output_dir="", str_filter=set(), projection="fastfood")
    with pytest.raises(error, match=reason):
        intrinsic_dimension_said(**{**given, **arguments})
    assert type(model) is transformers.BertForSequenceClassification and len(trained(model)) == 25
    said(model)  # nothing is left of the attempt


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"expected all to choose .* none of the 0 \(of 4\) in a Sequential"):
        said(mlp().requires_grad_(False))


@BOTH
def test_once_for_a_module(put):
    model = said(mlp())
    for again in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="module: expected one as it was made, got a Sequential that is, or holds"):
            put(again, D, None, {"weight"}, "fastfood")
    with pytest.raises(ValueError, match="no HSAID wraps"):
        HSAID(model, D)
    put(model.hsaid.merge(), D, None, set(), "fastfood")


def test_moving_takes_theta_along_and_keeps_it_float32():
    model = moved(said(t5())).eval()
    theta, values = model.intrinsic_parameter, model.intrinsic_parameter.clone()
    assert model.to(torch.bfloat16) is model
    assert model.intrinsic_parameter is theta is model.hsaid.theta and torch.equal(theta, values)
    assert theta.dtype == model.intrinsic_parameter_said.dtype == torch.float32
    assert model.shared.weight.dtype == torch.bfloat16 == logits(model).dtype
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert theta.grad.dtype == torch.float32 and theta.grad.any()
    model.float()
    assert logits(model).dtype == torch.float32
    for elsewhere in (said(mlp(), device="meta"), said(mlp()).to("meta")):
        assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
        assert elsewhere.hsaid.theta is elsewhere.intrinsic_parameter and len(trained(elsewhere)) == 2


# --- state_dict, copies


@BOTH
@pytest.mark.parametrize("make, assign", [(t5, False), (mlp, False), (mlp, True)])  # assigning unties what is tied
def test_a_state_dict_reloads_bit_for_bit(put, make, assign):
    model = moved(put(make(), D, None, set(), "fastfood", seed=4))
    again = put(make(), D, None, set(), "fastfood", seed=4)
    assert not same(again.hsaid.weights(), model.hsaid.weights())
    again.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert same(again.hsaid.weights(), model.hsaid.weights()) and same(again.hsaid.w0(), model.hsaid.w0())
    assert again.hsaid.theta is again.intrinsic_parameter and trained(again) == trained(model)


def test_the_two_parameters_alone_reload_on_the_same_w0():
    model = t5().eval()
    fresh = copy.deepcopy(model)
    moved(said(model))
    small = {name: value for name, value in model.state_dict().items() if "intrinsic" in name}
    assert list(small) == ["intrinsic_parameter", "intrinsic_parameter_said"]
    said(fresh).load_state_dict(small, strict=False)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "other, reason",
    [
        (lambda: said(bert(), seed=1), "expected seed 1, .* got 0"),
        (
            lambda: intrinsic_dimension_said(bert(), D + 1, "", (), "fastfood"),
            f"expected intrinsic_dim {D + 1}, .* got {D}",
        ),
        (lambda: intrinsic_dimension(bert(), D, "", (), "fastfood"), "expected partition 'did', .* got"),
        (lambda: said(bert(), {"attention"}), "is missing|is unexpected"),
        (lambda: said(bert(), width=64), "expected width 64, .* got 256: wrap the model with width=256 for that"),
    ],
)
def test_a_state_dict_of_another_subspace_is_refused_whole(other, reason):
    state = moved(said(bert())).state_dict()
    other = other()
    before = snapshot(other)
    with pytest.raises(ValueError, match=reason):
        other.load_state_dict(state, strict=False)
    assert same(other.state_dict(), before)


def test_save_pretrained_and_the_class_make_ordinary_models(tmp_path):
    model = moved(said(t5())).eval()
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert type(fresh) is transformers.T5ForConditionalGeneration and not hasattr(fresh, "hsaid")
    assert same(dict(fresh.named_parameters()), model.hsaid.w0())
    assert type(type(model)(model.config)) is transformers.T5ForConditionalGeneration


def test_checkpoint_and_merge_of_hsaid(tmp_path):
    model = t5().eval()
    fresh, keys, w0 = copy.deepcopy(model), model.state_dict().keys(), snapshot(model)
    moved(said(model, seed=2))
    model.hsaid.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 8000
    assert torch.equal(logits(HSAID.from_pretrained(tmp_path, fresh)), logits(model))
    merged = model.hsaid.merge()
    assert type(merged) is transformers.T5ForConditionalGeneration and merged.state_dict().keys() == keys
    assert torch.allclose(logits(merged), logits(model), atol=1e-6) and "hsaid" not in str(pickle.dumps(merged))
    assert same({name: model.state_dict()[name] for name in w0}, w0)
    with pytest.raises(ValueError, match="inplace: expected False"):
        model.hsaid.merge(inplace=True)
    with pytest.raises(RuntimeError, match="wrap a plain one in HSAID"):
        model.hsaid.add_task("other")


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(way):
    model = moved(said(t5(), {"block"})).eval()
    expected = logits(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model) and torch.equal(logits(other), expected)
    assert other.hsaid.model is other and other.hsaid.theta is other.intrinsic_parameter
    with torch.no_grad():
        other.intrinsic_parameter.zero_()
        other.shared.weight.add_(1)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
    other(input_ids=IDS, labels=LABELS).loss.backward()
    assert other.intrinsic_parameter.grad.any() and other.shared.weight.grad.any()
    assert model.intrinsic_parameter.grad is None and model.shared.weight.grad is None


def test_assigned_and_written_values_are_used():
    model = moved(said(mlp())).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        first = model(x)
        model.intrinsic_parameter = nn.Parameter(torch.randn(D - 4))
        second = model(x)
        assert model.hsaid.theta is model.intrinsic_parameter and not torch.equal(first, second)
        model.intrinsic_parameter.data.zero_()
        model.train().eval()
        assert not torch.equal(model(x), second)


def test_an_error_in_forward_leaves_the_module_as_it_was():
    model = moved(said(mlp()))
    before = snapshot(model)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        handle = model[2].register_forward_hook(fail)
        with pytest.raises(error):
            model(torch.randn(5, 4))
        handle.remove()
        assert same(model.state_dict(), before) and all(type(p) is nn.Parameter for p in model.parameters())


def test_the_module_and_its_hsaid_go_together():
    model = said(mlp())
    model(torch.randn(5, 4)).sum().backward()
    gone = weakref.ref(model), weakref.ref(model.hsaid)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# --- jgamper's wrapper: training code in the manner of its README


class Classifier(nn.Module):
    def __init__(self, input_dim, n_classes):
        super().__init__()
        self.fc = nn.Linear(input_dim, n_classes)
        self.maxpool = nn.AdaptiveMaxPool2d(1)

    def forward(self, x):
        return self.fc(self.maxpool(x).reshape(x.size(0), -1))


def convolutional(n_classes: int) -> nn.Module:
    encoder = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*encoder, Classifier(8, n_classes))


def test_jgampers_training_code_runs():
    images, targets = torch.randn(30, 1, 6, 6), torch.arange(30) % 3
    images[targets == 1] *= 3
    images[targets == 2, :, :3] += 4
    network = convolutional(3)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    model = FastfoodWrap(network, intrinsic_dimension=40, device="cpu")
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        model.train()
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == targets).float().mean()
        assert torch.equal(model(images), model(images))  # no dropout: eval() reaches the network
    assert losses[-1] < 0.7 * losses[0] and accuracy > 0.6
    assert same(dict(network.named_parameters()), start) and not network.training


def test_fastfood_wrap_is_did():
    network = mlp()
    network[0].bias.requires_grad_(False)
    x, bias = torch.randn(5, 4), network[0].bias.detach().clone()
    model = FastfoodWrap(network, 24, "cpu", seed=6)
    assert model.V is model.theta and model.V.shape == (24,) and model.m[0] is network
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [24]
    assert list(model.plan.names) == ["0.weight", "2.weight", "2.bias"]
    with torch.no_grad():
        model.V.normal_()
    other = HSAID(copy.deepcopy(network), 24, "did", seed=6, normalize="tensor")
    other.load_state_dict({"theta": model.V.detach()}, strict=False)
    assert torch.equal(model(input=x), other(x)) and torch.equal(network[0].bias, bias)
    seeds = [FastfoodWrap(copy.deepcopy(network), 24, "cpu", seed=seed) for seed in (6, 7)]
    for wrap in seeds:
        wrap.load_state_dict({"theta": model.V.detach()}, strict=False)
    assert torch.equal(seeds[0](x), model(x)) and not torch.allclose(seeds[1](x), model(x))


def test_fastfood_wrap_reloads(tmp_path):
    network, x = mlp(), torch.randn(5, 4)
    fresh, third = copy.deepcopy(network), copy.deepcopy(network)
    model = FastfoodWrap(network, 24, "cpu")
    with torch.no_grad():
        model.V.normal_()
    again = FastfoodWrap(fresh, 24, "cpu")
    again.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(again(x), model(x)) and torch.equal(FastfoodWrap.from_pretrained(tmp_path, third)(x), model(x))
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, FastfoodWrap) and torch.equal(copied(x), model(x))


@pytest.mark.parametrize(
    "put",
    [
        said,
        lambda module, **width: intrinsic_dimension(module, 50, None, (), "fastfood", **width),
        lambda module, **width: FastfoodWrap(module, 50, "cpu", **width),
    ],
)
def test_a_state_dict_of_the_narrower_width_of_earlier_versions(put):
    def make(**width: int) -> tuple[nn.Module, HSAID]:
        torch.manual_seed(1)
        module = put(bert(), **width)
        return module, getattr(module, "hsaid", module)

    (old, hsaid), (new, by_default), (again, narrow) = make(width=64), make(), make(width=64)
    assert [h.plan.width for h in (hsaid, by_default, narrow)] == [64, 256, 64]
    with torch.no_grad():
        hsaid.theta.normal_()
    with pytest.raises((ValueError, RuntimeError), match="got 64: wrap the model with width=64 for that"):
        new.load_state_dict(old.state_dict())
    again.load_state_dict(old.state_dict())
    assert same(narrow.weights(), hsaid.weights()) and not by_default.theta.any()


def test_fastfood_wrap_goes_to_its_device():
    model = FastfoodWrap(mlp(), 24, "meta")
    assert {p.device.type for p in (*model.parameters(), *model.m[0].parameters())} == {"meta"}
    with contextlib.nullcontext() if torch.cuda.is_available() else pytest.raises((AssertionError, RuntimeError)):
        FastfoodWrap(mlp(), 24)  # the first GPU, as in the original
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got str"):
        FastfoodWrap("mlp", 24, "cpu")
    with pytest.raises(ValueError, match="none of the 0"):
        FastfoodWrap(mlp().requires_grad_(False), 24, "cpu")
