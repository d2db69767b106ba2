"""Replacing a model's parameters by other tensors while the model runs.

A *place* is an entry of some module's `_parameters`; a tied parameter has several places. `Places` finds them,
`Exchange` puts tensors there for the duration of a context, and `Cache` keeps projected weights until one of the
tensors they were computed from changes.
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
    """All places of a model's parameters.

    modules     all modules of the model
    parameters  {name: parameter} as in `named_parameters()`, where a tied parameter appears once
    slots       {name: [(module._parameters, key), ...]}, one entry for each place of the parameter
    tied        {name: [module, ...]} for the parameters that have several places
    masks       {name: [(module, key), ...]} for the parameters that torch.nn.utils.prune masks; the masked tensor is
                the attribute `key` of the module
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
        """Whether the model still has the same modules and parameters. Takes a sixth of the time of `Places(model)`."""
        return all(len(h) == len(seen) and all(map(operator.is_, h.values(), seen)) for h, seen in self._seen)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for holder, key in self.slots[name]:
                holder[key] = tensor
            # The mask is applied here and not by torch's forward pre-hook, because torch.nn.MultiheadAttention reads
            # the weights of layers that it never calls.
            for module, key in self.masks.get(name, ()):
                setattr(module, key, _Masked.apply(tensor, module._buffers[f"{key}_mask"]))


def aliases_of(model: nn.Module) -> dict[str, str]:
    """{other name: name} for tied parameters: every name by which `named_parameters()` does not list them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = (
        (f"{prefix}.{key}" if prefix else key, names[id(parameter)])
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    )
    return {place: name for place, name in places if place != name}


class Exchange:
    """A context manager inside which given tensors replace the model's parameters.

    The context can be entered again. Backward does so under gradient checkpointing: it recomputes a layer after the
    model has got its own parameters back, and the layer must find the same tensors as in forward.

    Args:
        places: of the model's parameters.
        tensors: {parameter name: replacement}. All other parameters are replaced by detached versions of themselves.
        lock: held inside the context, because all threads share one model.
        late: a sequence of (modules, names, make). At the first call of one of `modules`, or of another module that
            shares one of the parameters `names` by tying, the tensors that `make()` returns replace the parameters
            `names`. Autograd runs the most recently created nodes first. A node created just before some blocks of the
            model run is therefore reached as soon as backward has left the first of these blocks.
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
        # Layers in which transformers' gradient checkpointing is on, and the attribute that holds their checkpoint
        # function.
        self._checkpoints = [(m, "_gradient_checkpointing_func") for m in modules if m.get("gradient_checkpointing")]
        # Attributes to restore on exit: torch's RNN modules keep references to the weights of their last run, ...
        self._kept: list[tuple[dict[str, Any], str]]
        self._kept = [(m, key) for m in modules for key in ("_flat_weights", "_flat_weight_refs") if key in m]
        # ... and torch.nn.utils.prune stores the masked weight as an attribute of the module.
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
        """A forward pre-hook that puts the tensors of `make()` in place at its first call only."""
        waiting = [make]

        def hook(module: nn.Module, arguments: Any) -> None:
            # A block that is compiled, or inside torch.func.vmap or grad, keeps the tensors that are already in place.
            traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            if waiting and not traced:
                tensors = dict(zip(names, waiting.pop()(), strict=True))
                self._tensors |= tensors
                self._places.fill(tensors)

        return hook

    def _contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint`: the contexts for a layer's forward and for its recomputation."""
        return contextlib.nullcontext(), self


class _Masked(torch.autograd.Function):
    """weight * mask, as torch.nn.utils.prune computes it. Avoids `save_for_backward` for the reason in `Project`."""

    @staticmethod
    def forward(ctx, weight, mask):
        ctx.mask = mask
        return weight * mask.to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.mask.to(grad.dtype), None


def masks(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, BasePruningMethod]]:
    """(module, hook) for each parameter masked by torch.nn.utils.prune, which does so in a forward pre-hook."""
    hooks = ((module, hook) for module in modules for hook in module._forward_pre_hooks.values())
    return [(module, hook) for module, hook in hooks if isinstance(hook, BasePruningMethod)]


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Recomputes the masked weights that torch.nn.utils.prune stores in modules from their current parameters."""
    for module, hook in masks(model.modules()):
        hook(module, None)


@torch.no_grad()
def merged_copy(model: nn.Module, own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of the model in which copies of `values` replace the parameters of these names.

    `own` holds the model's own parameters by name.
    """
    # deepcopy treats an entry of the memo as a finished copy, so the parameters that are replaced are not copied.
    memo: dict[int, Any] = {
        id(own[name]): nn.Parameter(value.clone(), own[name].requires_grad) for name, value in values.items()
    }
    for module, hook in masks(model.modules()):  # the masked weights stored by torch.nn.utils.prune
        made = getattr(module, hook._tensor_name)
        memo[id(made)] = made.detach()
    merged = copy.deepcopy(model, memo)
    apply_masks(merged)
    return merged


class Cache:
    """Projected weights, together with the tensors they were computed from, to detect when they are out of date.

    Small tensors (theta, multipliers) are compared by value, because fused optimizers write to them without increasing
    torch's version counter. Large ones (W0) are compared by address and version counter. The cache keeps references to
    them, so no new tensor can get the same address.
    """

    def __init__(self, small: Sequence[Tensor], large: Sequence[Tensor], weights: tuple[Tensor, ...]):
        self._small = [tensor.detach().clone() for tensor in small]
        self._large = [tensor.detach() for tensor in large]
        self.weights = weights
        self._stamp = self._stamp_of(large)

    def serves(self, small: Sequence[Tensor], large: Sequence[Tensor]) -> bool:
        """Whether the cached weights are unmodified and were computed from tensors equal to these."""
        same = self._stamp is not None and self._stamp == self._stamp_of(large)
        return same and all(map(torch.equal, self._small, small))

    def _stamp_of(self, large: Sequence[Tensor]) -> list[tuple[int, int]] | None:
        if any(tensor.is_inference() for tensor in large):  # inference tensors have no version counter
            return None
        return [(tensor.data_ptr(), tensor._version) for tensor in (*large, self.weights[0])]
