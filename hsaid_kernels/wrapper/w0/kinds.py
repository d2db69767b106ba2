"""Kinds of quantized layers and tensors, and how the float weight of each is obtained.

A layer of bitsandbytes, HQQ or GPTQ keeps codes and scales, in parameters, buffers or objects, and its own forward
computes from these: it never reads a weight matrix. For each class of such layers there is a `Kind`, by the name of
the class, because importing the libraries takes seconds. `register_quantized` adds the classes of others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """What the quantized layers of a class have in common.

    Attributes:
        dequantize: gives the weight of such a layer, in floats: [out_features, in_features], or an embedding's table.
        stored: gives the tensors that it is computed from.
        shape, dtype: those of what `dequantize` gives; None if only dequantizing tells.
        computes_in: gives the dtype that the layer's forward computes in; None if that is the dtype of its input.
        has_own_forward: whether the library sets `forward` on each layer, and not in the class.
        unfit: says why such a layer cannot be dequantized; "" if it can, None if its weight is an ordinary one.
    """

    dequantize: Callable[[Any], Tensor]
    stored: Callable[[Any], Iterable[Tensor]]
    shape: Callable[[Any], Sequence[int]] | None = None
    dtype: Callable[[Any], torch.dtype] | None = None
    computes_in: Callable[[Any], torch.dtype | None] = lambda layer: None
    has_own_forward: bool = False
    unfit: Callable[[Any], str | None] = lambda layer: ""


def register_quantized(cls: type, dequantize: Callable[[Any], Tensor]) -> None:
    """Makes a class of quantized layers, or of quantized tensors, known to every `HSAID` that is made from now on.

    While an HSAID wraps the model, such a layer computes as the float layer that it stands for: with the forward of the
    class of torch.nn that it is derived from (nn.Linear, nn.Embedding, nn.Conv2d, ...), or else of nn.Linear. Its bias
    is what it has as `bias`: a parameter, a buffer, or a plain tensor.

    Args:
        cls: a subclass of nn.Module or of torch.Tensor. Classes derived from it are meant too. A layer's weight is to
            be computed from tensors that the layer itself holds: parameters, buffers, attributes, or lists or dicts of
            them. A change of these is noticed.
        dequantize: is given a layer or a tensor, and returns the weight in float32, bfloat16 or float16, in the shape
            that the float weight has: [out_features, in_features] of a linear layer. It must not write to the layer.

    Raises TypeError if `cls` is no such class, or if `dequantize` cannot be called.
    """
    if not isinstance(cls, type) or not issubclass(cls, (nn.Module, Tensor)):
        raise TypeError(f"cls: expected a subclass of nn.Module or of torch.Tensor, got {cls!r}")
    if not callable(dequantize):
        raise TypeError(f"dequantize: expected a function of a layer or a tensor, got {dequantize!r}")
    if issubclass(cls, nn.Module):
        _registered_layers[cls] = Kind(dequantize, _tensors_in, unfit=_unfit_of_registered)
    else:
        _registered_tensors[cls] = dequantize


_registered_layers: dict[type, Kind] = {}
_registered_tensors: dict[type, Callable[[Any], Tensor]] = {}


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a quantized layer; None if it is any other module, or one with an ordinary weight.

    Raises TypeError for one that cannot be dequantized.
    """
    by_class = (_registered_layers.get(cls) or _LAYERS.get(_name(cls)) for cls in type(layer).__mro__)
    of_any_class = _COMPRESSED if "quantization_status" in layer.__dict__ else None
    for kind in (*by_class, of_any_class):
        if kind is None:
            continue
        if reason := kind.unfit(layer):
            raise TypeError(f"model: expected layers that can be dequantized, got a {type(layer).__name__} {reason}")
        return kind if reason is not None else None
    return None


def is_registered(tensor: Tensor) -> bool:
    """Whether `register_quantized` has been told of the tensor's class."""
    return isinstance(tensor, tuple(_registered_tensors))


def float_values(tensor: Any) -> Tensor:
    """The values of a quantized tensor, in floats."""
    for cls in type(tensor).__mro__:
        if dequantize := _registered_tensors.get(cls) or _TENSORS.get(_name(cls)):
            return dequantize(tensor)
    values: Tensor = tensor.dequantize()
    return values


def _name(cls: type) -> str:
    """The package and the class, without the modules in between, which move."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"


def _tensors_in(layer: nn.Module) -> list[Tensor]:
    """The layer's tensors but its bias: parameters, buffers, attributes, and those in lists and dicts."""
    others = ("_parameters", "_buffers", "_hsaid")
    named: dict[str, Any] = {key: value for key, value in layer.__dict__.items() if not key.startswith(others)}
    held = [value for key, value in (named | layer._parameters | layer._buffers).items() if key != "bias"]
    for value in list(held):
        held += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [value for value in held if isinstance(value, Tensor)]


def _unfit_of_registered(layer: nn.Module) -> str:
    held = any(True for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if "." in name)
    if not held and _tensors_in(layer):
        return ""
    where = "in a module inside of it" if held else "in no parameter, buffer, attribute, list or dict"
    return f"with its tensors {where}: a layer that register_quantized() is told of has to hold them itself"


# --- bitsandbytes

_NOT_YET = "of bitsandbytes whose weight is not quantized yet: model.to(device) quantizes it"


def _state(layer: Any) -> Any:
    """What belongs to codes of 4 bits. FSDP loses it from the parameter, and the layer keeps it too."""
    return getattr(layer._parameters["weight"], "quant_state", None) or getattr(layer, "quant_state", None)


def _is_reordered(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _of_4_bits(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    codes, state = layer._parameters["weight"].data, _state(layer)
    if _is_reordered(state):
        codes, state = _in_order(codes, state)
    if state.absmax.dim() > 1:
        raise RuntimeError(
            f"model: expected scales in the order of their blocks, got a {type(layer).__name__} in which bitsandbytes "
            "has left them in another one (state_dict() after an evaluation on this CPU), so that its own forward is "
            "wrong too: load the model anew"
        )
    return dequantize_4bit(codes, state)


def _in_order(reordered: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state as quantizing leaves them, of a layer [N, K] that has been evaluated on a CPU.

    With AVX-512 for bfloat16, its first evaluation writes the codes of each 32 rows column by column, 32 bytes of lower
    halves and higher halves at a time, transposes the scales, and rounds these to bfloat16, for good.
    """
    rows, half = reordered.shape
    groups = reordered.reshape(-1, 32)
    pairs = torch.cat((groups & 15, groups >> 4), 1).reshape(rows // 32, half, 32, 2).transpose(1, 2).reshape(-1, 2)
    state = copy.copy(state)
    state.absmax, state.nested, state.dtype = state.absmax.t().reshape(-1).float(), False, state.original_dtype
    return pairs[:, 0] << 4 | pairs[:, 1], state


def _stored_in_4_bits(layer: Any) -> list[Tensor]:
    state = _state(layer)
    return [layer._parameters["weight"], state.absmax, *([state.state2.absmax] if state.nested else [])]


def _scales(layer: Any) -> Any:
    """Those of codes of 8 bits. The first forward moves them from the parameter into the layer's state."""
    own = getattr(layer._parameters["weight"], "SCB", None)
    return own if own is not None else getattr(getattr(layer, "state", None), "SCB", None)


def _unfit_of_8_bits(layer: Any) -> str:
    if getattr(getattr(layer, "state", None), "has_fp16_weights", False):
        return "of bitsandbytes that quantizes a float weight in each forward: make it with has_fp16_weights=False"
    return _NOT_YET if _scales(layer) is None else ""


def _of_8_bits(layer: Any) -> Tensor:
    scales = _scales(layer)  # as the library's own kernels multiply them
    return layer._parameters["weight"].data.to(scales.dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


_IN_4_BITS = Kind(
    _of_4_bits,
    _stored_in_4_bits,
    shape=lambda layer: _state(layer).shape,
    dtype=lambda layer: _state(layer).original_dtype if _is_reordered(_state(layer)) else _state(layer).dtype,
    computes_in=lambda layer: layer.compute_dtype if getattr(layer, "compute_type_is_set", False) else None,
    unfit=lambda layer: _NOT_YET if _state(layer) is None else "",
)
_IN_8_BITS = Kind(
    _of_8_bits,
    lambda layer: [layer._parameters["weight"], _scales(layer)],
    shape=lambda layer: layer._parameters["weight"].shape,
    dtype=lambda layer: _scales(layer).dtype,
    unfit=_unfit_of_8_bits,
)

# --- GPTQ and AWQ, by gptqmodel, and BitNet


def _of_gptq(layer: Any) -> Tensor:
    # Subclasses keep what they have dequantized.
    (base,) = [cls for cls in type(layer).__mro__ if _name(cls) == "gptqmodel.PackableQuantLinear"]
    return base.dequantize_weight(layer).t()  # type: ignore[attr-defined]


def _of_awq(layer: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).t()


def _of_bitnet(layer: Any) -> Tensor:
    from transformers.integrations.bitnet import unpack_weights

    return unpack_weights(layer._buffers["weight"], dtype=layer.weight_scale.dtype) / layer.weight_scale


def _linear(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _unfit_of_hqq(layer: Any) -> str:
    if not layer.is_initialized():
        return "of hqq without codes: initialize() makes them"
    floats = getattr(layer, "linear_layer", None)
    return "" if floats is None else "of hqq that has kept its float layer: quantize with del_orig=True"


_LAYERS = {
    "bitsandbytes.Linear4bit": _IN_4_BITS,
    "bitsandbytes.Embedding4bit": _IN_4_BITS,
    "bitsandbytes.Linear8bitLt": _IN_8_BITS,
    "bitsandbytes.Embedding8bit": _IN_8_BITS,
    "hqq.HQQLinear": Kind(
        lambda layer: layer.dequantize(),
        lambda layer: [layer.W_q, *(value for value in layer.meta.values() if isinstance(value, Tensor))],
        shape=lambda layer: layer.meta["shape"],
        dtype=lambda layer: layer.meta.get("compute_dtype", torch.float16),
        computes_in=lambda layer: layer.compute_dtype,
        unfit=_unfit_of_hqq,
    ),
    "optimum.QModuleMixin": Kind(
        lambda layer: layer._parameters["weight"].dequantize(),
        lambda layer: [layer._parameters["weight"]],
        shape=lambda layer: layer._parameters["weight"].shape,
        dtype=lambda layer: layer._parameters["weight"].dtype,
        unfit=lambda layer: "" if hasattr(layer._parameters.get("weight"), "__tensor_flatten__") else None,
    ),
    "gptqmodel.PackableQuantLinear": Kind(
        _of_gptq,
        lambda layer: [layer.qweight, layer.qzeros, layer.scales, layer.g_idx],
        shape=_linear,
        dtype=lambda layer: layer.scales.dtype,
    ),
    "gptqmodel.AWQuantLinear": Kind(
        _of_awq,
        lambda layer: [layer.qweight, layer.qzeros, layer.scales],
        shape=_linear,
        dtype=lambda layer: layer.scales.dtype,
    ),
    "transformers.BitLinear": Kind(
        _of_bitnet,
        lambda layer: [layer._buffers["weight"], layer.weight_scale],
        shape=_linear,
        dtype=lambda layer: layer.weight_scale.dtype,
        unfit=lambda layer: "" if layer.rms_norm is None else "with a norm of its own",
    ),
}

# --- compressed-tensors, which makes layers of torch quantized ones


def _of_compressed(layer: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    scheme = layer.quantization_scheme
    return BaseCompressor.get_value_from_registry(scheme.format.value).decompress(_held(layer), scheme)["weight"]


def _held(layer: Any) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None
    }


def _unfit_of_compressed(layer: Any) -> str | None:
    if getattr(getattr(layer, "quantization_scheme", None), "weights", None) is None:
        return None
    status = getattr(layer.quantization_status, "value", layer.quantization_status)
    return (
        ""
        if status == "compressed"
        else (
            f"of compressed-tensors that is {status}: load the model anew and wrap it before its first forward, which "
            "decompresses all of it, or load it with quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    )


_COMPRESSED = Kind(
    _of_compressed,
    lambda layer: [tensor for name, tensor in _held(layer).items() if name.startswith("weight")],
    unfit=_unfit_of_compressed,
    has_own_forward=True,
)

# --- tensors of torchao without a dequantize() that gives their values


def _by_identity(tensor: Any) -> Tensor:
    identity = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
    return nn.functional.linear(identity, tensor).t()


_TENSORS: dict[str, Callable[[Any], Tensor]] = {
    "torchao.NF4Tensor": lambda tensor: tensor.get_original_weight(),
    "torchao.Int4OpaqueTensor": _by_identity,
}
