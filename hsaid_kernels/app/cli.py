"""The command `hsaid`: trains a text classifier and uses it, measures a task's intrinsic dimension, shows and merges.

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
from typing import Any, NoReturn

from hsaid_kernels.app import data
from hsaid_kernels.app.defaults import (
    BATCH_SIZE,
    INTRINSIC_DIM,
    LARGE,
    LEARNING_RATE,
    MAX_LENGTH,
    MBERT_STEPS,
    PROFILES,
    STEPS,
    STEPS_IF_LARGE,
    THRESHOLD,
    TUNED_STEPS,
)
from hsaid_kernels.app.terminal import RunError, UsageError
from hsaid_kernels.fastfood.limits import CHUNKS, DIAGONALS, MAX_DIM, MAX_WIDTH, MIN_WIDTH, NORMALIZATIONS
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
    except KeyboardInterrupt as interrupt:
        print(f"\nhsaid: {str(interrupt) or 'interrupted'}", file=sys.stderr)
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
    _add_model(train, _as_it_is, out="runs/train")
    _add_data(train, _as_it_is)
    add = _options(train.add_argument_group("subspace"), _as_it_is)
    add("--intrinsic-dim", INTRINSIC_DIM, "numbers to train", type=_integer(1, MAX_DIM), metavar="D")
    add("--partition", "hsaid-3", "did, said, hsaid-3 or levels as in L1+L2|L3|L4, L5 the heads, L6 the experts")
    _add_scale(add)
    add("--dtype", "float32", "of the weights while training", choices=DTYPES)
    add = _add_loop(train, _as_it_is, f"{STEPS}, or {STEPS_IF_LARGE} for a model of {LARGE:,} weights or more")
    add("--lr", LEARNING_RATE, "highest learning rate", type=_positive)
    text = f"then {TUNED_STEPS:.0%} more steps with theta on 2**N levels, so that pack rounds nothing"
    add("--bits", None, text, type=_integer(1, 16), metavar="N")
    add(
        "--mbert-steps",
        None,
        f"""then so many steps of the whole mBERT architecture,
        with fresh weights, to see what a step takes ({MBERT_STEPS} where the small model stood in for it, else 0)""",
        type=_integer(0, 2**31),
        metavar="N",
    )

    predict = commands.add_parser("predict", help="label texts by what train has left")
    predict.set_defaults(run=_predict)
    predict.add_argument("checkpoint", metavar="DIR", help="what `hsaid train` wrote")
    add = _options(predict, _as_it_is)
    add("--data", None, "texts: .csv, .tsv or .jsonl, as for train, labels not needed", type=Path, required=True)
    add("--text-column", "text", "", metavar="NAME")
    add("--format", "tsv", "of the lines that are printed; jsonl has all probabilities", choices=("tsv", "jsonl"))
    add("--model", None, "directory or hub name, where it has moved since (that of training)")
    add("--threads", None, "of the CPU (torch's choice)", type=_integer(1, 4096), metavar="N")

    _add_pack(commands.add_parser("pack", help="a checkpoint in some hundred bytes: a file, a text or a QR code"))
    unpack = commands.add_parser("unpack", help="the checkpoint again, from what pack wrote")
    unpack.set_defaults(run=_unpack)
    unpack.add_argument("packed", type=Path, metavar="FILE", help="what `hsaid pack` wrote, or its text")
    unpack.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    unpack.add_argument("--model", help="directory or hub name, where it has moved since (that of training)")
    _add_bound(commands.add_parser("bound", help="bound the error on new data by training's and the packed bytes"))

    _add_merge(commands.add_parser("merge", help="write the tuned weights as files of an ordinary model"))
    _add_measure(commands.add_parser("measure", help="measure the intrinsic dimension of a task"))

    info = commands.add_parser("info", help="say what a checkpoint or a model's hierarchy holds")
    info.set_defaults(run=_info)
    graph = commands.add_parser("graph", help="draw a model's hierarchy, or what a checkpoint has learned on it")
    graph.set_defaults(run=_graph)
    for command in (info, graph):
        command.add_argument("source", metavar="DIR|MODEL", help="a checkpoint, or a model's directory or hub name")
        command.add_argument("--model", help="of a checkpoint that `hsaid train` did not write: directory or hub name")
        command.add_argument("--heads", action="store_true", help="with a model: attention heads as level L5")
        command.add_argument("--experts", action="store_true", help="with a model: experts of mixtures as level L6")
    info.add_argument(
        "--check", action="store_true", help="with --heads: compare the heads with what the model computes"
    )
    graph.add_argument(
        "--partition", help="with a model: levels as in L1+L2|L3|L4, whose components are coloured (none)"
    )
    graph.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="layers that differ in nothing but their number in one (so for a model, not for a checkpoint)",
    )
    graph.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("graph.svg"),
        metavar="FILE",
        help=".svg, .png, .html, .dot (%(default)s)",
    )
    return parser


_Add = Callable[..., None]
_Default = Callable[[str, Any], Any]  # an option and its default value -> what argparse is to take for its default


def _options(group: argparse._ActionsContainer, default: _Default) -> _Add:
    """A function add(flag, default value, help, ...) that adds an option to `group`; the help names the default."""

    def add(flag: str, value: Any, text: str, **options: Any) -> None:
        if value is not None and value is not False:
            text = f"{text} ({' '.join(value) if isinstance(value, tuple) else value})".lstrip()
        group.add_argument(flag, default=default(flag, value), help=text.replace("%", "%%"), **options)

    return add


def _as_it_is(flag: str, value: Any) -> Any:
    return value


def _add_model(parser: argparse.ArgumentParser, default: _Default, out: str) -> None:
    small = "or a small model where that is not to be had"
    add = _options(parser, default)
    add("--model", None, f"directory or hub name (bert-base-multilingual-cased, {small})")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="where the results go (%(default)s)")
    add("--seed", 0, "of everything random", type=_integer(0, 2**64 - 1), metavar="N")
    add("--threads", None, "of the CPU, for each process (torch's choice)", type=_integer(1, 4096), metavar="N")


def _add_data(parser: argparse.ArgumentParser, default: _Default) -> None:
    group = parser.add_argument_group("data (names of things in many languages, from Unicode CLDR)")
    add = _options(group, default)
    add("--data", None, "your own texts in place of these: .csv, .tsv or .jsonl", type=Path, metavar="FILE")
    add("--test-data", None, "with --data: texts to test on (a fifth of --data)", type=Path, metavar="FILE")
    add("--text-column", "text", "with --data", metavar="NAME")
    add("--label-column", "label", "with --data", metavar="NAME")
    add("--train-languages", data.TRAIN_LANGUAGES, "", nargs="+", metavar="CODE")
    add("--test-languages", data.TEST_LANGUAGES, "", nargs="+", metavar="CODE")
    add("--max-length", MAX_LENGTH, "tokens of a text", type=_integer(2, 2**20), metavar="N")


def _add_scale(add: _Add) -> None:
    add("--normalize", "global", "scale of the random matrices", choices=NORMALIZATIONS)
    add("--diagonal", DIAGONALS[0], "of the random matrices", choices=DIAGONALS)
    text = "values in a block (as many as theta has, at most 16,384)"
    add("--width", None, text, type=_integer(MIN_WIDTH, MAX_WIDTH), metavar="N")
    add("--chunks", None, "what each block uses of a longer theta (all up to d = 16,384, else one)", choices=CHUNKS)


def _add_loop(parser: argparse.ArgumentParser, default: _Default, steps: str) -> _Add:
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_integer(1, 2**31), metavar="N", help=f"({steps})")
    length.add_argument(
        "--epochs", type=_integer(1, 2**31), metavar="N", help="passes over the data, in place of --steps"
    )
    add = _options(group, default)
    add("--batch-size", BATCH_SIZE, "texts a step", type=_integer(1, 2**20), metavar="N")
    add("--dropout", False, "the model's own (none)", action="store_true")
    return add


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_merge)
    text = "checkpoints: what train or save_pretrained() wrote, or hub names; of several, their updates are added"
    parser.add_argument("checkpoints", metavar="DIR", nargs="+", help=text)
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="directory of the merged model")
    add = _options(parser, _as_it_is)
    add("--to", None, "uploads it to the Hugging Face hub", type=_repository, metavar="hub:NAME")
    add("--model", None, "the one that was trained from: directory or hub name (what train noted)")
    add("--weights", None, "of the updates, one for each DIR", type=_number, nargs="+", metavar="W")
    add("--dtype", None, "of the files (that of training)", choices=DTYPES)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_pack)
    parser.add_argument("checkpoint", metavar="DIR", help="what train or save_pretrained() wrote")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="(task.hsz, task.txt or task.png)")
    add = _options(parser, _as_it_is)
    _add_bits(add)
    text = "what to write; text is base64, qr a PNG of a QR code with that text"
    add("--as", "file", text, choices=("file", "text", "qr"), dest="kind")


def _add_bits(add: _Add) -> None:
    add("--bits", 4, "of each value of theta", type=_integer(1, 16), metavar="N")
    add("--multiplier-bits", 8, "of each multiplier", type=_integer(1, 16), metavar="N")


def _add_bound(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bound)
    parser.add_argument("checkpoint", type=Path, metavar="DIR|FILE", help="what `hsaid train` or `hsaid pack` wrote")
    add = _options(parser, _as_it_is)
    _add_bits(add)
    add("--delta", 0.05, "probability with which the bound may fail", type=_probability, metavar="SHARE")
    text = "how many settings were tried, chosen before the data was seen; else the settings' own bits count"
    add("--tried", None, text, type=_integer(1, 2**62), metavar="N")
    add("--model", None, "directory or hub name, where it has moved since (that of training)")
    add("--threads", None, "of the CPU (torch's choice)", type=_integer(1, 4096), metavar="N")
    _add_data(parser, lambda *_: None)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hsaid measure`.

    Those that a study remembers are None unless they are given. Their defaults are in `defaults`.
    """
    defaults: dict[str, Any] = {"steps": None, "epochs": None}

    def unset(flag: str, value: Any) -> None:
        defaults[flag.lstrip("-").replace("-", "_")] = value

    _add_model(parser, unset, out="runs/measure")
    _add_data(parser, unset)
    add = _options(parser.add_argument_group("what is measured"), unset)
    quick, full = (
        {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in profile.items()}
        for profile in PROFILES.values()
    )

    def add_profiled(flag: str, text: str, **options: Any) -> None:
        name = flag.lstrip("-")
        add(flag, None, f"{text} (quick: {quick[name]}; full: {full[name]})".lstrip(), **options)

    add("--profile", "quick", "quick takes minutes, full hours", choices=tuple(PROFILES))
    text = "partitions, as for hsaid train; in did:rademacher and did:all:1024 with options of their own"
    add_profiled("--methods", text, nargs="+", metavar="PARTITION")
    add_profiled("--dims", "numbers to train: the grid", nargs="+", type=_integer(1, MAX_DIM), metavar="D")
    add_profiled("--seeds", "how many", type=_integer(1, 1000), metavar="N")
    add_profiled("--refine", "how many d are added where a curve crosses", type=_integer(0, 100), metavar="N")
    add("--threshold", THRESHOLD, "of the score of full fine-tuning", type=_share, metavar="SHARE")
    text = "other methods beside them, of lora, vera, unilora, fourierft, bitfit, gpart; lora:8 is LoRA of rank 8"
    add("--compare", None, text, type=_list, metavar="METHOD,...")
    text = "also bound the error on new data, by theta in N bits: a second picture (docs/certificates.md)"
    add("--bits", None, text, type=_integer(1, 16), metavar="N")
    _add_scale(add)
    _add_loop(parser, unset, f"quick: {quick['steps']}; full: {full['steps']}")

    add = _options(parser.add_argument_group("study (docs/measuring.md)"), _as_it_is)
    text = "database URL, or journal:FILE on a shared disk; the same on several machines (study.db in --out)"
    add("--storage", None, text, metavar="URL")
    add("--study", "measure", "its name in the storage; others have a directory in --out", metavar="NAME")
    add("--workers", 1, "processes to train in", type=_integer(1, 4096), metavar="N")
    add("--resume", False, "go on with a study; its settings need not be given again", action="store_true")
    add("--show", False, "only the results that there are; no run is started", action="store_true")
    parser.set_defaults(run=_measure, defaults=defaults)


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


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def _repository(text: str) -> str:
    name = text.removeprefix("hub:")
    if name == text or not 1 <= len(list(filter(None, name.split("/")))) <= 2:
        raise argparse.ArgumentTypeError(f"expected a repository as in hub:me/name, got {text!r}")
    return name


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return value


def _probability(text: str) -> float:
    value = _share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"expected a probability between 0 and 1, got {text!r}")
    return value


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _train(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_train import train

    train(arguments)


def _predict(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_predict import predict

    predict(arguments)


def _pack(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_pack import pack

    pack(arguments)


def _unpack(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_pack import unpack

    unpack(arguments)


def _bound(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_bound import bound

    bound(arguments)


def _merge(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_merge import merge

    merge(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_measure import measure

    measure(arguments)


def _info(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_info import info

    info(arguments)


def _graph(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.app.command_graph import graph

    graph(arguments)
