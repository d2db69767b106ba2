"""Quantized layers of a wrapped model: their forward is that of the float layer which they stand for (w0/stored.py)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsaid_kernels.wrapper.reads.link import plain_type
from hsaid_kernels.wrapper.w0.stored import is_read_as_stored, shown_in

_DERIVED = ("_reversed_padding_repeated_twice",)  # of convolutions, beside what their __constants__ names


def float_type(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of torch.nn that a class of quantized layers is derived from, or else nn.Linear."""
    own = (base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules") and base is not nn.Module)
    found: type[nn.Module] = next(own, nn.Linear)
    return found


def float_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    base = float_type(cls)
    return _linear if base is nn.Linear else base.forward


def _linear(self: Any, input: Tensor) -> Tensor:
    """As the libraries' layers, computes in the dtype of the weight, and returns that of the input.

    Under autocast as nn.Linear, which returns what autocast computes in.
    """
    weight, bias = self.weight, self.bias
    if torch.is_autocast_enabled(input.device.type):
        return F.linear(input, weight, bias)
    output = F.linear(input.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return output.to(input.dtype)


def is_read_by_library(layer: nn.Module, frame: FrameType) -> bool:
    """Whether the library reads an attribute of its own layer, in `frame`, or a kind does to dequantize it."""
    if torch.compiler.is_compiling():
        return False
    return is_read_as_stored(layer) or frame.f_code in _methods(plain_type(layer))  # type: ignore[arg-type]


@functools.cache
def _methods(cls: type[nn.Module]) -> frozenset[CodeType]:
    """The code of the functions that the classes of a library define, without that of torch."""
    bases = [base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins", "abc"))]
    found: set[CodeType] = set()
    for value in (value for base in bases for value in vars(base).values()):
        function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        while (code := getattr(function, "__code__", None)) is not None:
            found |= _with_inner(code)
            function = getattr(function, "__wrapped__", None)  # of a decorator
    return frozenset(found)


def _with_inner(code: CodeType) -> set[CodeType]:
    """A function's code, and that of the lambdas and comprehensions in it."""
    return {code}.union(*(_with_inner(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def library_value(layer: nn.Module, key: str) -> Any:
    """What the layer's library has under this name."""
    for held in (layer._parameters, layer._buffers, layer.__dict__):
        if key in held:
            return held[key]
    own = getattr(plain_type(layer), key, None)
    if isinstance(own, property):
        return own.__get__(layer)
    raise AttributeError(f"{type(layer).__name__!r} object has no attribute {key!r}")


def float_copy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """An ordinary layer of torch.nn, with copies of the parameters that a quantized layer shows. `memo` as in copy."""
    base: Any = float_type(plain_type(layer))
    made: nn.Module = base.__new__(base)
    nn.Module.__init__(made)
    memo[id(layer)] = made
    own = made.__dict__.keys() - {"_parameters", "_buffers", "_modules"} | {*base.__constants__, *_DERIVED}
    made.__dict__.update({key: copy.deepcopy(layer.__dict__[key], memo) for key in own if key in layer.__dict__})
    made._parameters.update(copy.deepcopy(shown_in(layer), memo))
    if isinstance(made, nn.Linear) and made._parameters["weight"] is not None:
        made.out_features, made.in_features = made._parameters["weight"].shape
    return made
