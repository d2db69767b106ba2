"""Operations on attention heads: listing their parameters, pruning them, removing them (docs/heads.md).

`hierarchy/attention.py` finds the heads. A layer is given as the index of the attention module in the model's order
(for BERT, the index of the layer) or as the module's name. Heads are numbered from 0, as before any pruning. *Pruning*
a head masks its parameters with zeros; *removing* it makes the parameters smaller.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hsaid_kernels.hierarchy.attention import Attention, find_attention, find_attentions, pick, survey
from hsaid_kernels.hierarchy.layouts import LATEST
from hsaid_kernels.wrapper.callers import stacklevel
from hsaid_kernels.wrapper.reads.link import link_of
from hsaid_kernels.wrapper.w0.kinds import kind_of
from hsaid_kernels.wrapper.w0.values import value_of

# {layer: heads}
Heads = Mapping[int | str, Iterable[int]] | Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]]
Model = TypeVar("Model", bound=nn.Module)

# {class: attributes for the number of heads and their total size} of attention modules that allow any number of heads.
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
    """A part of a parameter that belongs to a head: `model.get_parameter(name)[slices]`.

    Attributes:
        role: "query", "key" or "value" for outputs of these layers; "output" for inputs of the output layer; "other"
            for what belongs to heads besides, such as gates.
        name: of the parameter.
        slices: a slice for each of the first dimensions of the parameter.
        heads: all heads that use this part; in grouped-query attention several heads share key and value.
    """

    role: str
    name: str
    slices: tuple[slice, ...]
    heads: tuple[int, ...]


def head_slices(model: nn.Module, layer: int | str, head: int) -> tuple[HeadSlice, ...]:
    """Every part of query, key, value and output layer that belongs to a head, in the model's order.

    For BERT: rows of query, key and value, the same elements of their biases, columns of attention.output.dense.weight.
    Raises ValueError for a layer or head that does not exist and for a model without attention heads; TypeError for
    arguments of other types.
    """
    attention = find_attention(model, layer)
    _check_head(attention, head)
    return tuple(_slices(attention, head))


def undivided(model: nn.Module) -> dict[str, str]:
    """{attention module: why it is left whole}: those of which no head is known, in the model's order.

    Their heads are not on their own, or their shapes or layers fit no known layout: see `register_attention`.
    """
    return survey(model).whole


def prune_heads(model: Model, heads: Heads) -> Model:
    """Prunes heads, given as {layer: [heads]} such as {0: [2, 5], 3: [1]}, with masks. Returns the model.

    Uses `torch.nn.utils.prune`: every parameter with a part of these heads is replaced by `..._orig` and `..._mask`,
    until `remove` makes the masks permanent. Existing masks are kept and combined with the new ones. In grouped-query
    attention, key and value of a group are masked together with the last head of the group. The bias of the output
    layer is not masked. Warns of attention modules that are left whole (`undivided`).

    Raises, before anything is masked:
        ValueError: a layer or head does not exist, no head of a layer would be left, a parameter of the heads is shared
            with another module, or the model has no attention heads.
        TypeError: `heads` has another type.
    """
    _check_floats(model, "prune_heads()")
    chosen, already = check_heads(model, heads), pruned_heads(model)
    attentions = _own_attentions(model, chosen)
    if whole := undivided(model):
        some = ", ".join(f"{name!r} ({why})" for name, why in [*whole.items()][:3])
        warnings.warn(
            f"model: no head can be pruned of attention modules that are left whole: {some}"
            f"{f' and {len(whole) - 3} more' if len(whole) > 3 else ''}",
            stacklevel=stacklevel(),
        )
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
            with torch.no_grad():  # so that the model can be copied: deepcopy supports only tensors without a graph
                prune.custom_from_mask(owner, key, mask)
    return model


@dataclass(frozen=True)
class HeadStructured:
    """Prunes the heads of a layer with the smallest L_n norm, as `torch.nn.utils.prune.ln_structured` prunes channels.

    Attributes:
        amount: float: the fraction, from 0 to below 1, of the heads that are not pruned yet; int: their number.
        n: order of the norm over the weights and biases that belong to the head alone; any number, also inf and -inf.

    Raises TypeError if `amount` or `n` is not a number, ValueError if it is out of range or NaN.
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
        """The norm of every head of a layer, float32 [heads]. Pruned values count as zeros."""
        attention = find_attention(model, layer)
        norms = []
        for head in range(attention.heads):
            own = [piece for piece in _slices(attention, head) if piece.heads == (head,)]
            values = torch.cat([_masked(model, piece.name)[piece.slices].float().flatten() for piece in own])
            norms.append(torch.linalg.vector_norm(values, self.n))
        return torch.stack(norms)

    def choose(self, model: nn.Module, layer: int | str) -> list[int]:
        """The heads to prune, smallest norm first. Raises ValueError if no head would be left."""
        attention = find_attention(model, layer)
        norms = self.norms(model, layer)
        gone = pruned_heads(model).get(attention.name, [])
        left = [head for head in norms.argsort(stable=True).tolist() if head not in gone]
        count = self.amount if isinstance(self.amount, int) else round(self.amount * len(left))
        if count >= len(left):
            raise ValueError(f"amount: expected fewer than the {len(left)} heads that are left, got {self.amount}")
        return left[:count]

    def apply(self, model: Model, layer: int | str) -> Model:
        """Prunes the heads of `choose` in this layer with `prune_heads`. Returns the model."""
        return prune_heads(model, {layer: self.choose(model, layer)})


def pruned_heads(model: nn.Module) -> dict[str, list[int]]:
    """{attention module: [heads]} for the heads whose weights are all zero, masked or not. Empty if there are none.

    Also empty for a model without attention heads, or whose heads cannot be found. Only weights that belong to the head
    alone count. Biases are ignored, because they are often initialized to zero. A layer in which the weights of all
    heads are zero does not count as pruned: it is newly initialized.
    """
    try:
        attentions = find_attentions(model)
    except ValueError:  # no heads, or an unknown layout
        return {}
    found = {}
    for attention in attentions:
        dead = set(range(attention.heads))
        for bands in attention.bands:
            if dead and bands.count == attention.heads and len(bands.shape) > 1 and bands.role != "other":
                weight = value_of(_masked(model, bands.tensor))
                if weight.is_meta:  # offloaded, so that no update is written to it anyway
                    dead = set()
                    break
                used = (weight != 0).movedim(bands.dim, 0).flatten(1).any(1).tolist()
                dead -= {head for head in dead if any(used[bands.slices(head)[-1]])}
        if 0 < len(dead) < attention.heads:
            found[attention.name] = sorted(dead)
    return found


def remove(model: Model) -> Model:
    """Makes the masks of all attention modules permanent, as `torch.nn.utils.prune.remove` does. Returns the model.

    Masked weights become zero. `..._orig` gets its original name back, and its place in the order of the model's
    parameters. Under `HSAID` the heads stay pruned, because HSAID writes no update to them. Raises ValueError for a
    model without attention heads.
    """
    _check_floats(model, "remove()")
    for attention in find_attentions(model):
        _remove(model, attention)
    return model


def remove_heads(model: Model, heads: Heads | None = None) -> Model:
    """Removes heads, so that parameters become smaller. Returns the model.

    The model computes the same function as with these heads pruned, up to rounding.

    Args:
        model: the model, which is changed in place.
        heads: {layer: [heads]}; None means the pruned heads. Masks in these layers are made permanent first.

    The remaining heads are renumbered from 0. The model's configuration cannot store a number of heads for each layer:
    to load a saved model, create a new one, remove the same heads from it, and then call `load_state_dict`. Supports
    the BERT family: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT. Raises, before anything is changed,
    TypeError for other attention modules, and whatever `prune_heads` raises.
    """
    _check_floats(model, "remove_heads()")
    chosen = check_heads(model, pruned_heads(model) if heads is None else heads)
    attentions = _own_attentions(model, chosen)
    for attention in attentions:
        kind = type(model.get_submodule(attention.name)).__name__
        if kind not in REMOVABLE:
            raise TypeError(f"model: expected attention of the BERT family ({', '.join(REMOVABLE)}), got {kind}")
    for attention in attentions:
        _remove(model, attention)
        attention = find_attention(model, attention.name)  # its parameters have their original names again
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


def _check_floats(model: nn.Module, call: str) -> None:
    """Raises RuntimeError for a model whose weights an HSAID answers for, TypeError for quantized layers."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if link_of(module) is not None:
            raise RuntimeError(
                f"{call}: expected a plain model, got one that an HSAID wraps: unwrap() it first, or merge()"
            )
        if kind_of(module) is not None:
            raise TypeError(
                f"{call}: expected float weights, got a {type(module).__name__}: prune heads before quantizing the "
                "model, or let an HSAID write no update to them (pruned=)"
            )


def _slices(attention: Attention, head: int) -> Iterator[HeadSlice]:
    for bands in attention.bands:
        index = head * bands.count // attention.heads
        yield HeadSlice(bands.role, bands.tensor, bands.slices(index), attention.sharers(bands, index))


def check_heads(model: nn.Module, heads: Heads, argument: str = "heads", layouts: int = LATEST) -> dict[str, list[int]]:
    """`heads` as {attention module: sorted [heads]}; layers with an empty list are dropped.

    Raises ValueError for a layer or head that does not exist and for all heads of a layer, TypeError for other types.
    `argument` is the argument's name for messages.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"{argument}: expected {{layer: [heads]}}, got {type(heads).__name__} {heads!r}")
    chosen: dict[str, set[int]] = defaultdict(set)
    found = find_attentions(model, layouts) if heads else ()
    for layer, numbers in heads.items():
        attention = pick(found, layer)
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"{argument}: expected a list of heads for layer {layer!r}, got {numbers!r}")
        chosen[attention.name].update(_check_head(attention, head) for head in numbers)
        _refuse_all(attention, chosen[attention.name], argument)
    return {name: sorted(numbers) for name, numbers in chosen.items() if numbers}


def _own_attentions(model: nn.Module, chosen: Iterable[str]) -> list[Attention]:
    """The attention modules of these names. Raises ValueError if one shares a parameter with another module."""
    found = find_attentions(model) if chosen else ()
    attentions = [pick(found, name) for name in chosen]
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
    """Returns (module that owns the parameter, its key in the module without the suffix "_orig" of a masked one)."""
    prefix, _, key = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    short = key.removesuffix("_orig")
    return owner, short if f"{short}_mask" in owner._buffers else key


def _masked(model: nn.Module, tensor: str) -> Tensor:
    """A parameter's values, detached, with masked ones as zeros."""
    owner, key = _place(model, tensor)
    own = owner._parameters[tensor.rpartition(".")[2]]  # a library's class may have a `weight` of its own
    parameter = own if link_of(owner) is None and own is not None else model.get_parameter(tensor)
    value, mask = parameter.detach(), owner._buffers.get(f"{key}_mask")
    return value if mask is None else value * mask


def _remove(model: nn.Module, attention: Attention) -> None:
    for tensor in dict.fromkeys(bands.tensor for bands in attention.bands):
        owner, key = _place(model, tensor)
        with contextlib.suppress(ValueError):  # raised if the parameter is not masked
            prune.remove(owner, key)
            parameters = owner._parameters
            # prune.remove appends the parameter. Restore the usual order, weights before biases.
            for name in sorted(parameters, key=lambda name: "weight" not in name):
                parameters[name] = parameters.pop(name)
