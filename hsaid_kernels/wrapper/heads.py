"""What can be done with attention heads: name their parts, mask them, take them out.

`hierarchy/attention.py` says where they are. Layers are numbered as the attention modules come in the model (for BERT,
as its layers), or named by the module; heads from 0, as they are before any pruning (docs/heads.md).
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.hierarchy.attention import Attention, find_attention, find_attentions

# layer -> heads
Heads = Mapping[int | str, Iterable[int]] | Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]]
Model = TypeVar("Model", bound=nn.Module)

# Attention modules that run on any number of heads, with the attributes that say how many there are.
REMOVABLE = {
    "BertSelfAttention": ("num_attention_heads", "all_head_size"),
    "BertCrossAttention": ("num_attention_heads", "all_head_size"),
    "RobertaSelfAttention": ("num_attention_heads", "all_head_size"),
    "RobertaCrossAttention": ("num_attention_heads", "all_head_size"),
    "XLMRobertaSelfAttention": ("num_attention_heads", "all_head_size"),
    "XLMRobertaCrossAttention": ("num_attention_heads", "all_head_size"),
    "CamembertSelfAttention": ("num_attention_heads", "all_head_size"),
    "ElectraSelfAttention": ("num_attention_heads", "all_head_size"),
    "DistilBertSelfAttention": ("n_heads", "dim"),
}


@dataclass(frozen=True)
class HeadSlice:
    """A piece of a parameter that belongs to a head: `model.get_parameter(name)[slices]`.

    role    "query", "key" or "value", a band of outputs; "output", a band of the output layer's inputs
    heads   all that it serves: in grouped-query attention several share their key and value
    """

    role: str
    name: str
    slices: tuple[slice, ...]
    heads: tuple[int, ...]


def head_slices(model: nn.Module, layer: int | str, head: int) -> tuple[HeadSlice, ...]:
    """Every piece of query, key, value and output layer that belongs to a head, in the model's order.

    For BERT: rows of query, key and value, the same elements of their biases, columns of attention.output.dense.weight.
    Raises ValueError for a layer or head that does not exist and a model without attention heads.
    """
    attention = find_attention(model, layer)
    _check_head(attention, head)
    return tuple(_slices(attention, head))


def prune_heads(model: Model, heads: Heads) -> Model:
    """Masks heads of some layers, {0: [2, 5], 3: [1]}, with `torch.nn.utils.prune`, and returns the model.

    Every parameter that has a part of them becomes `..._orig` and `..._mask`, beside the masks that are there already,
    until `remove` makes it permanent. Key and value of grouped-query attention are masked with the last head of their
    group. What the output layer's bias adds remains. Raises ValueError, before anything is masked, for a layer or head
    that does not exist, all heads of a layer, or a model without attention heads.
    """
    chosen, already = check_heads(model, heads), pruned_heads(model)
    attentions = _own_attentions(model, chosen)
    for attention in attentions:
        _refuse_all(attention, {*already.get(attention.name, ()), *chosen[attention.name]})
    for attention in attentions:
        before = already.get(attention.name, [])
        pieces = attention.pieces([*before, *chosen[attention.name]]) - attention.pieces(before)
        masks: dict[str, Tensor] = {}
        for s in (segment for segment in attention.segments() if (segment.tensor, segment.label) in pieces):
            parameter = model.get_parameter(s.tensor)
            mask = masks.setdefault(s.tensor, parameter.new_ones(parameter.shape))
            mask.as_strided((s.rows, s.cols), (s.row_stride, 1), s.offset).zero_()
        for tensor, mask in masks.items():
            owner, key = _place(model, tensor)
            with torch.no_grad():  # so that the model can be copied: a tensor with a history cannot
                prune.custom_from_mask(owner, key, mask)
    return model


@dataclass(frozen=True)
class HeadStructured:
    """Prunes the heads of a layer with the smallest L_n norm, as `torch.nn.utils.prune.ln_structured` does channels.

    amount  a fraction (0.25) or a number (3) of the heads that are not pruned yet; never all of them
    n       of the norm over all of a head's own weights and biases; any number, inf and -inf too

    Raises TypeError or ValueError for an amount or n that is none.
    """

    amount: float
    n: float = 2

    def __post_init__(self) -> None:
        for key in ("amount", "n"):
            if isinstance(getattr(self, key), bool) or not isinstance(getattr(self, key), (int, float)):
                raise TypeError(f"{key}: expected a number, got {getattr(self, key)!r}")
        if not (self.amount >= 0 and (isinstance(self.amount, int) or self.amount < 1)):
            raise ValueError(f"amount: expected a number of heads, or a fraction from 0 to below 1, got {self.amount}")
        if self.n != self.n:
            raise ValueError(f"n: expected a number, got {self.n}")

    def norms(self, model: nn.Module, layer: int | str) -> Tensor:
        """float32 [heads]."""
        attention = find_attention(model, layer)
        norms = []
        for head in range(attention.heads):
            own = [piece for piece in _slices(attention, head) if piece.heads == (head,)]
            values = torch.cat([_masked(model, piece.name)[piece.slices].float().flatten() for piece in own])
            norms.append(torch.linalg.vector_norm(values, self.n))
        return torch.stack(norms)

    def choose(self, model: nn.Module, layer: int | str) -> list[int]:
        """The heads to prune, the smallest norm first. Raises ValueError where none would be left."""
        attention = find_attention(model, layer)
        norms = self.norms(model, layer)
        gone = pruned_heads(model).get(attention.name, [])
        left = [head for head in norms.argsort(stable=True).tolist() if head not in gone]
        count = self.amount if isinstance(self.amount, int) else round(self.amount * len(left))
        if count >= len(left):
            raise ValueError(f"amount: expected fewer than the {len(left)} heads that are left, got {self.amount}")
        return left[:count]

    def apply(self, model: Model, layer: int | str) -> Model:
        """Masks them in this layer, as `prune_heads` does; returns the model."""
        return prune_heads(model, {layer: self.choose(model, layer)})


def pruned_heads(model: nn.Module) -> dict[str, list[int]]:
    """{attention module: heads} of which all weights are zero, by a mask or in themselves. Empty for any other model.

    Biases are not looked at: they often start at zero. A layer without any weight but zeros is not pruned, but new.
    """
    try:
        attentions = find_attentions(model)
    except ValueError:  # no heads, or in a way that is not known
        return {}
    found = {}
    for attention in attentions:
        dead = set(range(attention.heads))
        for bands in attention.bands:
            if dead and bands.count == attention.heads and len(bands.shape) > 1:
                used = (_masked(model, bands.tensor) != 0).any(dim=1 - bands.dim).tolist()
                dead -= {head for head in dead if any(used[bands.slices(head)[-1]])}
        if 0 < len(dead) < attention.heads:
            found[attention.name] = sorted(dead)
    return found


def remove(model: Model) -> Model:
    """Makes the masks of all attention modules permanent, as `torch.nn.utils.prune.remove` does; returns the model.

    Masked weights are zero from now on, `..._orig` has its own name again and its place in the model's order. The heads
    stay pruned under `HSAID`, which writes no update there.
    """
    for attention in find_attentions(model):
        _remove(model, attention)
    return model


def remove_heads(model: Model, heads: Heads | None = None) -> Model:
    """Takes heads out: smaller matrices in place of masks, and the same function as with these masked, to rounding.

    heads   by default those that are pruned. Masks of these layers are made permanent first.

    The heads that stay are numbered anew. The configuration cannot say how many heads each layer has, so before a saved
    model is loaded the same heads are to be removed from a fresh one. Returns the model. For the BERT family (BERT,
    RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT); raises TypeError for other attention modules, and
    ValueError as `prune_heads` does, before anything is changed.
    """
    chosen = check_heads(model, pruned_heads(model) if heads is None else heads)
    attentions = _own_attentions(model, chosen)
    for attention in attentions:
        kind = type(model.get_submodule(attention.name)).__name__
        if kind not in REMOVABLE:
            raise TypeError(f"model: expected attention of the BERT family ({', '.join(REMOVABLE)}), got {kind}")
    for attention in attentions:
        _remove(model, attention)
        attention = find_attention(model, attention.name)  # its parameters have their own names again
        keep = [head for head in range(attention.heads) if head not in chosen[attention.name]]
        for bands in attention.bands:
            owner, key = _place(model, bands.tensor)
            old = owner.get_parameter(key)
            kept = torch.cat([old.data[bands.slices(head)] for head in keep], bands.dim)
            owner._parameters[key] = nn.Parameter(kept, old.requires_grad)
            if old.dim() > 1:
                setattr(owner, "in_features" if bands.role == "output" else "out_features", kept.shape[bands.dim])
        module = model.get_submodule(attention.name)
        for key, value in zip(REMOVABLE[type(module).__name__], (len(keep), len(keep) * attention.head_dim)):
            setattr(module, key, value)
    return model


def _slices(attention: Attention, head: int) -> Iterator[HeadSlice]:
    for bands in attention.bands:
        index = head * bands.count // attention.heads
        yield HeadSlice(bands.role, bands.tensor, bands.slices(index), attention.sharers(bands, index))


def check_heads(model: nn.Module, heads: Heads, argument: str = "heads") -> dict[str, list[int]]:
    """By the names of the attention modules. Raises TypeError or ValueError for a layer or head that does not exist."""
    if not isinstance(heads, Mapping):
        raise TypeError(f"{argument}: expected {{layer: [heads]}}, got {type(heads).__name__} {heads!r}")
    chosen: dict[str, set[int]] = defaultdict(set)
    for layer, numbers in heads.items():
        attention = find_attention(model, layer)
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"{argument}: expected a list of heads for layer {layer!r}, got {numbers!r}")
        chosen[attention.name].update(_check_head(attention, head) for head in numbers)
        _refuse_all(attention, chosen[attention.name], argument)
    return {name: sorted(numbers) for name, numbers in chosen.items() if numbers}


def _own_attentions(model: nn.Module, chosen: Iterable[str]) -> list[Attention]:
    """The attention modules of these names. Raises ValueError for one that shares a parameter with another module."""
    attentions = [find_attention(model, name) for name in chosen]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = Counter(names[id(p)] for module in model.modules() for p in module._parameters.values() if p is not None)
    for attention in attentions:
        if shared := [bands.tensor for bands in attention.bands if places[bands.tensor] > 1]:
            raise ValueError(
                f"model: expected heads with parameters of their own, got {shared[0]!r} in several modules"
            )
    return attentions


def _check_head(attention: Attention, head: int) -> int:
    if isinstance(head, bool) or not hasattr(head, "__index__"):
        raise TypeError(f"head: expected a number, got {type(head).__name__} {head!r}")
    if not 0 <= head < attention.heads:
        raise ValueError(f"head: expected a number from 0 to {attention.heads - 1} in {attention.name!r}, got {head}")
    return head.__index__()


def _refuse_all(attention: Attention, heads: Iterable[int], argument: str = "heads") -> None:
    if len(set(heads)) == attention.heads:
        raise ValueError(
            f"{argument}: expected some of the {attention.heads} heads of {attention.name!r} to be left, "
            "got all of them"
        )


def _place(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and what it calls it without a mask."""
    prefix, _, key = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    short = key.removesuffix("_orig")
    return owner, short if f"{short}_mask" in owner._buffers else key


def _masked(model: nn.Module, tensor: str) -> Tensor:
    """A parameter's values, those that are masked as zeros."""
    owner, key = _place(model, tensor)
    value, mask = model.get_parameter(tensor).detach(), owner._buffers.get(f"{key}_mask")
    return value if mask is None else value * mask


def _remove(model: nn.Module, attention: Attention) -> None:
    for tensor in dict.fromkeys(bands.tensor for bands in attention.bands):
        owner, key = _place(model, tensor)
        with contextlib.suppress(ValueError):  # it is not masked
            prune.remove(owner, key)
            parameters = owner._parameters
            for name in sorted(parameters, key=lambda name: "weight" not in name):  # before biases, as layers have them
                parameters[name] = parameters.pop(name)
