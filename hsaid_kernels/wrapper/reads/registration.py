"""What is put into a wrapped model, or taken out of it: accepted, or refused before anything has changed.

torch tells of what is put, by its registration hooks, but not of what is taken, and often takes one thing before it
puts another: `weight_norm` deletes `weight` and then registers `weight_g`. So a refusal puts back what has been taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from hsaid_kernels.wrapper.reads.link import Link, link_of, plain_type
from hsaid_kernels.wrapper.w0.stored import SHOWN, shown_in
from hsaid_kernels.wrapper.w0.values import has_own_memory
from hsaid_kernels.wrapper.weight import Weight


def change_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods for a subclass of `cls`, the class of a module in a wrapped model, that hear of changes to it."""

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if (link := link_of(self)) is not None:
            if param is None:
                _check_stays(link, self, name)
            else:  # torch itself refuses a weight with a graph, before its hooks are called
                param = _accepted(link, self, name, param)
        cls.register_parameter(self, name, param)

    def __delattr__(self: nn.Module, name: str) -> None:
        if (link := link_of(self)) is not None:
            _check_stays(link, self, name)
        cls.__delattr__(self, name)

    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        for prefix, module in self.named_modules():
            if (link := link_of(module)) is not None:
                for key in link.names:
                    name = f"{prefix}.{key}" if prefix else key
                    _check_loaded(link, module, key, state_dict.get(name))
        return cls.load_state_dict(self, state_dict, *args, **kwargs)

    def _load_from_state_dict(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        link = link_of(self)  # as a part of a larger module, which has checked nothing
        try:
            if link is not None:
                for key in link.names:
                    _check_loaded(link, self, key, state_dict.get(f"{prefix}{key}"))
        except (RuntimeError, ValueError) as error:
            args[-1].append(str(error))  # which load_state_dict() raises
        else:
            cls._load_from_state_dict(self, state_dict, prefix, *args)

    return {
        "register_parameter": register_parameter,
        "__delattr__": __delattr__,
        "load_state_dict": load_state_dict,
        "_load_from_state_dict": _load_from_state_dict,
    }


def _check_loaded(link: Link, module: nn.Module, key: str, value: object) -> None:
    own = shown_in(module).get(key)
    if own is not None and isinstance(value, Tensor) and not _are_codes_of(module, key, value):
        link.changes.check_set("load_state_dict()", own, value)


def _check_stays(link: Link, module: nn.Module, name: str) -> None:
    """Raises RuntimeError if `name` is a parameter of the model, or a module with parameters of the model."""
    inside = module._modules.get(name)
    taken = [] if inside is None else [own for own in inside.parameters() if link.changes.owns(own)]
    if (name in link.names and shown_in(module).get(name) is not None) or taken:
        link.changes.put_back(module)
        what = f"the module {name!r}" if taken else f"the parameter {link.names[name] or name!r}"
        raise RuntimeError(f"model: expected {what} to stay while an HSAID wraps the model: unwrap() it first")


def _on_registration(module: nn.Module, name: str, value: Any) -> Any:
    """Torch calls this before a module or parameter is put into any module, and puts there what it returns, if any."""
    link = link_of(module)
    if link is None:
        return _tied(module, name, value) if isinstance(value, Weight) else None
    if value is None:
        return _check_stays(link, module, name)
    accepted = _accepted(link, module, name, value)
    link.changes.note_change()
    if isinstance(value, nn.Module):
        # Its reads are ours from now on. The next look at the model gives its parameters names.
        for inner in value.modules():
            if link_of(inner) is None:
                link.changes.adopt(inner, [key for key, own in inner._parameters.items() if own is not None])
        return None
    return accepted if accepted is not value else None


def _tied(module: nn.Module, name: str, value: Weight) -> nn.Parameter:
    """Ties a module outside of the model to a weight of it, as tied modules inside are: both read the weight of now."""
    if (changes := value.changes()) is not None:
        changes.adopt(module, [name])
    return value.w0


def _accepted(link: Link, module: nn.Module, name: str, value: Any) -> Any:
    """`value`, or W0 in the place of a weight of the model. Raises, and puts back what was taken out, if it is refused.

    ValueError if `value` would give the model other tensors, or belongs to another wrapped model; RuntimeError if it
    would become W0 although it may have been computed from a weight.
    """
    try:
        _check(link, module, name, value)
    except (ValueError, RuntimeError):
        link.changes.put_back(module)
        raise
    return value.w0 if isinstance(value, Weight) else value


def _check(link: Link, module: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    before = module._modules.get(name) if isinstance(value, nn.Module) else module._parameters.get(name)
    modules = [] if isinstance(value, Tensor) else list(value.modules())
    if any((other := link_of(inner)) is not None and other.changes is not link.changes for inner in modules):
        raise ValueError(f"model: expected {name!r} to be a plain module, got one that is wrapped in another model")
    own, others = _tensors(before), _tensors(value)
    inside = set(map(id, map(_w0, others.values())))
    stay = all(id(parameter) in inside for parameter in own.values() if link.changes.owns(parameter))
    if isinstance(value, nn.Module) and others and stay and all(map(link.changes.owns, others.values())):
        return  # another name for a module of the model
    if name not in link.changes.others and _shapes(own) != _shapes(others):
        raise ValueError(
            f"model: expected {name!r} in a {plain_type(module).__name__} to keep its tensors "
            f"({_shapes(own) or 'none'}) while an HSAID wraps the model, got others ({_shapes(others) or 'none'}): "
            "unwrap() it first"
        )
    if isinstance(value, Tensor) and name != "bias" and not _are_codes_of(module, name, value):
        stands_for = module.__dict__.get(SHOWN, {}).get("weight")
        if stands_for is not None:  # by a weight that is computed from what is put here
            link.changes.check_set("model", stands_for, value)
    for key, parameter in own.items():
        if key in others and isinstance(parameter, nn.Parameter):
            link.changes.check_set("model", parameter, others[key])


def _are_codes_of(module: nn.Module, key: str, value: Tensor) -> bool:
    """Whether a quantized layer has these codes under this name already."""
    own = module._parameters.get(key, module._buffers.get(key))
    if SHOWN not in module.__dict__ or key == "bias" or own is None:
        return False
    if value is own or not (has_own_memory(value) and has_own_memory(own)):
        return value is own
    same = (value.dtype, value.shape, value.device) == (own.dtype, own.shape, own.device)
    return same and torch.equal(*(codes.detach().flatten().view(torch.uint8) for codes in (value, own)))


def _tensors(of: nn.Module | Tensor | None) -> dict[str, Tensor]:
    return {} if of is None else {"": of} if isinstance(of, Tensor) else dict(of.named_parameters())


def _w0(tensor: Tensor) -> Tensor:
    return tensor.w0 if isinstance(tensor, Weight) else tensor


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@functools.cache
def watch_registrations() -> None:
    """From now on, modules that are put into a wrapped model belong to it at once."""
    hook: Callable[..., Any] = _on_registration
    register_module_module_registration_hook(hook)
    register_module_parameter_registration_hook(hook)
