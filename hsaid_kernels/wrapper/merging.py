"""`merged_copy`: an ordinary model whose parameters are the projected weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.compiled import compiled_as_before
from hsaid_kernels.wrapper.place import Place, Source, place_of
from hsaid_kernels.wrapper.reads import detach, merging
from hsaid_kernels.wrapper.tree import forget_derived, masks


@torch.no_grad()
def merged_copy(
    model: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], flags: Mapping[str, bool]
) -> nn.Module:
    """A deep copy of the model in which copies of `values` replace the parameters of these names.

    `own` holds the model's own parameters by name; `flags` says which of the copy's require gradients.
    """
    # deepcopy treats an entry of the memo as a finished copy, so what is replaced is not copied.
    memo: dict[int, Any] = {id(own[name]): nn.Parameter(value.clone(), False) for name, value in values.items()}
    for module in model.modules():
        if (place := place_of(module)) is not None:
            memo[id(place)] = Place(Source())  # so that the wrapper is not copied
        # Weights that hooks compute and store in the module, such as those of prune and weight_norm, may have a graph.
        computed = (value for value in module.__dict__.values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(value): value.detach() for value in computed}
    replaced = {name: memo[id(own[name])] for name in values}
    merging.active = True
    try:
        merged = copy.deepcopy(model, memo)
    finally:
        merging.active = False
    for module in merged.modules():
        compiled_as_before(module)
        detach(module)
    for name, parameter in merged.named_parameters():
        if name in replaced and parameter is not replaced[name]:  # of a module that copies itself in its own way
            parameter.data = replaced[name].data
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    for module, hook in masks(merged.modules()):
        hook(module, None)
    forget_derived(merged)
    return merged
