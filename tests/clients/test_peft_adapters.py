"""HSAID as a method of PEFT: what a PeftModel does, an adapter of HSAID does, with the bits of an HSAID."""

import copy
import gc
import json
import pickle
import re
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import few_bits
import pytest
import torch
import torch._dynamo
import transformers
from datasets import Dataset
from models import IDS, bert, normed, relative, same, snapshot, tied_models
from processes import in_two_processes, leave
from torch import nn

from hsaid_kernels import HSAID

peft = pytest.importorskip("peft")
from peft import PeftModel, get_peft_model  # noqa: E402

from hsaid_kernels.peft import HSAIDConfig  # noqa: E402
from hsaid_kernels.peft.config import LR_SCALE  # noqa: E402
from hsaid_kernels.peft.layer import _open  # noqa: E402

LABELS = torch.tensor([0, 1])
BATCH = {"input_ids": IDS, "labels": LABELS}
HEAD = ["classifier"]


def seeded_bert(**changes) -> nn.Module:
    torch.manual_seed(0)
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, **changes).eval()


def inside(model: nn.Module) -> nn.Module:
    return model.base_model.model if isinstance(model, PeftModel) else model


def values(model: nn.Module, adapter: str = "default") -> nn.Module:
    return inside(model).hsaid.hsaid_adapters[adapter]


def moved(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """As after training: theta of about 1, multipliers of about 1."""
    own, generator = values(model, adapter), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own.theta.normal_(0, 1 / LR_SCALE, generator=generator)
        own.multipliers.normal_(0, 0.2 / LR_SCALE, generator=generator)
    return model


def adapted(adapter: str = "default", base: nn.Module | None = None, **options) -> PeftModel:
    options = dict(intrinsic_dim=80) | options
    model = get_peft_model(seeded_bert() if base is None else base, HSAIDConfig(**options), adapter)
    return moved(model.eval(), adapter)


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits.detach()


def train(model: nn.Module, steps: int = 8, lr: float = 1e-4) -> list[float]:
    """The loop of PEFT's documentation."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def w0(model: nn.Module) -> dict:
    return {name: tensor for name, tensor in snapshot(inside(model)).items() if not name.startswith("hsaid.")}


# --- the same numbers as an HSAID's


def test_begins_as_the_model():
    plain = logits(seeded_bert())
    model = get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80)).eval()
    assert torch.equal(logits(model), plain)
    trained, every = model.get_nb_trainable_parameters()
    assert trained == 80 and every == 80 + sum(p.numel() for p in seeded_bert().parameters())
    assert model.get_model_status().peft_types == {"default": "HSAID"}


ONE_CHUNK = {"intrinsic_dim": 300, "width": 64, "chunks": "one"}


@pytest.mark.parametrize("options", [{}, {"partition": "did"}, {"seed": 7, "diagonal": "rademacher"}, ONE_CHUNK])
def test_the_weights_are_those_of_an_hsaid_to_the_bit(options):
    model, hsaid = adapted(**options), HSAID(seeded_bert(), **{"intrinsic_dim": 80} | options)
    own = values(model)
    with torch.no_grad():
        hsaid.theta.copy_(LR_SCALE * own.theta)
        hsaid.multipliers.copy_(1 + LR_SCALE * own.multipliers)
        own.multipliers.copy_((hsaid.multipliers - 1) / LR_SCALE)
    expected = hsaid.weights()
    found = {name: read(inside(model), name) for name in expected}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items()) and len(found) == 25
    assert not any(torch.equal(found[name], hsaid.w0()[name]) for name in found)


def read(model: nn.Module, name: str) -> torch.Tensor:
    *path, key = name.split(".")
    for step in path:
        model = getattr(model, step)
    return getattr(model, key)


def test_trains_as_an_hsaid_does_at_lr_scale_times_the_rate():
    """But for Adam's epsilon, which is added to a gradient that is larger by lr_scale."""
    hsaid = HSAID(seeded_bert(), 80)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=1e-4 * LR_SCALE, weight_decay=0.0, eps=1e-8 / LR_SCALE)
    expected = []
    for _ in range(8):
        loss = hsaid(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    model = get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, weight_decay=0.0)
    for step in range(8):
        loss = model(**BATCH).loss
        assert loss.item() == pytest.approx(expected[step], rel=1e-5), step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert expected[-1] < 0.5 * expected[0]


def test_weight_decay_pulls_towards_w0():
    model = adapted()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5, weight_decay=1.0)
    for parameter in values(model).parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(200):
        optimizer.step()
    assert torch.allclose(logits(model), logits(seeded_bert()), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"memory": "block"}, {"task_type": "FEATURE_EXTRACTION"}, "checkpointing", "native"]
)
def test_trains_alike_in_every_way(options):
    expected = train(get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80)))
    if options == "native":
        model = seeded_bert()
        model.add_adapter(HSAIDConfig(intrinsic_dim=80))
    else:
        extra = options if isinstance(options, dict) else {"memory": "block"}
        model = get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80, **extra))
    if options == "checkpointing":
        model.gradient_checkpointing_enable()
        model.train()
    before = w0(model)
    assert train(model) == expected and expected[-1] < 0.5 * expected[0]
    assert same(w0(model), before)


@pytest.mark.parametrize("way", ["PeftModel", "task", "native"])
def test_every_way_of_calling_the_model_is_a_call_of_the_adapter(way):
    """In which weights do not change, and nothing of them is kept with memory="block"."""
    config = HSAIDConfig(intrinsic_dim=80, memory="block", task_type="FEATURE_EXTRACTION" if way == "task" else None)
    model = seeded_bert()
    if way == "native":
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    source, called = values(model)._source, []
    inside(model).bert.pooler.register_forward_hook(lambda *_: called.append(source._thread.call is not None))
    loss = model(**BATCH).loss
    with pytest.raises(RuntimeError):
        model(IDS.float())
    assert called == [True] and source._thread.call is None and not _open.calls
    loss.backward()
    assert values(model).theta.grad.any()


def test_generates():
    model = get_peft_model(language_model(), HSAIDConfig(intrinsic_dim=80, task_type="CAUSAL_LM")).eval()
    given = dict(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(**given)
    assert torch.equal(plain, language_model().eval().generate(**given))
    moved(model)
    with torch.no_grad():
        values(model).theta.mul_(10)
    tuned = model.generate(**given)
    assert not torch.equal(tuned, plain) and torch.equal(model.merge_and_unload().generate(**given), tuned)


def language_model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


# --- which tensors


def test_target_modules():
    everything = {name for name, _ in seeded_bert().named_parameters()}

    def projected(**options) -> set[str]:
        return set(values(adapted(partition="did", **options))._basis.plan.names)

    assert projected() == everything
    query = {name for name in everything if ".query." in name}
    assert projected(target_modules=["query"]) == projected(target_modules=r".*\.query") == query and len(query) == 2
    assert projected(target_modules=["attention"]) == {name for name in everything if ".attention." in name}
    assert projected(exclude_modules=["embeddings"]) == {name for name in everything if "embeddings" not in name}
    linear = projected(target_modules="all-linear", task_type="SEQ_CLS")
    assert linear == {n for n in everything if not ("embeddings" in n or "LayerNorm" in n or "classifier" in n)}
    assert projected(modules_to_save=HEAD) == {name for name in everything if not name.startswith("classifier.")}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "albert"])
def test_tied_weights_stay_tied(kind):
    torch.manual_seed(0)
    model = tied_models()[kind]()
    before = len(dict(model.named_parameters()))
    tuned = moved(get_peft_model(model, HSAIDConfig(intrinsic_dim=200)).eval())
    ids = dict(decoder_input_ids=IDS) if kind == "t5" else {}
    with torch.no_grad():  # T5 computes otherwise where weights require gradients
        expected = tuned(input_ids=IDS, **ids).logits
        assert len(values(tuned)._basis.plan.names) == before
        merged = tuned.merge_and_unload()
        found = merged(input_ids=IDS, **ids).logits
    assert torch.equal(found, expected) and len(dict(merged.named_parameters())) == before


def test_requires_grad_of_the_model_makes_no_difference():
    """PEFT freezes all of a model, and leaves it so after unload()."""
    expected = logits(adapted())
    model = seeded_bert().requires_grad_(False)
    assert torch.equal(logits(adapted(base=model)), expected)
    again = adapted(base=adapted().unload())
    assert torch.equal(logits(again), expected)


def test_one_configuration_for_two_models():
    config = HSAIDConfig(intrinsic_dim=200)
    get_peft_model(seeded_bert(), config)
    other = get_peft_model(language_model(), config)
    assert config.width is None and config.padding_rows is None and other.peft_config["default"].width == 256


# --- saved and loaded


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": HEAD}, {"partition": "did", "task_type": "SEQ_CLS"}, ONE_CHUNK]
)
def test_saved_and_loaded(options, low_cpu_mem_usage, tmp_path):
    model = adapted(**options)
    if options.keys() & {"modules_to_save", "task_type"}:
        with torch.no_grad():
            inside(model).classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 3000
    loaded = PeftModel.from_pretrained(seeded_bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trained = PeftModel.from_pretrained(seeded_bert(), tmp_path, is_trainable=True)
    assert train(trained, 3)[-1] < train(trained, 1)[0] + 1


def test_auto_classes_load_the_model_too(tmp_path):
    seeded_bert().save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = adapted(base=base, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    native = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert type(native).__name__ == "BertForSequenceClassification" and torch.equal(logits(native), logits(model))


def test_what_is_uploaded(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, *args, **kwargs):
        uploaded[repo_id] = sorted(path.name for path in Path(working_dir).iterdir())

    monkeypatch.setattr(transformers.utils.hub.PushToHubMixin, "_upload_modified_files", upload)
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    adapted().push_to_hub("me/task")
    assert uploaded == {"me/task": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}


def test_another_w0_is_said_and_another_subspace_refused(tmp_path):
    model = adapted(seed=3)
    model.save_pretrained(tmp_path)
    other = seeded_bert()
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(1)
    with pytest.warns(
        UserWarning, match=r"W0 is not what was trained from in 1 of 25 tensors \('bert.pooler.dense.wei"
    ):
        PeftModel.from_pretrained(other, tmp_path)
    state = peft.get_peft_model_state_dict(model)
    for options, said in {
        (("seed", 4),): "expected seed 4, as in this HSAID, got 3",
        (("seed", 3), ("lr_scale", 64.0)): "expected lr_scale 64.0, got 512.0",
        (("seed", 3), ("exclude_modules", ("pooler",))): "expected the 25 tensors that were trained, got others",
    }.items():
        found = adapted(**dict(options))
        before = snapshot(found)
        with pytest.raises(RuntimeError, match=said):
            peft.set_peft_model_state_dict(found, state)
        assert same(snapshot(found), before)
    small = seeded_bert(hidden_size=8)
    with pytest.raises((ValueError, RuntimeError), match="expected the 25 tensors that were trained, got others"):
        PeftModel.from_pretrained(small, tmp_path)


def test_files_of_lora_are_told_apart(tmp_path):
    lora = get_peft_model(seeded_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().load_adapter(tmp_path, "lora")


# --- several adapters


def two_adapters() -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    """The second one has a head of its own, and PEFT then renames the model's."""
    model = adapted()
    first = logits(model)
    config = HSAIDConfig(intrinsic_dim=60, partition="did", seed=3, modules_to_save=["classifier"], memory="block")
    model.add_adapter("second", config)
    moved(model, "second", 2)
    with torch.no_grad():
        inside(model).classifier.modules_to_save["second"].weight.add_(1)
    assert torch.equal(logits(model), first)  # is not active yet
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    return model, first, second


def test_adapters_are_set_in_turns():
    model, first, second = two_adapters()
    before = w0(model)
    for _ in range(2):
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"base_model.model.hsaid.hsaid_adapters.default.{key}" for key in ("theta", "multipliers")
        }
        model.set_adapter("second")
        assert torch.equal(logits(model), second)
    assert same(w0(model), before)
    assert len(values(model)._basis.plan.names) == 25 and len(values(model, "second")._basis.plan.names) == 23


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_each_loads_alone_and_beside_the_other(order, tmp_path):
    model, first, second = two_adapters()
    model.save_pretrained(tmp_path)
    expected = {"default": first, "second": second}
    paths = {"default": tmp_path, "second": tmp_path / "second"}
    loaded = PeftModel.from_pretrained(seeded_bert(), paths[order[0]], order[0])
    assert torch.equal(logits(loaded), expected[order[0]])
    loaded.load_adapter(paths[order[1]], order[1])
    for name in order[::-1]:
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), expected[name])


def test_both_are_trained_apart():
    model, _, _ = two_adapters()
    before = {name: snapshot(values(model, name)) for name in ("default", "second")}
    train(model.train())
    assert same(snapshot(values(model)), before["default"])
    assert not torch.equal(values(model, "second").theta, before["second"]["theta"])


@pytest.mark.parametrize("gone", ["default", "second"])
@pytest.mark.parametrize("active", ["default", "second"])
def test_one_is_deleted(gone, active):
    model, first, second = two_adapters()
    model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which one is set now
        model.delete_adapter(gone)
    assert list(inside(model).hsaid.hsaid_adapters) == model.active_adapters != [gone]
    assert torch.equal(logits(model), second if gone == "default" else first)
    (left,) = model.active_adapters
    model.delete_adapter(left)
    with torch.no_grad():
        assert torch.equal(model.base_model(IDS).logits, logits(seeded_bert()))


def test_a_failure_to_add_changes_nothing():
    model = adapted()
    before, expected = snapshot(model), logits(model)
    for options, said in {
        (("intrinsic_dim", 3),): "intrinsic_dim: expected more than the 16 multipliers",
        (
            ("intrinsic_dim", 80),
            ("target_modules", "nowhere"),
        ): "target_modules: expected names of modules, got 'nowhere'",
        (("intrinsic_dim", 80), ("partition", "L9")): "partition: expected did, none",
    }.items():
        with pytest.raises(ValueError, match=said):
            model.add_adapter("second", HSAIDConfig(**dict(options)))
    assert (
        same(snapshot(model), before)
        and torch.equal(logits(model), expected)
        and list(model.peft_config) == ["default"]
    )
    plain = seeded_bert()
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    with pytest.raises(ValueError, match="intrinsic_dim"):
        get_peft_model(plain, HSAIDConfig(intrinsic_dim=3))
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == flags and "hsaid" not in plain._modules


def test_statistics_belong_to_the_model(tmp_path):
    """Switching between adapters leaves them, and so does taking all adapters out."""
    torch.manual_seed(0)
    model = get_peft_model(normed(), HSAIDConfig(intrinsic_dim=60))
    model.add_adapter("second", HSAIDConfig(intrinsic_dim=60, seed=1))
    x = torch.randn(16, 8)
    model.train()(x)
    mean = inside(model)[1].running_mean.clone()
    model.set_adapter("second")
    model(x)
    later = inside(model)[1].running_mean.clone()
    with model.disable_adapter():
        pass
    assert torch.equal(inside(model)[1].running_mean, later) and not torch.equal(mean, later)
    assert torch.equal(model.unload()[1].running_mean, later)


# --- without adapters


def test_disable_adapter():
    model = adapted(modules_to_save=HEAD)
    within, plain = logits(model), logits(seeded_bert())
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), within)


def test_disabled_between_forward_and_backward():
    gradients = []
    for looks in (False, True):
        model = adapted(memory="block")
        loss = model(**BATCH).loss
        if looks:
            with model.disable_adapter(), torch.no_grad():
                model(IDS)
        loss.backward()
        gradients.append(values(model).theta.grad)
    assert torch.equal(*gradients)


def test_merged_and_unmerged_to_the_bit():
    model = adapted()
    before, expected = w0(model), logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected) and not same(w0(model), before)
    assert model.get_model_status().merged_adapters == ["default"]
    with pytest.raises(RuntimeError, match="expected a model on its W0"):
        model.load_state_dict(model.state_dict())
    model.unmerge_adapter()
    assert same(w0(model), before) and torch.equal(logits(model), expected)
    train(model.train(), 2)


def test_another_than_the_active_one_is_merged():
    model, first, second = two_adapters()
    model.merge_adapter(["default"])
    assert model.get_model_status().merged_adapters == ["default"] and not torch.equal(logits(model), second)
    model.unmerge_adapter()
    assert torch.equal(logits(model), second)


def test_a_merged_model_moves():
    model = adapted()
    model.merge_adapter()
    model.to(torch.float64).to(torch.float32)
    model.unmerge_adapter()
    assert same(w0(model), w0(adapted()))


@pytest.mark.parametrize("modules", [None, HEAD])
def test_merge_and_unload(modules, tmp_path):
    model = adapted(modules_to_save=modules)
    expected = logits(model)
    plain = model.merge_and_unload()
    assert type(plain) is type(seeded_bert()) and plain.state_dict().keys() == seeded_bert().state_dict().keys()
    assert torch.equal(logits(plain), expected) and not hasattr(plain, "peft_config")
    assert len({p.untyped_storage().data_ptr() for p in plain.parameters()}) == 25  # each has its own memory
    plain.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(get_peft_model(plain, HSAIDConfig(intrinsic_dim=80)).eval()), expected)


def test_safe_merge():
    model = adapted()
    with torch.no_grad():
        values(model).theta[0] = torch.nan
    before = w0(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert same(w0(model), before)


def test_unload_gives_the_plain_model():
    model = adapted(modules_to_save=HEAD)
    plain = inside(model)
    types = {name: type(module) for name, module in seeded_bert().named_modules()}
    assert model.unload() is plain and not plain._forward_hooks and not plain._forward_pre_hooks
    assert {name: type(module) for name, module in plain.named_modules()} == types


# --- copies, and the end


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, first, second = two_adapters()
    other = copied(model)
    assert type(other) is type(model) and torch.equal(logits(other), second)
    with torch.no_grad():
        values(other).theta.zero_()
        values(other).multipliers.zero_()
    other.set_adapter("default")
    assert torch.equal(logits(other), logits(seeded_bert()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_nothing_keeps_a_model_alive():
    model = adapted()
    train(model.train(), 2)
    gone = weakref.ref(inside(model))
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_theta_stays_in_float32():
    model = adapted().to(torch.bfloat16)
    assert values(model).theta.dtype == torch.float32 and inside(model).classifier.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


# --- transformers' own methods


def test_adapters_of_transformers(tmp_path):
    model, plain = seeded_bert(), logits(seeded_bert())
    model.add_adapter(HSAIDConfig(intrinsic_dim=80))
    first = logits(moved(model))
    assert torch.equal(first, logits(adapted()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a second one
        model.add_adapter(HSAIDConfig(intrinsic_dim=60, modules_to_save=["classifier"]), "second")
    with torch.no_grad():
        model.classifier.modules_to_save["second"].weight.add_(1)
    second = logits(moved(model, "second", 2))
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), second)
    model.save_pretrained(tmp_path / "second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path / "first")
    loaded = seeded_bert()
    loaded.load_adapter(str(tmp_path / "first"))
    assert torch.equal(logits(loaded.eval()), first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits(loaded.eval()), second)
    loaded.delete_adapter("second")
    assert torch.equal(logits(loaded), first)


def test_transformers_says_another_w0_too(tmp_path):
    model = seeded_bert()
    model.add_adapter(HSAIDConfig(intrinsic_dim=80))
    moved(model).save_pretrained(tmp_path)
    other = seeded_bert()
    with torch.no_grad():
        other.classifier.bias.add_(1)
    with pytest.warns(UserWarning, match="W0 is not what was trained from in 1 of 25 tensors"):
        other.load_adapter(str(tmp_path))


def test_training_a_model_with_adapters_of_transformers_warns_of_nothing():
    """Its parameters() have theta, so zero_grad() and save_pretrained() of it are meant."""
    model = seeded_bert()
    model.add_adapter(HSAIDConfig(intrinsic_dim=80))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(**BATCH).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            model.state_dict()


# --- Trainer, two processes, the compiler, few bits


def trainer(model: nn.Module, directory, **changes) -> transformers.Trainer:
    rows = Dataset.from_list([{"input_ids": [10 + 10 * (i % 2)] * 6, "labels": i % 2} for i in range(32)])
    settings = dict(max_steps=8, save_steps=4, logging_steps=1, learning_rate=2e-4, lr_scheduler_type="constant")
    settings |= dict(
        per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True, eval_strategy="steps"
    )
    settings |= dict(eval_steps=4, load_best_model_at_end=True) | changes
    arguments = transformers.TrainingArguments(output_dir=str(directory), **settings)
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}]
)
def test_trainer_and_a_resumed_run(options, tmp_path):
    def fresh() -> PeftModel:
        return get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80, modules_to_save=["classifier"]))

    whole = trainer(fresh(), tmp_path, **options)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").stat().st_size < 4000
    resumed = trainer(fresh(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    found = list(map(peft.get_peft_model_state_dict, (whole.model, resumed.model)))
    assert same(*found) and len(found[0]) == 5


def in_a_process() -> None:
    """DistributedDataParallel and FSDP2 average theta's gradient."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = adapted(modules_to_save=["classifier"])
    ddp = DistributedDataParallel(model)
    own = {key: value[rank : rank + 1] for key, value in BATCH.items()}
    ddp(**own).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    alone = adapted(modules_to_save=["classifier"])
    alone(**BATCH).loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 4
    assert all(relative(found[name], expected[name]) < 1e-5 for name in found)

    def shard(model: nn.Module) -> None:
        fully_shard(base.bert.encoder.layer[0])
        fully_shard(model)

    for wrapped_first in (False, True):  # FSDP2's shards, as Accelerate makes them, and as people do
        options = dict(memory="block", modules_to_save=["classifier"] if wrapped_first else None)
        base = seeded_bert()
        if not wrapped_first:
            shard(base)
            with pytest.raises(ValueError, match="modules_to_save: expected None for a model that FSDP2 has sharded"):
                adapted(base=base, memory="block", modules_to_save=["classifier"])
        sharded = adapted(base=base, **options)
        if wrapped_first:
            shard(sharded)
        sharded(**own).loss.backward()
        theta, alone = values(sharded).theta.grad, adapted(**options)
        alone(**BATCH).loss.backward()
        assert relative(theta.full_tensor() if wrapped_first else theta, values(alone).theta.grad) < 1e-5
    other = get_peft_model(seeded_bert(), HSAIDConfig(intrinsic_dim=80, seed=rank))
    with pytest.raises(ValueError, match="seed: expected the same on all ranks, got 0 on rank 0, 1 on rank 1"):
        DistributedDataParallel(other)(**own)
    leave()


def test_two_processes():
    in_two_processes(__file__)


@pytest.mark.parametrize("options", [{"task_type": "FEATURE_EXTRACTION"}, {"task_type": "SEQ_CLS"}, {}])
def test_compiled(options):
    """In one graph where PEFT calls its tuner, which it does for models with a task type."""
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        model = adapted(**options)
        called = torch.compile(model, backend="eager", fullgraph="task_type" in options) if compiles else model
        called(**BATCH).loss.backward()
        with torch.no_grad():
            values(model).theta.mul_(2)
        results.append((called(IDS).logits, values(model).theta.grad, values(model).multipliers.grad))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_one_that_keeps_the_renamed_head_is_compiled_with_breaks():
    model, first, _ = two_adapters()
    model.set_adapter("default")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(IDS).logits, first)


def test_over_few_bits():
    model = few_bits.quantized(seeded_bert())
    plain = logits(few_bits.quantized(seeded_bert()))
    tuned = get_peft_model(model, HSAIDConfig(intrinsic_dim=80, memory="block")).eval()
    assert torch.allclose(logits(tuned), plain, atol=1e-5) and len(values(tuned)._basis.plan.names) == 25
    losses = train(tuned.train())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(
        RuntimeError, match="merge: expected plain parameters, which adapters can be merged into, got quant"
    ):
        tuned.merge_and_unload()
    with pytest.raises(ValueError, match='memory: expected "block" for a quantized model'):
        get_peft_model(few_bits.quantized(seeded_bert()), HSAIDConfig(intrinsic_dim=80))


# --- refused


def test_what_is_refused():
    model, _, second = two_adapters()
    for call, said in {
        (
            lambda: model(IDS, adapter_names=["default", "second"])
        ): "adapter_names: expected None, because a call runs on",
        (lambda: model.base_model.set_adapter(["default", "second"])): "expected one adapter, because the weights of a",
        (lambda: inside(model).resize_token_embeddings(70)): "a projected weight is read only",
        (
            lambda: get_peft_model(HSAID(seeded_bert(), 80), HSAIDConfig())
        ): "expected a plain module, got one that is or",
        (lambda: get_peft_model(torch.compile(seeded_bert()), HSAIDConfig())): "compile what get_peft_model() gives",
        (lambda: model.merge_adapter(["default", "second"])): "merge: expected one adapter",
    }.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(said)):
            call()
    assert torch.equal(logits(model), second)


def test_backward_while_it_is_disabled_is_refused():
    """Nothing would tell which weights a part that backward recomputes has."""
    model = adapted()
    loss = model(**BATCH).loss
    with model.disable_adapter(), pytest.raises(RuntimeError, match=r"backward\(\): expected a call before unwrap"):
        loss.backward()


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="does not run in torch.nn.DataParallel"):
        values(adapted())._replicate_for_data_parallel()


def test_an_adapter_is_added_to_a_merged_model():
    model = adapted()
    expected, before = logits(model), w0(model)
    model.merge_adapter()
    model.add_adapter("second", HSAIDConfig(intrinsic_dim=60))
    assert torch.equal(logits(model), expected) and not model.get_model_status().merged_adapters
    assert same(w0(model), before)


def test_other_methods_beside_it_are_refused():
    lora = get_peft_model(seeded_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(TypeError, match="expected one without adapters of other methods, got Linear: unload()"):
        get_peft_model(lora.base_model.model, HSAIDConfig(intrinsic_dim=80))


def test_hotswap_is_refused(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but HSAID was passed"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_trainable_tokens_are_refused():
    config = HSAIDConfig(intrinsic_dim=80)
    config.trainable_token_indices = [1, 2]  # as TRL sets it
    with pytest.raises(ValueError, match="trainable_token_indices: expected None"):
        get_peft_model(seeded_bert(), config)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"intrinsic_dim": "80"}, "intrinsic_dim: expected an integer"),
        ({"memory": "none"}, "memory: expected one of 'step', 'block'"),
        ({"lr_scale": 0}, "lr_scale: expected a positive number, got 0"),
        ({"dtype": "int8"}, "dtype: expected None or one of 'float32'"),
        ({"seed": -1}, "seed: expected an integer from 0"),
    ],
)
def test_options_are_checked_at_once(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        HSAIDConfig(**options)


def test_resized_embeddings_are_noticed():
    model = adapted()
    with pytest.raises(ValueError, match=r"word_embeddings.weight' has shape \(70, 16\) in place of \(50, 16\)"):
        with model.disable_adapter():
            inside(model).resize_token_embeddings(70)


if __name__ == "__main__" and "pytest" in sys.modules:
    in_a_process()


def test_over_four_bits_of_bitsandbytes():
    layers = pytest.importorskip("bitsandbytes").nn

    def model() -> nn.Module:
        made = seeded_bert()
        for module in made.bert.encoder.layer:
            linear, quantized = module.intermediate.dense, layers.Linear4bit(16, 32, quant_type="nf4")
            quantized.load_state_dict(linear.state_dict())
            module.intermediate.dense = quantized.to("cpu")
        return made

    hsaid = HSAID(model(), 80, memory="block")
    tuned = get_peft_model(model(), HSAIDConfig(intrinsic_dim=80, memory="block"))
    (theta,) = [parameter for name, parameter in tuned.named_parameters() if name.endswith(".theta")]
    with torch.no_grad():
        hsaid.theta.normal_()
        theta.copy_(hsaid.theta / 512)
    loss, other = tuned(IDS, labels=LABELS).loss, hsaid(IDS, labels=LABELS).loss
    loss.backward()
    other.backward()
    assert torch.equal(loss, other) and torch.equal(theta.grad / 512, hsaid.theta.grad)
    with tuned.disable_adapter():
        assert torch.equal(tuned(IDS).logits, hsaid.unwrap()(IDS).logits)


def test_adapters_of_before_divide_heads_as_before(tmp_path):
    """Their configurations do not say how; a Longformer's heads own more by now."""
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    plain = transformers.LongformerModel(transformers.LongformerConfig(**sizes, attention_window=[4])).eval()
    options = dict(intrinsic_dim=400, partition="L1+L5|L3|L4", init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), HSAIDConfig(**options, layouts=1))
    expected = model(input_ids=torch.arange(3, 11)[None]).last_hidden_state
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config.pop("layouts"), config.pop("experts")) == (1, False)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(input_ids=torch.arange(3, 11)[None]).last_hidden_state, expected)
    assert get_peft_model(plain, HSAIDConfig(**options)).peft_config["default"].layouts == 2


def test_adapters_of_before_have_all_chunks_in_every_block(tmp_path):
    """Their configurations do not say so; a theta of more than 16,384 values is by default made otherwise now."""
    plain = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3))
    options = dict(intrinsic_dim=17_000, partition="did", init_weights=False)
    model, x = get_peft_model(copy.deepcopy(plain), HSAIDConfig(**options, chunks="all")), torch.randn(2, 300)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("chunks") == "all"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), model(x))
    assert get_peft_model(plain, HSAIDConfig(**options)).peft_config["default"].chunks == "one"
