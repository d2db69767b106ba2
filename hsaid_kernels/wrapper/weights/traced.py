"""Runs the model on newly computed weights, for torch.compile, which can trace neither the lock nor the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hsaid_kernels.wrapper.tasks import key_of
from hsaid_kernels.wrapper.w0.checks import check_plain
from hsaid_kernels.wrapper.weights.compute import WeightMaker
from hsaid_kernels.wrapper.weights.graph import scaled_factors


def prepare_tracing(maker: WeightMaker) -> None:
    """What torch.compile cannot trace: checks the model, and makes what would change attributes while it traces."""
    attachment = maker.attachment
    if not attachment.attached:
        attachment.check_on_w0("HSAID")
    if attachment.merged is None:
        with attachment.lock:
            own = attachment.verified()
        why, hint = "which a compiled HSAID projects at once", "compile the layers by themselves, as in layer.compile()"
        check_plain("torch.compile", own.values(), why, hint)
        maker.upload()


def call_traced(maker: WeightMaker, training: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls the model on the weights of the registered task: a thread's own task cannot be traced."""
    attachment, basis = maker.attachment, maker.basis
    own = dict(attachment.model.named_parameters())
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in own.items()}
    if attachment.merged is not None:
        if training and torch.is_grad_enabled():
            attachment.check_on_w0("training")
    else:
        trained: Any = maker.tasks.own
        theta, multipliers = trained["theta"], trained["multipliers"]
        factors = scaled_factors(basis.plan, basis.partition, multipliers)
        for launch in maker.launches({name: own[name] for name in basis.plan.names}, theta):
            base = [own[name] for name in launch.names]
            buffer = launch.projection.flat(theta, launch.whole.own(factors), base)
            for part in launch.parts:
                weights = launch.projection.part(theta, factors, part, buffer)
                tensors |= zip(part.plan.names, weights, strict=True)
        # views, because a parameter in the place of a parameter would be taken for W0
        full = {name: trained[key_of(name)] for name in basis.full}
        tensors |= {name: parameter.view_as(parameter) for name, parameter in full.items()}
    # All names of tied parameters are given explicitly, with tie_weights=False. If functional_call looked for them
    # itself, it would swap the parameters of a module that occurs twice in the model once too often, and leave a
    # projected weight in the place of W0.
    tensors |= {other: tensors[name] for other, name in attachment.aliases.items() if name in tensors}
    return torch.func.functional_call(attachment.model, tensors, tuple(args), dict(kwargs), tie_weights=False)
