"""W0 in few bits: tensors of torchao, or like them, which look like float tensors and store integers and scales.

Their weights are made from their dequantized values, block by block, and these are freed again. Other libraries keep
their codes in integers or in objects (GPTQ, HQQ, BitNet, ...), which no projection can be added to: an HSAID leaves
such modules as they are, and `warn_of_packed` says so.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hsaid_kernels.wrapper.callers import stacklevel
from hsaid_kernels.wrapper.w0.fsdp2 import is_sharded


def is_quantized(tensor: Tensor) -> bool:
    # Tensors that are made of others have this method, by which torch.compile takes them apart.
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)


def dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if is_quantized(tensor) else tensor


def stamp_of(tensor: Tensor) -> tuple[object, object]:
    """Addresses and versions of what a tensor stores."""
    if is_quantized(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner: list[Any] = [stamp_of(getattr(tensor, name)) for name in names]
        return tuple(address for address, _ in inner), tuple(version for _, version in inner)
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def floats_of_rest(
    own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """What an ordinary copy of a quantized model needs beside `values`, {name: projected weight}.

    Returns {name: its values in `dtype`, or in its own} of the other quantized parameters, and {name: True} for those
    in `values`, which could not require gradients before. Both are empty of a model without quantized parameters.
    """
    quantized = {name: parameter for name, parameter in own.items() if is_quantized(parameter)}
    rest = {name: dequantized(p).to(dtype or p.dtype) for name, p in quantized.items() if name not in values}
    return rest, {name: True for name in quantized if name in values}


def forget_quantizer(model: nn.Module, replaced: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Removes what transformers and torchao note in a model of quantized tensors, and in its configurations.

    `replaced` are pairs (tensor of before, tensor in this model). Does nothing if weights in few bits are left.
    """
    if packed_modules(model) or any(map(is_quantized, model.parameters())):
        return
    once = {id(now) for before, now in replaced if is_quantized(before)}
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


# --- codes that are no float parameters


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with packed weights, without those inside them."""
    if _is_packed(model):
        return [model]
    return list(dict.fromkeys(module for child in model.children() for module in packed_modules(child)))


def warn_of_packed(model: nn.Module) -> None:
    """Warns of packed weights. Not where peft's adapters are trained, over weights that are meant to stay."""
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
        stacklevel=stacklevel(),
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
