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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.files import read_file, replace_files
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.hierarchy import pruned_pieces
from hsaid_kernels.wrapper.basis import CHOICE
from hsaid_kernels.wrapper.callers import stacklevel
from hsaid_kernels.wrapper.checkpoint.compare import check_tensors, shapes_of
from hsaid_kernels.wrapper.checkpoint.configuration import Config, bytes_of, packed, parse, text_of_state

VALUES_FILE, CONFIG_FILE = "hsaid.safetensors", "hsaid_config.json"
# Written by transformers.Trainer; of all files of a checkpoint it writes trainer_state.json last.
TRAINER_FILE, TRAINER_STATE_FILE = "model.safetensors", "trainer_state.json"
ABOUT = f"for reading: what is loaded is the copy in {VALUES_FILE}"


def write(directory: str | os.PathLike[str], config: Config, values: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint to `directory`, which is created if needed.

    Both files are written completely under temporary names before either gets its final name. After an error no
    temporary file remains.

    Args:
        config: see `configuration.describe`.
        values: the tensors, {name: tensor}.

    Raises:
        OSError: the directory cannot be written to (PermissionError, NotADirectoryError, no space left, ...).
    """
    import safetensors.torch  # imported here because the kernels can be used without safetensors

    config = packed(config)
    text = json.dumps(config, separators=(",", ":"))
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


def read(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """Returns (configuration, {"theta": ..., "multipliers": ..., ...}) after verifying digest, format and types.

    `directory` is what `HSAID.save_pretrained` or transformers' Trainer wrote.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it has an unknown format or generator version, or is truncated or corrupted.
        OSError: it cannot be read.
    """
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
            read(path)
            return str(path)
    return None


def read_config(directory: str | os.PathLike[str]) -> Config:
    """The configuration of a checkpoint in the form of `describe`. Raises as `read`."""
    return read(directory)[0]


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
    divided = [config[key] for key in ("heads", "experts", "layouts", "names")]
    hierarchy = Hierarchy.from_model(model, config["skip"], config["merge"], *divided)
    without = pruned_pieces(model, config["pruned"], config["layouts"])
    return replace(hierarchy.select(saved, without=without), shapes=saved)


def _compare_readable(path: Path, text: str) -> None:
    if path.exists():
        try:
            same = json.loads(read_file(path)) == {"about": ABOUT, **json.loads(text)}
        except (OSError, ValueError):
            same = False
        if not same:
            warnings.warn(
                f"directory: {str(path)!r} is not what {VALUES_FILE} says, which is what is loaded",
                stacklevel=stacklevel(),
            )


def _digest(text: str, values: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()
