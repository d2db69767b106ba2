"""Pruned experts: those whose weights are all zero, which receive no update, as pruned heads do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hsaid_kernels.fastfood.plan import check_int
from hsaid_kernels.hierarchy.experts import find_experts
from hsaid_kernels.wrapper.w0.quantized import is_quantized
from hsaid_kernels.wrapper.w0.values import value_of

SAMPLE = 64  # values of an expert that are looked at first


def pruned_experts(model: nn.Module) -> dict[str, list[int]]:
    """{module of experts: [experts]} for the experts whose weights are all zero. Empty if there are none.

    Biases are ignored. Layers count as not pruned if the weights of all their experts are zero, if they are quantized,
    or offloaded to the meta device.
    """
    found: dict[str, list[int]] = {}
    parameters = dict(model.named_parameters())
    for layer in find_experts(model):
        dead = set(range(layer.count))
        for tensor in layer.fused:
            parameter = parameters[tensor]
            if is_quantized(parameter) or parameter.is_meta:
                dead = set()
            elif dead and parameter.dim() > 2 or parameter.shape[0] > layer.count:
                each = value_of(parameter.detach()).reshape(layer.count, -1)
                dead -= set(each[:, :SAMPLE].any(1).nonzero().flatten().tolist())
                dead = {expert for expert in dead if not each[expert].any()}
        for tensor, expert in layer.separate.items():
            parameter = parameters[tensor]
            if is_quantized(parameter) or parameter.is_meta:
                dead = set()
            elif expert in dead and parameter.dim() > 1 and value_of(parameter.detach()).any():
                dead.discard(expert)
        if 0 < len(dead) < layer.count:
            found[layer.name] = sorted(dead)
    return found


def check_experts(
    model: nn.Module, pruned: Mapping[Any, Iterable[int]], argument: str
) -> tuple[dict[str, list[int]], dict[Any, Iterable[int]]]:
    """({module of experts: sorted [experts]}, what else is in `pruned`).

    Raises TypeError if `pruned` or an expert has another type, ValueError for an expert that does not exist.
    """
    if not isinstance(pruned, Mapping):
        raise TypeError(f"{argument}: expected {{layer: [numbers]}}, got {type(pruned).__name__} {pruned!r}")
    layers = {layer.name: layer for layer in find_experts(model)} if pruned else {}
    chosen: dict[str, list[int]] = {}
    for name in pruned.keys() & layers.keys():
        numbers, last = pruned[name], layers[name].count - 1
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"{argument}: expected a list of experts for {name!r}, got {numbers!r}")
        chosen[name] = sorted({check_int(f"{argument}[{name!r}]", number, 0, last) for number in numbers})
    return chosen, {name: numbers for name, numbers in pruned.items() if name not in layers}
