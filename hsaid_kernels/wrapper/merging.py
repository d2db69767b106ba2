"""`merged_copy`: an ordinary model whose parameters are the projected weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.reads.compiled_layers import compiled_as_before
from hsaid_kernels.wrapper.reads.link import Place, Source, place_of
from hsaid_kernels.wrapper.reads.properties import detach, merging
from hsaid_kernels.wrapper.w0.packed import packed_modules
from hsaid_kernels.wrapper.w0.quantized import is_quantized
from hsaid_kernels.wrapper.w0.snapshot import forget_derived, masks


@torch.no_grad()
def merged_copy(
    model: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], flags: Mapping[str, bool]
) -> nn.Module:
    """A deep copy of the model in which copies of `values` replace the parameters of these names.

    `own` holds the model's own parameters by name; `flags` says which of the copy's require gradients. If no weights in
    few bits are left, the copy does not count as quantized for transformers either.
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
    if not packed_modules(merged) and not any(map(is_quantized, merged.parameters())):
        _forget_quantizer(merged, {id(replaced[name]) for name in values if is_quantized(own[name])})
    for name, parameter in merged.named_parameters():
        if name in replaced and parameter is not replaced[name]:  # of a module that copies itself in its own way
            parameter.data = replaced[name].data
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    for module, hook in masks(merged.modules()):
        hook(module, None)
    forget_derived(merged)
    return merged


def _forget_quantizer(model: nn.Module, once: set[int]) -> None:
    """Removes what transformers and torchao note in a model of quantized tensors, and in its configurations.

    `once` holds the ids of the parameters that were quantized.
    """
    for module in model.modules():
        own = module.__dict__
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            own.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            getattr(own.get("config"), "__dict__", {}).pop(name, None)
        if own.get("_weight_conversions"):  # from the checkpoint, which save_pretrained reverses
            own["_weight_conversions"] = [one for one in own["_weight_conversions"] if not _quantizes(one)]
        if any(id(parameter) in once for parameter in module._parameters.values()):
            own.pop("extra_repr", None)  # torchao's, which names the tensor's class, and cannot be pickled


def _quantizes(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)
