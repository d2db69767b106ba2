"""Which models can be wrapped: every reason why one cannot, or why a wrapped one cannot go on.

Each of these would otherwise compute something else than W0 + P theta without a word. Changes of a wrapped model are
judged where they are heard of (reads/registration.py), by `check_replaced` here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.selection import ON_META
from hsaid_kernels.wrapper.w0.fsdp2 import is_fsdp, is_sharded
from hsaid_kernels.wrapper.w0.kinds import kind_of
from hsaid_kernels.wrapper.w0.quantized import dequantized, is_quantized
from hsaid_kernels.wrapper.w0.stored import SHOWN, is_adapted
from hsaid_kernels.wrapper.w0.values import can_compare, same_values

# Wrappers that split a model's parameters or make replicas of them. By name: importing them takes a second.
PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


# --- before a model is wrapped


def plain(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, so that parameters have the names of the plain model; or the model.

    Raises TypeError if the model is or contains a parallel wrapper, which must be applied to the HSAID instead, because
    it would synchronize W0 and not theta; or if it has parameters in shards that are not FSDP2's, or beside quantized
    layers, or weights in few bits that cannot be W0.
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
    _check_partitioned(parameters)
    _check_quantized(model)
    check_sharding(parameters)
    if sharded := [name for name, parameter in parameters.items() if is_sharded(parameter)]:
        if not any(map(is_fsdp, model.modules())):
            raise TypeError(
                f"model: expected whole parameters or those of FSDP2 (fully_shard), got {sharded[0]!r}, a DTensor that "
                "no module of the model gathers"
            )
        layers = [] if is_adapted(model) else [m for m in model.modules() if kind_of(m) is not None]
        if layers:
            raise TypeError(
                f"model: expected layers with float weights where FSDP2 (fully_shard) has sharded the model, got "
                f"{len(layers)} quantized ones, such as a {type(layers[0]).__name__}"
            )
    return model


def check_sharding(parameters: Mapping[str, Tensor]) -> None:
    """Raises TypeError for a parameter that is sharded in another way than FSDP2 shards, by name."""
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            dtensor: Any = parameter
            *replicated, shard = dtensor.placements
            if len(replicated) > 1 or not shard.is_shard() or not all(p.is_replicate() for p in replicated):
                raise TypeError(
                    f"model: expected parameters that FSDP2 (fully_shard) alone has sharded, got {name!r} with "
                    f"placements {dtensor.placements}"
                )


def _check_partitioned(parameters: Mapping[str, Tensor]) -> None:
    """Raises TypeError for a parameter that DeepSpeed's ZeRO-3 has partitioned."""
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            raise TypeError(
                f"model: expected whole parameters or those of FSDP2 (fully_shard), got {name!r}, which DeepSpeed's "
                "ZeRO-3 has partitioned"
            )


def _check_quantized(model: nn.Module) -> None:
    """Raises TypeError, by name, for quantized tensors that cannot be dequantized."""
    judged: set[type] = set()
    for name, parameter in model.named_parameters():
        if type(parameter) not in judged and is_quantized(parameter) and parameter.device.type != "meta":
            judged.add(type(parameter))
            _check_dequantizes(name, parameter)


def _check_dequantizes(name: str, parameter: nn.Parameter) -> None:
    values: object = None
    with contextlib.suppress(Exception):  # whatever the library raises
        values = dequantized(parameter)
    if isinstance(values, Tensor) and values.is_floating_point() and values.shape == parameter.shape:
        return
    got = f"gives {tuple(values.shape)} in {values.dtype}" if isinstance(values, Tensor) else "fails"
    raise TypeError(
        f"model: expected quantized tensors whose dequantize() gives their values, got {name!r}, a "
        f"{type(parameter).__name__} of shape {tuple(parameter.shape)} whose dequantize() {got}: quantize the model by "
        "another configuration, such as torchao's Int8WeightOnlyConfig"
    )


def check_layers(model: nn.Module, projected: Collection[str], full: Collection[str]) -> None:
    """Raises for layers that would not run on projected weights; `full` are the names of the fully trained tensors.

    TypeError for a ScriptModule, whose reads of parameters are compiled, and for a layer that quantizes what it reads.
    ValueError for an embedding with max_norm, which writes to its own weight in forward.
    """
    _check_read(model, projected)
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


def _check_read(model: nn.Module, projected: Collection[str]) -> None:
    """Raises TypeError for a layer of an unknown kind that would quantize a projected weight once more.

    Where their weights are float parameters, as in quantization-aware training, this is what they are meant to do.
    """
    weights = {id(parameter) for name, parameter in model.named_parameters() if name in projected}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        known = SHOWN in module.__dict__ or weight is None or id(weight) not in weights
        if not known and hasattr(type(module), "qweight") and is_quantized(weight):
            raise TypeError(
                f"model: expected layers that compute with their weight as it is, got {name!r}, a "
                f"{type(module).__name__}, which would quantize the projected weight once more: say how it is "
                "dequantized (hsaid_kernels.register_quantized), or leave the layer out (exclude=)"
            )


def check_parameters(model: nn.Module, trained: Collection[str]) -> None:
    """Raises ValueError if one of the tensors `trained` has gradient hooks, or if modules keep it elsewhere.

    Raises ValueError also if parameters of the model share memory without being tied.
    """
    parameters = dict(model.named_parameters())
    check_hooks({name: parameters[name] for name in trained})
    _check_captured(model, trained)
    _check_separate(parameters)


def check_hooks(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a parameter with gradient hooks, by name."""
    for name, parameter in parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"model: expected parameters without gradient hooks, got {name!r} with one: in a random subspace theta "
                "has the gradient, and moves whole tensors: leave the tensor out (exclude=), or register hooks on "
                "theta or on hsaid.full"
            )


def _check_captured(model: nn.Module, trained: Iterable[str]) -> None:
    """Raises ValueError if a module keeps one of the tensors `trained` elsewhere than as its parameter.

    For example in a list or a functools.partial: what it reads there would be W0.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameters[name]): name for name in trained}
    own = {"_parameters", "_buffers", "_modules", "_flat_weights"}
    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in own or key.startswith("_hsaid"):
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


def _check_separate(tensors: Mapping[str, Tensor]) -> None:
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


# --- while it is wrapped


def check_w0(w0: Mapping[str, Tensor], theta: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if W0 is not on theta's device, or no longer of these shapes."""
    if elsewhere := {tensor.device for tensor in w0.values()} - {theta.device}:
        if theta.is_meta:
            raise ValueError(
                "theta: expected a tensor with values, got one on the meta device, where hooks of accelerate "
                "(cpu_offload, disk_offload) leave it: accelerate.hooks.remove_hook_from_module(hsaid, recurse=True) "
                "gives it back"
            )
        raise ValueError(
            f"model: expected its tensors on {theta.device}, where theta is, got some on {elsewhere.pop()}: "
            "hsaid.to(device) moves both"
        )
    if other := next((name for name, tensor in w0.items() if tensor.shape != shapes[name]), None):
        raise ValueError(
            f"model: expected {other!r} of shape {shapes[other]}, as it was when it was wrapped, got one of shape "
            f"{tuple(w0[other].shape)}: unwrap() the model before changing it"
        )


def check_memory(memory: str, projected: Mapping[str, Tensor], others: Iterable[Tensor] = ()) -> None:
    """Raises ValueError unless `memory` is "block" where a projected tensor is quantized, or any is a shard."""
    if memory == "block":
        return
    if quantized := next((name for name, tensor in projected.items() if is_quantized(tensor)), None):
        raise ValueError(
            f'memory: expected "block" for a quantized model, which is dequantized block by block, got {memory!r} '
            f'({quantized!r} is quantized): quantize the model first, and wrap it then with memory="block"'
        )
    if any(map(is_sharded, (*projected.values(), *others))):
        raise ValueError(
            f'memory: expected "block" for a model that FSDP2 (fully_shard) has sharded, whose parameters are gathered '
            f"block by block, got {memory!r}"
        )


def check_plain(call: str, tensors: Iterable[Tensor], why: str, hint: str) -> None:
    """Raises RuntimeError, with a message that begins with `call`, if one of the tensors is sharded or quantized."""
    for tensor in tensors:
        if is_sharded(tensor) or is_quantized(tensor):
            kind = "sharded" if is_sharded(tensor) else "quantized"
            raise RuntimeError(f"{call}: expected plain parameters, {why}, got {kind} ones: {hint}")


def check_replaced(
    call: str,
    name: str,
    own: nn.Parameter,
    value: Tensor,
    full: bool,
    moved: Callable[[], bool] | None,
    converted: bool,
    memory: str,
) -> None:
    """Raises if `value` cannot take the place of `own`.

    ValueError for a quantized tensor without memory="block"; RuntimeError for values that are lost on the meta device,
    and for other values, where the tensor is trained fully, or moved by a theta that is not 0.

    Args:
        call: what the message begins with.
        name, own: the parameter of the model.
        full: whether it is trained fully.
        moved: tells whether any theta moves it; None if it is not projected.
        converted: whether `own` may have been converted to the dtype of `value`.
        memory: that of the HSAID.
    """
    if value.is_meta and not own.is_meta:
        raise RuntimeError(
            f"{call}: expected {name!r} to keep its values, got a tensor on the meta device, {ON_META}, and "
            "unwrap() the model first"
        )
    if is_quantized(value) and not is_quantized(own):
        check_memory(memory, {name: value})
    if full and not same_values(own, value, converted):
        raise RuntimeError(f"{call}: expected {name!r} to stay, which is trained fully: write to hsaid.full[{name!r}]")
    if moved is not None and can_compare(own) and moved() and not same_values(own, value, converted):
        raise RuntimeError(
            f"{call}: expected {name!r} to stay, because a projected weight is W0 + P theta: what is set would become "
            "W0, and P theta would be added once more: write to W0 (hsaid.w0()), or change the model in "
            "hsaid.unwrapped()"
        )


def check_tensors_stay(
    shapes: Mapping[str, tuple[int, ...]], known: Iterable[str], added: Collection[str], now: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless a model has the tensors that it had when it was wrapped.

    Args:
        shapes: {name: shape} of the projected tensors.
        known: the names of all parameters that it had.
        added: the names of those that may have been added since.
        now: {name: parameter} that it has now.
    """
    expected: dict[str, Sequence[int]] = {**dict.fromkeys(known, ()), **shapes}
    got = {name: tuple(p.shape) if name in shapes else () for name, p in now.items() if name not in added}
    if reason := differences(expected, got):
        raise ValueError(
            f"model: expected the tensors that it had when it was wrapped, got others: {reason}; unwrap() the model "
            "before changing it"
        )


def differences(expected: Mapping[str, Sequence[int]], got: Mapping[str, Sequence[int]], at_most: int = 3) -> str:
    """Lists the first `at_most` differences between two {name: shape} for an error message; "" if there are none."""
    found = []
    for name, shape in expected.items():
        if name not in got:
            found.append(f"{name!r} of shape {tuple(shape)} is missing")
        elif tuple(got[name]) != tuple(shape):
            found.append(f"{name!r} has shape {tuple(got[name])} in place of {tuple(shape)}")
    found += [f"{name!r} of shape {tuple(shape)} is unexpected" for name, shape in got.items() if name not in expected]
    more = [f"{len(found) - at_most} more"] if len(found) > at_most else []
    return ", ".join([*found[:at_most], *more])
