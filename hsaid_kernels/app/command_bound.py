"""`hsaid bound`: how large the error on new data can be, by the errors in training and the bits of the packed task."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from hsaid_kernels.app import data, trained, training
from hsaid_kernels.app.certificate import Certificate, put
from hsaid_kernels.app.command_pack import packed
from hsaid_kernels.app.inputs import DATA, digest_of, load_dataset
from hsaid_kernels.app.terminal import say, user_input
from hsaid_kernels.fastfood.ops import choose_device
from hsaid_kernels.wrapper.checkpoint import packing
from hsaid_kernels.wrapper.hsaid import HSAID


def bound(arguments: argparse.Namespace) -> None:
    """Prints the bound of a packed classifier, and all numbers that go into it.

    Raises UsageError for invalid arguments, and where the training texts are not at hand.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with user_input():
        source = arguments.checkpoint
        if source.is_file():
            found = packing.read_packed(source)
        else:
            found = packing.unpack(packed(source, arguments.bits, arguments.multiplier_bits))
        dataset = _dataset(arguments, trained.read_run(source))
        classifier = training.load_trained(source, arguments.model)
        put(found.values, cast(HSAID, classifier.model))
    classifier.model.to(choose_device())
    predictions = classifier.predict([example.text for example in dataset.train])
    errors = sum(label != example.label for label, example in zip(predictions, dataset.train, strict=True))
    bits = described_by(found.bits, arguments.tried)
    certificate = Certificate(errors, len(dataset.train), sum(bits.values()), arguments.delta)
    _describe(certificate, bits, dataset)


def described_by(bits: Mapping[str, float], tried: int | None) -> dict[str, float]:
    """{what: bits} that describe a classifier among all others: `Packed.bits`, without what says nothing.

    If `tried` settings were fixed before the data was seen, log2 of their number says which it is.
    """
    settings = bits["settings"] if tried is None else math.log2(tried)
    return {what: number for what, number in {**bits, "settings": settings}.items() if number}


def _dataset(arguments: argparse.Namespace, run: Mapping[str, Any]) -> data.Dataset:
    """The data of training: what the run says, or what is given. Raises ValueError if it is not that of the run."""
    known: Mapping[str, Any] = run.get("examples", {})
    given = {name: getattr(arguments, name, None) for name in DATA}
    if not known and all(value is None for value in given.values()):
        raise ValueError(
            f"--data: expected the texts of training, or their --train-languages, as {str(arguments.checkpoint)!r} "
            "does not say, got neither"
        )
    defaults = {"text_column": "text", "label_column": "label", "seed": run["seed"]}
    defaults |= {"train_languages": data.TRAIN_LANGUAGES, "test_languages": data.TEST_LANGUAGES}
    chosen = {**defaults, **known, **{name: value for name, value in given.items() if value is not None}}
    chosen |= {name: Path(chosen[name]) for name in ("data", "test_data") if chosen.get(name) is not None}
    dataset = load_dataset(argparse.Namespace(**{name: chosen.get(name) for name in DATA}))
    if known and digest_of(dataset.train) != known["digest"]:
        raise ValueError(f"--data: expected the texts of training, got {len(dataset.train):,} others in {dataset.name}")
    return dataset


def _describe(certificate: Certificate, bits: Mapping[str, float], dataset: data.Dataset) -> None:
    n, share = certificate.examples, 1 - certificate.delta
    guess = 1 - training.majority_baseline(dataset.train, dataset.train).accuracy
    say("training", f"{certificate.errors:,} errors in n = {n:,} texts: {certificate.training_error:.4f}")
    say("described", f"by {certificate.bits:,.1f} bits, {certificate.nats:,.1f} nats:")
    say("", ", ".join(f"{what} {number:,.1f}" for what, number in bits.items()))
    say("Catoni", f"{certificate.catoni:.4f}, at the best parameter")
    say("Maurer", f"{certificate.maurer:.4f}, kl inverse")
    vacuous = certificate.bound >= guess
    what = f"VACUOUS: always saying the same label errs in {guess:.4f} of the training texts" if vacuous else ""
    say("bound", f"{certificate.bound:.4f} with probability {share:g}{f'; {what}' if vacuous else ''}")
    languages = " ".join(dict.fromkeys(e.language for e in dataset.train if e.language))
    about = f"new texts in {languages}, and not those in the test languages" if languages else "new texts like these"
    say("about", f"the packed classifier on {about}")
    print(f"\nIt holds if these {n:,} texts were drawn independently from the same distribution as the new ones, which")
    print("nothing here can check, and if neither W0 nor the length of texts depends on them: where the model was")
    print("pretrained on these texts, it does not hold.")
