"""Makes every read of a weight of a wrapped model, such as `layer.weight`, give the projected weight.

W0 stays where it is, in `module._parameters`, where `named_parameters()`, `state_dict()`, `load_state_dict()` and
`to()` find it. What changes is the module's class: a subclass of it has a property for each parameter, and Python looks
for a property of the class before `nn.Module.__getattr__` looks into `_parameters`. `torch.nn.utils.parametrize` does
the same, but moves the parameter into another module, which renames it and breaks ties.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils.prune import BasePruningMethod

from hsaid_kernels.wrapper.eager import calls_eagerly, runs_eagerly
from hsaid_kernels.wrapper.sharded import is_of_fsdp, is_sharded
from hsaid_kernels.wrapper.tree import Tree
from hsaid_kernels.wrapper.weight import LOOKUPS, Weight, as_tensor, is_given


class Source(Protocol):
    """What a read is answered by. `ProjectedWeights` implements it."""

    def read(self, name: str | None, parameter: nn.Parameter) -> Tensor:
        """The tensor of now for the parameter `name`, whose W0 is `parameter`; None if it is new in the model."""

    def quickly(self, name: str | None, parameter: nn.Parameter | None) -> Tensor | None:
        """What `read` gives, or None where this cannot be told quickly."""

    def table(self, name: str | None, parameter: nn.Parameter) -> object:
        """What a lookup of rows gets, in the place of the tensor."""

    @property
    def tables(self) -> Collection[str]:
        """Names of the tensors of which single rows are made."""

    def tree_changed(self) -> None:
        """Notes that a module or a parameter of the model has been replaced or added."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether this is a parameter of the model, or a projected weight of one."""

    @property
    def others(self) -> set[str]:
        """Names of parameters that may be added to the model."""


class Place:
    """What a module of a wrapped model knows of its wrapper, as its attribute `_hsaid`.

    source  answers the module's reads
    names   {attribute: name of the parameter in the model}
    tables  attributes that only embeddings have, and of which `source` makes single rows
    masks   {attribute: torch.nn.utils.prune's hook}, for masked weights, which prune stores as ordinary attributes
    graph   {attribute: tensor} while the module runs compiled (`compiled.py`), else None
    tree    of the model itself: what it looked like when it was last looked at, else None
    before  {attribute: tensor} of what hooks have computed from a parameter and stored in the module, such as
            weight_norm's `weight`, computed from `weight_g` and `weight_v`
    """

    def __init__(self, source: Source):
        self.source = source
        self.names: dict[str, str | None] = {}
        self.tables: frozenset[str] = frozenset()
        self.masks: dict[str, BasePruningMethod] = {}
        self.graph: dict[str, Tensor] | None = None
        self.tree: Tree | None = None
        self.before: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None, "tree": None}


def place_of(module: nn.Module) -> Place | None:
    return module.__dict__.get("_hsaid")


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
    if any(not isinstance(getattr(type(module), key, None), _Reading) for key in keys):
        module.__class__ = _class_for(type(module), keys)  # type: ignore[arg-type]  # classes are hashable


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


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's own class, without the properties of `attach`."""
    return next(kind for kind in type(module).__mro__ if "_hsaid_keys" not in kind.__dict__)


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


@functools.cache
def _class_for(cls: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `cls`, under its name, with a property for each of `keys`."""
    if "_hsaid_keys" in cls.__dict__:  # more attributes than before
        return _class_for(cls.__bases__[0], tuple(dict.fromkeys((*cls.__dict__["_hsaid_keys"], *keys))))
    members: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {key: _reading(key) for key in keys}
    members["_hsaid_keys"] = keys
    # torch.jit.trace would compile properties
    members["__jit_unused_properties__"] = [*getattr(cls, "__jit_unused_properties__", ()), *keys]
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
        _refuse_copy(self)
        return super(made, self).__deepcopy__(memo)

    def __delattr__(self: nn.Module, name: str) -> None:
        place = place_of(self)
        if place is not None and name in place.names:
            raise RuntimeError(
                f"model: expected the parameter {place.names[name]!r} to stay while an HSAID wraps the model: unwrap() "
                "it first"
            )
        super(made, self).__delattr__(name)

    members |= {"__reduce_ex__": __reduce_ex__, "__setstate__": __setstate__, "__delattr__": __delattr__}
    if hasattr(cls, "__deepcopy__") and not _is_parametrized(cls):
        members["__deepcopy__"] = __deepcopy__
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
    made: Any = _class_for(cls, keys)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)


def _on_registration(module: nn.Module, name: str, value: Any) -> Any:
    """Torch calls this before a module or parameter is put into any module, and puts there what it returns, if any."""
    place = place_of(module)
    if place is None or value is None:
        return None
    _refuse_others(place, module, name, value)
    place.source.tree_changed()
    if isinstance(value, nn.Module):
        # Its reads are ours from now on. `source` learns the names of its parameters at the first read.
        for inner in value.modules():
            if place_of(inner) is None:
                attach(inner, place.source, {key: None for key, p in inner._parameters.items() if p is not None}, {})
        return None
    return value.w0 if isinstance(value, Weight) else None


def _refuse_others(place: Place, module: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Raises ValueError if `value` would give the model other tensors, or belongs to another wrapped model."""
    before = module._modules.get(name) if isinstance(value, nn.Module) else module._parameters.get(name)
    inside = [] if isinstance(value, Tensor) else list(value.modules())
    if any((other := place_of(inner)) is not None and other.source is not place.source for inner in inside):
        raise ValueError(f"model: expected {name!r} to be a plain module, got one that is wrapped in another model")
    tensors = [] if isinstance(value, Tensor) else list(value.parameters())
    if tensors and all(map(place.source.owns, tensors)):  # another name for a module of the model
        return
    own, others = _shapes(before), _shapes(value)
    if name not in place.source.others and own != others:
        raise ValueError(
            f"model: expected {name!r} in a {plain_type(module).__name__} to keep its tensors ({own or 'none'}) while "
            f"an HSAID wraps the model, got others ({others or 'none'}): unwrap() it first"
        )


def _shapes(of: nn.Module | Tensor | None) -> dict[str, tuple[int, ...]]:
    tensors = {} if of is None else {"": of} if isinstance(of, Tensor) else dict(of.named_parameters())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@functools.cache
def watch_registrations() -> None:
    """From now on, modules that are put into a wrapped model belong to it at once."""
    hook: Callable[..., Any] = _on_registration
    register_module_module_registration_hook(hook)
    register_module_parameter_registration_hook(hook)
