"""The configuration of an HSAID, which a checkpoint or state_dict stores beside theta and the multipliers.

Together with the model it determines how the weights are computed from W0, theta and the multipliers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import GENERATOR
from hsaid_kernels.hierarchy.layouts import LATEST
from hsaid_kernels.wrapper.basis import BASIS, CHOICE, Basis
from hsaid_kernels.wrapper.w0.values import samples_of

Config = dict[str, Any]
Shapes = Mapping[str, Sequence[int]]

FORMAT = 1
TASK = "default"
SHAPES = ("tensors", "full", "frozen")  # keys with {name: shape}
# Values for keys that are missing in configurations from older versions.
FIRST: Config = {"task": TASK, "train_fully": None, "full": {}, "frozen": {}, "heads": False, "pruned": {}}
FIRST["padding_rows"] = {}  # which projected all rows
FIRST["chunks"] = "all"  # which added them up
FIRST |= {"experts": False, "layouts": 1, "names": {}}  # which knew none of them
FIRST |= {"w0_dtypes": None, "architecture": None}  # which did not say so
MOST_NAMES = 100_000  # limit for a run of numbered modules that is stored as one entry, such as "0..11"
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
SAMPLES = 16  # number of values of each W0 tensor that enter its hash in "w0_checks"


def describe(
    basis: Basis,
    task: str,
    dtype: torch.dtype,
    full: Mapping[str, Tensor],
    w0_checks: str,
    own: Mapping[str, Tensor],
) -> Config:
    """The configuration as a dict. `own` are the model's parameters and buffers, by name.

    "tensors" is {name: shape} of the projected tensors, "full" the same for the fully trained ones, "frozen" for those
    that are left out because they did not require gradients. "w0_checks" (`w0_checks`) serves to detect a different W0.
    "w0_dtypes" is {name: dtype} of the float tensors in `own`, where "*" stands for those that are not named. The other
    keys are the arguments of `HSAID`, the dtype of the weights and the versions of the format and of the random
    generator. In a checkpoint there is also "architecture", what transformers builds the model from
    (`architecture_of`).
    """
    settings = basis.settings
    dtypes = {name: _name(tensor.dtype) for name, tensor in own.items() if tensor.dtype in WEIGHT_DTYPES}
    ((usual, _),) = Counter(dtypes.values() or [_name(dtype)]).most_common(1)
    return {
        "format": FORMAT,
        "generator": GENERATOR,
        **{key: getattr(settings, key) for key in BASIS},
        "task": task,
        **{key: getattr(settings, key) for key in CHOICE},
        "dtype": _name(dtype),
        "dtype_given": settings.dtype is not None,
        "w0_dtypes": {"*": usual} | {name: dtype for name, dtype in dtypes.items() if dtype != usual},
        "tensors": basis.plan.shapes,
        "full": {name: tuple(parameter.shape) for name, parameter in full.items()},
        "frozen": basis.frozen,
        "w0_checks": w0_checks,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def architecture_of(model: object) -> Config | None:
    """The configuration of a model of transformers, as its config.json has it, with the name of the model's class.

    None for other models, and for one whose configuration cannot be written as JSON.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type") or not hasattr(config, "to_json_string"):
        return None
    try:
        found = json.loads(config.to_json_string())
    except (TypeError, ValueError):
        return None
    ids = found.get("id2label")
    if ids is not None and found.get("label2id") == {label: int(number) for number, label in ids.items()}:
        del found["label2id"]  # transformers makes it again
    for key in ("transformers_version", "_name_or_path", "quantization_config"):
        found.pop(key, None)
    return {**found, "architectures": [type(model).__name__]}


def w0_checks(w0: Mapping[str, Tensor]) -> str:
    """For each projected tensor four hex digits, separated by spaces: a hash of up to 16 values of its W0.

    Of W0 in shards, all ranks must call this together.
    """
    values = samples_of(w0.values(), SAMPLES)
    return " ".join(hashlib.blake2b(bytes_of(value), digest_size=2).hexdigest() for value in values)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which are not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def encode_state(config: Config) -> Tensor:
    """The configuration as JSON in a uint8 tensor [bytes], because every format for state_dicts can store tensors."""
    return torch.tensor(list(json.dumps(packed(config)).encode()), dtype=torch.uint8)


def decode_state(state: Tensor) -> Config:
    """The inverse of `encode_state`. Raises ValueError as `parse` does."""
    return parse("state_dict", text_of_state(state))


def text_of_state(state: Tensor) -> str:
    """The JSON in a tensor made by `encode_state`, also after `.half()` or an average of equal state dicts.

    Its bytes are ASCII, which these operations represent exactly. Raises ValueError if the values are not ASCII bytes.
    """
    values = state.detach().cpu().double()
    if not ((values == values.round()) & (values >= 0) & (values < 128)).all():
        raise ValueError("state_dict: expected the configuration in _extra_state, got other values")
    return bytes(values.to(torch.uint8).tolist()).decode()


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(_is(kind), value))


def _is_dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _is_dtypes(value: Any) -> bool:
    return value is None or (_is_dict_of(lambda dtype: dtype in DTYPES)(value) and "*" in value)


def _is_names(value: Any) -> bool:
    return value == {} or (
        isinstance(value, dict)
        and value.keys() == {"tensors", "pieces"}
        and isinstance(value["tensors"], dict)
        and _is_dict_of(_is_list_of(str))(value["pieces"])
    )


def _is_choice(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(str)(value)


# For each key of the JSON: what is expected, in words for error messages, and a predicate that checks it.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (str(FORMAT), lambda value: _is(int)(value) and value == FORMAT),
    "generator": (repr(GENERATOR), lambda value: value == GENERATOR),
    **dict.fromkeys(("intrinsic_dim", "width", "seed"), ("an integer", _is(int))),
    **dict.fromkeys(
        ("partition", "combine", "normalize", "diagonal", "chunks", "task", "w0_checks"), ("a string", _is(str))
    ),
    "skip": ("a list of names", _is_list_of(str)),
    "merge": ("lists of names by name", _is_dict_of(_is_list_of(str))),
    **dict.fromkeys(("heads", "experts", "dtype_given"), ("true or false", _is(bool))),
    "layouts": (f"a number from 1 to {LATEST}", lambda value: _is(int)(value) and 1 <= value <= LATEST),
    "names": ("the names of before", _is_names),
    "pruned": ("lists of heads by module", _is_dict_of(_is_list_of(int))),
    "padding_rows": ("rows by tensor", _is_dict_of(_is(int))),
    "w0_dtypes": ("dtypes by tensor or null", _is_dtypes),
    "architecture": ("the configuration of a model or null", _is(dict, type(None))),
    **dict.fromkeys(CHOICE, ("a regular expression, several or null", _is_choice)),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES if isinstance(value, str) else False),
    **dict.fromkeys(SHAPES, ("shapes by name", _is(dict))),
}


def parse(where: str, text: str, without: Collection[str] = ()) -> Config:
    """A configuration from its JSON. Keys that older versions did not write get their defaults.

    `without` are keys that it need not have, because a packed checkpoint has digests of what they say.

    Raises ValueError, with a message that begins with `where`, for another format or generator version, and for missing
    or invalid values.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: expected a configuration in JSON, got something else") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a configuration, got {found!r}")
    config: Config = {**FIRST, **found}
    for key, (expected, fits) in _FIELDS.items():
        if key in without:
            continue
        if key not in config:
            raise ValueError(f"{where}: expected a configuration with {key!r}, got one without")
        if not fits(config[key]):
            only = ", the only one known here" if key in ("format", "generator") else ""
            raise ValueError(f"{where}: expected {key} {expected}{only}, got {config[key]!r}")
    try:
        config |= {key: _unpack(config[key]) for key in SHAPES if key not in without}
        if config["names"]:
            config["names"] = {**config["names"], "tensors": _unpack(config["names"]["tensors"])}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{where}: expected names and shapes of tensors, got something else") from None
    if "w0_checks" in without:
        return config
    if len(config["w0_checks"].split()) != len(config["tensors"]) or not config["tensors"]:
        raise ValueError(f"{where}: expected w0_checks for each of {len(config['tensors'])} tensors, got others")
    return config


def packed(config: Config) -> Config:
    """The configuration in the form stored as JSON, with the names and shapes of tensors as compact trees (`_pack`).

    What says nothing is left out, so that it is that of versions that did not know it: no padding rows, all chunks in
    every block, no architecture, tensors that all have the dtype of the weights, no experts, heads as of old, names
    that have not changed.
    """
    silent: Config = {"padding_rows": {}, "chunks": "all", "architecture": None, "w0_dtypes": {"*": config["dtype"]}}
    silent |= {"experts": False, "layouts": 1, "names": {}}
    stored = {key: value for key, value in config.items() if key not in silent or value not in (silent[key], None)}
    if "names" in stored:
        stored["names"] = {**stored["names"], "tensors": _pack(stored["names"]["tensors"])}
    return stored | {key: _pack(config[key]) for key in SHAPES}


def _pack(shapes: Shapes) -> dict[str, Any]:
    """{name: shape} as a tree of modules, such as {"encoder": {"0..11": {"weight": "768x768"}}}.

    Consecutive numbered modules with the same content become one entry.
    """
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        *modules, last = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = "x".join(map(str, shape)) or "scalar"
    return _fold(tree)


def _fold(node: dict[str, Any]) -> dict[str, Any]:
    """Merges children with consecutive numbers and equal content into one child, such as "0..11".

    The key cannot clash with a module's name, which cannot contain a dot.
    """
    runs: list[list[Any]] = []  # [first, last, content]
    for key, child in node.items():
        content = child if isinstance(child, str) else _fold(child)
        _, last, same = runs[-1] if runs else ("", "", None)
        # Compared as JSON, because == on dicts ignores the order, which here is the order of the tensors.
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
