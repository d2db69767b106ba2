"""`head_importance`: how strongly the loss depends on the update of each attention head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hsaid_kernels.hierarchy.attention import find_attentions
from hsaid_kernels.hierarchy.layouts import LATEST
from hsaid_kernels.hierarchy.paths import HEADS
from hsaid_kernels.wrapper.hsaid import HSAID
from hsaid_kernels.wrapper.w0.stored import showing


def head_importance(hsaid: HSAID, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How strongly the loss L depends on the update of each head, as {attention module: float32 [heads]} on the CPU.

    The value of a head is the mean over batches of |dL / d lambda| at lambda = 1 and the trained theta and multipliers.
    Here lambda multiplies the whole update (W - W0) of the parameters that belong to this head alone. With a component
    "L1+L5" in the partition, dL / d lambda is the derivative by the head's multiplier, times the multiplier. Parts that
    several heads share (grouped-query attention) count for none of them.

    Args:
        hsaid: an HSAID with heads (`heads=True`, or L5 in the partition) and theta != 0, that is, a trained one.
        batches: mappings with the model's keyword arguments, such that its output has a `loss`. With one example per
            batch this is the published measure (Michel et al. 2019, arXiv 1905.10650), which masks heads' results.

    Runs in the current mode (train or eval) of `hsaid`, and changes nothing.

    Raises:
        TypeError: `hsaid` is not an HSAID, or a batch is not a mapping.
        ValueError: `hsaid` has no heads or theta is 0, there is no batch, or the model returns no loss.
    """
    if not isinstance(hsaid, HSAID):
        raise TypeError(f"hsaid: expected an HSAID, got {type(hsaid).__name__}")
    if HEADS not in hsaid.hierarchy.levels:
        raise ValueError("hsaid: expected one with heads=True or L5 in its partition, got one without heads")
    if not hsaid.theta.any():
        raise ValueError("hsaid: expected a trained one, got theta = 0, where no multiplier has a gradient")
    rows: dict[tuple[str, str], list[int]] = {}
    for row, piece in enumerate(hsaid.plan.pieces):
        rows.setdefault((piece.tensor, piece.label.rpartition("/")[2]), []).append(row)
    own = {}
    with showing(hsaid.model):
        attentions = find_attentions(hsaid.model, hsaid._basis.settings.layouts or LATEST)
    for attention in attentions:
        pieces = [attention.pieces([head]) for head in range(attention.heads)]
        own[attention.name] = [[row for piece in sorted(parts) for row in rows.get(piece, ())] for parts in pieces]
    totals = {name: torch.zeros(len(parts)) for name, parts in own.items()}
    count = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"batches: expected arguments by name, {{name: tensor}}, got {type(batch).__name__}")
        share = _shares(hsaid, batch)
        for name, parts in own.items():
            totals[name] += torch.stack([share[chosen].sum().abs() for chosen in parts])
        count += 1
    if not count:
        raise ValueError("batches: expected at least one, got none")
    return {name: total / count for name, total in totals.items()}


def _shares(hsaid: HSAID, batch: Mapping[str, Any]) -> Tensor:
    """dL / d lambda of each segment, float32 [segments] on the CPU."""
    theta = hsaid.theta
    trained = theta.requires_grad
    theta.requires_grad_(True)  # so that the weights have a graph
    try:
        with torch.inference_mode(False), torch.enable_grad(), hsaid._computing():
            loss = getattr(hsaid.model(**batch), "loss", None)
            factors = hsaid._source.factors()
        if loss is None:
            raise ValueError(f"batches: expected what the model makes a loss of (labels), got {', '.join(batch)}")
        (gradient,) = torch.autograd.grad(loss, factors)
    finally:
        theta.requires_grad_(trained)
    return (gradient * factors.detach()).cpu()
