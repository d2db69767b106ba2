"""Which models an HSAID may wrap: plain modules, whose layers and parameters do nothing that it would not hear."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.w0.fsdp2 import check_partitioned, check_sharding, is_fsdp, is_sharded
from hsaid_kernels.wrapper.w0.quantized import check_quantized, check_read
from hsaid_kernels.wrapper.w0.snapshot import check_separate

# Wrappers that split a model's parameters or make replicas of them. By name: importing them takes a second.
PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def plain(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, so that parameters have the names of the plain model; or the model.

    Raises TypeError if the model is or contains a parallel wrapper, which must be applied to the HSAID instead, because
    it would synchronize W0 and not theta; or if it has parameters in shards that are not FSDP2's, or weights in few
    bits that cannot be W0.
    """
    if not isinstance(model, nn.Module):
        return model  # which is refused where the argument is checked
    if type(model).__name__ == "OptimizedModule" and isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        return plain(inside)
    for name in (kind.__name__ for module in model.modules() for kind in type(module).__mro__):
        if name in PARALLEL:
            raise TypeError(
                f"model: expected a plain module, got one in {name}, which would not synchronize theta: wrap the plain "
                "model in HSAID, and that in DistributedDataParallel"
            )
    parameters = dict(model.named_parameters())
    check_partitioned(parameters)
    check_quantized(model)
    check_sharding(parameters)
    if sharded := [name for name, parameter in parameters.items() if is_sharded(parameter)]:
        if not any(map(is_fsdp, model.modules())):
            raise TypeError(
                f"model: expected whole parameters or those of FSDP2 (fully_shard), got {sharded[0]!r}, a DTensor that "
                "no module of the model gathers"
            )
    return model


def check_layers(model: nn.Module, projected: Collection[str], full: Collection[str]) -> None:
    """Raises for layers that would not run on projected weights; `full` are the names of the fully trained tensors.

    TypeError for a ScriptModule, whose reads of parameters are compiled, and for a layer that quantizes what it reads.
    ValueError for an embedding with max_norm, which writes to its own weight in forward.
    """
    check_read(model, projected)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module._parameters:
            raise TypeError(f"model: expected Python modules, got {name!r}, which is a torch.jit.ScriptModule")
        limited = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        if limited and (f"{name}.weight" if name else "weight") not in full:
            raise ValueError(
                f"model: expected layers that do not write to their own weights, got {name!r}, a "
                f"{type(module).__name__} with max_norm={module.max_norm}: set max_norm to None, or train it fully "
                "(train_fully=)"
            )


def check_captured(model: nn.Module, trained: Iterable[str]) -> None:
    """Raises ValueError if a module keeps one of the tensors `trained` elsewhere than as its parameter.

    For example in a list or a functools.partial: what it reads there would be W0.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameters[name]): name for name in trained}
    own = {"_parameters", "_buffers", "_modules", "_flat_weights", "_hsaid"}
    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in own:
                continue
            held = [value]
            if isinstance(value, functools.partial):
                held = [*value.args, *value.keywords.values()]
            elif isinstance(value, (list, tuple, set)):
                held = list(value)
            elif isinstance(value, dict):
                held = list(value.values())
            if name := next((names[id(inner)] for inner in held if id(inner) in names), None):
                place = f"{prefix}.{key}" if prefix else key
                raise ValueError(
                    f"model: expected modules that read {name!r} as their parameter, got {place!r}, which keeps it by "
                    "itself and would have W0: leave the tensor out (exclude=), or read it from its module"
                )


def check_parameters(model: nn.Module, trained: Collection[str]) -> None:
    """Raises ValueError if one of the tensors `trained` has gradient hooks, or if modules keep it elsewhere.

    Raises ValueError also if parameters of the model share memory without being tied.
    """
    parameters = dict(model.named_parameters())
    check_hooks({name: parameters[name] for name in trained})
    check_captured(model, trained)
    check_separate(parameters)


def check_hooks(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a parameter with gradient hooks, by name."""
    for name, parameter in parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"model: expected parameters without gradient hooks, got {name!r} with one: in a random subspace theta "
                "has the gradient, and moves whole tensors: leave the tensor out (exclude=), or register hooks on "
                "theta or on hsaid.full"
            )
