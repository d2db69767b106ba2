"""Reads what `hsaid train` writes to a directory: a checkpoint, and a JSON file about the run and its multipliers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hsaid_kernels.app.architecture import build_architecture
from hsaid_kernels.files import read_file
from hsaid_kernels.hierarchy import Component, Hierarchy, Partition
from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE, hierarchy_of, read_config
from hsaid_kernels.wrapper.checkpoint.packing import read_packed

RUN_FILE = "training.json"
NEEDED = ("model", "seed", "labels", "max_length")  # of a run, to build its classifier


def described(partition: Partition) -> list[dict[str, Any]]:
    """A partition's components in a form for JSON, which `components` reads."""
    return [{"levels": component.levels, "paths": component.paths} for component in partition.components]


def read_run(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The run that `save_trained` wrote, or of a packed checkpoint what it has of it.

    Raises FileNotFoundError if there is none, ValueError if it is damaged.
    """
    path = Path(directory, RUN_FILE)
    try:
        run = read_packed(directory).run if Path(directory).is_file() else json.loads(read_file(path))
        if missing := set(NEEDED).difference(run):
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"directory: expected one that `hsaid train` wrote, got no file {str(path)!r}"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"directory: expected one that `hsaid train` wrote, got a damaged {str(path)!r}: {error}"
        ) from None
    return run


def components(directory: Path, model: str | None = None) -> Sequence[Component]:
    """The components to which a checkpoint's multipliers belong, from the run or from `model`, the trained model.

    Raises as `read_run` and `load_multipliers`.
    """
    if model is None and "components" in (run := read_run(directory)):
        try:
            return [_component(item) for item in run["components"]]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"directory: expected one that `hsaid train` wrote, got damaged components in {RUN_FILE}: {error}"
            ) from None
    return load_multipliers(directory, model)[1].components


def _component(item: dict[str, Any]) -> Component:
    """One of `described`, read from JSON. Raises TypeError or KeyError if it is damaged."""
    levels, paths = item["levels"], item["paths"]
    names_of_levels = isinstance(levels, list) and all(isinstance(level, str) for level in levels)
    lists = isinstance(paths, list) and all(isinstance(path, list) for path in paths)
    if not (names_of_levels and lists and all(isinstance(node, str | None) for path in paths for node in path)):
        raise TypeError(f"expected lists of names, got {item!r:.80}")
    return Component(tuple(levels), tuple(map(tuple, paths)))


def load_multipliers(directory: Path, model: str | None = None) -> tuple[Hierarchy, Partition, Tensor]:
    """Returns a checkpoint's (hierarchy, partition, multipliers), the latter float32 [m].

    `model` is the directory or hub name of the trained model; None means the one that the run names. Raises ValueError
    if `model` is None and there is no run, or if the model's tensors do not fit the checkpoint.
    """
    config = read_config(directory)
    if model is None:
        if not (directory / RUN_FILE).exists():
            raise ValueError(f"--model: expected the one that {str(directory)!r} was trained from, as it does not say")
        model = read_run(directory)["model"]
    hierarchy = hierarchy_of(config, build_architecture(model))
    partition = hierarchy.partition(config["partition"], config["combine"])
    return hierarchy, partition, load_file(directory / VALUES_FILE)["multipliers"]


def is_checkpoint(source: str, model: str | None, **options: bool) -> bool:
    """Whether `source` is a checkpoint rather than a model. Raises ValueError for arguments that do not apply to it.

    `options` are those of the command line that are for a model only.
    """
    if Path(source, VALUES_FILE).exists():
        if given := next((name for name, value in options.items() if value), None):
            raise ValueError(f"--{given}: expected with a model only, got it with the checkpoint {source!r}")
        return True
    if model is not None:
        raise ValueError(f"--model: expected with a checkpoint only, got it with {source!r}, which is none")
    return False


def size(directory: Path) -> int:
    """The size in bytes of the checkpoint's file or files; other files in the directory do not count."""
    if directory.is_file():
        return directory.stat().st_size
    files = (directory / name for name in (VALUES_FILE, CONFIG_FILE, RUN_FILE))
    return sum(path.stat().st_size for path in files if path.exists())
