"""The configuration of an HSAID: what theta and the multipliers mean, as a checkpoint and a state_dict say it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import GENERATOR, Plan
from hsaid_kernels.fastfood.selection import Patterns
from hsaid_kernels.hierarchy import Hierarchy, Partition
from hsaid_kernels.hierarchy.paths import HEADS

Config = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]

FORMAT = 1
TASK = "default"
BASIS = (
    *("intrinsic_dim", "partition", "combine", "skip", "merge", "heads", "pruned"),
    *("normalize", "diagonal", "width", "seed"),
)
CHOICE = ("include", "exclude", "train_fully")
SHAPES = ("tensors", "full")
# Of those that do not say it yet.
FIRST: Config = {"task": TASK, "train_fully": None, "full": {}, "heads": False, "pruned": {}}
MOST_NAMES = 100_000  # of modules that are written in one
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
SAMPLES = 16  # values of each W0 tensor that its check is made from


class Described(Protocol):
    """What the configuration is made of: an `HSAID`."""

    plan: Plan
    partition: Partition
    hierarchy: Hierarchy
    pruned: dict[str, list[int]]

    @property
    def task(self) -> str: ...
    @property
    def given_dtype(self) -> torch.dtype | None: ...
    @property
    def include(self) -> Patterns: ...
    @property
    def exclude(self) -> Patterns: ...
    @property
    def train_fully(self) -> Patterns: ...
    @property
    def intrinsic_dim(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def full(self) -> dict[str, nn.Parameter]: ...
    def w0(self) -> dict[str, Tensor]: ...


def describe(hsaid: Described) -> Config:
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
        "w0_checks": w0_checks(hsaid),
    }


def w0_checks(hsaid: Described) -> str:
    """Four hex digits for each projected tensor, a hash of a few values of its W0."""
    samples = []
    for parameter in hsaid.w0().values():
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float())
    on_cpu = torch.cat(samples).cpu().split([len(sample) for sample in samples])  # one transfer for all
    return " ".join(hashlib.blake2b(bytes_of(sample), digest_size=2).hexdigest() for sample in on_cpu)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def encode_state(config: Config) -> Tensor:
    """The configuration as bytes in a uint8 tensor, which every way of storing a state_dict can store."""
    return torch.tensor(list(json.dumps(packed(config)).encode()), dtype=torch.uint8)


def decode_state(state: Tensor) -> Config:
    """The configuration that `encode_state` made a tensor of; ValueError for one of another format or generator."""
    return parse("state_dict", bytes(state.tolist()).decode())


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(_is(kind), value))


def _is_dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_choice(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(str)(value)


# What each value of the JSON is.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (str(FORMAT), lambda value: _is(int)(value) and value == FORMAT),
    "generator": (repr(GENERATOR), lambda value: value == GENERATOR),
    **dict.fromkeys(("intrinsic_dim", "width", "seed"), ("an integer", _is(int))),
    **dict.fromkeys(("partition", "combine", "normalize", "diagonal", "task", "w0_checks"), ("a string", _is(str))),
    "skip": ("a list of names", _is_list_of(str)),
    "merge": ("lists of names by name", _is_dict_of(_is_list_of(str))),
    **dict.fromkeys(("heads", "dtype_given"), ("true or false", _is(bool))),
    "pruned": ("lists of heads by module", _is_dict_of(_is_list_of(int))),
    **dict.fromkeys(CHOICE, ("a regular expression, several or null", _is_choice)),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES if isinstance(value, str) else False),
    **dict.fromkeys(SHAPES, ("shapes by name", _is(dict))),
}


def parse(where: str, text: str) -> Config:
    """A configuration from its JSON, with what older ones did not say.

    Raises ValueError for another format or generator, and for anything that no configuration has.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a configuration, got {found!r}")
    config: Config = {**FIRST, **found}
    for key, (expected, fits) in _FIELDS.items():
        if key not in config:
            raise ValueError(f"{where}: expected a configuration with {key!r}, got one without")
        if not fits(config[key]):
            only = ", the only one known here" if key in ("format", "generator") else ""
            raise ValueError(f"{where}: expected {key} {expected}{only}, got {config[key]!r}")
    try:
        config |= {key: _unpack(config[key]) for key in SHAPES}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{where}: expected names and shapes of tensors, got something else") from None
    if len(config["w0_checks"].split()) != len(config["tensors"]) or not config["tensors"]:
        raise ValueError(f"{where}: expected w0_checks for each of {len(config['tensors'])} tensors, got others")
    return config


def packed(config: Config) -> Config:
    """The configuration with its names and shapes as trees, as JSON has it."""
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


def _fold(node: dict[str, Any]) -> dict[str, Any]:
    """The tree with runs of consecutive numbers that hold the same as one child, "0..11" (no name has a dot in it)."""
    runs: list[list[Any]] = []  # [first, last, content]
    for key, child in node.items():
        content = child if isinstance(child, str) else _fold(child)
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
    shapes: dict[str, tuple[int, ...]] = {}
    for key, child in node.items():
        first, _, last = key.partition("..")
        if last and int(last) - int(first) >= MOST_NAMES:
            raise ValueError(f"more than {MOST_NAMES} modules in a row: {key}")
        for name in map(str, range(int(first), int(last) + 1)) if last else [key]:
            shapes |= _unpack(child, f"{prefix}.{name}" if prefix else name)
    return shapes
