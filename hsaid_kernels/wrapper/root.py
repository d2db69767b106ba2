"""`Root`: the one node of the autograd graph by which the gradients of all weights reach theta and the multipliers.

Layers that backward recomputes may run a backward pass of their own, inside of the one that recomputes them: reentrant
checkpoints and reversible layers do. In an ordinary model each such pass reaches parameters of its own. Here all would
reach theta, one after the other: a hook on theta would run once for each, and DistributedDataParallel would reduce the
first and leave out the others. So their gradients are collected, and reach theta with the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import version
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.weight import Weight


def scaled_factors(plan: Plan, partition: Partition, multipliers: Tensor) -> Tensor:
    """The factors of all segments of a plan, multiplied by its scales."""
    return partition.factors(multipliers) * plan.scales_on(multipliers.device)


class _Running:
    """Is referred to by a backward pass, and so lives as long as it runs."""


class Collected:
    """Gradients of theta and the factors from backward passes inside of another one, until that one delivers them."""

    def __init__(self) -> None:
        self.grads: list[Tensor | None] = [None, None]
        self.delivers: Callable[[], _Running | None] = lambda: None

    def add(self, *grads: Tensor | None) -> None:
        both = zip(self.grads, grads, strict=True)
        self.grads = [b if a is None else a if b is None else a + b for a, b in both]

    def take(self) -> list[Tensor | None]:
        taken, self.grads = self.grads, [None, None]
        return taken


class Root:
    """theta and the factors of all segments, with a graph.

    theta    [d - m], a copy of its values
    factors  [segments], multiplied by the plan's scales
    """

    def __init__(self, theta: nn.Parameter, multipliers: nn.Parameter, plan: Plan, partition: Partition):
        self.collected = Collected()
        self.theta, self.factors = _Trained.apply(theta, multipliers, plan, partition, self.collected)


class Late:
    """What layers hang on that backward recomputes, in the place of the root.

    nodes  {name: weight}, as in `Made`
    """

    def __init__(self, root: Root):
        self.nodes: dict[str, Weight] = {}
        anchor = torch.zeros((), device=root.theta.device, requires_grad=True)
        self.theta, self.factors = _Collect.apply(anchor, root.theta.detach(), root.factors.detach(), root.collected)


def deliver_at_end(root: Root, check: Callable[[], None]) -> None:
    """Lets the backward pass that runs now deliver what is collected inside of it: by the root's node, if it has it.

    That node was made before all others, so it runs last. A pass without it, as where the whole model is recomputed,
    delivers at its end, after calling `check`, which may raise.
    """
    collected = root.collected
    if collected.delivers() is not None:
        return
    running = _Running()
    collected.delivers = weakref.ref(running)
    collected.take()  # of a pass that failed

    def deliver(running: _Running = running) -> None:
        collected.delivers = lambda: None
        found = {end: grad for end, grad in zip((root.theta, root.factors), collected.take()) if grad is not None}
        if found:
            check()
            torch.autograd.backward(list(found), list(found.values()))

    torch.autograd.Variable._execution_engine.queue_callback(deliver)


class _Trained(torch.autograd.Function):
    """(theta, multipliers) -> `Root.theta`, `Root.factors`. Saves nothing that one backward would free.

    So the weights of now can be used by several forward passes, each with a backward of its own.
    """

    @staticmethod
    def forward(ctx, theta, multipliers, plan, partition, collected):
        ctx.theta, ctx.multipliers, ctx.plan, ctx.partition = theta, multipliers, plan, partition
        ctx.versions, ctx.collected = (version(theta), version(multipliers)), collected
        ctx.set_materialize_grads(False)
        return theta.clone(), scaled_factors(plan, partition, multipliers)

    @staticmethod
    def backward(ctx, dtheta, dfactors):
        said = ("theta has", "it"), ("the multipliers have", "them")
        for (what, it), tensor, before in zip(said, (ctx.theta, ctx.multipliers), ctx.versions):
            if version(tensor) != before:
                raise RuntimeError(
                    f"{what} been changed in place between forward and backward, which needs {it} unchanged"
                )
        ctx.collected.add(dtheta, dfactors)
        dtheta, dfactors = ctx.collected.take()
        if dfactors is None or not ctx.needs_input_grad[1]:
            return dtheta, None, None, None, None
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            multipliers = ctx.multipliers if graph else ctx.multipliers.detach().requires_grad_()
            factors = scaled_factors(ctx.plan, ctx.partition, multipliers)
            (found,) = torch.autograd.grad(factors, multipliers, dfactors, create_graph=graph, allow_unused=True)
        return dtheta, found, None, None, None


class _Collect(torch.autograd.Function):
    """theta and factors as they are. Backward collects their gradients."""

    @staticmethod
    def forward(ctx, anchor, theta, factors, collected):
        ctx.collected = collected
        ctx.set_materialize_grads(False)
        return theta.clone(), factors.clone()

    @staticmethod
    def backward(ctx, dtheta, dfactors):
        with torch.no_grad():
            ctx.collected.add(dtheta, dfactors)
        return None, None, None, None
