"""Other people's loops that are handed hsaid.model in place of the HSAID say so once; handed the HSAID, nothing."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import bert, same, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hsaid_kernels import HSAID

accelerate = pytest.importorskip("accelerate")

ROWS = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": i % 2} for i in range(32)]
BATCH = {"input_ids": torch.stack([row["input_ids"] for row in ROWS[:8]]), "labels": torch.arange(8) % 2}


def of_ours(said) -> list[str]:
    return [str(one.message) for one in said if str(one.message).startswith("hsaid.model:")]


@pytest.fixture
def said():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps the precision of the first Accelerator for all of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def wrapped() -> HSAID:
    torch.manual_seed(0)
    return HSAID(bert(), 60)


def trainer(model: nn.Module, directory: Path, **changes) -> transformers.Trainer:
    """Evaluates, saves, clips, logs, and loads the best."""
    options = dict(eval_strategy="steps", eval_steps=4, save_steps=4, logging_steps=1, load_best_model_at_end=True)
    options |= dict(
        max_steps=16, lr_scheduler_type="constant", per_device_train_batch_size=8, learning_rate=0.05, max_grad_norm=0.5
    )
    options |= dict(use_cpu=True, report_to=[], disable_tqdm=True) | changes
    arguments = transformers.TrainingArguments(str(directory), **options)
    return transformers.Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"save_strategy": "no"}])
def test_trainer_of_the_model(changes, tmp_path, said):
    hsaid = wrapped()
    if changes.get("save_strategy") == "no":
        changes = changes | {"load_best_model_at_end": False}
    trainer(hsaid.model, tmp_path, **changes).train()
    (message,) = of_ours(said)
    assert "hand over the HSAID itself" in message and not hsaid.theta.any()
    with pytest.warns(UserWarning, match="^hsaid.model: .*hand over the HSAID itself"):
        trainer(wrapped().model, tmp_path / "again", **changes).train()


def test_trainer_of_the_hsaid(tmp_path, said):
    hsaid = wrapped()
    before = snapshot(hsaid.model)
    run = trainer(hsaid, tmp_path)
    run.train()
    run.evaluate(), run.predict(ROWS), run.save_model(), hsaid.save_pretrained(tmp_path / "own")
    trainer(hsaid, tmp_path, max_steps=18).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0] and hsaid.theta.all()
    assert not of_ours(said)
    assert same(snapshot(hsaid.model), before)


def loop(hsaid: HSAID, each_step) -> None:
    """Accelerate's loop. `each_step(accelerator)` runs between backward and the step."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(hsaid, torch.optim.AdamW(hsaid.parameter_groups()))
    for _ in range(4):
        accelerator.backward(model(**BATCH).loss)
        each_step(accelerator)
        optimizer.step()
        optimizer.zero_grad()
    assert hsaid.theta.all()


class Average:
    """As diffusers' EMAModel: a list of parameters, of which each step takes a part."""

    def __init__(self, parameters):
        self.shadows = [parameter.clone().detach() for parameter in parameters]

    @torch.no_grad()
    def step(self, parameters) -> None:
        for shadow, parameter in zip(self.shadows, list(parameters), strict=True):
            shadow.sub_(0.1 * (shadow - parameter))


def averaged(model: nn.Module):
    average = AveragedModel(model)
    return lambda _: average.update_parameters(model)


def averaged_list(model: nn.Module):
    average = Average(model.parameters())
    return lambda _: average.step(model.parameters())


def averaged_by_timm(model: nn.Module):
    average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.9)
    return lambda _: average.update(model)


def clipped_by_timm(model: nn.Module):
    clip = pytest.importorskip("timm.utils").dispatch_clip_grad
    return lambda _: clip(model.parameters(), 0.5)


MEANT = {
    "AveragedModel": averaged,
    "as diffusers": averaged_list,
    "timm's average": averaged_by_timm,
    "timm's clipping": clipped_by_timm,
    "clip_grad_norm_": lambda model: lambda _: nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    "Accelerate's clip_grad_norm_": lambda model: lambda by: by.clip_grad_norm_(model.parameters(), 0.5),
    "unwrap_model": lambda model: lambda by: nn.utils.clip_grad_norm_(by.unwrap_model(model).parameters(), 0.5),
}


@pytest.mark.parametrize("kind", MEANT)
def test_loops(kind, said):
    hsaid = wrapped()
    loop(hsaid, MEANT[kind](hsaid))
    assert not of_ours(said)
    hsaid = wrapped()
    loop(hsaid, MEANT[kind](hsaid.model))
    (message,) = of_ours(said)
    assert message.startswith(("hsaid.model: parameters() gives W0", "hsaid.model: state_dict() gives W0"))


def test_an_optimizer_over_the_model(said):
    """Accelerate's loop whose optimizer has W0, which gets no gradients."""
    hsaid = wrapped()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(hsaid, torch.optim.AdamW(hsaid.model.parameters(), lr=0.05))
    for _ in range(4):
        accelerator.backward(model(**BATCH).loss)
        optimizer.step()
        optimizer.zero_grad()
    (message,) = of_ours(said)
    assert "an optimizer has W0" in message and not hsaid.theta.any()


HARMLESS = {
    "a device": lambda model: lambda _: next(model.parameters()).device,
    "transformers counts": lambda model: lambda _: (model.num_parameters(), model.num_parameters(True)),
    "a dtype": lambda model: lambda _: (model.dtype, model.device, model.get_memory_footprint()),
    "Accelerate unwraps": lambda model: lambda by: by.unwrap_model(model),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_only_looks_is_not_said(kind, said):
    hsaid = wrapped()
    sum(parameter.numel() for parameter in hsaid.model.parameters())  # once, before training
    loop(hsaid, HARMLESS[kind](hsaid.model))
    assert not of_ours(said)
    hsaid.model.zero_grad()  # is heard still
    assert len(of_ours(said)) == 1
