"""How much the loss depends on each attention head's update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hsaid_kernels.fastfood.projection import Projection
from hsaid_kernels.hierarchy.attention import find_attentions
from hsaid_kernels.hierarchy.paths import HEADS
from hsaid_kernels.wrapper.exchange import Exchange, Places
from hsaid_kernels.wrapper.hsaid import HSAID


def head_importance(hsaid: HSAID, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How much the loss depends on each head's update: {attention module: float32 [heads]}, the mean over batches of

        | dL / d lambda |,   lambda a multiplier, 1, of everything that H-SAID adds to the parts of this head alone

    at the trained theta and multipliers. With a component "L1+L5" lambda's derivative is that of the head's own
    multiplier, times the multiplier. Parts that heads share (grouped-query attention) count for none of them.

    Args:
        hsaid: one with heads (`heads=True`, or L5 in the partition), trained: at theta = 0 all is 0.
        batches: arguments of the model, which must return a `loss`. One example per batch is the published form
            (Michel et al. 2019, arXiv 1905.10650, there for masks on the heads' results).

    Runs in the mode (train, eval) that hsaid is in, and changes nothing. Raises ValueError for an HSAID without heads,
    theta = 0 or no batch.
    """
    if not isinstance(hsaid, HSAID):
        raise TypeError(f"hsaid: expected an HSAID, got {type(hsaid).__name__}")
    if HEADS not in hsaid.hierarchy.levels:
        raise ValueError("hsaid: expected one with heads=True or L5 in its partition, got one without heads")
    if not hsaid.theta.any():
        raise ValueError("hsaid: expected a trained one, got theta = 0, where no multiplier has a gradient")
    projection, places = Projection(hsaid.plan, dtype=hsaid.dtype, backend=hsaid.backend), Places(hsaid.model)
    rows = {(piece.tensor, piece.label): row for row, piece in enumerate(hsaid.plan.pieces)}
    own = {}
    for attention in find_attentions(hsaid.model):
        pieces = [attention.pieces([head]) for head in range(attention.heads)]
        own[attention.name] = [[rows[piece] for piece in sorted(parts) if piece in rows] for parts in pieces]
    totals = {name: torch.zeros(len(parts)) for name, parts in own.items()}
    count = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"batches: expected arguments by name, {{name: tensor}}, got {type(batch).__name__}")
        with torch.inference_mode(False), torch.enable_grad():
            factors = hsaid.partition.factors(hsaid.multipliers.detach()).requires_grad_()
            weights = projection.forward(hsaid.theta.detach(), factors, hsaid.w0())
            with Exchange(places, weights | hsaid.full, hsaid._projected.lock):
                loss = getattr(hsaid.model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"batches: expected what the model makes a loss of (labels), got {', '.join(batch)}")
        (gradient,) = torch.autograd.grad(loss, factors)
        share = (gradient * factors.detach()).cpu()
        for name, parts in own.items():
            totals[name] += torch.stack([share[chosen].sum().abs() for chosen in parts])
        count += 1
    if not count:
        raise ValueError("batches: expected at least one, got none")
    return {name: total / count for name, total in totals.items()}
