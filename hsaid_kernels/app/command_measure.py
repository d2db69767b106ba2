"""`hsaid measure`: the intrinsic dimension of text classification, on the embedded data or on the user's files."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hsaid_kernels.app import data, training
from hsaid_kernels.app.certificate import certified
from hsaid_kernels.app.defaults import PROFILES, TUNED_RATE, TUNED_STEPS
from hsaid_kernels.app.inputs import check_writable, load_classifier, load_dataset, num_steps
from hsaid_kernels.app.measure.compare import save_adapted
from hsaid_kernels.app.measure.measure import (
    BOUND_FILE,
    DEFAULT_NAME,
    PICTURE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    default_storage,
    described,
    design_of,
    directory_of,
    remember,
    run_study,
    write_results,
)
from hsaid_kernels.app.measure.runs import BASELINE, Diverged, Run, Scores
from hsaid_kernels.app.measure.schedule import Schedule
from hsaid_kernels.app.measure.storage import shown
from hsaid_kernels.app.measure.study import Study
from hsaid_kernels.app.measure.workers import BaselineError, Job
from hsaid_kernels.app.terminal import RunError, duration, say, user_input
from hsaid_kernels.fastfood.ops import choose_backend, choose_device
from hsaid_kernels.wrapper.checkpoint.configuration import bytes_of
from hsaid_kernels.wrapper.hsaid import HSAID

OPTIONS = "options"  # under this key a study keeps what was given on the command line
PROTOCOL = 1  # to be raised when runs with the same settings no longer give the same scores


@dataclass(frozen=True)
class TextClassification:
    """The training function of `hsaid measure`: `hsaid train` for a run of any method."""

    source: str
    dataset: data.Dataset
    max_length: int
    steps: int
    batch_size: int
    dropout: bool
    normalize: str
    diagonal: str
    width: int | None = None
    chunks: str | None = None
    bits: int | None = None  # in which a subspace's values are tuned and certified, after the scores are known

    def __call__(self, run: Run) -> Scores:
        classifier = training.build_classifier(self.source, self.dataset.labels, run.seed, self.max_length)
        device = choose_device()
        options = {name: getattr(self, name) for name in ("normalize", "diagonal", "width", "chunks")}
        classifier.model = run.wrap(classifier.model.to(device), **options)
        batches = training.training_batches(classifier, self.dataset.train, self.batch_size, run.seed)
        for step in training.training_steps(
            classifier.model, batches, steps=self.steps, lr=run.lr, seed=run.seed, dropout=self.dropout
        ):
            if not math.isfinite(step.loss):
                raise Diverged
        validation, test = (
            training.evaluate(classifier, part).accuracy for part in (self.dataset.validation, self.dataset.test)
        )
        self._save(classifier, run, test)
        trained = sum(p.numel() for p in classifier.model.parameters() if p.requires_grad)
        subspace = isinstance(classifier.model, HSAID)
        known = self._certified(classifier, run, self.bits) if subspace and self.bits is not None else {}
        return Scores(validation, test, trained, **known)

    def _certified(self, classifier: training.Classifier, run: Run, bits: int) -> dict[str, Any]:
        """Tunes the values on their levels, as `hsaid train --bits` does, and counts the errors in training."""
        train, steps = self.dataset.train, max(1, round(self.steps * TUNED_STEPS))
        batches = training.training_batches(classifier, train, self.batch_size, run.seed)
        options: dict[str, Any] = {
            "steps": steps,
            "lr": run.lr * TUNED_RATE / 2**bits,
            "seed": run.seed,
            "dropout": self.dropout,
        }
        for step in training.training_steps(classifier.model, batches, bits=bits, **options):
            if not math.isfinite(step.loss):
                raise Diverged

        def errors() -> int:
            predictions = classifier.predict([example.text for example in train])
            return sum(label != example.label for label, example in zip(predictions, train, strict=True))

        return certified(cast(HSAID, classifier.model), bits, errors, len(train))

    def _save(self, classifier: training.Classifier, run: Run, accuracy: float) -> None:
        """Saves what was trained, unless it is the whole model."""
        if isinstance(classifier.model, HSAID):
            info = {
                "model": self.source,
                "seed": run.seed,
                "data": self.dataset.name,
                "steps": self.steps,
                "lr": run.lr,
            }
            training.save_trained(classifier, run.directory, **info, test_accuracy=accuracy)
        elif run.method != BASELINE:
            save_adapted(classifier.model, run.directory)


def measure(arguments: argparse.Namespace) -> None:
    """Measures, and writes and prints the results. With `--resume`, what is not given is taken from the study.

    Raises UsageError for invalid arguments, RunError if a run or the storage fails, and KeyboardInterrupt with a
    sentence that says how to go on.
    """
    with user_input():
        out = directory_of(arguments.out, arguments.study)
        storage = arguments.storage or default_storage(arguments.out)
        check_writable(out)
        study, job = (_shown if arguments.show else _prepared)(arguments, storage, out)
        design = study.design if job is None else job.schedule.design
    try:
        if job is not None:
            run_study(job, arguments.workers)
        measurement = write_results(study, design, out)
    except BaselineError as error:
        raise RunError(f"{error}: train for more --steps in another --out, or look at the data") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_how_to_resume(arguments)}") from None
    except Exception as error:
        what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise RunError(f"{what} ({_how_to_resume(arguments)})") from error
    print(f"\n{measurement.table()}\n")
    say("time", f"{measurement.runs} runs, together {duration(measurement.seconds)}")
    pictures = f"{PICTURE_FILE}, {BOUND_FILE}" if measurement.certificates else PICTURE_FILE
    say("results", f"{TABLE_FILE}, {RESULTS_FILE}, {pictures} and the checkpoints in {out}")


def _shown(arguments: argparse.Namespace, storage: str, out: Path) -> tuple[Study, None]:
    if given := [name for name in arguments.defaults if getattr(arguments, name) is not None]:
        raise ValueError(f"--show: expected no settings beside it, got --{given[0].replace('_', '-')}")
    return Study(storage, arguments.study, None), None


def _prepared(arguments: argparse.Namespace, storage: str, out: Path) -> tuple[Study, Job]:
    """Loads data and model, opens the study, says what is going to be measured."""
    options = _options(arguments, storage)
    dataset = data.with_validation(load_dataset(options), options.seed)
    source, classifier = load_classifier(options, dataset.labels)
    choose_backend("auto", choose_device())
    asked = ("methods", "dims", "seeds", "threshold", "refine")
    chosen = {name: getattr(options, name) for name in asked}
    design = design_of(classifier.model, **chosen, compare=options.compare or (), rates={})
    steps = num_steps(options, sum(p.numel() for p in classifier.model.parameters()), len(dataset.train))
    of_run = ("max_length", "batch_size", "dropout", "normalize", "diagonal", "width", "chunks", "bits")
    train = TextClassification(source, dataset, steps=steps, **{name: getattr(options, name) for name in of_run})
    study = Study(storage, arguments.study, _settings(train, classifier.model))
    majority = training.majority_baseline(dataset.train, dataset.test)
    chance = majority.accuracy
    options.threads = options.threads or max(1, torch.get_num_threads() // arguments.workers)
    job = Job(train, Schedule(design), storage, arguments.study, out / "runs", chance, options.threads)
    remember(study, job, f"{Path(source).name}, {dataset.name}", {})
    options.model = options.model and source  # the absolute path of a directory
    study.note(OPTIONS, {name: _plain(value) for name, value in vars(options).items()})

    say("model", f"{source}: {described(classifier.model)}")
    say("data", f"{dataset.name}: which of {len(dataset.labels)} labels?")
    say("  train", f"{len(dataset.train):,} texts")
    say("  validate", f"{len(dataset.validation):,} texts, by which learning rates are chosen")
    say("  test", f"{len(dataset.test):,} texts; {chance:.3f} by always saying {majority.predictions[0]!r}")
    for method in design.methods:
        skipped = [d for d in design.dims if d not in design.grid(method)]
        if skipped:
            numbers = ", ".join(map(str, skipped))
            say("", f"{method} has {design.multipliers[method]} multipliers: not measured at d = {numbers}")
    return study, job


def _options(arguments: argparse.Namespace, storage: str) -> argparse.Namespace:
    """What is given on the command line, else what the study remembers (with --resume), else the profile's values."""
    given = {name: getattr(arguments, name) for name in arguments.defaults if getattr(arguments, name) is not None}
    known = dict(arguments.defaults)
    if arguments.resume:
        saved = Study(storage, arguments.study, None).noted(OPTIONS)
        if saved is None:
            raise ValueError(f"study: expected one that `hsaid measure` made, got {arguments.study!r} of a script")
        known |= saved
        for name in ("data", "test_data"):
            known[name] = known[name] and Path(known[name])
    if not arguments.resume or "profile" in given:
        known |= PROFILES[str(given.get("profile", known["profile"]))]
    if "epochs" in given:
        known["steps"] = None
    elif "steps" in given:
        known["epochs"] = None
    return argparse.Namespace(**{**known, **given})


def _settings(train: TextClassification, model: nn.Module) -> dict[str, Any]:
    """What two runs of a study must have in common. Names and paths may differ from machine to machine."""
    names = ("max_length", "steps", "batch_size", "dropout", "normalize", "diagonal", "width", "chunks")
    parts = [getattr(train.dataset, part) for part in ("train", "validation", "test")]
    examples = json.dumps([[astuple(example) for example in part] for part in parts])
    weights = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        weights.update(bytes_of(parameter.detach().cpu()))
    return {
        "protocol": PROTOCOL,
        "tensors": described(model),
        "weights (digest)": weights.hexdigest(),
        "examples (digest)": hashlib.blake2b(examples.encode(), digest_size=8).hexdigest(),
        **{name: getattr(train, name) for name in names},
        **({} if train.bits is None else {"bits": train.bits}),
    }


def _plain(value: Any) -> Any:
    """An option in a form for JSON."""
    return str(value.absolute()) if isinstance(value, Path) else value


def _how_to_resume(arguments: argparse.Namespace) -> str:
    words = ["hsaid", "measure", "--resume", "--out", str(arguments.out)]
    if arguments.storage:
        words += ["--storage", shown(arguments.storage)]
    if arguments.study != DEFAULT_NAME:
        words += ["--study", arguments.study]
    if arguments.workers > 1:
        words += ["--workers", str(arguments.workers)]
    return f"go on with: {shlex.join(words)}"
