"""`merged_copy`: an ordinary model whose parameters are the projected weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.reads.compiled_layers import compiled_as_before
from hsaid_kernels.wrapper.reads.link import link_of
from hsaid_kernels.wrapper.reads.properties import detach
from hsaid_kernels.wrapper.w0.beside import forget_derived, masks
from hsaid_kernels.wrapper.w0.quantized import forget_quantizer
from hsaid_kernels.wrapper.w0.stored import hide


@torch.no_grad()
def merged_copy(
    model: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], flags: Mapping[str, bool]
) -> nn.Module:
    """A deep copy of the model in which copies of `values` replace the parameters of these names.

    Args:
        model: a wrapped model, or a part of one.
        own: its parameters by name.
        values: {name: tensor}.
        flags: {name: whether the copy's parameter requires gradients}; those of other names keep their own.

    If no weights in few bits are left, the copy does not count as quantized for transformers either.
    """
    # deepcopy takes an entry of the memo for a finished copy, so what is replaced is not copied.
    memo: dict[int, Any] = {id(own[name]): nn.Parameter(value.clone(), False) for name, value in values.items()}
    replaced = {name: memo[id(own[name])] for name in values}
    for module in model.modules():
        memo[id(link_of(module))] = None  # so that the wrapper is not copied
        # Weights that hooks compute and store in the module, such as those of prune and weight_norm, may have a graph.
        computed = (value for value in module.__dict__.values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(value): value.detach() for value in computed}
    merged = copy.deepcopy(model, memo)
    for module in merged.modules():
        compiled_as_before(module)
        hide(module, for_good=True)
        detach(module)
    forget_quantizer(merged, ((own[name], parameter) for name, parameter in replaced.items()))
    for name, parameter in merged.named_parameters():
        if name in replaced and parameter is not replaced[name]:  # of a module that copies itself in its own way
            parameter.data = replaced[name].data
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    for module, hook in masks(merged.modules()):
        hook(module, None)
    forget_derived(merged)
    return merged
