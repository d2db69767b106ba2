"""What `hsaid train` left in a directory: a checkpoint, and a JSON file about the run and its multipliers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hsaid_kernels.app.architecture import build_architecture
from hsaid_kernels.files import read_file
from hsaid_kernels.hierarchy import Component, Hierarchy, Partition
from hsaid_kernels.wrapper.checkpoint import CONFIG_FILE, VALUES_FILE, hierarchy_of, read_config

RUN_FILE = "training.json"


def described(partition: Partition) -> list[dict[str, Any]]:
    """A partition's components for JSON; `components` reads it."""
    return [{"levels": component.levels, "paths": component.paths} for component in partition.components]


def read_run(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_trained` was given. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    path = Path(directory, RUN_FILE)
    try:
        run = json.loads(read_file(path))
        if missing := {"model", "seed", "labels", "max_length"}.difference(run):
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


def components(directory: Path, model: str | None = None) -> Iterable[Component]:
    """What a checkpoint's multipliers belong to, as the run says, or `model`, the one that was trained."""
    if model is None and "components" in (run := read_run(directory)):
        try:
            return [
                Component(tuple(item["levels"]), tuple(tuple(path) for path in item["paths"]))
                for item in run["components"]
            ]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"directory: expected one that `hsaid train` wrote, got damaged components in {RUN_FILE}: {error}"
            ) from None
    return load_multipliers(directory, model)[1].components


def load_multipliers(directory: Path, model: str | None = None) -> tuple[Hierarchy, Partition, Tensor]:
    """A checkpoint's multipliers and what they belong to; `model` is what was trained, if not as the run says."""
    config = read_config(directory)
    if model is None:
        if not (directory / RUN_FILE).exists():
            raise ValueError(f"--model: expected the one that {str(directory)!r} was trained from, as it does not say")
        model = read_run(directory)["model"]
    hierarchy = hierarchy_of(config, build_architecture(model))
    partition = hierarchy.partition(config["partition"], config["combine"])
    return hierarchy, partition, load_file(directory / VALUES_FILE)["multipliers"]


def hierarchy_of_model(source: str, heads: bool) -> Hierarchy:
    return Hierarchy.from_model(build_architecture(source), heads=heads)


def is_checkpoint(source: str, model: str | None, heads: bool) -> bool:
    """Whether `source` is a checkpoint and not a model; ValueError for arguments that only the other one takes."""
    if Path(source, VALUES_FILE).exists():
        if heads:
            raise ValueError(f"--heads: expected with a model only, got it with the checkpoint {source!r}")
        return True
    if model is not None:
        raise ValueError(f"--model: expected with a checkpoint only, got it with {source!r}, which is none")
    return False


def size(directory: Path) -> int:
    """Bytes of the checkpoint's files, whatever else is in the directory."""
    files = (directory / name for name in (VALUES_FILE, CONFIG_FILE, RUN_FILE))
    return sum(path.stat().st_size for path in files if path.exists())
