"""`Tree`: the modules and parameters of a model at one moment, with ties and masks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from hsaid_kernels.wrapper.w0.fsdp2 import is_gathered, is_sharded
from hsaid_kernels.wrapper.w0.quantized import is_quantized
from hsaid_kernels.wrapper.weight import is_given


class Tree:
    """
    modules     all modules of the model but the model itself, so that a model that keeps its tree makes no circle
    parameters  {name: parameter} as in `named_parameters()`, where a tied parameter appears once
    places      {name: (module, attribute)} where the parameter is
    sharded     whether FSDP2 has sharded the model
    aliases     {other name: name} for tied parameters: every name by which `named_parameters()` does not list them.
                A module in several places counts once
    """

    def __init__(self, model: nn.Module, sharded: bool = False):
        self.sharded = sharded
        everything = list(model.modules())
        self.modules = everything[1:]
        self.parameters = dict(model.named_parameters())
        names = self.names()
        self.aliases = {}
        self.places: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    place = f"{prefix}.{key}" if prefix else key
                    self.places.setdefault(names[id(parameter)], (weakref.ref(module), key))
                    if place != names[id(parameter)]:
                        self.aliases[place] = names[id(parameter)]
        holders = [holder for module in everything for holder in (module._parameters, module._modules)]
        self._empty = [holder for holder in holders if not holder]
        self._seen = [(holder, tuple(holder.values()), tuple(map(id, holder.values()))) for holder in holders if holder]
        every: list[Any] = holders
        self._whole = [(holder, dict(holder)) for holder in every if holder]
        # Those of modules whose weight a hook computes from buffers, as spectral_norm's does
        hooked = [module for module in everything if module._forward_pre_hooks and module._buffers]
        self._buffers = {id(module): dict(module._buffers) for module in hooked}

    def names(self) -> dict[int, str]:
        """{id of the parameter: name}."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    def now(self, name: str) -> nn.Parameter:
        """The parameter that is in the model now, which may be a shard or what FSDP2 has gathered."""
        module, key = self.places[name]
        parameter = getattr(module(), "_parameters", {}).get(key)
        if parameter is None:
            raise RuntimeError(f"model: expected {name!r} to be in use, but its module is gone")
        return parameter

    def put_back(self, changed: nn.Module | None) -> None:
        """Gives modules the parameters, and the modules with parameters, that were taken out of them, in their order.

        And `changed` its buffers: other modules may have dropped theirs by themselves.
        """
        known = self.names()
        for holder, whole in self._whole:
            if any(holder.get(key) is None and _has_one_of(known, value) for key, value in whole.items()):
                now = {key: value for key, value in holder.items() if value is not None}
                holder.clear()
                holder.update(whole | now)
        if changed is not None:
            changed._buffers.update(self._buffers.get(id(changed), {}) | changed._buffers)

    def holds(self) -> bool:
        """Whether the model still has the same modules and parameters. Takes a twelfth of the time of `Tree(model)`."""
        if any(map(len, self._empty)):
            return False
        if all(tuple(map(id, holder.values())) == ids for holder, _, ids in self._seen):
            return True
        # torch.func.functional_call puts tensors in the places of parameters, without telling the module, and so does
        # FSDP2 while a block runs.
        return all(
            len(holder) == len(seen)
            and all(
                now is then
                or (
                    isinstance(then, nn.Parameter)
                    and (is_given(now, then) or (self.sharded and is_gathered(now, then)))
                )
                for now, then in zip(holder.values(), seen)
            )
            for holder, seen, _ in self._seen
        )


def _has_one_of(known: Mapping[int, str], value: nn.Module | nn.Parameter | None) -> bool:
    """Whether this is one of the parameters, or a module with one of them."""
    parameters = value.parameters() if isinstance(value, nn.Module) else [value]
    return any(id(parameter) in known for parameter in parameters)


def forget_derived(model: nn.Module) -> None:
    """Lets modules forget what they have derived from their weights for evaluation, such as LeViT's attention biases.

    These are modules that keep tensors in a dict, and have a `train` of their own, which clears it. Their modes stay.
    """
    for module in model.modules():
        if type(module).train is not nn.Module.train and any(map(_has_tensors, module.__dict__.items())):
            modes = [(inner, inner.training) for inner in module.modules()]
            module.train(True)
            for inner, mode in modes:
                inner.training = mode


def _has_tensors(item: tuple[str, object]) -> bool:
    key, value = item
    return isinstance(value, dict) and key[0] != "_" and any(isinstance(inner, Tensor) for inner in value.values())


def masks(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, BasePruningMethod]]:
    """(module, hook) for each parameter masked by torch.nn.utils.prune, which does so in a forward pre-hook."""
    hooks = ((module, hook) for module in modules for hook in module._forward_pre_hooks.values())
    return [(module, hook) for module, hook in hooks if isinstance(hook, BasePruningMethod)]


def check_separate(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, which names two tensors, if one shares memory with another."""
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type != "meta" and tensor.numel() and not (is_sharded(tensor) or is_quantized(tensor)):
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    for names in by_storage.values():
        if len(names) == 1 or not names:
            continue
        storage = tensors[names[0]].untyped_storage()
        owner = torch.full((storage.nbytes(),), -1, dtype=torch.int32, device="cpu")  # of each byte
        for number, name in enumerate(names):
            tensor = tensors[name]
            size = tensor.element_size()
            strides = (*(stride * size for stride in tensor.stride()), 1)
            own = owner.as_strided((*tensor.shape, size), strides, tensor.storage_offset() * size)
            if (taken := own[own >= 0]).numel():
                other = names[int(taken.flatten()[0])]
                raise ValueError(
                    f"model: expected parameters that are tied or have their own memory, got {other!r} and {name!r}, "
                    "which share memory: make them the same nn.Parameter, or copy one of them"
                )
            own.fill_(number)
