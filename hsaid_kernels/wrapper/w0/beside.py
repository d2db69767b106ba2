"""What a model has beside its parameters: buffers that training changes, masks, tensors derived from weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from hsaid_kernels.wrapper.w0.stored import SHOWN

LARGEST = 2**24  # bytes; larger buffers are taken for constants
PREFIX = "model."  # of their names in an HSAID's state_dict


class Buffers:
    """The persistent buffers of a model as they were when it was wrapped, such as the statistics of BatchNorm.

    Prune's masks, what quantized layers hold, and buffers of more than 16 MB are taken for constants.
    """

    def __init__(self, model: nn.Module):
        self._before = {name: buffer.detach().clone() for name, buffer in _persistent(model)}

    def tracked(self, model: nn.Module) -> dict[str, Tensor]:
        """{name: buffer} of the model's buffers that are not taken for constants."""
        return dict(_persistent(model))

    @torch.no_grad()
    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        """{name: copy} of the buffers that are not as they were."""
        found = {}
        for name, buffer in _persistent(model):
            before = self._before.get(name)
            if before is None or before.shape != buffer.shape or not torch.equal(before.to(buffer), buffer):
                found[name] = buffer.detach().clone()
        return found

    @torch.no_grad()
    def put(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Puts the model's buffers back as they were, but those of `values`, which get these values."""
        for name, buffer in _persistent(model):
            value = values.get(name, self._before.get(name))
            if value is not None and value.shape == buffer.shape and not torch.equal(value.to(buffer), buffer):
                buffer.copy_(value)  # only then, because other threads may be using it

    def check(self, where: str, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Raises ValueError, with a message that begins with `where`, if a value is of no buffer of the model."""
        own = dict(_persistent(model))
        for name, value in values.items():
            if name not in own or own[name].shape != value.shape:
                expected = f"shape {list(own[name].shape)}" if name in own else "none of this name"
                raise ValueError(
                    f"{where}: expected buffers of the model, got {name!r} of shape {list(value.shape)}, where it has "
                    f"{expected}"
                )


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if SHOWN in module.__dict__:  # whose buffers are codes
            continue
        constant = {f"{hook._tensor_name}_mask" for _, hook in masks([module])}
        for key, buffer in module._buffers.items():
            left_out = buffer is None or key in module._non_persistent_buffers_set or key in constant or buffer.is_meta
            if not left_out and id(buffer) not in seen and buffer.numel() * buffer.element_size() <= LARGEST:
                seen.add(id(buffer))
                yield (f"{prefix}.{key}" if prefix else key), buffer


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
