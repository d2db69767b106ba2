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
import threading
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.isolation import calls_eagerly, runs_eagerly
from hsaid_kernels.wrapper.reads.hearing import said_methods
from hsaid_kernels.wrapper.reads.link import Place, Source, place_of, plain_type
from hsaid_kernels.wrapper.reads.registration import heard_methods
from hsaid_kernels.wrapper.w0.fsdp2 import is_of_fsdp, is_sharded
from hsaid_kernels.wrapper.weight import LOOKUPS, Weight, as_tensor, is_given


def attach(module: nn.Module, source: Source, names: Mapping[str, str | None], masks: Mapping[str, Any]) -> None:
    """Lets `source` answer reads of the attributes `names` and `masks` of the module; see `Place`."""
    place = place_of(module)
    if place is None or place.source is not source:
        place = module.__dict__["_hsaid"] = Place(source)
        computed = {key.removesuffix(end) for key in module._parameters for end in ("_orig", "_g") if key.endswith(end)}
        place.before = {key: module.__dict__[key] for key in computed if key in module.__dict__}
        _give_back(module)
    place.names, place.masks = dict(names), dict(masks)
    place.tables = frozenset(key for key, name in names.items() if name in source.tables)
    keys = (*place.names, *place.masks)
    heard = _is_made(type(module)) or not (keys or module._modules)
    if not heard or any(not isinstance(getattr(type(module), key, None), _Reading) for key in keys):
        module.__class__ = class_for(type(module), keys)  # type: ignore[arg-type]  # classes are hashable


def _give_back(module: nn.Module) -> None:
    """Where a projected weight was set as a parameter, as SyncBatchNorm's conversion does, puts its W0 back."""
    for key, value in module._parameters.items():
        if isinstance(value, Weight):
            module._parameters[key] = value.w0


def detach(module: nn.Module) -> None:
    """Gives the module its own class back. It reads its own parameters then."""
    if (place := module.__dict__.pop("_hsaid", None)) is not None:
        module.__dict__.update(place.before)
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
        parameter = module._parameters.get(key)
        if type(parameter) is not nn.Parameter and is_given(parameter):
            return parameter  # put there by torch.func.functional_call for the time of a call
        if parameter is not None and is_sharded(parameter) and is_of_fsdp(sys._getframe(1)):
            return parameter  # which FSDP2 looks for, having put it there
        place = module.__dict__.get("_hsaid")
        if place is not None and (parameter is None or key in place.names):
            if torch.compiler.is_compiling():
                return place.graph[key] if place.graph is not None else _eagerly(place, key, parameter, module)
            if key in place.tables and sys._getframe(1).f_code in LOOKUPS.values():
                return place.source.table(place.names[key], parameter)
            return _answer(place, key, parameter, module)
        if parameter is not None:
            return parameter
        if key in module.__dict__:
            return module.__dict__[key]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {key!r}")

    def write(module: nn.Module, value: Any) -> None:
        # nn.Module.__setattr__ comes first and has taken parameters, buffers and modules. A masked weight is what
        # prune's hook computes before each forward pass; reads compute it themselves.
        place = place_of(module)
        if place is None or key not in place.masks:
            module.__dict__[key] = value

    def delete(module: nn.Module) -> None:
        place = place_of(module)
        if place is not None and key in place.masks:
            raise RuntimeError(
                f"model: expected the mask of {key!r} to stay while an HSAID wraps the model: call unwrap() before "
                "prune.remove(), or remove masks from a merge()"
            )
        if key not in module.__dict__:
            raise AttributeError(key)
        del module.__dict__[key]

    return _Reading(read, write, delete)


@runs_eagerly
def _answer(place: Place, key: str, parameter: nn.Parameter | None, module: nn.Module) -> Any:
    try:
        if (weight := place.source.quickly(place.names.get(key), parameter)) is not None:
            return weight
        if key in place.masks:
            return place.masks[key].apply_mask(module)  # which reads "<key>_orig"
        if parameter is None:
            place.source.tree_changed()
            raise RuntimeError(f"model: expected the parameter {place.names[key]!r}, got a module without it")
        return place.source.read(place.names[key], parameter)
    except AttributeError as error:  # after which Python would ask nn.Module.__getattr__, which would answer with W0
        raise RuntimeError(f"model: {place.names.get(key)!r} cannot be read: {error}") from error


@runs_eagerly
def _eagerly(place: Place, key: str, parameter: nn.Parameter | None, module: nn.Module) -> Any:
    """`_answer` as an ordinary tensor, for a module that is compiled with others around it: ends the graph."""
    return as_tensor(_answer(place, key, parameter, module))


# What torch.compiler.disable sets, for functions that are called inside a graph.
_eagerly.__dict__["_torchdynamo_disable"] = True
_eagerly.__dict__["_torchdynamo_disable_msg"] = "a weight of an HSAID is read: compile the HSAID in place of its parts"


def _swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Sets the class of a module, as libraries of kernels do. The module keeps the properties of `attach`."""
    if place_of(module) is not None and not _is_made(cls):
        cls = class_for(cls, type(module)._hsaid_keys)  # type: ignore[arg-type, attr-defined]
    object.__dict__["__class__"].__set__(module, cls)


@functools.cache
def class_for(cls: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `cls`, under its name, with a property for each of `keys`."""
    if "_hsaid_keys" in cls.__dict__:  # more attributes than before
        return class_for(cls.__bases__[0], tuple(dict.fromkeys((*cls.__dict__["_hsaid_keys"], *keys))))
    members: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {key: _reading(key) for key in keys}
    members |= {
        "_hsaid_keys": keys,
        "__class__": property(type, _swap_class),
        **heard_methods(cls),
        **said_methods(cls),
    }
    # torch.jit.trace would compile properties
    members["__jit_unused_properties__"] = [*getattr(cls, "__jit_unused_properties__", ()), "__class__", *keys]
    if issubclass(cls, nn.RNNBase):
        # A list of the weights that torch keeps for itself, and moves into one buffer for cuDNN
        members["_flat_weights"] = property(_flat_weights, lambda module, value: None)
        members["__jit_unused_properties__"].append("_flat_weights")
        members["flatten_parameters"] = lambda module: None

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> Any:
        # pickle looks a class up by its name, but this one is made at run time
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (cls, keys), *reduced[2:])
        _refuse_copy(self)
        return reduced

    def __setstate__(self: nn.Module, state: dict[str, Any]) -> None:
        # Some classes, such as nn.LSTM, read their weights here, when the rest of the model is not there yet.
        own = dict(state)
        place = own.pop("_hsaid", None)
        super(made, self).__setstate__(own)
        if place is not None:
            self.__dict__["_hsaid"] = place

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        place = place_of(self)
        # A memo with something in it is that of a larger copy, which the wrapper may be a part of.
        if place is not None and not memo and not merging.active and (part := place.source.part_copy(self)) is not None:
            return part
        if hasattr(cls, "__deepcopy__"):
            if not _is_parametrized(cls):
                _refuse_copy(self)
            return cls.__deepcopy__(self, memo)
        reduced = self.__reduce_ex__(4)
        assert isinstance(reduced, tuple)
        return copy._reconstruct(self, memo, *reduced)  # type: ignore[attr-defined]  # as deepcopy does without this method

    members |= {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__, "__deepcopy__": __deepcopy__}
    metaclass: type = type(cls)
    made = metaclass(cls.__name__, (cls,), members)
    return made


def _is_parametrized(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize has made the class. Its copies have all of a module's attributes."""
    return cls.__name__.startswith("Parametrized") and "__deepcopy__" in cls.__dict__


class _Merging(threading.local):
    """Whether the thread copies a model that `merged_copy` corrects afterwards."""

    active = False


merging = _Merging()


def _refuse_copy(module: nn.Module) -> None:
    """Raises RuntimeError for a module whose class makes copies by itself, which would not read the weights of now."""
    if not merging.active and place_of(module) is not None:
        raise RuntimeError(
            f"model: expected modules that torch copies, got a {plain_type(module).__name__} with copies of its own "
            "(__deepcopy__ or __reduce__), which would have W0: copy a merge(), or unwrap() the model first"
        )


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _blank(cls: type[nn.Module], keys: tuple[str, ...]) -> nn.Module:
    made: Any = class_for(cls, keys)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)
