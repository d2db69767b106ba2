"""W0 in few bits: tensors of torchao, or like them, which look like float tensors and store integers and scales.

The weights of a block are made from their dequantized values, which are freed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hsaid_kernels.wrapper.sharded import gathered, is_sharded

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


def check_quantized(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises TypeError for a parameter that bitsandbytes has quantized, by name."""
    for name, parameter in parameters.items():
        if type(parameter).__name__ in BITSANDBYTES:
            raise TypeError(
                f"model: expected plain parameters or tensors of torchao, got {name!r}, a {type(parameter).__name__}, "
                "of bitsandbytes: quantize the model by torchao.quantization.quantize_"
            )
