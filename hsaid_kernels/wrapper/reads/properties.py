"""Makes every read of a weight of a wrapped model, such as `layer.weight`, give the projected weight.

W0 stays where it is, in `module._parameters`, where `named_parameters()`, `state_dict()`, `load_state_dict()` and
`to()` find it. What changes is the module's class: a subclass of it has a property for each parameter, and Python looks
for a property of the class before `nn.Module.__getattr__` looks into `_parameters`. `torch.nn.utils.parametrize` does
the same, but moves the parameter into another module, which renames it and breaks ties.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.isolation import calls_eagerly, runs_eagerly
from hsaid_kernels.wrapper.reads.hearing import use_methods
from hsaid_kernels.wrapper.reads.link import Changes, Link, Source, link_of, plain_type
from hsaid_kernels.wrapper.reads.quantized_layers import (
    float_copy,
    float_forward,
    is_read_by_library,
    library_value,
)
from hsaid_kernels.wrapper.reads.registration import change_methods
from hsaid_kernels.wrapper.w0.fsdp2 import is_read_by_fsdp2
from hsaid_kernels.wrapper.w0.stored import SHOWN, hide
from hsaid_kernels.wrapper.weight import LOOKUPS, Weight, as_tensor, is_given


def attach(
    module: nn.Module, source: Source, changes: Changes, names: Mapping[str, str | None], masks: Mapping[str, Any]
) -> None:
    """Lets `source` answer reads of the attributes `names` and `masks` of the module; see `Link`."""
    link = link_of(module)
    if link is None or link.source is not source:
        link = module.__dict__["_hsaid"] = Link(source, changes)
        computed = {key.removesuffix(end) for key in module._parameters for end in ("_orig", "_g") if key.endswith(end)}
        link.before = {key: module.__dict__[key] for key in computed if key in module.__dict__}
        _give_back(module)
    link.names, link.masks = dict(names), dict(masks)
    link.tables = frozenset(key for key, name in names.items() if name in source.tables)
    keys = (*link.names, *link.masks)
    shows = SHOWN in module.__dict__
    done = _is_made(type(module)) or not (keys or module._modules or shows)  # a leaf without parameters needs no class
    if not done or any(not isinstance(getattr(type(module), key, None), _Reading) for key in keys):
        module.__class__ = class_for(type(module), keys, shows and bool(names))  # type: ignore[arg-type]  # hashable


def _give_back(module: nn.Module) -> None:
    """Where a projected weight was set as a parameter, as SyncBatchNorm's conversion does, puts its W0 back."""
    for key, value in module._parameters.items():
        if isinstance(value, Weight):
            module._parameters[key] = value.w0


def detach(module: nn.Module) -> None:
    """Gives the module its own class back. It reads its own parameters then."""
    hide(module)
    if (link := module.__dict__.pop("_hsaid", None)) is not None:
        module.__dict__.update(link.before)
    while "_hsaid_keys" in type(module).__dict__:
        module.__class__ = type(module).__bases__[0]


def _is_made(cls: type[nn.Module]) -> bool:
    """Whether this is a class of `class_for`, or one below it."""
    return any("_hsaid_keys" in kind.__dict__ for kind in cls.__mro__)


class _Reading(property):
    """The property of a parameter or of a masked weight."""


@functools.cache
def _reading(key: str) -> _Reading:
    @calls_eagerly
    def read(module: nn.Module) -> Any:
        own = module._parameters
        if (shown := module.__dict__.get(SHOWN)) is not None:
            if is_read_by_library(module, sys._getframe(1)):
                return library_value(module, key)
            own = shown
        parameter = own.get(key)
        if parameter is not None and type(parameter) is not nn.Parameter:
            # put there by torch.func.functional_call for the time of a call, or by FSDP2, which looks for it
            if is_given(parameter) or is_read_by_fsdp2(parameter, sys._getframe(1)):
                return parameter
        link = module.__dict__.get("_hsaid")
        if link is not None and (parameter is None or key in link.names):
            if torch.compiler.is_compiling():
                return link.graph[key] if link.graph is not None else _eagerly(link, key, parameter, module)
            if key in link.tables and sys._getframe(1).f_code in LOOKUPS.values():
                return link.source.table(link.names[key], parameter)
            return _answer(link, key, parameter, module)
        if parameter is not None:
            return parameter
        if key in module.__dict__:
            return module.__dict__[key]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {key!r}")

    def write(module: nn.Module, value: Any) -> None:
        # nn.Module.__setattr__ comes first and has taken parameters, buffers and modules. A masked weight is what
        # prune's hook computes before each forward pass; reads compute it themselves.
        link = link_of(module)
        if link is None or key not in link.masks:
            module.__dict__[key] = value

    def delete(module: nn.Module) -> None:
        link = link_of(module)
        if link is not None and key in link.masks:
            raise RuntimeError(
                f"model: expected the mask of {key!r} to stay while an HSAID wraps the model: call unwrap() before "
                "prune.remove(), or remove masks from a merge()"
            )
        if key not in module.__dict__:
            raise AttributeError(key)
        del module.__dict__[key]

    return _Reading(read, write, delete)


@runs_eagerly
def _answer(link: Link, key: str, parameter: nn.Parameter | None, module: nn.Module) -> Any:
    try:
        if (weight := link.source.quickly(link.names.get(key), parameter)) is not None:
            return weight
        if key in link.masks:
            return link.masks[key].apply_mask(module)  # which reads "<key>_orig"
        if parameter is None:
            link.changes.note_change()
            raise RuntimeError(f"model: expected the parameter {link.names[key]!r}, got a module without it")
        return link.source.read(link.names[key], parameter)
    except AttributeError as error:  # after which Python would ask nn.Module.__getattr__, which would answer with W0
        raise RuntimeError(f"model: {link.names.get(key)!r} cannot be read: {error}") from error


@runs_eagerly
def _eagerly(link: Link, key: str, parameter: nn.Parameter | None, module: nn.Module) -> Any:
    """`_answer` as an ordinary tensor, for a module that is compiled with others around it: ends the graph."""
    return as_tensor(_answer(link, key, parameter, module))


# What torch.compiler.disable sets, for functions that are called inside a graph.
_eagerly.__dict__["_torchdynamo_disable"] = True
_eagerly.__dict__["_torchdynamo_disable_msg"] = "a weight of an HSAID is read: compile the HSAID in place of its parts"


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Sets the class of a module, as libraries of kernels do. The module keeps the properties of `attach`."""
    if link_of(module) is not None and not _is_made(cls):
        made: Any = type(module)
        cls = class_for(cls, made._hsaid_keys, made._hsaid_quantized)  # type: ignore[arg-type]
    object.__dict__["__class__"].__set__(module, cls)


@functools.cache
def class_for(cls: type[nn.Module], keys: tuple[str, ...], quantized: bool) -> type[nn.Module]:
    """A subclass of `cls`, under its name, with a property for each of `keys`. `quantized`: with a float forward."""
    if "_hsaid_keys" in cls.__dict__:  # more attributes than before
        return class_for(cls.__bases__[0], tuple(dict.fromkeys((*cls.__dict__["_hsaid_keys"], *keys))), quantized)
    members: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {key: _reading(key) for key in keys}
    members |= {
        "_hsaid_keys": keys,
        "_hsaid_quantized": quantized,
        "__class__": property(type, _swap_class),
        **change_methods(cls),
        **use_methods(cls),
    }
    # torch.jit.trace would compile properties
    members["__jit_unused_properties__"] = [*getattr(cls, "__jit_unused_properties__", ()), "__class__", *keys]
    if quantized:
        members["forward"] = float_forward(cls)
    if issubclass(cls, nn.RNNBase):
        # A list of the weights that torch keeps for itself, and moves into one buffer for cuDNN
        members["_flat_weights"] = property(_flat_weights, lambda module, value: None)
        members["__jit_unused_properties__"].append("_flat_weights")
        members["flatten_parameters"] = lambda module: None

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> Any:
        # pickle looks a class up by its name, but this one is made at run time
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (cls, keys, quantized), *reduced[2:])
        _refuse_copy(self)
        return reduced

    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        # Some classes, such as nn.LSTM, read their weights here, when the rest of the model is not there yet.
        own = dict(state)
        link = own.pop("_hsaid", None)
        super(made, self).__setstate__(own)
        if link is not None:
            self.__dict__["_hsaid"] = link

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        link = link_of(self)
        merges = link is not None and memo.get(id(link), link) is None  # as `merging.merged_copy` has it
        # A memo with something in it is that of a larger copy, which the wrapper may be a part of.
        if link is not None and not memo and (part := link.source.part_copy(self)) is not None:
            return part
        if merges and SHOWN in self.__dict__:
            return float_copy(self, memo)
        if SHOWN in self.__dict__:  # hqq's layers have a bias with a graph, which deepcopy refuses
            tensors = [value for value in self.__dict__.values() if isinstance(value, Tensor) and not value.is_leaf]
            memo.update({id(tensor): tensor.detach().clone() for tensor in tensors})
        if hasattr(cls, "__deepcopy__"):
            if not (merges or _is_parametrized(cls)):
                _refuse_copy(self)
            return cls.__deepcopy__(self, memo)
        reduced: Any = super(made, self).__reduce_ex__(4)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            reduced = self.__reduce_ex__(4)
        elif not merges:
            _refuse_copy(self)
        return copy._reconstruct(self, memo, *reduced)  # type: ignore[attr-defined]  # as deepcopy does without this method

    members |= {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__, "__deepcopy__": __deepcopy__}
    metaclass: type = type(cls)
    made = metaclass(cls.__name__, (cls,), members)
    return made


def _is_parametrized(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize has made the class. Its copies have all of a module's attributes."""
    return cls.__name__.startswith("Parametrized") and "__deepcopy__" in cls.__dict__


def _refuse_copy(module: nn.Module) -> None:
    """Raises RuntimeError for a module whose class makes copies by itself, which would not read the weights of now."""
    if link_of(module) is not None:
        raise RuntimeError(
            f"model: expected modules that torch copies, got a {plain_type(module).__name__} with copies of its own "
            "(__deepcopy__ or __reduce__), which would have W0: copy a merge(), or unwrap() the model first"
        )


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _blank(cls: type[nn.Module], keys: tuple[str, ...], quantized: bool) -> nn.Module:
    made: Any = class_for(cls, keys, quantized)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)
