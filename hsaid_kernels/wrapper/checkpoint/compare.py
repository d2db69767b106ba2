"""Whether a configuration agrees with an HSAID, or with a model: in basis, tensors and W0."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.selection import split_tensors
from hsaid_kernels.wrapper.basis import BASIS, CHOICE
from hsaid_kernels.wrapper.callers import stacklevel
from hsaid_kernels.wrapper.checkpoint.configuration import Config, Shapes, decode_state
from hsaid_kernels.wrapper.checkpoint.renaming import proposal
from hsaid_kernels.wrapper.w0.checks import differences

# In the configuration of a packed checkpoint, in place of "tensors" and "full", and of "w0_checks".
TENSORS_DIGEST, W0_DIGEST = "tensors_digest", "w0_digest"


def tensors_digest(shapes: Mapping[str, Shapes]) -> bytes:
    """Four bytes that stand for names, shapes and order, {"tensors": projected, "full": fully trained}."""
    return _digest(json.dumps([[*shapes[key].items()] for key in ("tensors", "full")]))


def w0_digest(w0_checks: str) -> bytes:
    """Four bytes that stand for the hashes of W0, `configuration.w0_checks`."""
    return _digest(w0_checks)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=4).digest()


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def arguments_of(config: Config, model: nn.Module) -> dict[str, Any]:
    """The arguments of `HSAID` that a configuration stores, for the model that was trained.

    Raises ValueError as `check_tensors` does.
    """
    frozen = [name for name in config["frozen"] if name in dict(model.named_parameters())]
    projected, full = split_tensors(model, **{key: config[key] for key in CHOICE}, frozen=frozen)
    check_tensors(config, {"tensors": shapes_of(projected), "full": shapes_of(full)})
    dtype = getattr(torch, config["dtype"]) if config["dtype_given"] else None
    return {key: config[key] for key in (*BASIS, *CHOICE, "task")} | {"frozen": frozen, "dtype": dtype}


def check_value(values: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raises ValueError if a checkpoint's tensor `name` is missing, or has another shape or dtype (None means any)."""
    value = values.get(name)
    if value is None or tuple(value.shape) != tuple(shape) or value.dtype != (dtype or value.dtype):
        got = "none" if value is None else f"shape {list(value.shape)} ({value.dtype})"
        kind = "" if dtype is None else f" ({dtype})"
        raise ValueError(f"directory: expected {name} of shape {list(shape)}{kind}, got {got}")


def check_tensors(config: Config, got: Mapping[str, Shapes]) -> None:
    """Raises ValueError if names, shapes or order of the tensors in `got` differ from the configuration's.

    `got` is {"tensors": projected, "full": fully trained}, each {name: shape}. The configuration of a packed checkpoint
    has a digest of these.
    """
    if TENSORS_DIGEST in config:
        if config[TENSORS_DIGEST] != tensors_digest(got):
            count = len(got["tensors"]) + len(got["full"])
            raise ValueError(f"model: expected the tensors that were trained, got {count} of other names or shapes")
        return
    for key, what in {"tensors": "trained", "full": "trained fully"}.items():
        expected, found = config[key], got[key]
        if list(expected.items()) != list(found.items()):  # the order matters too: it determines the multipliers' order
            reason = differences(expected, found) or "they are in another order"
            raise ValueError(
                f"model: expected the {len(expected)} tensors that were {what}, got others: {reason}"
                f"{proposal(expected, found)}"
            )


def check_config(where: str, config: Config, own: Config) -> None:
    """Raises ValueError if the configuration's basis or tensors are not the HSAID's `own`; warns if its W0 is not.

    Error messages begin with `where`.
    """
    for key in BASIS:
        if config[key] != own[key]:
            # These are rarely given, and what they are by default has changed.
            changed = key in ("width", "chunks", "padding_rows", "layouts")
            hint = f": wrap the model with {key}={config[key]!r} for that" if changed else ""
            raise ValueError(f"{where}: expected {key} {own[key]!r}, as in this HSAID, got {config[key]!r}{hint}")
    check_tensors(config, own)
    warn_of_other_w0(config, own["w0_checks"])


def check_state(state: Tensor, own: Config) -> None:
    """Raises ValueError if an encoded configuration (`encode_state`) differs from `own` in task, basis or tensors.

    Warns if its W0 differs.
    """
    config = decode_state(state)
    if config["task"] != own["task"]:
        raise ValueError(f"state_dict: expected task {own['task']!r}, which is set, got {config['task']!r}")
    check_config("state_dict", config, own)


def warn_of_other_w0(config: Config, own: str) -> None:
    """Warns if the W0 of some tensors, by their `w0_checks`, is not that from which theta was trained.

    A packed checkpoint has a digest of these, so that it does not say which tensors.
    """
    if W0_DIGEST in config:
        if config[W0_DIGEST] != w0_digest(own):
            warnings.warn(
                f"model: W0 is not what was trained from in some of {len(own.split())} tensors, so these will not be "
                "the trained ones",
                stacklevel=stacklevel(),
            )
        return
    pairs = zip(config["w0_checks"].split(), own.split(), config["tensors"], strict=True)
    if other := [name for saved, now, name in pairs if saved != now]:
        names = ", ".join(map(repr, other[:3])) + (", ..." if len(other) > 3 else "")
        sizes = {name: math.prod(shape) for name, shape in config["tensors"].items()}
        share = sum(sizes[name] for name in other) / sum(sizes.values())
        warnings.warn(
            f"model: W0 is not what was trained from in {len(other)} of {len(config['tensors'])} tensors ({names}), "
            f"{share:.1%} of the weights, so these will not be the trained ones",
            stacklevel=stacklevel(),
        )
