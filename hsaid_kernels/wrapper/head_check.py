"""`check`: whether the heads that `find_attentions` finds are those of the model, by numbers.

Names and shapes can lie. So parameters of a copy of the model are changed, and what changes in its results is compared
with what the bands of a head say:

1. Other values in a head's queries, keys or values change this head's columns of the output layer's input, and no
   others.
2. With a head's columns of the output layer's weight at zero, other queries, keys and values of this head change
   nothing in what the model returns. This finds keys and values that other layers read too, and ways around the layer.
3. With all its queries, keys and values at zero, a head's columns of the output layer's input are zero.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hsaid_kernels.hierarchy.attention import Attention, Bands, survey
from hsaid_kernels.wrapper.reads.link import link_of

# What a model returns besides results: a cache has keys, and attention weights are not behind the output layer.
NO_RESULTS = re.compile(r"past|cache|mems|attentions|shared_kv|attn_weights")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest absolute value


Part = tuple[str, tuple[slice, ...]]  # of a parameter: name, slices


@dataclass(frozen=True)
class Checked:
    """What `check` says of an attention module.

    Attributes:
        name: of the module.
        kind: name of its class.
        heads: their number, 0 if they are not known.
        verdict: "right"; "wrong"; "whole", for a module that is not divided; "not run", if the model did not run the
            module with these inputs, or if a change shows nothing (a single key, for example).
        why: what was seen, or why the module is left whole; "" if there is nothing to say.
    """

    name: str
    kind: str
    heads: int
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ""
        return f"{self.name or 'the model'} ({self.kind}{heads}): {self.verdict}" + (self.why and f", {self.why}")


def check(model: nn.Module, inputs: Mapping[str, Any]) -> list[Checked]:
    """Compares the heads of every attention module of a model with what the model computes, by three tests (above).

    Two heads of each module are tested, each by itself or, in grouped-query attention, with its group. That takes about
    ten calls of the model for each module, on a copy in float64, or float32 where the model does not run in float64.

    Args:
        model: any model with its weights, not on the meta device. Nothing in it is changed.
        inputs: keyword arguments of the model. At least two tokens, of different values.

    Returns an entry for each attention module, in the model's order. Raises TypeError if `model` is not a module or
    `inputs` not a mapping, ValueError if an HSAID wraps the model or it is on the meta device, and what the model
    raises.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected arguments by name, {{name: tensor}}, got {type(inputs).__name__}")
    found = survey(model)
    if any(link_of(module) is not None for module in model.modules()):
        raise ValueError("model: expected a plain model, got one that an HSAID wraps: unwrap() it first, or merge()")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: expected one with weights, got one on the meta device")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    report = {name: Checked(name, kinds[name], 0, "whole", why) for name, why in found.whole.items()}
    if found.divided:
        runs = _Runs(model, inputs, found.divided)
        for attention in found.divided:
            verdict, why = _judge(runs, attention)
            report[attention.name] = Checked(attention.name, kinds[attention.name], attention.heads, verdict, why)
    return [report[name] for name in kinds if name in report]


def _judge(runs: _Runs, attention: Attention) -> tuple[str, str]:
    outputs = [bands for bands in attention.bands if bands.role == "output"]
    inputs = [bands for bands in attention.bands if bands.role != "output"]
    before = [runs.plain.get(bands.tensor) for bands in outputs]
    if before[0] is None:
        return "not run", "the output layer is not reached"
    seen: set[str] = set()
    least = min((bands for bands in inputs), key=lambda bands: bands.count)
    sets = [attention.sharers(least, index) for index in {least.count // 2, least.count - 1}]
    for heads in sets:
        for role in dict.fromkeys(bands.role for bands in inputs):
            own = [bands for bands in inputs if bands.role == role]
            with runs.changed(_parts(attention, own, heads), _other):
                after, _ = runs.run()
            for bands, old in zip(outputs, before):
                new = after.get(bands.tensor)
                if old is None or new is None or new.shape != old.shape:
                    continue
                moved = _columns(new - old) > runs.tolerance * old.abs().max()
                columns = _mine(bands, heads, len(moved))
                if (moved & ~columns).any():
                    return "wrong", f"the {role} of heads {list(heads)} reaches the results of others"
                if (moved & columns).any():
                    seen.add(role)
    heads = sets[-1]
    mine = _parts(attention, inputs, heads)
    with runs.changed(_parts(attention, outputs, heads), torch.zeros_like):
        _, zeroed = runs.run()
        with runs.changed(mine, _other):
            _, changed = runs.run()
    if _differ(zeroed, changed, runs.tolerance):
        return "wrong", f"queries, keys or values of heads {list(heads)} are used elsewhere too"
    if not {"value", "key", "query"} & seen:
        return "not run", "no change of query, key and value shows"
    computed = {bands.role for bands in inputs} & {"key", "value"} or any(
        "*" in o for o in attention.layout.layers.values()
    )
    if computed:
        with runs.changed(mine, torch.zeros_like):
            after, _ = runs.run()
        for bands, old in zip(outputs, before):
            new = after.get(bands.tensor)
            if old is not None and new is not None:
                left = _columns(new)[_mine(bands, heads, new.shape[-1])]
                if (left > runs.tolerance * old.abs().max()).any():
                    return "right", "more than its queries, keys and values makes the results of a head"
    return "right", ""


class _Runs:
    """Calls of a copy of the model, whose parameters can be changed meanwhile."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], attentions: Iterable[Attention]):
        outputs = {bands.tensor for attention in attentions for bands in attention.bands if bands.role == "output"}
        for dtype in (torch.float64, torch.float32):
            self.model = copy.deepcopy(model).eval().to(dtype)
            self.tolerance = TOLERANCE[dtype]
            self.inputs = {key: _cast(value, dtype) for key, value in inputs.items()}
            self.parameters = dict(self.model.named_parameters())
            self.outputs = {_storage(self.parameters[tensor]): tensor for tensor in outputs}
            try:
                self.plain, self.results = self.run()
                break
            except RuntimeError:  # an operation that float64 does not have
                if dtype == torch.float32:
                    raise
        _, again = self.run()
        if _differ(self.results, again, self.tolerance):
            raise ValueError("model: expected the same results in two calls, got others: it draws random numbers")

    def run(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """({output weight: what the layer gets in its first call}, what the model returns)."""
        inputs = _Inputs(self.outputs)
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # an operation that does all of torch's own attention
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), inputs, _Einsums(inputs):
                torch.manual_seed(0)
                returned = self.model(**copy.deepcopy(self.inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
        return inputs.seen, list(_results(returned))

    @contextmanager
    def changed(
        self, parts: Iterable[tuple[str, tuple[slice, ...]]], change: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """A context manager for the time of which parts of parameters have other values."""
        kept = []
        with torch.no_grad():
            for tensor, slices in parts:
                part = self.parameters[tensor].data[slices]
                kept.append((part, part.clone()))
                part.copy_(change(part))
        try:
            yield
        finally:
            for part, values in reversed(kept):
                part.copy_(values)


class _Inputs(TorchDispatchMode):
    """Notes what is multiplied by the weights that lie in some storages, {address: name}, the first time."""

    def __init__(self, weights: Mapping[int, str]):
        super().__init__()
        self.weights = weights
        self.seen: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in PRODUCTS:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            factors = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
            for weight, other in (factors, factors[::-1]):
                self.note(weight, other.transpose(1, -1) if name == "convolution" else other)
        return result

    def note(self, weight: Tensor, other: Tensor) -> None:
        key = self.weights.get(_storage(weight))
        if key is not None and key not in self.seen:
            self.seen[key] = other.detach().clone()


class _Einsums(TorchFunctionMode):
    """Notes for `inputs` what einsum multiplies by a weight [..., heads, size], of which it may make a copy first."""

    def __init__(self, inputs: _Inputs):
        super().__init__()
        self.inputs = inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and len(args) == 3:
            for weight, other in (args[1:], args[:0:-1]):
                self.inputs.note(weight, other.flatten(-2))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(one, dtype) for one in value) if isinstance(value, (list, tuple)) else value


def _other(part: Tensor) -> Tensor:
    """Other values of about the same size."""
    size = part.std(correction=0) if part.numel() > 1 else part.abs().sum()
    return part + torch.randn_like(part) * (size if size > 0 else 0.3)


def _parts(attention: Attention, bands: Iterable[Bands], heads: tuple[int, ...]) -> list[tuple[str, tuple[slice, ...]]]:
    """The parts of parameters that serve only these heads."""
    return [
        (some.tensor, some.slices(index))
        for some in bands
        for index in range(some.count)
        if set(attention.sharers(some, index)) <= set(heads)
    ]


def _columns(values: Tensor) -> Tensor:
    """The largest absolute value of each column, [columns]."""
    return values.abs().flatten(0, -2).amax(0)


def _mine(bands: Bands, heads: tuple[int, ...], columns: int) -> Tensor:
    """bool [columns]: whether a column of the output layer's input belongs to these heads."""
    mine = torch.zeros(bands.shape[bands.dim], dtype=torch.bool)
    for head in heads:
        mine[bands.slices(head)[-1]] = True
    return mine.repeat_interleave(columns // len(mine))  # several, where a head has a dimension of its own


def _results(returned: Any) -> Iterator[Tensor]:
    """All float tensors in what a model returns, but those that are no results."""
    if isinstance(returned, Tensor):
        if returned.is_floating_point():
            yield returned
    elif isinstance(returned, Mapping):
        for key, value in returned.items():
            if not NO_RESULTS.search(str(key)):
                yield from _results(value)
    elif isinstance(returned, (list, tuple)):
        for value in returned:
            yield from _results(value)


def _differ(before: list[Tensor], after: list[Tensor], tolerance: float) -> bool:
    for old, new in zip(before, after, strict=True):
        old, new = old.nan_to_num(0, 0, 0), new.nan_to_num(0, 0, 0)
        if old.shape != new.shape or (old.numel() and (new - old).abs().max() > tolerance * old.abs().max()):
            return True
    return False
