"""`hsaid train`: trains a text classifier with H-SAID, on the embedded data or on the user's files."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hsaid_kernels.app import data, trained, training
from hsaid_kernels.app.architecture import FALLBACK
from hsaid_kernels.app.defaults import MBERT_STEPS, TUNED_RATE, TUNED_STEPS
from hsaid_kernels.app.inputs import check_writable, described_data, load_classifier, load_dataset, num_steps
from hsaid_kernels.app.terminal import RunError, num_weights, progress, say, user_input
from hsaid_kernels.fastfood.ops import choose_backend, choose_device
from hsaid_kernels.wrapper.hsaid import HSAID


def train(arguments: argparse.Namespace) -> None:
    """Trains, saves the checkpoint, reloads it and compares the predictions; then may time steps of mBERT.

    Raises UsageError for invalid arguments, RunError if the loss is not finite or the predictions differ.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with user_input():
        dataset = load_dataset(arguments)
        check_writable(arguments.out)
        source, classifier = load_classifier(arguments, dataset.labels)
        classifier.model = _wrap(classifier.model, arguments)
    _describe_model(source, classifier.model)
    _describe_data(dataset)

    steps = num_steps(arguments, num_weights(classifier.model.plan.shapes), len(dataset.train))
    seconds = _fit(classifier, dataset, steps, arguments.lr, arguments)
    if arguments.bits is not None:
        tuned = max(1, round(steps * TUNED_STEPS))
        more = _fit(
            classifier, dataset, tuned, arguments.lr * TUNED_RATE / 2**arguments.bits, arguments, arguments.bits
        )
        seconds = {part: seconds[part] + more[part] for part in seconds}
        steps += tuned
    result = training.evaluate(classifier, dataset.test)
    run = {"model": source, "seed": arguments.seed, "data": dataset.name, "steps": steps, "lr": arguments.lr}
    run["examples"] = described_data(arguments, dataset)
    with user_input():
        training.save_trained(classifier, arguments.out, **run, test_accuracy=result.accuracy)

    device = classifier.model.theta.device
    _describe_accuracy(result, dataset)
    if dataset.validation:
        validation = training.evaluate(classifier, dataset.validation).accuracy
        say("", f"{validation:.3f}{_languages(dataset.validation)}, by which to choose settings")
    say("step", _shares(seconds, steps))
    say("memory", f"{training.peak_memory(device) / 2**20:,.0f} MiB at the peak")
    say("checkpoint", f"{trained.size(arguments.out):,} bytes in {arguments.out}")

    del classifier  # two models at once may not fit into memory
    fresh = training.load_trained(arguments.out)
    fresh.model.to(device)
    again = training.evaluate(fresh, dataset.test)
    if again.predictions != result.predictions:
        before, after = result.accuracy, again.accuracy
        raise RunError(f"expected the accuracy {before!r} after reloading {arguments.out}, got {after!r}")
    say("reloaded", f"into a fresh model: accuracy {again.accuracy!r}, the same to the last digit")

    del fresh
    mbert_steps = arguments.mbert_steps
    if mbert_steps is None:
        mbert_steps = MBERT_STEPS if arguments.model is None and source == FALLBACK else 0
    if mbert_steps:
        _time_mbert(mbert_steps, dataset.train, arguments)


def _fit(
    classifier: training.Classifier,
    dataset: data.Dataset,
    steps: int,
    lr: float,
    arguments: argparse.Namespace,
    bits: int | None = None,
) -> dict[str, float]:
    """Trains the classifier's model. Returns the total seconds of all steps for each of `training.PARTS`."""
    seed = arguments.seed
    batches = training.training_batches(classifier, dataset.train, arguments.batch_size, seed)
    options = {"steps": steps, "lr": lr, "seed": seed, "dropout": arguments.dropout, "bits": bits}
    losses: list[float] = []
    seconds: dict[str, float] = defaultdict(float)
    with progress(steps, "training" if bits is None else f"tuning in {bits} bits") as advance:
        for step in training.training_steps(classifier.model, batches, **options):
            losses.append(step.loss)
            if not math.isfinite(step.loss):
                raise RunError(f"the loss is {step.loss} at step {len(losses)}: try an --lr lower than {lr}")
            for part, took in step.seconds.items():
                seconds[part] += took
            advance(f"loss={sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return seconds


def _wrap(model: nn.Module, arguments: argparse.Namespace) -> HSAID:
    """Wraps the model in HSAID, on a GPU if there is one that a backend supports."""
    device = choose_device()
    choose_backend("auto", device)
    return HSAID(
        model.to(device),
        arguments.intrinsic_dim,
        arguments.partition,
        arguments.seed,
        normalize=arguments.normalize,
        diagonal=arguments.diagonal,
        width=arguments.width,
        chunks=arguments.chunks,
        dtype=getattr(torch, arguments.dtype),
    )


def _describe_model(source: str, hsaid: HSAID) -> None:
    say("model", f"{source}: {len(hsaid.plan.shapes)} tensors, {num_weights(hsaid.plan.shapes):,} weights")
    say("partition", f"{hsaid.partition.spec}: {hsaid.partition}")
    say(
        "trained",
        f"d = {hsaid.intrinsic_dim:,} numbers: {len(hsaid.theta):,} in theta, {len(hsaid.multipliers)} multipliers",
    )


def _describe_data(dataset: data.Dataset) -> None:
    say("data", f"{dataset.name}: which of {len(dataset.labels)} labels? {_shortened(dataset.labels)}")
    say("  train", f"{len(dataset.train):,} texts{_languages(dataset.train)}")
    say("  test", f"{len(dataset.test):,} texts{_languages(dataset.test)}")


def _languages(examples: Sequence[data.Example]) -> str:
    codes = " ".join(dict.fromkeys(example.language for example in examples))
    return codes and f" in {codes}"


def _shortened(labels: Sequence[str], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")


def _describe_accuracy(result: training.Evaluation, dataset: data.Dataset) -> None:
    baseline = training.majority_baseline(dataset.train, dataset.test)
    where = "on texts not trained on" if "" in result.by_language else "in languages not trained on"
    say(
        "accuracy",
        f"{result.accuracy:.3f} {where}; {baseline.accuracy:.3f} by always saying {baseline.predictions[0]!r}",
    )
    if len(result.by_language) > 1:
        say("", "  ".join(f"{language} {accuracy:.2f}" for language, accuracy in result.by_language.items()))


def _shares(seconds: Mapping[str, float], steps: int) -> str:
    total = sum(seconds.values())
    projection = seconds["projection"] + seconds["adjoint"]
    rest = [f"{part} {seconds[part] / total:.1%}" for part in ("forward", "backward", "optimiser", "data")]
    each = f"{seconds['projection'] / steps * 1e3:.0f} ms and its adjoint {seconds['adjoint'] / steps * 1e3:.0f} ms"
    return f"{total / steps * 1e3:.0f} ms: projection {projection / total:.1%} ({each}), {', '.join(rest)}"


def _time_mbert(steps: int, examples: Sequence[data.Example], arguments: argparse.Namespace) -> None:
    """Runs a few steps of the full mBERT architecture and prints their times, one row for each step.

    The weights are random, so the losses only show that it runs.
    """
    print("\nmBERT's architecture with fresh weights, 16 texts of 16 hashed tokens a step, times in seconds")
    with user_input():
        hsaid = _wrap(training.build_mbert(arguments.seed), arguments)
    _describe_model("mBERT", hsaid)
    batches = training.hashed_batches(examples, hsaid.theta.device)
    columns = ("projection", "adjoint", "forward", "backward", "optimiser")
    print("  ".join(["step", "  loss", *(f"{column:>10}" for column in columns)]))
    taken = training.training_steps(hsaid, batches, steps=steps, lr=arguments.lr, seed=arguments.seed)
    for number, step in enumerate(taken, 1):
        print("  ".join([f"{number:4}", f"{step.loss:6.3f}", *(f"{step.seconds[column]:10.4f}" for column in columns)]))
    say("memory", f"{training.peak_memory(hsaid.theta.device) / 2**20:,.0f} MiB at the peak")
