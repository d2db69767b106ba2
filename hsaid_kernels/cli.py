"""`hsaid`: train a text classifier through H-SAID; say or draw what a checkpoint or a model's hierarchy holds.

Bad input ends in one sentence on stderr and exit code 2, a run that went wrong in exit code 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import hsaid_kernels
from hsaid_kernels import data
from hsaid_kernels.hierarchy import HEADS, Hierarchy, Partition
from hsaid_kernels.plan import DIAGONALS, MAX_DIM, NORMALIZATIONS

if TYPE_CHECKING:
    from torch import nn

    from hsaid_kernels import training
    from hsaid_kernels.module import HSAID

# Chosen on the embedded data's validation languages (docs/method.md); STEPS_IF_LARGE by what two cores do in minutes.
STEPS, BATCH_SIZE, LEARNING_RATE, INTRINSIC_DIM, MAX_LENGTH = 300, 32, 0.05, 5000, 32
LARGE, STEPS_IF_LARGE = 50_000_000, 60  # weights
MBERT_STEPS = 5
PARTITIONS = ("did", "L1+L2+L3+L4", "L1+L2+L3|L4", "L1+L2|L3+L4", "L1+L2|L3|L4", "L1|L2|L3|L4")
HEAD_PARTITIONS = ("L1+L2|L3|L4|L5", "L1+L5|L3|L4", "L1+L2+L3+L4+L5")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """What was asked for cannot be done; the message is the one sentence that says why."""


class RunError(Exception):
    """What was asked for was done, and went wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a run that went wrong, 2 for bad input, 130 for Ctrl-C, 141 if nobody reads."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where it can be noticed that nobody reads any more
    except BrokenPipeError:  # hsaid info ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141  # as shells say of a process that SIGPIPE has ended


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except (UsageError, RunError) as error:
        print(f"hsaid: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nhsaid: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hsaid", description="Fine-tuning inside a small random subspace: DID, SAID and H-SAID.")
    parser.add_argument("--version", action="version", version=f"hsaid {hsaid_kernels.__version__}")
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


@contextmanager
def _input() -> Iterator[None]:
    """What the library refuses in here is the user's to change."""
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def _say(what: str, text: str) -> None:
    print(f"{what:<12} {text}", flush=True)


def _train(arguments: argparse.Namespace) -> None:
    # Imported here because transformers takes seconds, which `hsaid --help` need not wait for.
    from hsaid_kernels import training

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with _input():
        dataset = _dataset(arguments)
        _check_writable(arguments.out)
        source, classifier = _classifier(arguments, dataset.labels)
        classifier.model = _wrap(classifier.model, arguments)
    _describe_model(source, classifier.model)
    _describe_data(dataset)

    steps = _steps(classifier.model, dataset, arguments)
    seconds = _fit(classifier, dataset, steps, arguments)
    result = training.evaluate(classifier, dataset.test)
    run = {"model": source, "seed": arguments.seed, "data": dataset.name, "steps": steps, "lr": arguments.lr}
    with _input():
        training.save_trained(classifier, arguments.out, **run, test_accuracy=result.accuracy)

    device = classifier.model.theta.device
    _describe_accuracy(result, dataset)
    if dataset.validation:
        validation = training.evaluate(classifier, dataset.validation).accuracy
        _say("", f"{validation:.3f}{_languages(dataset.validation)}, by which to choose settings")
    _say("step", _shares(seconds, steps))
    _say("memory", f"{training.peak_memory(device) / 2**20:,.0f} MiB at the peak")
    _say("checkpoint", f"{_size(arguments.out):,} bytes in {arguments.out}")

    del classifier  # two models at once may be more than the machine holds
    fresh = training.load_trained(arguments.out)
    fresh.model.to(device)
    again = training.evaluate(fresh, dataset.test)
    if again.predictions != result.predictions:
        before, after = result.accuracy, again.accuracy
        raise RunError(f"expected the accuracy {before!r} after reloading {arguments.out}, got {after!r}")
    _say("reloaded", f"into a fresh model: accuracy {again.accuracy!r}, the same to the last digit")

    del fresh
    mbert_steps = arguments.mbert_steps
    if mbert_steps is None:
        mbert_steps = MBERT_STEPS if arguments.model is None and source == training.FALLBACK else 0
    if mbert_steps:
        _time_mbert(mbert_steps, dataset.train, arguments)


def _steps(hsaid: HSAID, dataset: data.Dataset, arguments: argparse.Namespace) -> int:
    if arguments.epochs:
        return arguments.epochs * math.ceil(len(dataset.train) / arguments.batch_size)
    return arguments.steps or (STEPS if _weights(hsaid.plan.shapes) < LARGE else STEPS_IF_LARGE)


def _weights(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _fit(
    classifier: training.Classifier, dataset: data.Dataset, steps: int, arguments: argparse.Namespace
) -> Counter[str]:
    """Trains, and returns the seconds that each part of all steps took."""
    from tqdm import tqdm

    from hsaid_kernels import training

    seed, lr, dropout = arguments.seed, arguments.lr, arguments.dropout
    batches = training.training_batches(classifier, dataset.train, arguments.batch_size, seed)
    losses, seconds = [], Counter()
    with tqdm(total=steps, desc="training", unit=" steps") as bar:
        for step in training.training_steps(classifier.model, batches, steps=steps, lr=lr, seed=seed, dropout=dropout):
            losses.append(step.loss)
            if not math.isfinite(step.loss):
                raise RunError(f"the loss is {step.loss} at step {len(losses)}: try an --lr lower than {lr}")
            seconds.update(step.seconds)
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
            bar.update()
    return seconds


def _dataset(arguments: argparse.Namespace) -> data.Dataset:
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


def _check_writable(directory: Path) -> None:
    """Before training, and without making anything: raises OSError unless a file can be made in the directory-to-be."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"--out: expected a directory that can be written to, got {directory}: {error.strerror}"
        ) from error


def _classifier(arguments: argparse.Namespace, labels: Sequence[str]) -> tuple[str, training.Classifier]:
    """The model asked for, or mBERT, or what stands in for it."""
    from hsaid_kernels import training

    options = (labels, arguments.seed, arguments.max_length)
    if arguments.model is not None:
        is_directory = Path(arguments.model).is_dir()
        source = str(Path(arguments.model).absolute()) if is_directory else arguments.model
        return source, training.build_classifier(source, *options)
    try:
        return training.MBERT, training.build_classifier(training.MBERT, *options)
    except ValueError:
        print(f"{training.MBERT} is not to be had here (directory, cache, hub): {training.FALLBACK} stands in for it.")
        return training.FALLBACK, training.build_classifier(training.FALLBACK, *options)


def _wrap(model: nn.Module, arguments: argparse.Namespace) -> HSAID:
    """On the GPU where there is one that the kernels can use."""
    from hsaid_kernels.module import HSAID
    from hsaid_kernels.ops import choose_backend, choose_device

    device = choose_device()
    choose_backend("auto", device)
    return HSAID(
        model.to(device),
        arguments.intrinsic_dim,
        arguments.partition,
        arguments.seed,
        normalize=arguments.normalize,
        diagonal=arguments.diagonal,
        dtype=DTYPES[arguments.dtype],
    )


def _describe_model(source: str, hsaid: HSAID) -> None:
    _say("model", f"{source}: {len(hsaid.plan.shapes)} tensors, {_weights(hsaid.plan.shapes):,} weights")
    _say("partition", f"{hsaid.partition.spec}: {hsaid.partition}")
    _say(
        "trained",
        f"d = {hsaid.intrinsic_dim:,} numbers: {len(hsaid.theta):,} in theta, {len(hsaid.multipliers)} multipliers",
    )


def _describe_data(dataset: data.Dataset) -> None:
    _say("data", f"{dataset.name}: which of {len(dataset.labels)} labels? {_shortened(dataset.labels)}")
    _say("  train", f"{len(dataset.train):,} texts{_languages(dataset.train)}")
    _say("  test", f"{len(dataset.test):,} texts{_languages(dataset.test)}")


def _languages(examples: Sequence[data.Example]) -> str:
    codes = " ".join(dict.fromkeys(example.language for example in examples))
    return codes and f" in {codes}"


def _shortened(labels: Sequence[str], most: int = 10) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")


def _describe_accuracy(result: training.Evaluation, dataset: data.Dataset) -> None:
    from hsaid_kernels import training

    baseline = training.majority_baseline(dataset.train, dataset.test)
    where = "on texts not trained on" if "" in result.by_language else "in languages not trained on"
    _say(
        "accuracy",
        f"{result.accuracy:.3f} {where}; {baseline.accuracy:.3f} by always saying {baseline.predictions[0]!r}",
    )
    if len(result.by_language) > 1:
        _say("", "  ".join(f"{language} {accuracy:.2f}" for language, accuracy in result.by_language.items()))


def _shares(seconds: Counter[str], steps: int) -> str:
    total = seconds.total()
    projection = seconds["projection"] + seconds["adjoint"]
    rest = [f"{part} {seconds[part] / total:.1%}" for part in ("forward", "backward", "optimiser", "data")]
    each = f"{seconds['projection'] / steps * 1e3:.0f} ms and its adjoint {seconds['adjoint'] / steps * 1e3:.0f} ms"
    return f"{total / steps * 1e3:.0f} ms: projection {projection / total:.1%} ({each}), {', '.join(rest)}"


def _time_mbert(steps: int, examples: Sequence[data.Example], arguments: argparse.Namespace) -> None:
    """A few steps of the whole architecture, row by row; the losses say only that it runs."""
    from hsaid_kernels import training

    print("\nmBERT's architecture with fresh weights, 16 texts of 16 hashed tokens a step, times in seconds")
    with _input():
        hsaid = _wrap(training.build_mbert(arguments.seed), arguments)
    _describe_model("mBERT", hsaid)
    batches = training.hashed_batches(examples, hsaid.theta.device)
    columns = ("projection", "adjoint", "forward", "backward", "optimiser")
    print("  ".join(["step", "  loss", *(f"{column:>10}" for column in columns)]))
    taken = training.training_steps(hsaid, batches, steps=steps, lr=arguments.lr, seed=arguments.seed)
    for number, step in enumerate(taken, 1):
        print("  ".join([f"{number:4}", f"{step.loss:6.3f}", *(f"{step.seconds[column]:10.4f}" for column in columns)]))
    _say("memory", f"{training.peak_memory(hsaid.theta.device) / 2**20:,.0f} MiB at the peak")


def _info(arguments: argparse.Namespace) -> None:
    with _input():
        if _is_checkpoint(arguments):
            _describe_checkpoint(Path(arguments.source), arguments.model)
            return
        hierarchy = _hierarchy(arguments.source, arguments.heads)
    print(hierarchy, end="\n\n")
    for spec in PARTITIONS + HEAD_PARTITIONS * arguments.heads:
        _say(spec, str(hierarchy.partition(spec)))


def _graph(arguments: argparse.Namespace) -> None:
    from hsaid_kernels.graph import Graph

    with _input():
        partition, multipliers = arguments.partition, None
        if _is_checkpoint(arguments):
            if partition is not None:
                raise ValueError(f"--partition: expected none, as a checkpoint has its own, got {partition!r}")
            hierarchy, partition, multipliers = _trained(Path(arguments.source), arguments.model)
        else:
            hierarchy = _hierarchy(arguments.source, arguments.heads or HEADS in (partition or ""))
        graph = Graph.of(hierarchy, partition, fold=arguments.fold, multipliers=multipliers)
        graph.write(arguments.out)
    counts = [f"{len(hierarchy.tensors)} tensors", f"{graph.num_paths} paths", f"{len(graph.nodes)} nodes"]
    if graph.partition:
        counts.append(f"{graph.partition.num_multipliers} multipliers")
    _say("graph", f"{arguments.out}: {', '.join(counts)}")


def _is_checkpoint(arguments: argparse.Namespace) -> bool:
    from hsaid_kernels.checkpoint import VALUES_FILE

    if Path(arguments.source, VALUES_FILE).exists():
        if arguments.heads:
            raise ValueError(f"--heads: expected with a model only, got it with the checkpoint {arguments.source!r}")
        return True
    if arguments.model is not None:
        raise ValueError(f"--model: expected with a checkpoint only, got it with {arguments.source!r}, which is none")
    return False


def _hierarchy(source: str, heads: bool) -> Hierarchy:
    from hsaid_kernels import training

    return Hierarchy.from_model(training.build_architecture(source), heads=heads)


def _trained(directory: Path, model: str | None) -> tuple[Hierarchy, Partition, torch.Tensor]:
    """A checkpoint's multipliers and what they belong to; `model` is what was trained, if not as the run says."""
    from safetensors.torch import load_file

    from hsaid_kernels import checkpoint, training

    config = checkpoint.read_config(directory)
    if model is None:
        if not (directory / training.RUN_FILE).exists():
            raise ValueError(f"--model: expected the one that {str(directory)!r} was trained from, as it does not say")
        model = training.read_run(directory)["model"]
    hierarchy = checkpoint.hierarchy_of(config, training.build_architecture(model))
    partition = hierarchy.partition(config["partition"], config["combine"])
    return hierarchy, partition, load_file(directory / checkpoint.VALUES_FILE)["multipliers"]


def _describe_checkpoint(directory: Path, model: str | None) -> None:
    from safetensors.torch import load_file

    from hsaid_kernels import checkpoint, training

    config = checkpoint.read_config(directory)
    theta, multipliers = map(load_file(directory / checkpoint.VALUES_FILE).get, ("theta", "multipliers"))
    _say("checkpoint", f"{_size(directory):,} bytes in {directory}")
    _say("model", f"{len(config['tensors'])} tensors, {_weights(config['tensors']):,} weights")
    _say(
        "trained",
        f"d = {config['intrinsic_dim']:,} numbers: {len(theta):,} in theta, m = {len(multipliers)} multipliers",
    )
    for key in (*checkpoint.BASIS[1:], "include", "exclude", "dtype", "generator"):
        if config[key] not in (None, [], {}):
            _say(key, str(config[key]))
    _say("theta", f"norm {theta.norm():.4g}")
    if (directory / training.RUN_FILE).exists():
        run = training.read_run(directory)
        for key in ("model", "data", "steps", "lr", "test_accuracy"):
            _say(key, str(run.get(key)))
    elif model is None:
        _say("multipliers", "--model MODEL, the one that was trained, tells their names")
        return
    if len(multipliers):
        _describe_multipliers(*_trained(directory, model))


def _describe_multipliers(hierarchy: Hierarchy, partition: Partition, multipliers: torch.Tensor) -> None:
    _say("multipliers", "by component, the largest change from 1 first")
    values = iter(multipliers.tolist())
    for component in partition.components:
        learned = sorted(zip(component.paths, values), key=lambda item: -abs(item[1] - 1))
        # Hard spaces, so that lines break between multipliers only.
        shown = [" ".join([*filter(None, path), f"{value:.3f}"]).replace(" ", "\xa0") for path, value in learned]
        indent = {"initial_indent": f"{'+'.join(component.levels):<12} ", "subsequent_indent": " " * 13}
        print(textwrap.fill(", ".join(shown), 118, **indent).replace("\xa0", " "))


def _size(directory: Path) -> int:
    """Bytes of the checkpoint's files, whatever else is in the directory."""
    from hsaid_kernels import checkpoint, training

    files = (directory / name for name in (checkpoint.VALUES_FILE, checkpoint.CONFIG_FILE, training.RUN_FILE))
    return sum(path.stat().st_size for path in files if path.exists())
