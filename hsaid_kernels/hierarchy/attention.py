"""Finds a model's attention heads: which rows or columns of which parameters belong to which head.

A *band* is a contiguous range of indices in one dimension of a parameter. A head owns a band of the outputs of query,
key and value: rows of a Linear's weight, columns of a Conv1D's weight, elements of the bias. The results of all heads
are concatenated before the output layer, so a head also owns a band of that layer's inputs: columns of a Linear's
weight. The bias of the output layer belongs to no head. In grouped-query attention a band of key and value
serves a whole group of heads.

Attention modules are recognized by the names of their layers, because models have no other interface in common;
layouts.py lists the names, and how the layers arrange the heads. The number or the size of the heads is taken from the
module. A module whose shapes do not fit, whose heads are not on their own, or whose layers have other names is left
whole, and named with the reason.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from hsaid_kernels.fastfood.plan import Segment
from hsaid_kernels.hierarchy import layouts
from hsaid_kernels.hierarchy.layouts import LATEST, Layout

ROLES = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Bands:
    """Bands of a parameter: band i is the range [starts[i], starts[i] + size) of dimension `dim`.

    role    "query", "key", "value", "output", or "other" for what belongs to heads besides (gates, sinks)
    tensor  name of the parameter
    shape   shape of the parameter
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    dim: int
    starts: tuple[int, ...]
    size: int

    @property
    def count(self) -> int:
        return len(self.starts)

    def slices(self, index: int) -> tuple[slice, ...]:
        start = self.starts[index]
        return (slice(None),) * self.dim + (slice(start, start + self.size),)


@dataclass(frozen=True)
class Attention:
    """An attention module and the bands of its parameters.

    name      name of the module that owns query, key and value ("bert.encoder.layer.0.attention.self")
    heads     number of heads (in grouped-query attention, of query heads)
    groups    number of key-value heads: `heads`, or fewer, each serving heads / groups neighbouring query heads
    head_dim  size of a head's result
    bands     the bands of every parameter that is divided among the heads
    layout    the row of layouts.py that fits the module
    """

    name: str
    heads: int
    groups: int
    head_dim: int
    bands: tuple[Bands, ...]
    layout: Layout = field(compare=False)

    def sharers(self, bands: Bands, index: int) -> tuple[int, ...]:
        """The heads that band `index` serves: one, or all heads of a group."""
        each = self.heads // bands.count
        return tuple(range(index * each, (index + 1) * each))

    def label(self, bands: Bands, index: int) -> str:
        """The label of band `index`, "head.<index>" or "group.<index>": its node on L5 and part of the stream id."""
        return f"{'head' if bands.count == self.heads else 'group'}.{index}"

    def segments(self) -> Iterator[Segment]:
        """Yields a segment for each head (or group) of each divided parameter, in the parameters' order."""
        for tensor, bands in itertools.groupby(self.bands, key=lambda bands: bands.tensor):
            for count, same in itertools.groupby(bands, key=lambda bands: bands.count):
                alike = list(same)
                for index in range(count):
                    yield _segment(tensor, self.label(alike[0], index), alike, index)

    def pieces(self, heads: Collection[int]) -> set[tuple[str, str]]:
        """(parameter, label) of the segments that serve only these heads."""
        return {
            (bands.tensor, self.label(bands, index))
            for bands in self.bands
            for index in range(bands.count)
            if set(self.sharers(bands, index)) <= set(heads)
        }


@dataclass(frozen=True)
class Survey:
    """The attention modules of a model, in the order of `model.named_modules()`.

    divided  those whose heads are known
    whole    {name: reason} of those that are left whole: their tensors have no node on L5, and no head can be pruned
    """

    divided: tuple[Attention, ...]
    whole: dict[str, str]


def _segment(tensor: str, label: str, alike: list[Bands], index: int) -> Segment:
    """One segment from the bands `index` of all roles that one tensor contains, which must be equally spaced."""
    first, inner = alike[0], math.prod(alike[0].shape[alike[0].dim + 1 :])
    outer, length = math.prod(first.shape[: first.dim]), first.shape[first.dim]
    starts, size = sorted(bands.starts[index] for bands in alike), first.size
    distance = starts[1] - starts[0] if len(starts) > 1 else length
    if distance == size:  # adjacent bands form a single band
        starts, size, distance = starts[:1], size * len(starts), length
    even = all(b - a == distance for a, b in itertools.pairwise(starts))
    if not even or (outer > 1 and len(starts) * distance != length):
        raise ValueError(f"model: expected the parts of a head in {tensor!r} at one distance, got them at {starts}")
    return Segment(tensor, starts[0] * inner, outer * len(starts), size * inner, distance * inner, label)


def survey(model: nn.Module, version: int = LATEST) -> Survey:
    """All attention modules of a model on any device: those whose heads are known, and those that are left whole.

    version  of the layouts; 1 divides as the versions did that knew no other

    Tied parameters appear under their first name, parameters that torch.nn.utils.prune masks under `..._orig`. Raises
    TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    finder = _Finder(model, version)
    divided, whole = [], {}
    for name in finder.modules:
        found = finder.attention(name)
        if isinstance(found, str):
            whole[name] = found
        elif found is not None:
            divided.append(found)
    known = {attention.name for attention in divided} | whole.keys()
    others = [name for name in finder.modules if name not in known and finder.has_own_attention(name)]
    around = {outer for name in (*known, *others) for outer in _outer(name)}
    for name in others:
        if name not in around and not known.intersection(_outer(name)):
            whole[name] = "its layers have no known layout"
    return Survey(tuple(divided), {name: whole[name] for name in finder.modules if name in whole})


def find_attentions(model: nn.Module, version: int = LATEST) -> tuple[Attention, ...]:
    """The attention modules of a model whose heads are known, as `survey` finds them.

    Raises ValueError if there are none, and says which attention modules are left whole, and why; TypeError if `model`
    is not a module.
    """
    found = survey(model, version)
    if not found.divided:
        kind = type(model).__name__
        if found.whole:
            (name, reason), *more = found.whole.items()
            and_more = f" (and {len(more)} more)" if more else ""
            module = type(model.get_submodule(name)).__name__
            raise ValueError(
                f"model: expected one with attention heads that can be told apart, got a {kind}, where {name!r} "
                f"({module}) is left whole: {reason}{and_more}"
            )
        raise ValueError(
            "model: expected one with attention heads (layers named query, key and value, q_proj, c_attn or the like), "
            f"got a {kind} without any"
        )
    return found.divided


def find_divisions(model: nn.Module, version: int = LATEST) -> list[Segment]:
    """The segments of all divided tensors of a model; none if it has no attention heads."""
    return [segment for attention in survey(model, version).divided for segment in attention.segments()]


def find_attention(model: nn.Module, layer: int | str, version: int = LATEST) -> Attention:
    """One of `find_attentions(model)`, by index or by the module's name.

    Raises ValueError for an index or name that does not exist, TypeError for a `layer` of another type, and what
    `find_attentions` raises.
    """
    return pick(find_attentions(model, version), layer)


def pick(found: tuple[Attention, ...], layer: int | str) -> Attention:
    """One of these by index or name; raises as `find_attention`."""
    if isinstance(layer, str):
        named = [attention for attention in found if attention.name == layer]
        if not named:
            raise ValueError(f"layer: expected the name of an attention module ({found[0].name!r}, ...), got {layer!r}")
        return named[0]
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise TypeError(f"layer: expected a number or a module's name, got {type(layer).__name__} {layer!r}")
    if not 0 <= layer < len(found):
        raise ValueError(f"layer: expected a number from 0 to {len(found) - 1}, got {layer}")
    return found[layer]


def pieces_of(model: nn.Module, heads: Mapping[str, Collection[int]], version: int = LATEST) -> set[tuple[str, str]]:
    """(parameter, label) of the segments that serve only the given heads, {attention module: [heads]}."""
    found = find_attentions(model, version) if heads else ()
    return set().union(*(pick(found, layer).pieces(numbers) for layer, numbers in heads.items()))


@dataclass(frozen=True)
class _Layer:
    """A linear layer: the names of its parameters, the weight's shape, and its dimensions of outputs and of inputs."""

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    outputs: int
    inputs: int

    def bands(self, role: str, starts: Iterable[int], size: int) -> Iterator[Bands]:
        """Bands of the outputs, in weight and bias; for role "output" bands of the inputs, in the weight only."""
        dim = self.inputs if role == "output" else self.outputs
        yield Bands(role, self.weight, self.shape, dim, tuple(starts), size)
        if self.bias and role != "output":
            yield Bands(role, self.bias, (self.shape[self.outputs],), 0, tuple(starts), size)


class _Unfit(Exception):
    """Why the heads of a module are not divided."""


class _Finder:
    """Looks for the attention modules of a model, {name: module}."""

    def __init__(self, model: nn.Module, version: int):
        self.modules = dict(model.named_modules())
        self.version = version
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._order = {name: place for place, name in enumerate(self._names.values())}
        self._layouts = [layout for layout in layouts.LAYOUTS if layout.since <= version]

    def attention(self, name: str) -> Attention | str | None:
        """The attention module of this name, or why it is left whole; None if no layout has its layers."""
        module = self.modules[name]
        if any(isinstance(child, nn.MultiheadAttention) for child in module._modules.values()):
            return None  # what these layers compute goes through its own
        for layout in self._layouts:
            first = next(iter(layout.layers)).partition(".")[0]
            if first and first not in module._modules and not any(key.startswith(first) for key in module._parameters):
                continue  # the usual case, without looking closer
            if not re.fullmatch(layout.kinds, type(module).__name__):
                continue
            if layout.when and not getattr(module, layout.when, False):
                continue
            inputs = [(path, self._layer(name, path.rstrip("?")), order) for path, order in layout.layers.items()]
            if all(layer or path.endswith("?") for path, layer, _ in inputs):
                try:
                    return self._divided(name, layout, [(layer, order) for _, layer, order in inputs if layer])
                except _Unfit as reason:
                    return str(reason)
        return None

    def has_own_attention(self, name: str) -> bool:
        """Whether a module's class is called an attention, and has matrices."""
        kind = type(self.modules[name]).__name__
        if not layouts.OWN_ATTENTION.fullmatch(kind) or layouts.NO_ATTENTION.fullmatch(kind):
            return False
        return any(parameter.dim() > 1 for parameter in self.modules[name].parameters())

    def _divided(self, name: str, layout: Layout, inputs: list[tuple[_Layer, str]]) -> Attention:
        if layout.whole:
            raise _Unfit(layout.whole)
        places = layout.output or layouts.OUTPUT[self.version]
        output = next(filter(None, (self._layer(name, place) for place in places)), None)
        if output is None:
            raise _Unfit("no output layer is known")
        width = output.shape[output.inputs]
        heads, size = self._heads(name, layout, inputs, width)
        sizes = {"q": size, "k": size, "v": width // heads}  # of a band; a free one has what is there
        counts = {"q": heads}
        for layer, order in inputs:
            roles = re.findall("[qkv]", order)
            if "*" not in order and roles != ["q"]:
                rest = layer.shape[layer.outputs] - heads * size * roles.count("q")
                counts |= dict.fromkeys(set(roles) - {"q"}, rest // sum(sizes[role] for role in roles if role != "q"))
        if not all(0 < count <= heads and heads % count == 0 for count in counts.values()) or width % heads:
            raise _Unfit(_unfit(heads, size, inputs, width))
        bands: list[Bands] = []
        for layer, order in inputs:
            every = list(_starts(order, layer.shape[layer.outputs], counts, sizes))
            if sum(len(starts) * band for _, starts, band in every) != layer.shape[layer.outputs]:
                raise _Unfit(_unfit(heads, size, inputs, width))
            for role, starts, band in every:
                bands += layer.bands(ROLES[role], starts, band)
        self._check_norms(name, layout, size)
        for layer in [output, *filter(None, (self._layer(name, place) for place in layout.more))]:
            each = layer.shape[layer.inputs] // heads
            bands += layer.bands("output", range(0, heads * each, each), each)
        groups = counts.get("k", heads)
        if self.version > 1:
            bands += self._others(name, heads, groups, {band.tensor for band in bands})
        bands.sort(key=lambda band: self._order[band.tensor])
        return Attention(name, heads, groups, width // heads, tuple(bands), layout)

    def _heads(self, name: str, layout: Layout, inputs: list[tuple[_Layer, str]], width: int) -> tuple[int, int]:
        """The number of heads, and the size of their queries. Raises _Unfit if they are not known or do not fit."""
        module = self.modules[name]
        count = _number(module, [layout.heads] if layout.heads else layouts.COUNT)
        size = _number(module, layouts.SIZE)
        if all("*" in order for _, order in inputs):
            size = None if count else size
        if count is None and size is None and self.version == 1:
            size = self._configured(name)
        if count is None and size is None:
            raise _Unfit("it says neither the number nor the size of its heads")
        # All queries, or, where they have another size or lie with keys and values, all results.
        rows = next((layer.shape[layer.outputs] for layer, order in inputs if order == "q"), width)
        count = count or rows // (size or 1)
        size = size or rows // (count or 1)
        if count * size != rows or not count:
            raise _Unfit(_unfit(count, size, inputs, width))
        return count, size

    def _configured(self, name: str) -> int | None:
        """The size of a head by the configuration of the innermost enclosing module with one, as in version 1."""
        configs = [getattr(self.modules[outer], "config", None) for outer in (name, *_outer(name))]
        sizes = [_number(config, layouts.SIZE) for config in configs]
        both = [(_number(config, ["hidden_size"]), _number(config, ["num_attention_heads"])) for config in configs]
        sizes += [hidden // heads for hidden, heads in both if hidden and heads]
        return next(filter(None, sizes), None)

    def _check_norms(self, name: str, layout: Layout, size: int) -> None:
        for key, child in self.modules[name].named_children():
            scale = getattr(child, "weight", None)
            if layout.norms and layouts.NORM_OF_ALL.match(key) and scale is not None and scale.dim() == 1:
                if len(scale) > size:
                    raise _Unfit(f"{key} divides all heads by one norm")

    def _others(self, name: str, heads: int, groups: int, taken: set[str]) -> Iterator[Bands]:
        """The bands of what belongs to heads besides query, key, value and output layer (`layouts.OTHERS`)."""
        module = self.modules[name]
        parts = {key: list(part._parameters.values()) for key, part in module.named_modules() if key}
        parts |= {key.removesuffix("_orig"): [parameter] for key, parameter in module._parameters.items()}
        for pattern, dim, among in layouts.OTHERS:
            count = heads if among == "heads" else groups
            for key in filter(re.compile(pattern).fullmatch, parts):
                layer = self._layer(name, key)
                for parameter in parts[key]:
                    tensor = self._names.get(id(parameter), "")
                    if parameter is None or not tensor or tensor in taken:
                        continue
                    along = 0 if parameter.dim() == 1 else layer.outputs if layer else dim
                    each, rest = divmod(parameter.shape[along], count)
                    if not rest:
                        starts = tuple(range(0, count * each, each))
                        yield Bands("other", tensor, tuple(parameter.shape), along, starts, each)

    def _layer(self, name: str, path: str) -> _Layer | None:
        """The layer at a path from the module of this name, or None if there is none."""
        while path.startswith("../") and name:
            name, path = name.rpartition(".")[0], path[3:]
        full = f"{name}.{path}".lstrip(".")
        if full not in self.modules:
            own = self.modules[name]
            return self._linear(own, path) if path == "in_proj_" else self._parameter(own, path)
        found = self._linear(self.modules[full])
        if found is None and self.version > 1 and f"{full}.linear" in self.modules:  # a layer in a wrapper
            found = self._linear(self.modules[f"{full}.linear"])
        return found

    def _parameter(self, module: nn.Module, key: str) -> _Layer | None:
        """A parameter [inputs, heads, size] of the attention module itself."""
        own = module._parameters
        parameter = own.get(key) if own.get(key) is not None else own.get(f"{key}_orig")
        if parameter is None or parameter.dim() != 3 or self.version == 1:
            return None
        return _Layer(self._names[id(parameter)], None, tuple(parameter.shape), 1, 1)

    def _linear(self, module: nn.Module, prefix: str = "") -> _Layer | None:
        """A Linear or the like, or the module's own parameters with the given prefix; else None."""
        own: dict[str, nn.Parameter | None] = module._parameters
        found = [(own.get(prefix + key), own.get(f"{prefix}{key}_orig")) for key in ("weight", "bias")]
        weight, bias = (masked if plain is None else plain for plain, masked in found)
        if weight is None or weight.dim() not in (2, 3):
            return None
        shape = tuple(weight.shape)
        outputs, inputs = (1, 0) if type(module).__name__ == "Conv1D" else (0, 1)
        if len(shape) == 3 and self.version > 1:
            if not isinstance(module, nn.Conv1d):  # [experts, outputs, inputs]
                outputs, inputs, bias = 1, 2, None
            elif shape[2] != 1:
                return None
        elif len(shape) == 3:
            return None
        else:
            # Also of quantized layers, which are no nn.Linear.
            sizes = tuple(getattr(module, key, None) for key in ("out_features", "in_features"))
            known = isinstance(module, nn.Linear) or sizes == shape or type(module).__name__ == "QuantLinear"
            if not (prefix or outputs or known):
                return None
        return _Layer(self._names[id(weight)], None if bias is None else self._names[id(bias)], shape, outputs, inputs)


def _starts(
    order: str, rows: int, counts: Mapping[str, int], sizes: Mapping[str, int]
) -> Iterator[tuple[str, range | list[int], int]]:
    """(role, starts, size) of the bands of each role of a layer with this many outputs, for its order."""
    roles = re.findall("[qkv]", order)
    if "*" in order:
        heads = counts["q"]
        yield roles[0], range(0, rows, rows // heads or 1), rows // heads
        return
    before, bracket, _ = order.partition("(")
    parts = 1 if not bracket else int(before) if before else counts[roles[-1]]
    length = sum(counts[role] // parts * sizes[role] for role in roles)
    offset = 0
    for role in roles:
        each, size = counts[role] // parts, sizes[role]
        yield role, [part * length + offset + i * size for part in range(parts) for i in range(each)], size
        offset += each * size


def _unfit(heads: int, size: int, inputs: list[tuple[_Layer, str]], width: int) -> str:
    outputs = sum(layer.shape[layer.outputs] for layer, _ in inputs)
    return (
        f"query, key and value have {outputs} outputs and the output layer {width} inputs, which {heads} heads of size "
        f"{size} do not fit"
    )


def _number(source: object, keys: Sequence[str]) -> int | None:
    """The first of the attributes, or paths of attributes, that is a positive integer."""
    for key in keys:
        value = functools.reduce(lambda found, step: getattr(found, step, None), key.split("."), source)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _outer(name: str) -> list[str]:
    """The names of the modules that contain a module, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in reversed(range(len(parts)))]
