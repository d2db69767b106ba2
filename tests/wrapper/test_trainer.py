"""transformers' Trainer, and torch's mixed precision, take an HSAID as they take the model."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import IDS, bert, moved, same, snapshot, tied_models
from torch import Tensor, nn

from hsaid_kernels import HSAID, last_checkpoint
from hsaid_kernels.fastfood import ops

ROWS = [  # the label is whether the tokens are 10 or 20
    {
        "input_ids": torch.full((8,), 10 + 10 * (i % 2)),
        "attention_mask": torch.ones(8, dtype=torch.long),
        "labels": i % 2,
    }
    for i in range(24)
]


def wrapped(seed: int = 0, **options) -> HSAID:
    torch.manual_seed(seed)
    return HSAID(bert(), 60, backend="auto", **options)


def trainer(model: nn.Module, directory: Path, rows=ROWS, kind=transformers, **changes) -> transformers.Trainer:
    settings = dict(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    arguments = transformers.TrainingArguments(**(settings | changes))
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trains_evaluates_and_predicts(tmp_path):
    hsaid = wrapped()
    before = snapshot(hsaid.model)
    run = trainer(hsaid, tmp_path)
    run.train()
    assert hsaid.theta.all() and losses(run)[-1] < losses(run)[0]
    assert same(hsaid.model.state_dict(), before)
    result = run.evaluate()  # labels are found, and columns that the model has no use for dropped
    assert result["eval_loss"] == pytest.approx(
        sum(hsaid(**{k: torch.as_tensor(v)[None] for k, v in row.items()}).loss.item() for row in ROWS) / len(ROWS),
        rel=1e-5,
    )
    predicted = run.predict(ROWS)
    with torch.no_grad():
        expected = hsaid.merge().eval()(torch.stack([row["input_ids"] for row in ROWS])).logits
    assert torch.allclose(torch.from_numpy(predicted.predictions), expected, atol=1e-6)
    assert predicted.label_ids.tolist() == [row["labels"] for row in ROWS]


def test_columns_that_the_model_does_not_take_are_dropped(tmp_path):
    rows = [row | {"text": "unused"} for row in ROWS]
    run = trainer(wrapped(), tmp_path, rows)
    run.train()
    assert run._signature_columns[:2] == ["input_ids", "attention_mask"] and run.label_names == ["labels"]


@pytest.mark.parametrize("partition, train_fully", [("L1+L2|L3|L4", None), ("did", "classifier")])
def test_resuming_continues_bit_for_bit(tmp_path, partition, train_fully):
    options = dict(partition=partition, train_fully=train_fully)
    whole = wrapped(**options)
    saving = dict(save_strategy="steps", save_steps=2)
    trainer(whole, tmp_path / "a", **saving).train()

    stopped = wrapped(**options)
    trainer(stopped, tmp_path / "b", **saving, max_steps=4, lr_scheduler_type="constant").train()
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = wrapped(**options)
    run = trainer(resumed, tmp_path / "b", **saving)
    run.train(resume_from_checkpoint=last_checkpoint(tmp_path / "b"))
    assert run.state.global_step == 6 and len(losses(run)) == 6
    assert same(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    assert not same(dict(stopped.named_parameters()), dict(whole.named_parameters()))


def test_a_checkpoint_of_trainers_is_one_of_ours(tmp_path):
    hsaid = wrapped(train_fully="classifier")
    trainer(hsaid, tmp_path, save_strategy="steps", save_steps=6).train()
    directory = tmp_path / "checkpoint-6"
    assert sum(path.stat().st_size for path in directory.glob("model*")) < 5000
    other = HSAID.from_pretrained(directory, copy.deepcopy(hsaid.model))
    assert same(dict(other.named_parameters()), dict(hsaid.named_parameters())) and repr(other) == repr(hsaid)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    hsaid = wrapped()
    run = trainer(
        hsaid,
        tmp_path,
        learning_rate=3.0,  # so high that the last is not the best
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] > min(evaluated) == run.state.best_metric == run.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "other, reason",
    [
        (lambda: HSAID(bert(), 60, seed=1), "expected seed 1, as in this HSAID, got 0"),
        (lambda: HSAID(bert(), 60, task="other"), "expected task 'other', which is set, got 'default'"),
        (lambda: HSAID(bert(num_labels=3), 60), "'classifier.weight' has shape"),
        (lambda: HSAID(bert(), 60, train_fully="classifier"), "'classifier.weight' of shape .* is missing"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, other, reason):
    trainer(wrapped(), tmp_path, save_strategy="steps", save_steps=6).train()
    hsaid = other()
    with pytest.raises(RuntimeError, match=reason):
        trainer(hsaid, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not hsaid.theta.any()


def test_the_last_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    trainer(wrapped(), tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-9])  # cut off while it was written
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    values = tmp_path / "checkpoint-4" / "model.safetensors"
    values.write_bytes(values.read_bytes()[:-9])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) is None


def test_accumulating_gradients_is_a_larger_batch(tmp_path):
    rows = ROWS * 2
    one, two = wrapped(), wrapped()
    settings = dict(max_grad_norm=0.01, train_sampling_strategy="sequential")  # and clipped
    large = trainer(one, tmp_path, rows, per_device_train_batch_size=8, **settings)
    parts = trainer(two, tmp_path, rows, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    for model in (one, two):
        for module in model.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    large.train()
    parts.train()
    assert torch.allclose(one.theta, two.theta, atol=1e-4) and one.theta.any()
    norms = [entry["grad_norm"] for entry in large.state.log_history if "grad_norm" in entry]
    assert max(norms) > 0.01  # something was clipped


def test_bfloat16_mixed_precision(tmp_path):
    hsaid, plain = wrapped(), wrapped()
    seen = []
    hsaid.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    run = trainer(hsaid, tmp_path, bf16=True)
    run.train()
    trainer(plain, tmp_path).train()
    assert all(seen) and hsaid.theta.dtype == torch.float32 and not torch.equal(hsaid.theta, plain.theta)
    assert losses(run)[-1] < losses(run)[0]


def test_gradient_checkpointing_gives_the_same_losses(tmp_path):
    runs = []
    for settings in ({}, {"activation_checkpointing": True}):
        run = trainer(wrapped(), tmp_path, **settings)
        run.train()
        assert run.model.is_activation_checkpointing == bool(settings)
        runs.append(run)
    assert losses(runs[0]) == losses(runs[1]) and torch.equal(runs[0].model.theta, runs[1].model.theta)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_label_smoothing_is_that_of_the_model(kind, tmp_path):
    """A causal language model's labels are shifted, which Trainer knows from the model's class."""
    if kind == "gpt2":
        hsaid = moved(HSAID(tied_models()["gpt2"](), 80)).eval()
        inputs = {"input_ids": IDS, "labels": IDS}
    else:
        hsaid = moved(HSAID(bert(), 60)).eval()
        inputs = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    merged = hsaid.merge()
    got, expected = (
        trainer(model, tmp_path, label_smoothing_factor=0.3).compute_loss(model, dict(inputs)).item()
        for model in (hsaid, merged)
    )
    assert got == expected != trainer(hsaid, tmp_path).compute_loss(hsaid, dict(inputs)).item()


def test_generation_in_evaluation(tmp_path, monkeypatch):
    model = tied_models()["t5"]().eval()
    hsaid = moved(HSAID(model, 80))
    config = transformers.GenerationConfig(decoder_start_token_id=0, pad_token_id=0, max_length=7)
    made = []
    forward = ops.fastfood_forward
    monkeypatch.setattr(ops, "fastfood_forward", lambda *a: (made.append(1), forward(*a))[1])
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        predict_with_generate=True,
        generation_config=config,
        report_to=[],
        disable_tqdm=True,
        per_device_eval_batch_size=1,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    run = transformers.Seq2SeqTrainer(model=hsaid, args=arguments, eval_dataset=rows)
    predicted = run.predict(rows)
    assert hsaid.generation_config is model.generation_config and model.generation_config.max_length == 7
    assert len(made) == 1  # for two batches, each with a loss and six new tokens
    expected = hsaid.merge().generate(IDS)
    assert predicted.predictions.tolist() == expected.tolist()


# --- without Trainer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_gradient_scaling(dtype):
    hsaid = wrapped().train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.02)
    labels, reached = torch.tensor([0, 1]), []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = hsaid(IDS, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert hsaid.theta.grad.dtype == torch.float32 and hsaid.theta.grad.isfinite().all()
        nn.utils.clip_grad_norm_(hsaid.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        reached.append(loss.item())
    assert reached[-1] < reached[0]


def test_scaled_gradients_that_overflow_are_skipped():
    hsaid = wrapped().train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        loss = hsaid(IDS, labels=torch.tensor([0, 1])).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not hsaid.theta.any() and scaler.get_scale() < 2.0**60


def test_accelerate_saves_and_resumes(tmp_path):
    from accelerate import Accelerator

    def run(steps: range, load: Path | None = None) -> Tensor:
        accelerator = Accelerator(cpu=True)
        hsaid = wrapped().eval()
        optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.02)
        hsaid, optimizer = accelerator.prepare(hsaid, optimizer)
        if load:
            accelerator.load_state(str(load))
        for step in steps:
            accelerator.backward(hsaid(IDS, labels=torch.tensor([0, 1])).loss)
            optimizer.step()
            optimizer.zero_grad()
            if step == 2 and not load:
                accelerator.save_state(str(tmp_path))
        return accelerator.unwrap_model(hsaid).theta.detach()

    assert torch.equal(run(range(5)), run(range(3, 5), tmp_path))
    torch.manual_seed(0)
    assert HSAID.from_pretrained(tmp_path, bert()).theta.any()
