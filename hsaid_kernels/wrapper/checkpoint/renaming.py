"""A checkpoint of a model whose tensors have other names by now, or are parts of larger ones.

A random basis is a hash of a tensor's name, and libraries rename: `renamed` makes a configuration for the model of now,
whose "names" say under which names the basis is drawn, and the multipliers numbered.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hsaid_kernels.hierarchy.attention import find_attentions
from hsaid_kernels.hierarchy.experts import find_experts
from hsaid_kernels.wrapper.checkpoint.configuration import Config, Shapes, w0_checks
from hsaid_kernels.wrapper.tasks import key_of
from hsaid_kernels.wrapper.w0.beside import PREFIX
from hsaid_kernels.wrapper.w0.values import value_of

# {name, or pattern for the whole name: what it was, or the pieces of a fused tensor in their order}
Names = Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None]


def renamed(
    config: Config, values: Mapping[str, Tensor], model: nn.Module, names: Names
) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the values of a checkpoint for a model with other names; see `State.from_pretrained`.

    Raises TypeError if `names` or what it gives has another type, ValueError if the tensors do not fit.
    """
    was = _reader(names)
    parameters = dict(model.named_parameters())
    saved: Shapes = {**config["tensors"], **config["full"], **config["frozen"]}
    before = config["names"].get("pieces", {})
    pieces: dict[str, list[str]] = {}
    for name in parameters:
        olds = was(name)
        if olds != [name] or name in before:
            pieces[name] = [piece for old in olds for piece in before.get(old, [old])]
    olds_of = {name: was(name) for name in parameters}
    used = Counter(old for olds in olds_of.values() for old in olds)
    trained = {**config["tensors"], **config["full"]}
    if missing := [old for old in trained if used[old] != 1]:
        raise ValueError(
            f"names: expected each of the {len(trained)} tensors that were trained once among the names of before, got "
            f"{missing[0]!r} {used[missing[0]]} times"
        )
    for name, olds in olds_of.items():
        shapes = [saved[old] for old in olds if old in saved]
        whole = len(olds) == 1 and len(shapes) == 1
        sizes = sum(map(math.prod, shapes))
        if shapes and (
            tuple(parameters[name].shape) != tuple(shapes[0]) if whole else sizes != parameters[name].numel()
        ):
            raise ValueError(
                f"names: expected {name!r} of shape {tuple(parameters[name].shape)} to be "
                f"{' and '.join(f'{old!r} of shape {tuple(saved[old])}' for old in olds if old in saved)}"
            )

    def now(kind: str) -> dict[str, tuple[int, ...]]:
        found = {name: [old in config[kind] for old in olds] for name, olds in olds_of.items()}
        if half := next((name for name, inside in found.items() if any(inside) and not all(inside)), None):
            raise ValueError(f"names: expected all pieces of {half!r} to be {kind} of the checkpoint, got some of them")
        return {name: tuple(parameters[name].shape) for name, inside in found.items() if inside and all(inside)}

    tensors, full = now("tensors"), now("full")
    for name in (*full, *(name for name, olds in olds_of.items() if set(olds) & config["padding_rows"].keys())):
        if len(olds_of[name]) > 1:
            raise ValueError(
                f"names: expected {name!r} to be one tensor of before, as what is trained fully or has a padding row "
                f"must be, got {len(olds_of[name])} pieces"
            )
    checks = dict(zip(config["tensors"], config["w0_checks"].split(), strict=True))
    new_of = {old: name for name, olds in olds_of.items() for old in olds}
    config = {
        **config,
        "include": None,
        "exclude": None,
        "train_fully": [f"^{re.escape(name)}$" for name in full] or None,
        "tensors": tensors,
        "full": full,
        "frozen": {name: tuple(p.shape) for name, p in parameters.items() if name not in tensors and name not in full},
        "w0_checks": " ".join(_check(olds_of[name], parameters[name], saved, checks) for name in tensors),
        "names": {"tensors": config["names"].get("tensors") or config["tensors"], "pieces": pieces},
        "padding_rows": {new_of[old]: row for old, row in config["padding_rows"].items()},
        "pruned": _pruned(config, model, olds_of),
        "w0_dtypes": None
        if config["w0_dtypes"] is None
        else {
            "*": config["w0_dtypes"]["*"],
            **{new_of[old]: dtype for old, dtype in config["w0_dtypes"].items() if old in new_of},
        },
    }
    keys = {key_of(old): key_of(new) for old, new in new_of.items() if new in full}
    keys |= {f"{PREFIX}{old}": f"{PREFIX}{name}" for name, _ in model.named_buffers() for old in was(name)[:1]}
    return config, {keys.get(key, key): value for key, value in values.items()}


def proposal(expected: Shapes, got: Shapes) -> str:
    """What to say of tensors that have other names by now: a mapping, where shapes and order leave one possibility."""
    gone = [name for name in expected if name not in got]
    new = [name for name in got if name not in expected]
    if not gone or not new:
        return ""
    hint = ". If the library has renamed them, from_pretrained(names={new: old}) keeps what was trained"
    if [tuple(expected[name]) for name in gone] != [tuple(got[name]) for name in new]:
        return hint
    patterns = dict.fromkeys(map(_pattern, new, gone))
    known = ", ".join(f"{one!r}: {other!r}" for one, other in patterns)
    return f"{hint}; by shapes and order that would be names={{{known}}}" if len(patterns) <= 40 else hint


def _pattern(new: str, old: str) -> tuple[str, str]:
    """A regular expression for names like `new` with other numbers, and what replaces them by those like `old`."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", new)
    if numbers != re.findall(r"(?<=\.)\d+(?=\.)", old):
        return re.escape(new), old
    places = iter(range(1, len(numbers) + 1))
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"(\\d+)", re.escape(new)), re.sub(
        r"(?<=\.)\d+(?=\.)", lambda _: f"\\{next(places)}", old
    )


def _reader(names: Names) -> Callable[[str], list[str]]:
    """A function from a name of now to the names of before."""
    if not callable(names) and not isinstance(names, Mapping):
        raise TypeError(f"names: expected {{new: old}} or a function from new to old, got {type(names).__name__}")

    def was(name: str) -> list[str]:
        old: object = None
        if callable(names):
            old = names(name)
        elif name in names:
            old = names[name]
        else:
            for pattern, replacement in names.items():
                if found := re.fullmatch(pattern, name):
                    several = [replacement] if isinstance(replacement, str) else list(replacement)
                    return [found.expand(one) for one in several]
        olds: list[Any] = [name] if old is None else list(old) if isinstance(old, (list, tuple)) else [old]
        if not olds or not all(isinstance(one, str) for one in olds):
            raise TypeError(f"names: expected a name or several for {name!r}, got {old!r}")
        return olds

    return was


def _check(olds: Sequence[str], tensor: Tensor, saved: Shapes, checks: Mapping[str, str]) -> str:
    """The hash of W0 that belongs to a tensor of now; "none" if a piece of it is not what was trained from."""
    if len(olds) == 1:
        return checks[olds[0]]
    flat, start, pieces = value_of(tensor.detach()).reshape(-1), 0, {}
    for old in olds:
        size = math.prod(saved[old])
        pieces[old] = flat[start : start + size]
        start += size
    same = w0_checks(pieces).split() == [checks[old] for old in olds]
    return w0_checks({"": flat}) if same else "none"


def _pruned(config: Config, model: nn.Module, olds_of: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The pruned heads and experts under the names that their modules have now."""
    if not config["pruned"]:
        return {}
    tensors = {attention.name: attention.bands[0].tensor for attention in find_attentions(model, config["layouts"])}
    tensors |= {layer.name: next(iter([*layer.fused, *layer.separate])) for layer in find_experts(model)}
    found = {}
    for old, numbers in config["pruned"].items():
        inside = [name for name, tensor in tensors.items() if olds_of[tensor][0].startswith(f"{old}.")]
        if len(inside) != 1:
            raise ValueError(f"names: expected one module that was {old!r}, where {numbers} are pruned, got {inside}")
        found[inside[0]] = numbers
    return found
