"""Weights in few bits that are no float parameters: codes of GPTQ, HQQ, BitNet and others, in integers or in objects.

An HSAID leaves them as they are, and `warn_of_packed` says so.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hsaid_kernels.wrapper.w0.quantized import is_quantized


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with packed weights, without those inside them."""
    if _is_packed(model):
        return [model]
    return list(dict.fromkeys(module for child in model.children() for module in packed_modules(child)))


def warn_of_packed(model: nn.Module) -> None:
    """Warns of packed weights, at the line that calls this package.

    Not where peft's adapters are trained, over weights that are meant to stay.
    """
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for module in packed_modules(model):
        found[f"{type(module).__module__}.{type(module).__name__}"].append(module)
    adapted = any("base_layer" in module._modules or hasattr(module, "peft_config") for module in model.modules())
    if not found or adapted:
        return
    what = " and ".join(f"{len(modules)} {name}{_size(modules)}" for name, modules in found.items())
    warnings.warn(
        f"model: expected weights in float parameters or in tensors of torchao, got {what} with packed ones, which are "
        "not projected and stay as they are: dequantize the model before wrapping, or name what is projected by "
        "include=, which also silences this",
        stacklevel=_outside(),
    )


def _is_packed(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if any(map(_is_codes, module._parameters.values())):
        return True
    # Index tables and masks are buffers too, but of modules that have float weights.
    held = any(map(_is_codes, module._buffers.values()))
    held = held or any(isinstance(value, torch.ScriptObject) for value in vars(module).values())  # of torch.ao
    if held and not _has_matrix(module.parameters()):
        return True
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    attributes = [value for value in vars(module).values() if isinstance(value, Tensor)]
    return not any(map(_has_matrix, (module.parameters(), module.buffers(), attributes)))


def _is_codes(tensor: Tensor | None) -> bool:
    """Whether this is a matrix of integers, or of floats of one byte, that is neither a mask nor of torch's indices."""
    if tensor is None or is_lazy(tensor) or tensor.dim() < 2 or is_quantized(tensor):
        return False
    if tensor.is_floating_point():
        return tensor.dtype.itemsize == 1
    if tensor.is_complex() or tensor.dtype in (torch.bool, torch.int64):
        return False
    return tensor.device.type == "meta" or not bool(((tensor == 0) | (tensor == 1)).all())


def _has_matrix(tensors: Iterable[Tensor]) -> bool:
    return any(
        is_lazy(tensor) or (tensor.dim() > 1 and tensor.is_floating_point() and tensor.dtype.itemsize > 1)
        for tensor in tensors
    )


def _size(modules: Iterable[nn.Module]) -> str:
    """How many weights these have, where they tell."""
    sizes = [(getattr(module, "in_features", None), getattr(module, "out_features", None)) for module in modules]
    weights = [rows * columns for rows, columns in sizes if isinstance(rows, int) and isinstance(columns, int)]
    if len(weights) == len(sizes):
        return f" ({sum(weights):,} weights)"
    own = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    codes = [tensor.numel() for tensor in own if tensor is not None and _is_codes(tensor)]
    return f" ({sum(codes):,} codes)" if codes else ""


def _outside() -> int:
    """The `stacklevel` of the nearest caller that is not in this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("hsaid_kernels."):
        level, frame = level + 1, frame.f_back
    return level
