"""`Snapshot`: the modules and parameters of a model at one moment, to tell whether anything has changed since."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from hsaid_kernels.wrapper.w0.stored import parameters_of, shown_in
from hsaid_kernels.wrapper.w0.values import stands_for
from hsaid_kernels.wrapper.weight import is_given


class Snapshot:
    """What a model looked like when it was wrapped, and whenever it was found changed later.

    Attributes:
        modules: all modules of the model but the model itself: the model keeps its snapshot, and would be a circle.
        parameters: {name: parameter} as in `named_parameters()`, where a tied parameter appears once.
        places: {name: (module, attribute)}, where the parameter is.
        aliases: {other name: name} for tied parameters: every name by which `named_parameters()` does not list them.
            A module in several places counts once.
    """

    def __init__(self, model: nn.Module):
        everything = list(model.modules())
        self.modules = everything[1:]
        self.parameters = parameters_of(model)
        names = self.names()
        self.aliases = {}
        self.places: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in shown_in(module).items():
                if parameter is not None:
                    place = f"{prefix}.{key}" if prefix else key
                    self.places.setdefault(names[id(parameter)], (weakref.ref(module), key))
                    if place != names[id(parameter)]:
                        self.aliases[place] = names[id(parameter)]
        holders = [holder for module in everything for holder in (module._parameters, module._modules)]
        self._empty = [holder for holder in holders if not holder]
        every: list[Any] = holders
        self._seen = [(holder, dict(holder), tuple(map(id, holder.values()))) for holder in every if holder]
        # Those of modules whose weight a hook computes from buffers, as spectral_norm's does
        hooked = [module for module in everything if module._forward_pre_hooks and module._buffers]
        self._buffers = {id(module): dict(module._buffers) for module in hooked}

    def names(self) -> dict[int, str]:
        """{id of the parameter: name}."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    def now(self, name: str) -> nn.Parameter:
        """The parameter that is in the model now, which may be a shard or what FSDP2 has gathered."""
        place, key = self.places[name]
        module = place()
        parameter = None if module is None else shown_in(module).get(key)
        if parameter is None:
            raise RuntimeError(f"model: expected {name!r} to be in use, but its module is gone")
        return parameter

    def put_back(self, changed: nn.Module | None) -> None:
        """Gives modules the parameters, and the modules with parameters, that were taken out of them, in their order.

        Also those in whose place is one on the meta device. And `changed` its buffers: other modules may have dropped
        theirs by themselves.
        """
        known = self.names()
        for holder, whole, _ in self._seen:
            if any(_is_lost(holder.get(key), value) and _has_one_of(known, value) for key, value in whole.items()):
                now = {key: value for key, value in holder.items() if not _is_lost(value, whole.get(key))}
                holder.clear()
                holder.update(whole | now)
        if changed is not None:
            changed._buffers.update(self._buffers.get(id(changed), {}) | changed._buffers)

    def holds(self) -> bool:
        """Whether the model still has the same modules and parameters. Takes a twelfth of the time of a new one."""
        if any(map(len, self._empty)):
            return False
        if all(tuple(map(id, holder.values())) == ids for holder, _, ids in self._seen):
            return True
        # torch.func.functional_call puts tensors in the places of parameters, without telling the module, and so does
        # FSDP2 while a block runs.
        return all(
            len(holder) == len(seen)
            and all(
                now is then or (isinstance(then, nn.Parameter) and (is_given(now, then) or stands_for(now, then)))
                for now, then in zip(holder.values(), seen.values())
            )
            for holder, seen, _ in self._seen
        )


def _is_lost(now: nn.Module | nn.Parameter | None, before: object) -> bool:
    """Whether nothing is in its place, or a parameter without values in that of one with them."""
    return now is None or (isinstance(now, nn.Parameter) and now.is_meta and not getattr(before, "is_meta", True))


def _has_one_of(known: Mapping[int, str], value: nn.Module | nn.Parameter | None) -> bool:
    """Whether this is one of the parameters, or a module with one of them."""
    parameters = value.parameters() if isinstance(value, nn.Module) else [value]
    return any(id(parameter) in known for parameter in parameters)
