"""Checkpoints: theta, the multipliers, the fully trained tensors and the configuration of an HSAID, a few kilobytes.

The file `hsaid.safetensors` is a complete checkpoint. It contains the parameters of one task; its header contains the
configuration as JSON and a digest (BLAKE2b) of everything. A single file can be replaced atomically: if saving fails,
the directory holds either the old or the new checkpoint. `hsaid_config.json` is a copy of the configuration for
reading; it is not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.fastfood.selection import split_tensors
from hsaid_kernels.files import read_file, replace_files
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.attention import pieces_of
from hsaid_kernels.wrapper.checkpoint.compare import check_config, check_tensors, check_w0, shapes_of
from hsaid_kernels.wrapper.checkpoint.configuration import (
    BASIS,
    CHOICE,
    Config,
    Described,
    bytes_of,
    packed,
    parse,
    text_of_state,
)
from hsaid_kernels.wrapper.w0.beside import PREFIX
from hsaid_kernels.wrapper.w0.checks import plain
from hsaid_kernels.wrapper.w0.fsdp2 import gathered

VALUES_FILE, CONFIG_FILE = "hsaid.safetensors", "hsaid_config.json"
# Written by transformers.Trainer; of all files of a checkpoint it writes trainer_state.json last.
TRAINER_FILE, TRAINER_STATE_FILE = "model.safetensors", "trainer_state.json"
ABOUT = f"for reading: what is loaded is the copy in {VALUES_FILE}"


class Trained(Described, Protocol):
    """What is saved and loaded. `HSAID` implements it."""

    def configuration(self) -> Config: ...
    def buffers_changed(self) -> dict[str, Tensor]: ...
    def put_buffers(self, values: Mapping[str, Tensor]) -> None: ...


class WithTasks(Trained, Protocol):
    """What another task can be loaded into. `HSAID` implements it."""

    def add_task(self, name: str) -> None: ...
    def remove_task(self, name: str) -> None: ...
    def set_task(self, name: str) -> None: ...


Made = TypeVar("Made", bound=Trained)


def save_pretrained(hsaid: Trained, directory: str | os.PathLike[str], *, write: bool = True) -> None:
    """Writes the current task's parameters and the configuration to `directory`, which is created if needed.

    `write=False` is for the other ranks where FSDP2 has sharded theta, which all gather together. Both files are
    written completely under temporary names before either gets its final name. After an error no temporary file
    remains.

    Raises:
        OSError: the directory cannot be written to (PermissionError, NotADirectoryError, no space left, ...).
    """
    import safetensors.torch  # imported here because the kernels can be used without safetensors

    values = {name: gathered(parameter.detach()) for name, parameter in hsaid.named_parameters()}
    config = packed(hsaid.configuration())
    if not write:
        return
    text = json.dumps(config, separators=(",", ":"))
    values |= {f"{PREFIX}{name}": buffer for name, buffer in hsaid.buffers_changed().items()}
    values = {name: value.cpu().contiguous() for name, value in values.items()}
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
    make: Callable[..., Made], directory: str | os.PathLike[str], model: nn.Module, **options: Any
) -> Made:
    """Returns `make(model, ...)` with the configuration and parameters of a checkpoint.

    Given the same W0, the projected weights are the same as when saved, bit for bit. Warns if the model's W0 differs
    from the W0 of training, for example if a classification head was newly initialized.

    Args:
        make: the class `HSAID`.
        directory: what `save_pretrained` or transformers' Trainer wrote.
        model: the module to wrap.
        options: `backend` and `memory`, as of `HSAID`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint has an unknown format or generator version, or is truncated or corrupted; or the
            names, shapes or order of the model's tensors differ from the saved ones (the message lists the first).
        OSError: the checkpoint cannot be read.
    """
    config, values = _read(directory)
    model = plain(model)
    frozen = [name for name in config["frozen"] if name in dict(model.named_parameters())]
    projected, full = split_tensors(model, **{key: config[key] for key in CHOICE}, frozen=frozen)
    check_tensors(config, {"tensors": shapes_of(projected), "full": shapes_of(full)})
    basis = {key: config[key] for key in (*BASIS, *CHOICE, "task")}
    dtype = getattr(torch, config["dtype"]) if config["dtype_given"] else None
    hsaid = make(model, dtype=dtype, frozen=frozen, **basis, **options)
    _fill(hsaid, values)
    check_w0(config, hsaid)
    return hsaid


def load_task(hsaid: WithTasks, directory: str | os.PathLike[str]) -> str:
    """Adds the task of a checkpoint to an HSAID with the same basis, and makes it current; see `HSAID.load_task`."""
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
    """The path of the newest complete checkpoint in the output directory of transformers' Trainer, or None.

    Use it as `trainer.train(resume_from_checkpoint=last_checkpoint(directory))` after a run was killed. Trainer writes
    the files of "checkpoint-<step>" one after the other, so a run killed while saving leaves an incomplete checkpoint.
    Trainer's own `resume_from_checkpoint=True` takes the newest one without checking that it is complete.
    """
    steps = {int(p.name.rpartition("-")[2]): p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads(read_file(path / TRAINER_STATE_FILE))
            _read(path)
            return str(path)
    return None


def read_config(directory: str | os.PathLike[str]) -> Config:
    """The configuration of a checkpoint in the form of `describe`. Raises as `from_pretrained` for a bad checkpoint."""
    return _read(directory)[0]


def hierarchy_of(config: Config, model: nn.Module) -> Hierarchy:
    """The hierarchy of a checkpoint's tensors, given the architecture that was trained (on any device, also "meta").

    The first dimension of a tensor may differ in size from the model's, because it may be the number of labels or of
    tokens. Raises ValueError for any other difference in names, shapes or order. Parameters that were masked in
    training are masked in `model` too.
    """
    modules = dict(model.named_modules())
    for name in config["tensors"]:
        prefix, _, key = name.removesuffix("_orig").rpartition(".")
        if name.endswith("_orig") and prefix in modules and key in modules[prefix]._parameters:
            prune.identity(modules[prefix], key)  # it was masked in training; creates "<key>_orig" in the model
    saved, shapes = config["tensors"], shapes_of(dict(model.named_parameters()))
    chosen = saved if any(config[key] for key in CHOICE) else shapes
    found = {name: (*saved.get(name, shape)[:1], *shape[1:]) for name, shape in shapes.items() if name in chosen}
    check_tensors({"tensors": saved, "full": {}}, {"tensors": found, "full": {}})
    hierarchy = Hierarchy.from_model(model, config["skip"], config["merge"], config["heads"])
    return replace(hierarchy.select(saved, without=pieces_of(model, config["pruned"])), shapes=saved)


def _fill(hsaid: Trained, values: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's values into the parameters.

    First checks that each parameter has a value of its shape and dtype, and each other value is of a buffer; otherwise
    raises ValueError and changes nothing.
    """
    parameters = dict(hsaid.named_parameters())
    for name, parameter in parameters.items():
        value = values.get(name)
        if value is None or (value.dtype, value.shape) != (parameter.dtype, parameter.shape):
            got = "none" if value is None else f"shape {list(value.shape)} ({value.dtype})"
            raise ValueError(
                f"directory: expected {name} of shape {list(parameter.shape)} ({parameter.dtype}), got {got}"
            )
    hsaid.put_buffers({name.removeprefix(PREFIX): v for name, v in values.items() if name.startswith(PREFIX)})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _read(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """Returns (configuration, {"theta": ..., "multipliers": ..., ...}) after verifying digest, format and types."""
    import safetensors.torch

    path = Path(directory, VALUES_FILE)
    if not path.exists() and Path(directory, TRAINER_FILE).exists():
        path = Path(directory, TRAINER_FILE)
    try:
        data = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"directory: expected one with a checkpoint, got no file {str(path)!r}") from None
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        reason = getattr(error, "strerror", None) or str(error)
        raise type(error)(f"directory: expected a checkpoint that can be read, got {str(path)!r}: {reason}") from None
    try:
        values = safetensors.torch.load(data)
        if path.name == TRAINER_FILE:  # a state_dict, which has no digest to compare with
            text = text_of_state(values.pop("_extra_state"))
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
