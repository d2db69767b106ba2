"""Finds a model's attention heads: which rows or columns of which parameters belong to which head.

A *band* is a contiguous range of indices in one dimension of a parameter. A head owns a band of the outputs of query,
key and value: rows of a Linear's weight, columns of a Conv1D's weight, elements of the bias. The results of all heads
are concatenated before the output layer, so a head also owns a band of that layer's inputs: columns of a Linear's
weight. The bias of the output layer belongs to no head. In grouped-query attention a band of key and value
serves a whole group of heads.

Attention modules are recognized by the names of their layers, because models have no other interface in common. The
size of a head is taken from the module or the configuration. If the shapes do not fit, an error is raised.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from hsaid_kernels.fastfood.plan import Segment

SEPARATE = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ALBERT
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, ViT, BART, OPT, Whisper
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "k", "v"),  # T5, MPNet
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa v2 and v3
)
# One layer for all three. FUSED: all queries, then all keys, then all values (GPT-2, ModernBERT, Phi-3). INTERLEAVED:
# query, key and value of the first head, then those of the next (GPT-NeoX, BLOOM).
FUSED = ("c_attn", "Wqkv", "qkv_proj", "qkv")
INTERLEAVED = ("query_key_value",)
OUTPUT = ("o_proj", "out_proj", "dense", "out_lin", "o", "c_proj", "Wo", "proj", "projection")
HEAD_COUNT = ("num_attention_heads", "num_heads", "n_heads")
HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
# Classes that use the names above for another layout: fused in another order, or with heads that share values or are
# mixed before the output layer.
OTHER_LAYOUTS = re.compile("CodeGen|GPTBigCode|MiniMaxLightning|DiffLlama|Doge")
NORM_OF_ALL = re.compile(
    "(q|k|query|key)_?(layer)?_?norm|attn_sub_norm|inner_attn_ln"
)  # norms over all heads together, if they have a scale for each value
ROLES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Bands:
    """`count` bands of a parameter: band i is the range [start + i * step, start + i * step + size) of dimension `dim`.

    role    one of ROLES
    tensor  name of the parameter
    shape   shape of the parameter
    """

    role: str
    tensor: str
    shape: tuple[int, ...]
    dim: int
    start: int
    step: int
    size: int
    count: int

    def slices(self, index: int) -> tuple[slice, ...]:
        start = self.start + index * self.step
        return (slice(None),) * self.dim + (slice(start, start + self.size),)


@dataclass(frozen=True)
class Attention:
    """An attention module and the bands of its parameters.

    name      name of the module that owns query, key and value ("bert.encoder.layer.0.attention.self")
    heads     number of heads (in grouped-query attention, of query heads)
    groups    number of key-value heads: `heads`, or fewer, each serving heads / groups neighbouring query heads
    head_dim  size of a head
    bands     the bands of every parameter that is divided among the heads
    """

    name: str
    heads: int
    groups: int
    head_dim: int
    bands: tuple[Bands, ...]

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


def _segment(tensor: str, label: str, alike: list[Bands], index: int) -> Segment:
    """One segment from the bands `index` of all roles that one tensor contains, which must be equally spaced."""
    first, inner = alike[0], math.prod(alike[0].shape[alike[0].dim + 1 :])
    outer, length = math.prod(first.shape[: first.dim]), first.shape[first.dim]
    starts, size = [bands.slices(index)[-1].start for bands in alike], first.size
    distance = starts[1] - starts[0] if len(starts) > 1 else length
    if distance == size:  # adjacent bands form a single band
        starts, size, distance = starts[:1], size * len(starts), length
    even = all(b - a == distance for a, b in itertools.pairwise(starts))
    if not even or (outer > 1 and len(starts) * distance != length):
        raise ValueError(f"model: expected the parts of a head in {tensor!r} at one distance, got them at {starts}")
    return Segment(tensor, starts[0] * inner, outer * len(starts), size * inner, distance * inner, label)


def find_attentions(model: nn.Module) -> tuple[Attention, ...]:
    """All attention modules of a model on any device, in the order of `model.named_modules()`.

    Recognizes the modules of transformers whose layers have the names listed at the top of this file, and
    torch.nn.MultiheadAttention. Tied parameters appear under their first name, parameters that torch.nn.utils.prune
    masks under `..._orig`.

    Raises ValueError if the model has no such module, or one whose shapes do not fit its heads (multi-head latent
    attention, for example); TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    found = tuple(filter(None, (_attention(name, modules, names) for name in modules)))
    if not found:
        raise ValueError(
            "model: expected one with attention heads (layers named query, key and value, q_proj, c_attn or the like), "
            f"got a {type(model).__name__} without any"
        )
    return found


def find_attention(model: nn.Module, layer: int | str) -> Attention:
    """One of `find_attentions(model)`, by index or by the module's name.

    Raises ValueError for an index or name that does not exist, TypeError for a `layer` of another type, and what
    `find_attentions` raises.
    """
    found = find_attentions(model)
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


def pieces_of(model: nn.Module, heads: Mapping[str, Collection[int]]) -> set[tuple[str, str]]:
    """(parameter, label) of the segments that serve only the given heads, {attention module: [heads]}."""
    return set().union(*(find_attention(model, layer).pieces(numbers) for layer, numbers in heads.items()))


@dataclass(frozen=True)
class _Layer:
    """A linear layer: the names of its parameters, the weight's shape, and the weight's output dimension (0 or 1)."""

    weight: str
    bias: str | None
    shape: tuple[int, int]
    outputs: int

    def bands(self, role: str, start: int, step: int, size: int, count: int) -> Iterator[Bands]:
        """Bands of the outputs, in weight and bias; for role "output" bands of the inputs, in the weight only."""
        dim = 1 - self.outputs if role == "output" else self.outputs
        yield Bands(role, self.weight, self.shape, dim, start, step, size, count)
        if self.bias and role != "output":
            yield Bands(role, self.bias, (self.shape[self.outputs],), 0, start, step, size, count)


def _layer(module: nn.Module | None, names: dict[int, str], prefix: str = "") -> _Layer | None:
    """A Linear or Conv1D as a `_Layer`, or the module's own parameters with the given prefix; else None."""
    own: dict[str, nn.Parameter | None] = getattr(module, "_parameters", {})
    found = [(own.get(prefix + key), own.get(f"{prefix}{key}_orig")) for key in ("weight", "bias")]
    weight, bias = (masked if plain is None else plain for plain, masked in found)
    outputs = 1 if type(module).__name__ == "Conv1D" else 0
    if weight is None or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    sizes = tuple(getattr(module, key, None) for key in ("out_features", "in_features"))  # also of quantized layers
    if not (prefix or outputs or isinstance(module, nn.Linear) or sizes == (rows, columns)):
        return None
    return _Layer(names[id(weight)], None if bias is None else names[id(bias)], (rows, columns), outputs)


def _inputs(module: nn.Module, names: dict[int, str]) -> list[tuple[_Layer, tuple[str, ...]]]:
    """The layers that compute query, key and value, each with its roles; empty if this is not an attention module."""
    layers = {key: layer for key, child in module.named_children() if (layer := _layer(child, names))}
    for keys in SEPARATE:
        if all(key in layers for key in keys):
            return [(layers[key], (role,)) for key, role in zip(keys, ROLES)]
    fused = next((layers[key] for key in (*FUSED, *INTERLEAVED) if key in layers), None)
    fused = fused or (_layer(module, names, "in_proj_") if isinstance(module, nn.MultiheadAttention) else None)
    if fused and "q_attn" in layers:  # GPT-2's cross-attention
        return [(layers["q_attn"], ROLES[:1]), (fused, ROLES[1:3])]
    return [(fused, ROLES[:3])] if fused else []


def _attention(name: str, modules: dict[str, nn.Module], names: dict[int, str]) -> Attention | None:
    """The attention module of this name; None if the module is not one. Raises ValueError if its layout is unknown."""
    module = modules[name]
    inputs = _inputs(module, names)
    if not inputs:
        return None
    beside = modules.get(f"{name.rpartition('.')[0]}.output".lstrip("."))  # BERT's attention.self, attention.output
    places = [getattr(module, key, None) for key in OUTPUT] + [getattr(beside, "dense", None)]
    output = next(filter(None, (_layer(place, names) for place in places)), None)
    width = output.shape[1 - output.outputs] if output else 0
    total = sum(layer.shape[layer.outputs] for layer, _ in inputs)
    size = _head_size(name, modules)
    heads, groups = width // size, (total - width) // (2 * size)
    counts = {"query": heads, "key": groups, "value": groups}
    interleaved = any(hasattr(module, key) for key in INTERLEAVED)
    fits = 0 < groups <= heads and heads * size == width and heads % groups == 0
    fits = fits and (heads == groups or not interleaved)
    fits = fits and all(getattr(module, key, heads) == heads for key in HEAD_COUNT)
    outputs = [sum(counts[role] for role in roles) * size for _, roles in inputs]
    fits = fits and outputs == [layer.shape[layer.outputs] for layer, _ in inputs]
    if output is None or not fits or OTHER_LAYOUTS.match(type(module).__name__):
        raise ValueError(
            f"model: expected attention heads in a known layout, got {name!r} ({type(module).__name__}), where query, "
            f"key and value have {total} outputs, the output layer {width} inputs, and a head {size}"
        )
    for key, child in module.named_children():
        scale = getattr(getattr(child, "weight", None), "shape", ())
        if NORM_OF_ALL.match(key) and scale == (width,) != (size,):
            raise ValueError(
                f"model: expected attention heads that are on their own, got {name!r} ({type(module).__name__}), "
                f"whose {key} divides all heads by one norm"
            )
    bands: list[Bands] = []
    for layer, roles in inputs:
        for number, role in enumerate(roles):
            start = number if interleaved else sum(counts[before] for before in roles[:number])
            step = len(roles) if interleaved else 1
            bands += layer.bands(role, start * size, step * size, size, counts[role])
    bands += output.bands("output", 0, size, size, heads)
    order = {tensor: place for place, tensor in enumerate(names.values())}
    return Attention(name, heads, groups, size, tuple(sorted(bands, key=lambda bands: order[bands.tensor])))


def _head_size(name: str, modules: dict[str, nn.Module]) -> int:
    """The size of a head, from the module or else from the configuration of the innermost enclosing module with one."""
    module = modules[name]
    configs = [getattr(modules[outer], "config", None) for outer in (name, *_outer(name))]
    for source in (module, *filter(None, configs)):
        sizes = (getattr(source, key, None) for key in HEAD_SIZE)
        if size := next((size for size in sizes if isinstance(size, int)), None):
            return size
    for config in filter(None, configs):
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if isinstance(hidden, int) and isinstance(heads, int):
            return hidden // heads
    raise ValueError(
        f"model: expected {name!r} ({type(module).__name__}) to have one of {', '.join(HEAD_SIZE)}, or a configuration "
        "with hidden_size and num_attention_heads, got neither"
    )


def _outer(name: str) -> list[str]:
    """The names of the modules that contain a module, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in reversed(range(len(parts)))]
