"""An HSAID trains a LoRA model of PEFT inside a random subspace, and stays apart from LoRA on another model."""

import copy

import pytest
import torch
from models import IDS, bert, moved, same, snapshot
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.app.measure.compare import save_adapted
from hsaid_kernels.measure import Run

peft = pytest.importorskip("peft")

LABELS = torch.tensor([0, 1])
BATCH = {"input_ids": IDS, "labels": LABELS}


def lora(model: nn.Module, **changes) -> nn.Module:
    """LoRA of query and value, with random values in both factors: PEFT's own start is 0 in one of them."""
    settings = dict(r=2, lora_dropout=0.0, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | changes)))


def seeded_bert() -> nn.Module:
    torch.manual_seed(0)
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)


def train(model: nn.Module, steps: int = 12) -> list[float]:
    """The loop of PEFT's documentation."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_only_the_adapters_are_projected():
    model = lora(seeded_bert())
    before, trained = snapshot(model), {name for name, p in model.named_parameters() if p.requires_grad}
    hsaid = HSAID(model, 40)  # the one line that is changed
    assert set(hsaid.plan.names) == trained and len(trained) == 4 and all("lora_" in name for name in trained)
    assert type(hsaid).__name__ == "HSAIDPeftModel" and len(hsaid.frozen) == len(before) - 4
    losses = train(hsaid)
    assert losses[-1] < losses[0] - 0.01 and hsaid.theta.all() and same(model.state_dict(), before)
    moving = {name for name, value in hsaid.merge().state_dict().items() if not torch.equal(value, before[name])}
    assert moving == trained
    assert torch.equal(hsaid.eval()(IDS).logits, hsaid.merge().eval()(IDS).logits)
    assert hsaid.unwrap() is model and {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_a_head_is_trained_fully_beside_the_adapters():
    """With `modules_to_save`, PEFT trains a copy of the classifier."""
    model = lora(seeded_bert(), task_type="SEQ_CLS")
    hsaid = HSAID(model, 40, train_fully="modules_to_save")
    before = snapshot(model)
    assert len(hsaid.full) == 2 and all("classifier" in name for name in hsaid.full) and len(hsaid.plan.names) == 4
    losses = train(hsaid)
    assert losses[-1] < 0.5 * losses[0] and same(model.state_dict(), before)
    assert torch.equal(hsaid.eval()(IDS).logits, hsaid.merge().eval()(IDS).logits)


def test_a_start_of_zero():
    """In PEFT's own start a factor is 0, where the model gives what it gives without LoRA. It trains from there."""
    plain = seeded_bert().eval()
    hsaid = HSAID(lora(copy.deepcopy(plain), init_lora_weights=True), 40, normalize="tensor").eval()
    assert torch.equal(hsaid(IDS).logits, plain(IDS).logits)
    losses = train(hsaid)
    assert losses[-1] < losses[0] - 0.01 and not torch.equal(hsaid(IDS).logits, plain(IDS).logits)


def test_the_adapters_go_into_the_weights():
    hsaid = moved(HSAID(lora(seeded_bert()), 40)).eval()
    before, expected = snapshot(hsaid.model), hsaid(IDS).logits
    plain = hsaid.merge().merge_and_unload()
    assert type(plain) is type(bert()) and not any("lora" in name for name in plain.state_dict())
    assert torch.allclose(plain(IDS).logits, expected, atol=1e-6)
    assert not torch.allclose(seeded_bert().eval()(IDS).logits, expected, atol=1e-4)
    assert torch.equal(hsaid(IDS).logits, expected) and same(hsaid.model.state_dict(), before)


def test_what_peft_saves_of_a_merged_model_it_loads(tmp_path):
    hsaid = moved(HSAID(lora(seeded_bert()), 40)).eval()
    hsaid.merge().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5000
    loaded = peft.PeftModel.from_pretrained(seeded_bert(), tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, hsaid(IDS).logits)


def test_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = lora(seeded_bert())
    fresh = copy.deepcopy(model)
    hsaid = HSAID(model, 40)
    train(hsaid, 3)
    hsaid.save_pretrained(tmp_path)
    loaded = HSAID.from_pretrained(tmp_path, fresh)
    assert loaded.theta.any() and torch.equal(loaded(IDS).logits, hsaid(IDS).logits)


def test_without_the_adapters():
    """`disable_adapter` gives W0's model without LoRA, for the time of a block."""
    hsaid = moved(HSAID(lora(seeded_bert()), 40)).eval()
    within = hsaid(IDS).logits
    with hsaid.disable_adapter():
        assert torch.equal(hsaid(IDS).logits, seeded_bert().eval()(IDS).logits)
    assert torch.equal(hsaid(IDS).logits, within) and not torch.equal(within, seeded_bert().eval()(IDS).logits)


def test_lora_beside_it_on_a_copy():
    """Trained in turns, each ends where it ends alone."""

    def ends(kinds: tuple[str, ...]) -> dict[str, dict]:
        models = {"hsaid": seeded_bert(), "lora": seeded_bert()}
        torch.manual_seed(1)
        for kind in kinds:
            models[kind] = HSAID(models[kind], 60) if kind == "hsaid" else lora(models[kind])
        before = snapshot(models["hsaid"].model) if "hsaid" in kinds else {}
        losses = {kind: [] for kind in kinds}
        optimizers = {
            kind: torch.optim.AdamW((p for p in models[kind].parameters() if p.requires_grad), lr=0.05)
            for kind in kinds
        }
        for _ in range(8):
            for kind in kinds:
                loss = models[kind](**BATCH).loss
                loss.backward()
                optimizers[kind].step()
                optimizers[kind].zero_grad()
                losses[kind].append(loss.item())
        assert all(of[-1] < of[0] - 0.01 for of in losses.values())
        if before:
            assert same(models["hsaid"].model.state_dict(), before)
        return {kind: snapshot(models[kind]) for kind in kinds}

    together = ends(("lora", "hsaid"))
    assert same(together["lora"], ends(("lora",))["lora"]) and same(together["hsaid"], ends(("hsaid",))["hsaid"])


def test_a_wrapped_model_is_merged_and_then_gets_lora():
    hsaid = HSAID(seeded_bert(), 60)
    train(hsaid)
    before = hsaid.eval()(IDS).logits
    model = lora(hsaid.merge())
    losses = train(model.train())
    assert losses[-1] < losses[0] and sum(p.requires_grad for p in model.parameters()) == 4
    assert torch.equal(hsaid(IDS).logits, before)
    assert torch.equal(model.unload().eval()(IDS).logits, before)


CHANGES = {
    "add_adapter of transformers": (seeded_bert, lambda hsaid: hsaid.add_adapter(peft.LoraConfig(r=2))),
    "load_adapter of transformers": (seeded_bert, lambda hsaid: hsaid.load_adapter("nowhere")),
    "get_peft_model": (seeded_bert, lora),
    "add_adapter of PEFT": (
        lambda: lora(seeded_bert()),
        lambda hsaid: hsaid.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"])),
    ),
    "merge_and_unload": (lambda: lora(seeded_bert()), lambda hsaid: hsaid.merge_and_unload()),
    "unload": (lambda: lora(seeded_bert()), lambda hsaid: hsaid.unload()),
    "delete_adapter": (lambda: lora(seeded_bert()), lambda hsaid: hsaid.delete_adapter("default")),
    "merge_adapter": (lambda: lora(seeded_bert()), lambda hsaid: hsaid.merge_adapter()),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_the_model_is_refused_before_anything_changes(kind):
    build, change = CHANGES[kind]
    hsaid = moved(HSAID(build(), 60 if build is seeded_bert else 40)).eval()
    before, expected = snapshot(hsaid.model), hsaid(IDS).logits
    with pytest.raises((RuntimeError, TypeError, ValueError), match="unwrap"):
        change(hsaid)
    assert same(hsaid.model.state_dict(), before) and torch.equal(hsaid(IDS).logits, expected)
    assert same(hsaid.unwrap().state_dict(), before)


HEAD = 2 * 16 + 2
TRAINED = {  # of a layer with 16 x 16 matrices for query and value
    "lora": 2 * (16 + 16) + HEAD,
    "lora:4": 4 * 2 * (16 + 16) + HEAD,
    "vera:8": 2 * (8 + 16) + HEAD,
    "unilora:100": 100 + HEAD,
    "fourierft:7": 2 * 7 + HEAD,
}


@pytest.mark.parametrize("method", TRAINED)
def test_methods_to_compare_with(method, tmp_path):
    """What `hsaid measure --compare` trains: the adapters and the head, from the seed alone, and nothing else."""
    model = Run(method, None, 0.01, seed=3).wrap(seeded_bert())
    again = Run(method, None, 0.01, seed=3).wrap(seeded_bert())
    other = Run(method, None, 0.01, seed=4).wrap(seeded_bert())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == TRAINED[method]
    assert sum("classifier" in name for name in parameters) == 2
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in parameters.items())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    losses = train(model)
    assert losses == train(again) != train(other)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert not any(torch.equal(value, parameters[name]) for name, value in start.items())
    save_adapted(model, tmp_path)
    fresh = peft.PeftModel.from_pretrained(seeded_bert(), tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**BATCH).logits, model.eval()(**BATCH).logits)
