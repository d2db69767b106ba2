"""An HSAID on disk: theta, the multipliers and what they mean, in a few kilobytes.

`hsaid.safetensors` is the checkpoint, whole in itself: theta and multipliers, and in its header the configuration as
JSON and a digest over all of it.  One file can be replaced in one step, so whatever happens while saving, the directory
holds the old checkpoint or the new one.  `hsaid_config.json` has the configuration too, for people to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.fastfood.selection import split_tensors
from hsaid_kernels.files import read_file, replace_files
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.attention import pieces_of
from hsaid_kernels.wrapper.comparison import check_config, check_tensors, check_w0, shapes_of
from hsaid_kernels.wrapper.configuration import BASIS, CHOICE, Config, Described, bytes_of, describe, packed, parse

VALUES_FILE, CONFIG_FILE = "hsaid.safetensors", "hsaid_config.json"
TRAINER_FILE, TRAINER_STATE_FILE = "model.safetensors", "trainer_state.json"  # by transformers.Trainer, this one last
ABOUT = f"for reading: what is loaded is the copy in {VALUES_FILE}"


class Trained(Described, Protocol):
    """What is saved and loaded: an `HSAID`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class WithTasks(Trained, Protocol):
    """What a further task is loaded into: an `HSAID`."""

    def add_task(self, name: str) -> None: ...
    def remove_task(self, name: str) -> None: ...
    def set_task(self, name: str) -> None: ...


Made = TypeVar("Made", bound=Trained)


def save_pretrained(hsaid: Trained, directory: str | os.PathLike[str]) -> None:
    """Writes both files to a directory, made where there is none.

    Both are on the disk under other names before either is put in place; after an error nothing is left of them.

    Raises:
        OSError: the directory cannot be written to (PermissionError, NotADirectoryError, no space left, ...).
    """
    import safetensors.torch  # the kernels serve where it is not installed

    config = packed(describe(hsaid))
    text = json.dumps(config, separators=(",", ":"))
    values = {name: parameter.detach().cpu().contiguous() for name, parameter in hsaid.named_parameters()}
    metadata = {"config": text, "digest": _digest(text, values)}
    readable = json.dumps({"about": ABOUT, **dict(sorted(config.items()))}, indent=1)
    files = {VALUES_FILE: safetensors.torch.save(values, metadata), CONFIG_FILE: f"{readable}\n".encode()}
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        replace_files({Path(directory, name): data for name, data in files.items()})
    except OSError as error:
        reason = error.strerror or str(error)
        refusal = type(error)(f"directory: expected one that can be written to, got {os.fspath(directory)!r}: {reason}")
        refusal.errno = error.errno
        raise refusal from error


def from_pretrained(
    make: Callable[..., Made], directory: str | os.PathLike[str], model: nn.Module, *, backend: str = "auto"
) -> Made:
    """`make(model, ...)` with the configuration, theta and multipliers of a checkpoint: the same weights bit for bit.

    Warns where the model's W0 is not the one that was trained from (a classifier with fresh random weights, say).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of an unknown format or generator version, truncated or corrupted, or the model has tensors of
            other names or shapes, of which the first are listed.
    """
    config, values = _read(directory)
    projected, full = split_tensors(model, *(config[key] for key in CHOICE))
    check_tensors(config, {"tensors": shapes_of(projected), "full": shapes_of(full)})
    options = {key: config[key] for key in (*BASIS, *CHOICE, "task")}
    dtype = getattr(torch, config["dtype"]) if config["dtype_given"] else None
    hsaid = make(model, dtype=dtype, backend=backend, **options)
    _fill(hsaid, values)
    check_w0(config, hsaid)
    return hsaid


def load_task(hsaid: WithTasks, directory: str | os.PathLike[str]) -> str:
    """Adds the task of a checkpoint to an HSAID of the same basis, and sets it; see `HSAID.load_task`."""
    config, values = _read(directory)
    check_config("directory", config, hsaid)
    before, task = hsaid.task, config["task"]
    hsaid.add_task(task)
    hsaid.set_task(task)
    try:
        _fill(hsaid, values)
    except ValueError:
        hsaid.set_task(before)
        hsaid.remove_task(task)
        raise
    return task


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint among those that transformers' Trainer leaves in its output directory, or None.

    For `trainer.train(resume_from_checkpoint=last_checkpoint(directory))` after a run that was killed, maybe while it
    saved: Trainer writes the files of a checkpoint one after the other into "checkpoint-<step>", where its own
    `resume_from_checkpoint=True` takes the newest as it is.
    """
    steps = {int(p.name.rpartition("-")[2]): p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads(read_file(path / TRAINER_STATE_FILE))
            _read(path)
            return str(path)
    return None


def read_config(directory: str | os.PathLike[str]) -> Config:
    """The configuration of a checkpoint, as `describe` makes it; raises what `from_pretrained` raises for a bad one."""
    return _read(directory)[0]


def hierarchy_of(config: Config, model: nn.Module) -> Hierarchy:
    """The hierarchy of a checkpoint's tensors, in the model that was trained (on any device, meta too).

    The first size of a tensor, which may be the number of labels or of tokens, may be another than the model's. Raises
    ValueError for other differences.
    """
    modules = dict(model.named_modules())
    for name in config["tensors"]:
        prefix, _, key = name.removesuffix("_orig").rpartition(".")
        if name.endswith("_orig") and prefix in modules and key in modules[prefix]._parameters:
            prune.identity(modules[prefix], key)  # it was masked when it was trained
    saved, shapes = config["tensors"], shapes_of(dict(model.named_parameters()))
    chosen = saved if any(config[key] for key in CHOICE) else shapes
    found = {name: (*saved.get(name, shape)[:1], *shape[1:]) for name, shape in shapes.items() if name in chosen}
    check_tensors({"tensors": saved, "full": {}}, {"tensors": found, "full": {}})
    hierarchy = Hierarchy.from_model(model, config["skip"], config["merge"], config["heads"])
    return replace(hierarchy.select(saved, without=pieces_of(model, config["pruned"])), shapes=saved)


def _fill(hsaid: Trained, values: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint's values into the parameters, once all of them are known to be what they should be."""
    parameters = dict(hsaid.named_parameters())
    for name, parameter in parameters.items():
        value = values.get(name)
        if value is None or (value.dtype, value.shape) != (parameter.dtype, parameter.shape):
            got = "none" if value is None else f"shape {list(value.shape)} ({value.dtype})"
            raise ValueError(
                f"directory: expected {name} of shape {list(parameter.shape)} ({parameter.dtype}), got {got}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _read(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """(configuration, {"theta": ..., "multipliers": ..., ...}), known to be what was written."""
    import safetensors.torch

    path = Path(directory, VALUES_FILE)
    if not path.exists() and Path(directory, TRAINER_FILE).exists():
        path = Path(directory, TRAINER_FILE)
    try:
        data = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"directory: expected one with a checkpoint, got no file {str(path)!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that none can have
        reason = getattr(error, "strerror", None) or str(error)
        raise type(error)(f"directory: expected a checkpoint that can be read, got {str(path)!r}: {reason}") from None
    try:
        values = safetensors.torch.load(data)
        if path.name == TRAINER_FILE:  # a state_dict, without a digest
            text = bytes(values.pop("_extra_state").tolist()).decode()
            digest = _digest(text, values)
        else:
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            text, digest = metadata["config"], metadata["digest"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"directory: expected a whole checkpoint, got a truncated or foreign {str(path)!r}: {error}"
        ) from None
    if digest != _digest(text, values):
        raise ValueError(
            f"directory: expected the checkpoint that was saved, got a corrupted {str(path)!r}: its digest differs"
        )
    config = parse(f"directory: {str(path)!r}", text)
    if path.name == VALUES_FILE:
        _compare_readable(path.with_name(CONFIG_FILE), text)
    return config, values


def _compare_readable(path: Path, text: str) -> None:
    if path.exists():
        try:
            same = json.loads(read_file(path)) == {"about": ABOUT, **json.loads(text)}
        except (OSError, ValueError):
            same = False
        if not same:
            warnings.warn(
                f"directory: {str(path)!r} is not what {VALUES_FILE} says, which is what is loaded", stacklevel=5
            )


def _digest(text: str, values: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()
