"""`hsaid info`: prints the contents of a checkpoint, or a model's hierarchy.

A checkpoint written by `hsaid train` needs no model, because training.json stores the paths of the multipliers.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hsaid_kernels.app import trained
from hsaid_kernels.app.architecture import build_architecture, load_model
from hsaid_kernels.app.command_pack import describe_size
from hsaid_kernels.app.example_inputs import example_inputs
from hsaid_kernels.app.terminal import num_weights, say, user_input
from hsaid_kernels.hierarchy import Component, Hierarchy
from hsaid_kernels.wrapper.checkpoint.configuration import BASIS, Config
from hsaid_kernels.wrapper.checkpoint.files import VALUES_FILE, read_config
from hsaid_kernels.wrapper.checkpoint.packing import read_packed
from hsaid_kernels.wrapper.head_check import check
from hsaid_kernels.wrapper.heads import undivided

PARTITIONS = ("did", "L1+L2+L3+L4", "L1+L2+L3|L4", "L1+L2|L3+L4", "L1+L2|L3|L4", "L1|L2|L3|L4")
EXPERT_PARTITIONS = ("L1+L2|L3|L4|L6", "L1+L6|L3|L4")
HEAD_PARTITIONS = ("L1+L2|L3|L4|L5", "L1+L5|L3|L4", "L1+L2+L3+L4+L5")


def info(arguments: argparse.Namespace) -> None:
    """Prints the information about `arguments.source`. Raises UsageError for invalid arguments."""
    with user_input():
        if Path(arguments.source).is_file():
            _describe_packed(Path(arguments.source))
            return
        divided = {"heads": arguments.heads, "experts": arguments.experts}
        if trained.is_checkpoint(arguments.source, arguments.model, **divided, check=arguments.check):
            _describe_checkpoint(Path(arguments.source), arguments.model)
            return
        if arguments.check and not arguments.heads:
            raise ValueError("--check: expected with --heads, got it without")
        model = build_architecture(arguments.source)
        hierarchy = Hierarchy.from_model(model, **divided)
        whole = undivided(model) if arguments.heads else {}
    print(hierarchy, end="\n\n")
    for spec in PARTITIONS + HEAD_PARTITIONS * arguments.heads + EXPERT_PARTITIONS * arguments.experts:
        say(spec, str(hierarchy.partition(spec)))
    for why, names in itertools.groupby(sorted(whole, key=whole.__getitem__), key=whole.__getitem__):
        _say_attentions("left whole", list(names), why)
    if arguments.check:
        with user_input():
            model = load_model(arguments.source)
            found = check(model, example_inputs(model))
        alike = itertools.groupby(
            sorted(found, key=lambda one: (one.verdict, one.why)), key=lambda one: (one.verdict, one.why)
        )
        for (verdict, why), same in alike:
            if verdict != "whole":
                _say_attentions(verdict, [one.name for one in same], why)


def _say_attentions(what: str, names: Sequence[str], why: str) -> None:
    some = ", ".join(names[:2]) + (f", ... ({len(names)} attention modules)" if len(names) > 2 else "")
    say(what, some + (why and f": {why}"))


def _describe_packed(file: Path) -> None:
    found = read_packed(file)
    describe_size(found, trained.size(file), str(file))
    theta, multipliers = found.values["theta"], found.values["multipliers"]
    _describe_config(found.config, theta, multipliers)
    for key in trained.NEEDED:
        if key in found.run:
            say(key, str(found.run[key]))
    if len(multipliers):
        say("multipliers", f"{multipliers.min():.3f} to {multipliers.max():.3f}; hsaid unpack tells their names")


def _describe_config(config: Config, theta: Tensor, multipliers: Tensor) -> None:
    say(
        "trained",
        f"d = {config['intrinsic_dim']:,} numbers: {len(theta):,} in theta, m = {len(multipliers)} multipliers",
    )
    for key in (*BASIS[1:], "include", "exclude", "dtype", "generator"):
        if config[key] not in (None, [], {}) and key not in ("experts", "layouts", "names"):
            say(key, str(config[key]))
    say("theta", f"norm {theta.norm():.4g}")


def _describe_checkpoint(directory: Path, model: str | None) -> None:
    config = read_config(directory)
    theta, multipliers = map(load_file(directory / VALUES_FILE).__getitem__, ("theta", "multipliers"))
    say("checkpoint", f"{trained.size(directory):,} bytes in {directory}")
    say("model", f"{len(config['tensors'])} tensors, {num_weights(config['tensors']):,} weights")
    _describe_config(config, theta, multipliers)
    if (directory / trained.RUN_FILE).exists():
        run = trained.read_run(directory)
        for key in ("model", "data", "steps", "lr", "test_accuracy"):
            say(key, str(run.get(key)))
    elif model is None:
        say("multipliers", "--model MODEL, the one that was trained, tells their names")
        return
    if len(multipliers):
        _describe_multipliers(trained.components(directory, model), multipliers.tolist())


def _describe_multipliers(components: Sequence[Component], multipliers: list[float]) -> None:
    num_paths = sum(len(component.paths) for component in components)
    if num_paths != len(multipliers):
        raise ValueError(
            f"directory: expected one that `hsaid train` wrote, got {len(multipliers)} multipliers and "
            f"{num_paths} paths in {trained.RUN_FILE}"
        )
    say("multipliers", "by component, the largest change from 1 first")
    values = iter(multipliers)
    for component in components:
        learned = sorted(zip(component.paths, values), key=lambda item: -abs(item[1] - 1))
        # Non-breaking spaces, so that lines break only between multipliers.
        shown = [" ".join([*filter(None, path), f"{value:.3f}"]).replace(" ", "\xa0") for path, value in learned]
        first, others = f"{'+'.join(component.levels):<12} ", " " * 13
        text = textwrap.fill(", ".join(shown), 118, initial_indent=first, subsequent_indent=others)
        print(text.replace("\xa0", " "))
