"""The command `hsaid`: trains a text classifier with H-SAID, and prints or draws a checkpoint or a model's hierarchy.

Invalid input gives one sentence on stderr and exit code 2; a failed run gives exit code 1. This module contains the
argument parser, which does not import torch. Each subcommand is in a separate module.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hsaid_kernels.app import data
from hsaid_kernels.app.defaults import (
    BATCH_SIZE,
    INTRINSIC_DIM,
    LARGE,
    LEARNING_RATE,
    MAX_LENGTH,
    MBERT_STEPS,
    STEPS,
    STEPS_IF_LARGE,
)
from hsaid_kernels.app.terminal import RunError, UsageError
from hsaid_kernels.fastfood.limits import DIAGONALS, MAX_DIM, NORMALIZATIONS
from hsaid_kernels.version import __version__

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    The code is 0 for success, 1 for a failed run, 2 for invalid input, 130 after Ctrl-C, and 141 if the reader of
    stdout has closed the pipe.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # flushes inside the try block, so that a closed pipe raises here
    except BrokenPipeError:  # hsaid info ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # because Python flushes again at exit
        return 141  # 128 + SIGPIPE, as shells report it


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except (UsageError, RunError) as error:
        sentence = " ".join(str(error).split())
        print(f"hsaid: {sentence.encode(errors='backslashreplace').decode()}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nhsaid: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hsaid", description="Fine-tuning inside a small random subspace: DID, SAID and H-SAID.")
    parser.add_argument("--version", action="version", version=f"hsaid {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train a text classifier, save theta and the multipliers")
    train.set_defaults(run=_train)
    add = train.add_argument
    add(
        "--model",
        help="directory or hub name (bert-base-multilingual-cased, or a small model where that is not to be had)",
    )
    add("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="where the checkpoint goes (%(default)s)")
    add("--seed", type=_integer(0, 2**64 - 1), default=0, metavar="N", help="of everything random (%(default)s)")
    add("--threads", type=_integer(1, 4096), metavar="N", help="of the CPU (torch's choice)")

    add = train.add_argument_group("data (names of things in many languages, from Unicode CLDR)").add_argument
    add("--data", type=Path, metavar="FILE", help="your own texts in place of these: .csv, .tsv or .jsonl")
    add("--test-data", type=Path, metavar="FILE", help="with --data: texts to test on (a fifth of --data)")
    add("--text-column", default="text", metavar="NAME", help="with --data (%(default)s)")
    add("--label-column", default="label", metavar="NAME", help="with --data (%(default)s)")
    add(
        "--train-languages",
        nargs="+",
        default=data.TRAIN_LANGUAGES,
        metavar="CODE",
        help=f"({' '.join(data.TRAIN_LANGUAGES)})",
    )
    add(
        "--test-languages",
        nargs="+",
        default=data.TEST_LANGUAGES,
        metavar="CODE",
        help=f"({' '.join(data.TEST_LANGUAGES)})",
    )
    add("--max-length", type=_integer(2, 2**20), default=MAX_LENGTH, metavar="N", help="tokens of a text (%(default)s)")

    add = train.add_argument_group("subspace").add_argument
    add(
        "--intrinsic-dim",
        type=_integer(1, MAX_DIM),
        default=INTRINSIC_DIM,
        metavar="D",
        help="numbers to train (%(default)s)",
    )
    add(
        "--partition",
        default="hsaid-3",
        help="did, said, hsaid-3 or levels as in L1+L2|L3|L4, L5 the heads (%(default)s)",
    )
    add("--normalize", choices=NORMALIZATIONS, default="global", help="scale of the random matrices (%(default)s)")
    add("--diagonal", choices=DIAGONALS, default=DIAGONALS[0], help="of the random matrices (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights while training (%(default)s)")

    loop = train.add_argument_group("training")
    length = loop.add_mutually_exclusive_group()
    steps = f"({STEPS}, or {STEPS_IF_LARGE} for a model of {LARGE:,} weights or more)"
    length.add_argument("--steps", type=_integer(1, 2**31), metavar="N", help=steps)
    length.add_argument(
        "--epochs", type=_integer(1, 2**31), metavar="N", help="passes over the data, in place of --steps"
    )
    add = loop.add_argument
    add("--batch-size", type=_integer(1, 2**20), default=BATCH_SIZE, metavar="N", help="texts a step (%(default)s)")
    add("--lr", type=_positive, default=LEARNING_RATE, help="highest learning rate (%(default)s)")
    add("--dropout", action="store_true", help="the model's own (none)")
    add(
        "--mbert-steps",
        type=_integer(0, 2**31),
        metavar="N",
        help=f"""then so many steps of the whole mBERT architecture,
        with fresh weights, to see what a step takes ({MBERT_STEPS} where the small model stood in for it, else 0)""",
    )

    info = commands.add_parser("info", help="say what a checkpoint or a model's hierarchy holds")
    info.set_defaults(run=_info)
    graph = commands.add_parser("graph", help="draw a model's hierarchy, or what a checkpoint has learned on it")
    graph.set_defaults(run=_graph)
    for command in (info, graph):
        command.add_argument("source", metavar="DIR|MODEL", help="a checkpoint, or a model's directory or hub name")
        command.add_argument("--model", help="of a checkpoint that `hsaid train` did not write: directory or hub name")
        command.add_argument("--heads", action="store_true", help="with a model: attention heads as level L5")
    add = graph.add_argument
    add("--partition", help="with a model: levels as in L1+L2|L3|L4, whose components are coloured (none)")
    add(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="layers that differ in nothing but their number in one (so for a model, not for a checkpoint)",
    )
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("graph.svg"),
        metavar="FILE",
        help=".svg, .png, .html, .dot (%(default)s)",
    )
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _train(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_train import train

    train(arguments)


def _info(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_info import info

    info(arguments)


def _graph(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_graph import graph

    graph(arguments)
