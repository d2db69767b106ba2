"""`Graph`: the one node of the autograd graph by which the gradients of all weights reach theta and the multipliers.

A call of the HSAID makes this node before all others. Autograd runs nodes in reverse order of creation, so backward
reaches it last, when the gradients of all weights are there.

Reentrant checkpoints and reversible layers run a backward pass of their own for each part that they recompute, inside
of the one that the user has started. In an ordinary model each of these passes reaches parameters of its own. Here they
would all reach theta, one after the other: a hook on theta would run once for each, and DistributedDataParallel would
reduce the first gradient and leave out the others. Where that makes a difference, their gradients are collected
(`late_graph`), and reach theta with the rest.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import version
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.weight import Weight


def scaled_factors(plan: Plan, partition: Partition, multipliers: Tensor) -> Tensor:
    """The factors of all segments of a plan, multiplied by its scales."""
    return partition.factors(multipliers) * plan.scales_on(multipliers.device)


class Graph:
    """theta and the factors with a graph, and weights that hang on them.

    Attributes:
        theta: [d - m], a copy of its values.
        factors: [segments], multiplied by the plan's scales.
        wanting: which of theta and the multipliers required gradients when it was made.
        nodes: {name: weight}, added part by part when a weight of the part is first read in this forward pass. So
            backward runs a part's node as soon as it has left the part, and the gradients of its weights can be freed.
    """

    def __init__(self, theta: Tensor, factors: Tensor, wanting: Sequence[bool]):
        self.theta, self.factors, self.wanting = theta, factors, tuple(wanting)
        self.nodes: dict[str, Weight] = {}


def root_graph(theta: nn.Parameter, multipliers: nn.Parameter, plan: Plan, partition: Partition) -> Graph:
    """A graph that ends in theta and the multipliers."""
    of_theta, factors = _FromTrained.apply(theta, multipliers, plan, partition)
    return Graph(of_theta, factors, (theta.requires_grad, multipliers.requires_grad))


class _Collected:
    """Gradients of one theta, and of the factors, from passes inside of a backward pass, until that delivers them."""

    def __init__(self, theta: nn.Parameter, deliver: Callable[[list[Tensor | None]], None], of: _Pass):
        self.theta, self.deliver, self._of = theta, deliver, weakref.ref(of)
        self.grads: list[Tensor | None] = [None, None]
        self.arrived = False

    def add(self, grads: Sequence[Tensor | None]) -> None:
        both = zip(self.grads, grads, strict=True)
        self.grads = [b if a is None else a if b is None else a + b for a, b in both]

    def take(self) -> list[Tensor | None]:
        taken, self.grads = self.grads, [None, None]
        return taken

    def is_over(self) -> bool:
        """Whether nobody will take what is added: the pass has ended, and somebody has kept a graph of it."""
        of = self._of()
        return of is None or not of.runs()


class _Running:
    """Is referred to by a backward pass alone, and so lives as long as it runs, however it ends."""


class _Pass:
    """A backward pass: graphs of the layers that it recomputes, and gradients that it collects, by theta's id."""

    def __init__(self, running: _Running):
        self._running, self._ended = weakref.ref(running), False
        self.graphs: dict[Hashable, Graph] = {}
        self.collected: dict[int, _Collected] = {}

    def runs(self) -> bool:
        return not self._ended and self._running() is not None

    def end(self, running: _Running) -> None:
        self._ended = True  # a hook that delivering runs may begin another one
        for collected in self.collected.values():
            grads = collected.take()
            if any(grad is not None for grad in grads):
                collected.deliver(grads)
            elif not collected.arrived:
                warnings.warn(
                    "backward(): weights were read with gradients inside of backward, and no backward pass has used "
                    "them. If torch.autograd.grad() was meant to differentiate them by theta: it does not reach theta "
                    "there, because theta has hooks, or DistributedDataParallel reduces it",
                    stacklevel=2,
                )


class _Thread(threading.local):
    """The outermost backward pass in which a thread recomputes layers."""

    last: Callable[[], _Pass | None] = staticmethod(lambda: None)

    def running(self) -> _Pass | None:
        found = self.last()
        return found if found is not None and found.runs() else None


_thread = _Thread()


def late_graph(
    key: Hashable,
    theta: nn.Parameter,
    values: tuple[Tensor, Tensor],
    deliver: Callable[[list[Tensor | None]], None],
) -> Graph:
    """A graph for layers that the backward pass running now recomputes: one for each `key`.

    The gradients reach `theta` together with those of a graph made by `root_graph`, if this pass reaches one, or else
    when the pass ends, by `deliver`. `values` are theta and the factors.
    """
    running = begin_pass()
    if key not in running.graphs:
        collected = running.collected.setdefault(id(theta), _Collected(theta, deliver, running))
        anchor = torch.zeros((), device=theta.device, requires_grad=True)
        of_theta, factors = _FromCopies.apply(anchor, *values, collected)
        running.graphs[key] = Graph(of_theta, factors, (True, True))
    return running.graphs[key]


def begin_pass() -> _Pass:
    """Notes the backward pass that runs now, at its first read of a weight, as the one that collects."""
    if (running := _thread.running()) is not None:
        return running
    alive = _Running()
    begun = _Pass(alive)
    _thread.last = weakref.ref(begun)
    torch.autograd.Variable._execution_engine.queue_callback(partial(begun.end, alive))
    return begun


class _FromTrained(torch.autograd.Function):
    """(theta, multipliers) -> `Graph.theta`, `Graph.factors`. Saves nothing that one backward would free.

    So the weights of now can be used by several forward passes, each with a backward of its own.
    """

    @staticmethod
    def forward(ctx, theta, multipliers, plan, partition):
        ctx.theta, ctx.multipliers, ctx.plan, ctx.partition = theta, multipliers, plan, partition
        ctx.versions = version(theta), version(multipliers)
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
        running = _thread.running()
        if running is not None and (collected := running.collected.get(id(ctx.theta))) is not None:
            collected.add((dtheta, dfactors))
            dtheta, dfactors = collected.take()
        if dfactors is None or not ctx.needs_input_grad[1]:
            return dtheta, None, None, None
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            multipliers = ctx.multipliers if graph else ctx.multipliers.detach().requires_grad_()
            factors = scaled_factors(ctx.plan, ctx.partition, multipliers)
            (found,) = torch.autograd.grad(factors, multipliers, dfactors, create_graph=graph, allow_unused=True)
        return dtheta, found, None, None


class _FromCopies(torch.autograd.Function):
    """theta and factors as they are. Backward collects their gradients."""

    @staticmethod
    def forward(ctx, anchor, theta, factors, collected):
        ctx.collected = collected
        ctx.set_materialize_grads(False)
        return theta.clone(), factors.clone()

    @staticmethod
    def backward(ctx, dtheta, dfactors):
        with torch.no_grad():
            ctx.collected.add((dtheta, dfactors))
            ctx.collected.arrived = True
        if ctx.collected.is_over():
            ctx.collected.deliver(ctx.collected.take())
        return None, None, None, None
