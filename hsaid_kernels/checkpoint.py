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
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.attention import pieces_of
from hsaid_kernels.hierarchy import HEADS, Hierarchy
from hsaid_kernels.plan import GENERATOR
from hsaid_kernels.projection import split_tensors

if TYPE_CHECKING:
    from hsaid_kernels.module import HSAID

FORMAT = 1
VALUES_FILE, CONFIG_FILE = "hsaid.safetensors", "hsaid_config.json"
TRAINER_FILE, TRAINER_STATE_FILE = "model.safetensors", "trainer_state.json"  # by transformers.Trainer, this one last
TASK = "default"
ABOUT = f"for reading: what is loaded is the copy in {VALUES_FILE}"
BASIS = (
    *("intrinsic_dim", "partition", "combine", "skip", "merge", "heads", "pruned"),
    *("normalize", "diagonal", "width", "seed"),
)
CHOICE = ("include", "exclude", "train_fully")
SHAPES = ("tensors", "full")
FIRST = {"task": TASK, "train_fully": None, "full": {}, "heads": False, "pruned": {}}  # of those that do not say it yet
SAMPLES = 16  # values of each W0 tensor that its check is made from

Config = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]


def describe(hsaid: HSAID) -> Config:
    """The configuration: what theta and the multipliers mean, on which tensors ("tensors": {name: shape}); what is
    trained fully beside them ("full").

    "w0_checks" has four hex digits per tensor, a hash of a few values of W0, to warn of another W0.
    """
    plan, partition = hsaid.plan, hsaid.partition
    return {
        "format": FORMAT,
        "generator": GENERATOR,
        "intrinsic_dim": hsaid.intrinsic_dim,
        "partition": partition.spec,
        "combine": partition.combine,
        "skip": hsaid.hierarchy.skip,
        "merge": hsaid.hierarchy.merge,
        "heads": HEADS in hsaid.hierarchy.levels,
        "pruned": hsaid.pruned,
        "normalize": plan.normalize,
        "diagonal": plan.diagonal,
        "width": plan.width,
        "seed": plan.seed,
        "task": hsaid.task,
        **{key: getattr(hsaid, key) for key in CHOICE},
        "dtype": str(hsaid.dtype).removeprefix("torch."),
        "dtype_given": hsaid.given_dtype is not None,
        "tensors": plan.shapes,
        "full": {name: tuple(parameter.shape) for name, parameter in hsaid.full.items()},
        "w0_checks": _w0_checks(hsaid),
    }


def save_pretrained(hsaid: HSAID, directory: str | os.PathLike) -> None:
    """Writes both files to a directory, made where there is none.

    Both are on the disk under other names before either is put in place; after an error nothing is left of them.

    Raises:
        OSError: the directory cannot be written to (PermissionError, NotADirectoryError, no space left, ...).
    """
    import safetensors.torch  # the kernels serve where it is not installed

    config = _packed(describe(hsaid))
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
    make: Callable[..., HSAID], directory: str | os.PathLike, model: nn.Module, *, backend: str = "auto"
) -> HSAID:
    """`make(model, ...)` with the configuration, theta and multipliers of a checkpoint: the same weights bit for bit.

    Warns where the model's W0 is not the one that was trained from (a classifier with fresh random weights, say).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of an unknown format or generator version, truncated or corrupted, or the model has tensors of
            other names or shapes, of which the first are listed.
    """
    config, values = _read(directory)
    projected, full = split_tensors(model, *(config[key] for key in CHOICE))
    _check_tensors(config, {"tensors": _shapes(projected), "full": _shapes(full)})
    options = {key: config[key] for key in (*BASIS, *CHOICE, "task")}
    dtype = getattr(torch, config["dtype"]) if config["dtype_given"] else None
    hsaid = make(model, dtype=dtype, backend=backend, **options)
    _fill(hsaid, values)
    _check_w0(config, hsaid)
    return hsaid


def load_task(hsaid: HSAID, directory: str | os.PathLike) -> str:
    """Adds the task of a checkpoint to an HSAID of the same basis, and sets it; see `HSAID.load_task`."""
    config, values = _read(directory)
    _check_config("directory", config, hsaid)
    before, task = hsaid.task, config["task"]
    hsaid.add_task(task)
    hsaid.set_task(task)
    try:
        _fill(hsaid, values)
    except ValueError:
        hsaid.set_task(before)
        hsaid._tasks.pop(task)
        raise
    return task


def last_checkpoint(directory: str | os.PathLike) -> str | None:
    """The newest whole checkpoint among those that transformers' Trainer leaves in its output directory, or None.

    For `trainer.train(resume_from_checkpoint=last_checkpoint(directory))` after a run that was killed, maybe while it
    saved: Trainer writes the files of a checkpoint one after the other into "checkpoint-<step>", where its own
    `resume_from_checkpoint=True` takes the newest as it is.
    """
    steps = {int(p.name.rpartition("-")[2]): p for p in Path(directory).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(steps.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / TRAINER_STATE_FILE).read_bytes())
            _read(path)
            return str(path)
    return None


def check_ranks(configs: Sequence[Config]) -> None:
    """Refuses (ValueError) ranks of a distributed run that do not have the same configuration and W0."""
    for key, first in configs[0].items():
        other = [rank for rank, config in enumerate(configs) if config[key] != first]
        if other and key == "w0_checks":
            pairs = zip(first.split(), configs[other[0]][key].split(), configs[0]["tensors"], strict=True)
            name = next(name for one, two, name in pairs if one != two)
            raise ValueError(
                f"model: expected the same W0 on all ranks, but {name!r} on rank {other[0]} is not that of rank 0: "
                "load the same weights, and call torch.manual_seed(...) with the same seed before making new ones"
            )
        if other and key in SHAPES:
            reason = differences(first, configs[other[0]][key]) or "they are in another order"
            raise ValueError(f"model: expected the same tensors on all ranks, got others on rank {other[0]}: {reason}")
        if other:
            got = ", ".join(f"{config[key]!r} on rank {rank}" for rank, config in enumerate(configs))
            raise ValueError(f"{key}: expected the same on all ranks, got {got}")


def read_config(directory: str | os.PathLike) -> Config:
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
    saved, shapes = config["tensors"], _shapes(dict(model.named_parameters()))
    chosen = saved if any(config[key] for key in CHOICE) else shapes
    found = {name: (*saved.get(name, shape)[:1], *shape[1:]) for name, shape in shapes.items() if name in chosen}
    _check_tensors({"tensors": saved, "full": {}}, {"tensors": found, "full": {}})
    hierarchy = Hierarchy.from_model(model, config["skip"], config["merge"], config["heads"])
    return replace(hierarchy.select(saved, without=pieces_of(model, config["pruned"])), shapes=saved)


def encode_state(config: Config) -> Tensor:
    """The configuration as bytes in a uint8 tensor, which every way of storing a state_dict can store."""
    return torch.tensor(list(json.dumps(_packed(config)).encode()), dtype=torch.uint8)


def check_state(state: Tensor, hsaid: HSAID) -> None:
    """Refuses (ValueError) an encoded configuration of another task, or by which the values mean other weights."""
    config = _parse("state_dict", bytes(state.tolist()).decode())
    if config["task"] != hsaid.task:
        raise ValueError(f"state_dict: expected task {hsaid.task!r}, which is set, got {config['task']!r}")
    _check_config("state_dict", config, hsaid)


def differences(expected: Shapes, got: Shapes, at_most: int = 3) -> str:
    """The first differences between two sets of names and shapes, in words; "" where there are none."""
    found = []
    for name, shape in expected.items():
        if name not in got:
            found.append(f"{name!r} of shape {tuple(shape)} is missing")
        elif tuple(got[name]) != tuple(shape):
            found.append(f"{name!r} has shape {tuple(got[name])} in place of {tuple(shape)}")
    found += [f"{name!r} of shape {tuple(shape)} is unexpected" for name, shape in got.items() if name not in expected]
    more = [f"{len(found) - at_most} more"] if len(found) > at_most else []
    return ", ".join([*found[:at_most], *more])


def _check_config(where: str, config: Config, hsaid: HSAID) -> None:
    """Refuses a configuration of another basis or of other tensors than this HSAID's; warns of another W0."""
    own = describe(hsaid)
    for key in BASIS:
        if config[key] != own[key]:
            raise ValueError(f"{where}: expected {key} {own[key]!r}, as in this HSAID, got {config[key]!r}")
    _check_tensors(config, own)
    _check_w0(config, hsaid)


def _check_tensors(config: Config, got: Mapping[str, Shapes]) -> None:
    for key, what in {"tensors": "trained", "full": "trained fully"}.items():
        expected, found = config[key], got[key]
        if list(expected.items()) != list(found.items()):  # the order too: it numbers the multipliers
            reason = differences(expected, found) or "they are in another order"
            raise ValueError(f"model: expected the {len(expected)} tensors that were {what}, got others: {reason}")


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _fill(hsaid: HSAID, values: Mapping[str, Tensor]) -> None:
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


def _check_w0(config: Config, hsaid: HSAID) -> None:
    pairs = zip(config["w0_checks"].split(), _w0_checks(hsaid).split(), config["tensors"], strict=True)
    if other := [name for saved, own, name in pairs if saved != own]:
        names = ", ".join(map(repr, other[:3])) + (", ..." if len(other) > 3 else "")
        warnings.warn(
            f"model: W0 is not what was trained from in {len(other)} of {len(config['tensors'])} tensors ({names}), so "
            "their weights will not be the trained ones",
            stacklevel=4,
        )


def _w0_checks(hsaid: HSAID) -> str:
    samples = []
    for parameter in hsaid.w0().values():
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float())
    on_cpu = torch.cat(samples).cpu().split([len(sample) for sample in samples])  # one transfer for all
    return " ".join(hashlib.blake2b(_bytes(sample), digest_size=2).hexdigest() for sample in on_cpu)


def _read(directory: str | os.PathLike) -> tuple[Config, dict[str, Tensor]]:
    """(configuration, {"theta": ..., "multipliers": ..., ...}), known to be what was written."""
    import safetensors.torch

    path = Path(directory, VALUES_FILE)
    if not path.exists() and Path(directory, TRAINER_FILE).exists():
        path = Path(directory, TRAINER_FILE)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"directory: expected one with a checkpoint, got no file {str(path)!r}") from None
    try:
        values = safetensors.torch.load(data)
        if path.name == TRAINER_FILE:  # a state_dict, without a digest
            text = bytes(values.pop("_extra_state").tolist()).decode()
            digest = _digest(text, values)
        else:
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            text, digest = metadata["config"], metadata["digest"]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"directory: expected a whole checkpoint, got a truncated or foreign {str(path)!r}: {error}"
        ) from None
    if digest != _digest(text, values):
        raise ValueError(
            f"directory: expected the checkpoint that was saved, got a corrupted {str(path)!r}: its digest differs"
        )
    config = _parse(f"directory: {str(path)!r}", text)
    if path.name == VALUES_FILE:
        _compare_readable(path.with_name(CONFIG_FILE), text)
    return config, values


def _parse(where: str, text: str) -> Config:
    config = {**FIRST, **json.loads(text)}
    for key, known in {"format": FORMAT, "generator": GENERATOR}.items():
        if config.get(key) != known:
            raise ValueError(f"{where}: expected {key} {known!r}, the only one known here, got {config.get(key)!r}")
    return {**config, **{key: _unpack(config[key]) for key in SHAPES}}


def _compare_readable(path: Path, text: str) -> None:
    if path.exists():
        try:
            same = json.loads(path.read_bytes()) == {"about": ABOUT, **json.loads(text)}
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
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Puts the files in place in their order, each in one step, after all of them are on the disk."""
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in files}
    try:
        for path, data in files.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _packed(config: Config) -> Config:
    return {**config, **{key: _pack(config[key]) for key in SHAPES}}


def _pack(shapes: Shapes) -> dict[str, Any]:
    """Names and shapes as a tree of modules, {"encoder": {"0..11": {"weight": "768x768"}}}, equal neighbours in one."""
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        *modules, last = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = "x".join(map(str, shape)) or "scalar"
    return _fold(tree)


def _fold(node: dict[str, Any] | str) -> dict[str, Any] | str:
    """The tree with runs of consecutive numbers that hold the same as one child, "0..11" (no name has a dot in it)."""
    if isinstance(node, str):
        return node
    runs: list[list[Any]] = []  # [first, last, content]
    for key, child in node.items():
        content = _fold(child)
        _, last, same = runs[-1] if runs else ("", "", None)
        # as JSON, because == of dicts has no regard for the order, which is the tensors'
        if key == _following(last) and json.dumps(content) == json.dumps(same):
            runs[-1][1] = key
        else:
            runs.append([key, key, content])
    return {first if first == last else f"{first}..{last}": content for first, last, content in runs}


def _following(key: str) -> str | None:
    return str(int(key) + 1) if re.fullmatch("0|[1-9][0-9]*", key) else None


def _unpack(node: dict[str, Any] | str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    if isinstance(node, str):
        return {prefix: () if node == "scalar" else tuple(map(int, node.split("x")))}
    shapes = {}
    for key, child in node.items():
        first, _, last = key.partition("..")
        for name in map(str, range(int(first), int(last) + 1)) if last else [key]:
            shapes |= _unpack(child, f"{prefix}.{name}" if prefix else name)
    return shapes
