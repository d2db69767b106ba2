"""W0 in few bits: tensors that look like float tensors, and store integers and scales.

These are torchao's, or like them, and those of quantized layers (stored.py). Their weights are made from their
dequantized values, block by block, and these are freed again. A model with codes of any other kind is refused
(`check_known`): no projection can be added to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hsaid_kernels.wrapper.w0.fsdp2 import is_sharded
from hsaid_kernels.wrapper.w0.kinds import float_values, is_registered, kind_of
from hsaid_kernels.wrapper.w0.stored import SHOWN, Stored, is_adapted


def is_quantized(tensor: Tensor) -> bool:
    # Tensors that are made of others have this method, by which torch.compile takes them apart.
    made = hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)
    return made or isinstance(tensor, Stored) or is_registered(tensor)


def dequantized(tensor: Tensor) -> Tensor:
    return float_values(tensor) if is_quantized(tensor) else tensor


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantized one consists of."""
    if isinstance(tensor, Stored):
        return tensor.stored()
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def stamp_of(tensor: Tensor) -> tuple[object, object]:
    """Addresses and versions of what a tensor stores."""
    if isinstance(tensor, Stored) or hasattr(tensor, "__tensor_flatten__"):
        inner: list[Any] = list(map(stamp_of, parts_of(tensor)))
        return tuple(address for address, _ in inner), tuple(version for _, version in inner)
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def weight_dtypes(
    w0: Mapping[str, Tensor], parameters: Mapping[str, Tensor], given: torch.dtype | None
) -> dict[str, torch.dtype]:
    """{name: dtype of the weight}: that of W0, but of quantized tensors the dtype that their layers compute in.

    This is `given`, or what the layer says (bitsandbytes, HQQ), or that of all other parameters of the model, for
    layers, which convert what they compute from to the dtype of their input. The same for tensors that still stand
    for float32 after `.to(dtype)`, which does not reach torchao's of 8 bits.
    """
    dtypes = {name: tensor.dtype for name, tensor in w0.items()}
    quantized = {name: tensor for name, tensor in w0.items() if is_quantized(tensor)}
    if not quantized:
        return dtypes
    others = others_dtype(parameters)
    for name, tensor in quantized.items():
        own = tensor.kind.computes_in(tensor.layer) if isinstance(tensor, Stored) else None
        follows = isinstance(tensor, Stored) or tensor.dtype == torch.float32
        dtypes[name] = given or own or (others if follows else None) or tensor.dtype
    return dtypes


def as_floats(
    own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """What the parameters of an ordinary copy of a model are: `values`, {name: weight}, and more of a quantized model.

    Returns {name: tensor}, `values` and the other quantized parameters, these all in `dtype`, unless that is None,
    because ordinary layers convert nothing; and {name: True} for the quantized ones in `values`, which could not
    require gradients before.
    """
    quantized, layers = [name for name, parameter in own.items() if is_quantized(parameter)], _layers_of(own)
    found = {name: values.get(name, own[name]) for name in own if name in quantized or _module(name) in layers}
    floats = {name: dequantized(value) for name, value in found.items()}
    changed = {name: value.to(dtype or value.dtype) for name, value in floats.items()}
    return {**values, **changed}, {name: True for name in quantized if name in values}


def with_layers(own: Mapping[str, Tensor], names: Collection[str]) -> list[Tensor]:
    """The parameters of these names, and the weights of the quantized layers that have some of them."""
    layers = set(map(_module, names)) & _layers_of(own)
    return [parameter for name, parameter in own.items() if name in names or _module(name) in layers]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _layers_of(parameters: Mapping[str, Tensor]) -> set[str]:
    """The names of the quantized layers. bitsandbytes converts their biases to the dtype that they compute in."""
    return {_module(name) for name, parameter in parameters.items() if isinstance(parameter, Stored)}


def others_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype of all parameters that are neither quantized nor of a quantized layer, if it is one."""
    layers = _layers_of(parameters)
    others = [p for name, p in parameters.items() if not is_quantized(p) and _module(name) not in layers]
    found = {parameter.dtype for parameter in others if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 else None


# What transformers notes in a model.
_NOTES = (
    *("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    "ct_decompress_hook",
)


def forget_quantizer(model: nn.Module, replaced: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Removes what transformers and torchao note in a model of quantized tensors, and in its configurations.

    `replaced` are pairs (tensor of before, tensor in this model). Does nothing if weights in few bits are left.
    """
    if unknown_layers(model) or any(map(is_quantized, model.parameters())):
        return
    once = {id(now) for before, now in replaced if is_quantized(before)}
    for module in model.modules():
        own = module.__dict__
        for name in _NOTES:
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


# --- layers of other kinds


def unknown_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold codes of an unknown kind, without those inside them."""
    if _is_unknown(model):
        return [model]
    return list(dict.fromkeys(module for child in model.children() for module in unknown_layers(child)))


def check_known(model: nn.Module) -> None:
    """Raises TypeError for quantized layers of an unknown kind. peft's adapters are trained over any kind."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for module in unknown_layers(model):
        found[f"{type(module).__module__}.{type(module).__name__}"].append(module)
    if not found or is_adapted(model):
        return
    what = " and ".join(f"{len(modules)} {name}{_size(modules)}" for name, modules in found.items())
    raise TypeError(
        f"model: expected float weights, or quantized ones of a kind that is known (docs/integration.md), got {what} "
        "with others, which would not be projected: say how they are dequantized (hsaid_kernels.register_quantized), "
        "or name what is projected, to leave them as they are (include=)"
    )


def _is_unknown(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or SHOWN in module.__dict__ or kind_of(module) is not None:
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
        is_lazy(tensor)
        or (tensor.dim() > 1 and (tensor.is_floating_point() or tensor.is_complex()) and tensor.itemsize > 1)
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
