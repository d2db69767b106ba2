"""Reentrant activation checkpointing: Accelerate's DistributedDataParallel and hooks get theta's gradient once a step.

Run as a script, this file is one of two processes.
"""

import sys

import pytest
import torch
import transformers
from models import bert, relative
from processes import in_two_processes, leave

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper.weights import launches

pytest.importorskip("accelerate")

LAYERS, STEPS = 3, 4
SIZES = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=LAYERS)
KINDS = {"step": {}, "block": dict(memory="block"), "did": dict(partition="did", train_fully=None)}
# Of float32, whose roundings are 2^-24: sums of some hundred terms in another order, in each of the steps.
ROUNDINGS = STEPS * 100 * 2.0**-24


def wrapped(kind: str, reentrant: bool) -> HSAID:
    torch.manual_seed(0)
    model = bert(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    hsaid = HSAID(model, 90, **dict(train_fully="classifier") | KINDS[kind])
    hsaid.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return hsaid.train()


class Seen:
    """How often hooks have run: one that halves theta's gradient, and one inside of each layer."""

    def __init__(self, hsaid: HSAID):
        self.gradients = self.layers = 0
        hsaid.theta.register_hook(self.halve)
        for layer in hsaid.model.bert.encoder.layer:
            layer.output.register_forward_pre_hook(self.count)

    def halve(self, grad: torch.Tensor) -> torch.Tensor:
        self.gradients += 1
        return grad / 2

    def count(self, *_) -> None:
        self.layers += 1


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    return [(torch.randint(50, (8, 7)), torch.randint(2, (8,))) for _ in range(STEPS)]


def trained(hsaid: HSAID) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in hsaid.named_parameters()}


def train(hsaid: HSAID, parts: int) -> dict[str, torch.Tensor]:
    """One process on the whole batch, as so many parts."""
    optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.5)
    for ids, labels in batches():
        for part in range(parts):
            (hsaid(ids[part::parts], labels=labels[part::parts]).loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(hsaid)


def main(folder: str) -> None:
    from accelerate import Accelerator

    launches.SMALLEST_TABLE = 1  # rows of embeddings are looked up
    accelerator, found = Accelerator(cpu=True), {}
    for kind in KINDS:
        hsaid = wrapped(kind, reentrant=True)
        seen = Seen(hsaid)
        ddp, optimizer = accelerator.prepare(hsaid, torch.optim.SGD(hsaid.parameters(), lr=0.5))
        assert type(ddp).__name__ == "DistributedDataParallel"
        for ids, labels in batches():
            rows = slice(accelerator.process_index, None, 2)
            accelerator.backward(ddp(ids[rows], labels=labels[rows]).loss)
            optimizer.step()
            optimizer.zero_grad()
        found[kind] = {"trained": trained(hsaid), "gradients": seen.gradients, "layers": seen.layers}
    torch.save(found, f"{folder}/{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(__file__, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(ranks, kind, monkeypatch):
    """To the last bit as one that adds up the gradients of both halves, and as one without reentrant checkpoints."""
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 1)
    for found in ranks:
        assert found[kind]["gradients"] == STEPS  # a hook on theta runs once in a step
        assert found[kind]["layers"] == 2 * LAYERS * STEPS  # each layer runs again in backward
    first, second = (found[kind]["trained"] for found in ranks)
    halves, whole = wrapped(kind, reentrant=True), wrapped(kind, reentrant=False)
    Seen(halves), Seen(whole)
    halves, whole = train(halves, 2), train(whole, 1)
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, halves[name]), name
        assert (value - whole[name]).norm() <= ROUNDINGS * whole[name].norm(), name
    assert first["theta"].all()


@pytest.mark.parametrize("clip", [None, 1e-2])
def test_trainer(clip, tmp_path):
    """With reentrant checkpoints as with others, also where a hook on theta clips its gradient."""
    rows = [{"input_ids": ids[0], "labels": labels[0]} for ids, labels in batches() * 4]
    found = []
    for reentrant in (False, True):
        hsaid, norms = wrapped("step", reentrant), []

        def clipping(grad: torch.Tensor, norms=norms) -> torch.Tensor:
            norms.append(grad.norm().item())
            return grad if clip is None else grad * min(1.0, clip / norms[-1])

        hsaid.theta.register_hook(clipping)
        seen = Seen(hsaid)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **dict(use_cpu=True, max_steps=6, per_device_train_batch_size=8, logging_steps=1, optim="sgd"),
            **dict(learning_rate=0.5, max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True),
        )
        trainer = transformers.Trainer(hsaid, arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(norms) == seen.gradients == len(losses) == 6 and seen.layers == 2 * LAYERS * 6
        found.append((losses, norms, trained(hsaid)["theta"]))
    (losses, norms, theta), (others, other_norms, other) = found
    assert len(set(losses)) == 6 and others == pytest.approx(losses, rel=ROUNDINGS)
    assert other_norms == pytest.approx(norms, rel=ROUNDINGS) and min(norms) > (clip or 0)
    assert relative(other, theta) <= ROUNDINGS and theta.all()


if __name__ == "__main__":
    main(*sys.argv[1:])
