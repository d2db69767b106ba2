"""W0 in 8 bits, as torchao's tensors are made."""

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

DETACH = torch.ops.aten.detach.default
UNCHANGED = (DETACH, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class Int8(torch.Tensor):
    """A float32 matrix as int8 [rows, columns] and a scale [rows, 1]."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, device=data.device)

    def __init__(self, data, scale):
        self.values, self.scale = data, scale

    @classmethod
    def of(cls, dense: torch.Tensor) -> "Int8":
        scale = dense.abs().amax(1, keepdim=True) / 127
        return cls((dense / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["values"], inner["scale"])

    def dequantize(self) -> torch.Tensor:
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in UNCHANGED:  # also by .to(dtype), as torchao's tensors of 8 bits
            own = args[0]
            made = cls(own.values.clone(), own.scale.clone()) if function is not DETACH else cls(own.values, own.scale)
            return return_and_correct_aliasing(function, args, kwargs or {}, made)
        dense = [arg.dequantize() if isinstance(arg, Int8) else arg for arg in args]
        return function(*dense, **(kwargs or {}))


def quantized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8.of(module.weight.detach()), requires_grad=False)
    return model
