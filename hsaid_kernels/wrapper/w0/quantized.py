"""W0 in few bits: tensors of torchao, or like them, which look like float tensors and store integers and scales.

The weights of a block are made from their dequantized values, which are freed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.w0.fsdp2 import gathered, is_sharded

BITSANDBYTES = ("Params4bit", "Int8Params")  # its layers read more than the values of a weight


def is_quantized(tensor: Tensor) -> bool:
    # Tensors that are made of others have this method, by which torch.compile takes them apart.
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)


def dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if is_quantized(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor as an ordinary one: gathered and dequantized where it is sharded or quantized."""
    return dequantized(gathered(tensor))


def stamp_of(tensor: Tensor) -> tuple[object, object]:
    """Address and version of what a tensor stores."""
    if is_quantized(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner: list[Any] = [stamp_of(getattr(tensor, name)) for name in names]
        return tuple(address for address, _ in inner), tuple(version for _, version in inner)
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def check_quantized(model: nn.Module) -> None:
    """Raises TypeError for weights in few bits over which no HSAID can compute, by name.

    These are parameters of bitsandbytes, layers of compressed-tensors that have not been dequantized, whose parameters
    the first forward replaces, and tensors whose `dequantize()` does not give their values.
    """
    judged: set[type] = set()
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if hasattr(module, "quantization_status") and getattr(scheme, "weights", None) is not None:
            raise TypeError(
                f"model: expected plain parameters or tensors of torchao, got {name!r}, a {type(module).__name__} of "
                "compressed-tensors: load the model with quantization_config=CompressedTensorsConfig(dequantize=True)"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ in BITSANDBYTES:
            raise TypeError(
                f"model: expected plain parameters or tensors of torchao, got {name!r}, a {type(parameter).__name__}, "
                "of bitsandbytes: quantize the model by torchao.quantization.quantize_"
            )
        if type(parameter) not in judged and is_quantized(parameter) and parameter.device.type != "meta":
            judged.add(type(parameter))
            _check_dequantizes(name, parameter)


def _check_dequantizes(name: str, parameter: nn.Parameter) -> None:
    values: object = None
    with contextlib.suppress(Exception):  # whatever the library raises
        values = parameter.dequantize()
    if isinstance(values, Tensor) and values.is_floating_point() and values.shape == parameter.shape:
        return
    got = f"gives {tuple(values.shape)} in {values.dtype}" if isinstance(values, Tensor) else "fails"
    raise TypeError(
        f"model: expected quantized tensors whose dequantize() gives their values, got {name!r}, a "
        f"{type(parameter).__name__} of shape {tuple(parameter.shape)} whose dequantize() {got}: quantize the model by "
        "another configuration, such as torchao's Int8WeightOnlyConfig"
    )


def check_read(model: nn.Module, projected: Collection[str]) -> None:
    """Raises TypeError for a layer that would quantize a projected weight once more, as optimum-quanto's do.

    Where their weights are float parameters, as in quantization-aware training, this is what they are meant to do.
    """
    weights = {id(parameter) for name, parameter in model.named_parameters() if name in projected}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if hasattr(type(module), "qweight") and weight is not None and is_quantized(weight) and id(weight) in weights:
            raise TypeError(
                f"model: expected layers that compute with their weight as it is, got {name!r}, a "
                f"{type(module).__name__}, which would quantize the projected weight once more: quantize the model by "
                "torchao.quantization.quantize_, or leave the layer out (exclude=)"
            )


def check_labels(parameters: Mapping[str, Tensor]) -> None:
    """Raises TypeError if quantized tensors stand for float32, and all others have been converted to fewer bits.

    `.to(dtype)` does not reach torchao's tensors of 8 bits. Their own layers run nevertheless.
    """
    floats = {p.dtype for p in parameters.values() if p.is_floating_point() and not is_quantized(p)}
    labels = {name: p.dtype for name, p in parameters.items() if is_quantized(p)}
    if len(floats) == 1 and not floats & set(labels.values()) and torch.float32 in labels.values():
        name = next(name for name, dtype in labels.items() if dtype == torch.float32)
        (dtype,) = floats
        raise TypeError(
            f"dtype: expected {dtype}, which all other parameters have, because {name!r}, a "
            f"{type(parameters[name]).__name__}, still stands for torch.float32 after to(), got None: wrap the model "
            f"with dtype={dtype}"
        )
