"""Other tensors in the places of a model's parameters: finding the places, filling them while the model runs, and
keeping what fills them until something that it was made from changes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

Late = tuple[Sequence[nn.Module], Sequence[str], Callable[[], Sequence[Tensor]]]


class Places:
    """Where a model's parameters are.

    modules     all of the model's
    parameters  {name: parameter}, as `named_parameters` has them: tied ones once
    slots       {name: a module's _parameters and the key in it, for each place}: several for a tied parameter
    tied        {name: the modules that have it} for those that are in several places
    masks       {name: (module, key of what is made of it) for each place} for those that torch.nn.utils.prune masks
    """

    def __init__(self, model: nn.Module):
        self.modules = list(model.modules())
        self.parameters = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.slots: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        owners: dict[str, list[nn.Module]] = defaultdict(list)
        for module in self.modules:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.slots[names[id(parameter)]].append((module._parameters, key))
                    owners[names[id(parameter)]].append(module)
        self.tied = {name: modules for name, modules in owners.items() if len(modules) > 1}
        self.masks: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module, hook in masks(self.modules):
            key = hook._tensor_name
            self.masks[names[id(module._parameters[f"{key}_orig"])]].append((module, key))
        holders = [holder for module in self.modules for holder in (module._parameters, module._modules)]
        self._seen = [(holder, tuple(holder.values())) for holder in holders]

    def hold(self) -> bool:
        """Whether the model still has the same modules and parameters: a sixth of the time that finding them takes."""
        return all(len(h) == len(seen) and all(map(operator.is_, h.values(), seen)) for h, seen in self._seen)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for holder, key in self.slots[name]:
                holder[key] = tensor
            # Not left to torch's hook: torch.nn.MultiheadAttention reads weights of layers that it never calls.
            for module, key in self.masks.get(name, ()):
                setattr(module, key, _Masked.apply(tensor, module._buffers[f"{key}_mask"]))


def aliases_of(model: nn.Module) -> dict[str, str]:
    """{place: name} for the places of tied parameters that do not have the name of the parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = (
        (f"{prefix}.{key}" if prefix else key, names[id(parameter)])
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    )
    return {place: name for place, name in places if place != name}


class Exchange:
    """A context in which tensors stand in the places of a model's parameters.

    It can be entered again, and backward does: a checkpointed layer is run a second time there, when the model has its
    own parameters back, and must find what it found in forward.

    Args:
        tensors: what stands in, by the parameter's name; the other parameters are detached.
        lock: held inside, because the model is one for all threads.
        late: (modules, names, make): from the first call of one of the modules, or of another one that has one of the
            names, on, what `make` gives stands in for these. Autograd runs what was made last first, so a node that is
            made just before blocks of the model run is reached as soon as backward leaves the first of them.
    """

    def __init__(
        self,
        places: Places,
        tensors: dict[str, Tensor],
        lock: threading.RLock,
        late: Sequence[Late] = (),
    ):
        self._places = places
        self._tensors = {name: p.detach() for name, p in places.parameters.items() if name not in tensors} | tensors
        modules = [module.__dict__ for module in places.modules]
        # transformers' gradient checkpointing: layers that have it on, and in each of them the function that does it
        self._checkpoints = [(m, "_gradient_checkpointing_func") for m in modules if m.get("gradient_checkpointing")]
        # torch's RNNs keep the weights that they last ran on, and would keep ours alive
        self._kept: list[tuple[dict[str, Any], str]]
        self._kept = [(m, key) for m in modules for key in ("_flat_weights", "_flat_weight_refs") if key in m]
        # and torch.nn.utils.prune leaves the masked weight in its module
        self._kept += [(module.__dict__, key) for masked in places.masks.values() for module, key in masked]
        self._lock = lock
        self._late = late
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._saved: list[list[tuple[dict[str, Any], str, Any]]] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        slots = [slot for slots in self._places.slots.values() for slot in slots]
        self._saved.append([(holder, key, holder[key]) for holder, key in (*slots, *self._checkpoints, *self._kept)])
        self._places.fill(self._tensors)
        for module, key in self._checkpoints:
            module[key] = functools.partial(module[key], use_reentrant=False, context_fn=self._contexts)
        for modules, names, make in self._late:
            hook, tied = self._once(names, make), self._places.tied
            for place in {*modules, *(owner for name in names if name in tied for owner in tied[name])}:
                self._handles.append(place.register_forward_pre_hook(hook, prepend=True))
        self._late = ()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for holder, key, value in self._saved.pop():
            holder[key] = value
        self._lock.release()

    def _once(self, names: Sequence[str], make: Callable[[], Sequence[Tensor]]) -> Callable[[nn.Module, Any], None]:
        """A hook that the first time that it is called puts what `make` gives in place."""
        waiting = [make]

        def hook(module: nn.Module, arguments: Any) -> None:
            # A compiled block, or one inside torch.func.vmap or grad, keeps what stands there already.
            traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            if waiting and not traced:
                tensors = dict(zip(names, waiting.pop()(), strict=True))
                self._tensors |= tensors
                self._places.fill(tensors)

        return hook

    def _contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For `torch.utils.checkpoint`: what surrounds a layer in forward, and when it is run again."""
        return contextlib.nullcontext(), self


class _Masked(torch.autograd.Function):
    """What torch.nn.utils.prune makes of a weight. It saves nothing in torch's way: see `Project`."""

    @staticmethod
    def forward(ctx, weight, mask):
        ctx.mask = mask
        return weight * mask.to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.mask.to(grad.dtype), None


def masks(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, BasePruningMethod]]:
    """(module, hook) for each parameter that torch.nn.utils.prune masks before its module runs."""
    hooks = ((module, hook) for module in modules for hook in module._forward_pre_hooks.values())
    return [(module, hook) for module, hook in hooks if isinstance(hook, BasePruningMethod)]


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Makes what torch.nn.utils.prune leaves in modules that it masks from their parameters as they are now."""
    for module, hook in masks(model.modules()):
        hook(module, None)


@torch.no_grad()
def merged_copy(model: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model, whose parameters are `own`, with copies of `values` in the place of those of these names."""
    # deepcopy takes what it finds in the memo for the copy already made, so the model's own are not copied.
    memo: dict[int, Any] = {
        id(own[name]): nn.Parameter(value.clone(), own[name].requires_grad) for name, value in values.items()
    }
    for module, hook in masks(model.modules()):  # what torch.nn.utils.prune has made of them
        made = getattr(module, hook._tensor_name)
        memo[id(made)] = made.detach()
    merged = copy.deepcopy(model, memo)
    apply_masks(merged)
    return merged


class Cache:
    """Weights and what they were made from: small tensors, compared by value, because torch does not count what fused
    optimizers write, and large ones. While these are held, no other tensor can have their address.
    """

    def __init__(self, small: Sequence[Tensor], large: Sequence[Tensor], weights: tuple[Tensor, ...]):
        self._small = [tensor.detach().clone() for tensor in small]
        self._large = [tensor.detach() for tensor in large]
        self.weights = weights
        self._stamp = self._stamp_of(large)

    def serves(self, small: Sequence[Tensor], large: Sequence[Tensor]) -> bool:
        """Whether nothing has been written to the weights, and they would be made from the same again."""
        same = self._stamp is not None and self._stamp == self._stamp_of(large)
        return same and all(map(torch.equal, self._small, small))

    def _stamp_of(self, large: Sequence[Tensor]) -> list[tuple[int, int]] | None:
        if any(tensor.is_inference() for tensor in large):  # these do not count their changes
            return None
        return [(tensor.data_ptr(), tensor._version) for tensor in (*large, self.weights[0])]
