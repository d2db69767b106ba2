"""What `hsaid train` and `hsaid measure` make of the same arguments: data, model, number of steps, output directory."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsaid_kernels.app import data, training
from hsaid_kernels.app.architecture import FALLBACK, MBERT
from hsaid_kernels.app.defaults import LARGE, STEPS, STEPS_IF_LARGE

# Arguments that say which data it is.
DATA = ("data", "test_data", "text_column", "label_column", "train_languages", "test_languages", "seed")


def load_dataset(arguments: argparse.Namespace) -> data.Dataset:
    """The user's files, or the embedded data. Raises `DataError` for data that cannot be used."""
    if arguments.data is None:
        if arguments.test_data is not None:
            raise ValueError(f"--test-data: expected --data FILE to train on, got only {arguments.test_data}")
        validation = [
            language
            for language in data.VALIDATION_LANGUAGES
            if language not in (*arguments.train_languages, *arguments.test_languages)
        ]
        return data.load_cldr(arguments.train_languages, validation, arguments.test_languages, seed=arguments.seed)
    columns = {"text": arguments.text_column, "label": arguments.label_column}
    return data.load_files(arguments.data, arguments.test_data, **columns, seed=arguments.seed)


def described_data(arguments: argparse.Namespace, dataset: data.Dataset) -> dict[str, Any]:
    """What `load_dataset` needs to load the same data again, and a digest of the training texts, as JSON."""
    known = {name: getattr(arguments, name) for name in DATA}
    known |= {name: str(known[name].absolute()) for name in ("data", "test_data") if known[name] is not None}
    return known | {"digest": digest_of(dataset.train)}


def digest_of(examples: Sequence[data.Example]) -> str:
    """Of texts and labels."""
    text = json.dumps([(example.text, example.label) for example in examples])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_classifier(arguments: argparse.Namespace, labels: Sequence[str]) -> tuple[str, training.Classifier]:
    """The model given by --model; else mBERT, or FALLBACK if mBERT is not available. Returns (source, classifier)."""
    options = (labels, arguments.seed, arguments.max_length)
    if arguments.model is not None:
        is_directory = Path(arguments.model).is_dir()
        source = str(Path(arguments.model).absolute()) if is_directory else arguments.model
        return source, training.build_classifier(source, *options)
    try:
        return MBERT, training.build_classifier(MBERT, *options)
    except ValueError:
        print(f"{MBERT} is not to be had here (directory, cache, hub): {FALLBACK} stands in for it.")
        return FALLBACK, training.build_classifier(FALLBACK, *options)


def num_steps(arguments: argparse.Namespace, weights: int, examples: int) -> int:
    """The number of training steps for a model with `weights` weights and a number of training examples."""
    if arguments.epochs:
        return arguments.epochs * math.ceil(examples / arguments.batch_size)
    return arguments.steps or (STEPS if weights < LARGE else STEPS_IF_LARGE)


def check_writable(directory: Path) -> None:
    """Raises OSError, before training starts, if no file can be created in the output directory.

    If it does not exist yet, this checks its nearest existing parent. Leaves nothing behind.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"--out: expected a directory that can be written to, got {directory}: {error.strerror}"
        ) from error
