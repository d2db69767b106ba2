"""`Maker`: computes the projected weights of a wrapped model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.isolation import runs_eagerly, undisturbed
from hsaid_kernels.wrapper.tasks import Tasks, key_of
from hsaid_kernels.wrapper.w0.fsdp2 import divided, gathered_dtype, owners_of
from hsaid_kernels.wrapper.w0.quantized import check_labels, whole
from hsaid_kernels.wrapper.weight import Weight
from hsaid_kernels.wrapper.weights.attachment import WatchedModel
from hsaid_kernels.wrapper.weights.blocks import blocks_of, joined
from hsaid_kernels.wrapper.weights.cache import Made, check_w0
from hsaid_kernels.wrapper.weights.graph import Graph, late_graph, root_graph, scaled_factors
from hsaid_kernels.wrapper.weights.launches import Group, divide, tables_of
from hsaid_kernels.wrapper.weights.outside import ReducedOnce
from hsaid_kernels.wrapper.weights.saved_tensors import BlockWeight

UNWRAPPED = "backward(): expected a call before unwrap(), because a part of the model may be recomputed"


class Maker(WatchedModel):
    """Computes W0_i + factor_i * P_i theta for the tensors of a plan.

    Args:
        model, plan, full, own_full: see `WatchedModel`.
        tasks: where "theta", "multipliers" and the fully trained tensors are.
        partition: defines, with the plan, what theta and the multipliers mean.
        dtype: of the weights. None means for each tensor the dtype of its W0.
        backend: "auto", or one of `available_backends()`.
        memory: "step" or "block", see `HSAID`.
        padding_rows: {name: row} that stay W0.

    Attributes:
        tables: names of the tensors of which single rows are made, for embeddings.
        parts: [names], the other tensors of each call of the adjoint in backward.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Tasks,
        full: Collection[str],
        plan: Plan,
        partition: Partition,
        dtype: torch.dtype | None,
        backend: str,
        *,
        memory: str = "step",
        padding_rows: Mapping[str, int],
        own_full: bool = False,
    ):
        super().__init__(model, plan, full, own_full)
        self.memory = memory
        self.tasks, self.partition, self.given_dtype, self.backend = tasks, partition, dtype, backend
        self.full = {name: key_of(name) for name in full}
        self.tables, self.padding_rows = tables_of(model, plan), padding_rows
        others = [name for name in plan.names if name not in self.tables]
        self.parts = joined(blocks_of(model, others), plan.shapes) if others else []
        self._start()

    def _start(self) -> None:
        super()._start()
        self._groups: tuple[Any, list[Group]] = (None, [])
        self.reduced_once = ReducedOnce()

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_groups", "reduced_once")
        return {key: value for key, value in super().__getstate__().items() if key not in made_again}

    def trained(self, key: str) -> nn.Parameter:
        parameter = self.tasks.now()[key]
        assert parameter is not None
        return parameter

    def thetas(self) -> list[Tensor]:
        return self.tasks.thetas()

    def groups(self, w0: Mapping[str, Tensor], theta: Tensor) -> list[Group]:
        """The tensors by the dtype of their weights. Raises as `divide` and `check_labels`."""
        dtypes = {name: tensor.dtype for name, tensor in w0.items()}
        check_w0(w0, theta, self.plan.shapes)
        owners: dict[str, int] = {}  # by number, as these modules are not to be kept alive from here
        if self.ranks is not None:
            modules = owners_of(self.model, self.owner() if self.owner else None)
            owners = {name: id(module) for name, module in modules.items()}
            dtypes = {name: gathered_dtype(modules[name], tensor) for name, tensor in w0.items()}
        if self._groups[0] != (dtypes, owners):
            if self.given_dtype is None:
                check_labels(self._own)
            parts = divided(self.parts, owners) if owners else self.parts
            given = (self.given_dtype, self.backend, self.memory, self.padding_rows)
            self._groups = ((dtypes, owners), divide(self.plan, parts, self.tables, dtypes, *given))
        return self._groups[1]

    def upload(self) -> None:
        """Copies small index and scale tables to the device of theta and the multipliers before the first call.

        If the first call did this, torch.compile would see attributes change and compile again. Raises as `groups`.
        """
        own, multipliers = dict(self.model.named_parameters()), self.trained("multipliers")
        device = multipliers.device
        groups = self.groups({name: own[name] for name in self.plan.names}, self.trained("theta"))
        with torch.no_grad():
            scaled = scaled_factors(self.plan, self.partition, multipliers)
        for group in groups:
            group.whole.own(scaled)
            ops.prepare(group.whole.plan, device, self.backend)
            for part in group.parts:
                part.rows_on(device)
                ops.prepare(part.plan, device, self.backend)

    def forget_groups(self) -> None:
        """Lets the next read divide the tensors again, by `parts`."""
        self._groups = (None, [])
        self.drop_cache()

    def new_made(self, own: Mapping[str, nn.Parameter]) -> Made:
        """The weights of now, but those that are made when they are read. `own` are the parameters of the model."""
        w0, theta = {name: own[name] for name in self.plan.names}, self.trained("theta")
        groups = self.groups(w0, theta)
        blocks = (group.nbytes for group in groups if group.names[0] not in self.tables)
        # A little more than the largest block: what runs after the last layer leaves it there for backward.
        room = max(blocks, default=0) * 5 // 4 if self.memory == "block" else None
        made = Made(theta, self.trained("multipliers"), w0, groups, room, self.ranks is not None, weakref.ref(self))
        for group in groups:
            if not group.on_read:
                self.fill(made, group)
        return made

    def scaled(self, made: Made) -> Tensor:
        """The factors of all segments, without a graph."""
        if made.factors is None:
            made.factors = scaled_factors(self.plan, self.partition, made.values[1])
        return made.factors

    def fill(self, made: Made, group: Group) -> Tensor:
        """Computes the weights of a group, where they are not there."""
        if (flat := made.flats.get(group)) is not None:
            return flat
        if not self.attached:
            raise RuntimeError(UNWRAPPED)
        with self.lock, torch.inference_mode(False), torch.no_grad(), undisturbed():
            if (name := made.changed(group.names)) is not None:
                raise RuntimeError(
                    f"model: expected {name!r} to stay as it is between forward and backward, which makes its weight "
                    "again (memory='block'), got one that has been changed"
                )
            if made.sharded:
                tree = self.snapshot()
                base = [whole(tree.now(name)) for name in group.names]
            else:
                base = [whole(made.w0[name]) for name in group.names]
            return made.make(group, self.scaled(made), base)

    @runs_eagerly
    def new_graph(self, made: Made) -> Graph:
        """theta and the factors with a graph, on which weights can hang."""
        with torch.inference_mode(False), torch.enable_grad(), undisturbed():
            if self.ranks is not None:
                self.ranks.average(made.theta, made.multipliers)
            graph = root_graph(made.theta, made.multipliers, self.plan, self.partition)
        with self.lock:
            made.graphs.add(graph)
        return graph

    def late_graph(self, made: Made) -> Graph:
        """The same for layers that backward recomputes. The gradients reach theta with those of the rest."""

        def deliver(grads: list[Tensor | None]) -> None:
            if self.ranks is not None and self.trained("theta") is not made.theta:
                raise RuntimeError(
                    "theta: expected it to be gathered until backward ends, which recomputes all of the model, got a "
                    "shard again: checkpoint parts of the model with use_reentrant=False"
                )
            graph = self.new_graph(made)
            found = {end: grad for end, grad in zip((graph.theta, graph.factors), grads) if grad is not None}
            torch.autograd.backward(list(found), list(found.values()))

        graph = late_graph(made, made.theta, (made.values[0], self.scaled(made)), deliver)
        with self.lock:
            made.graphs.add(graph)
        return graph

    def delivers_once(self, made: Made) -> bool:
        """Whether it makes a difference in how many parts the gradients of theta and the multipliers arrive."""
        if self.reduced_once.reduces or self.reduced_once.at_end:
            return self.reduced_once.reduces
        for parameter in (made.theta, made.multipliers):
            averages = self.ranks is not None and self.ranks.averages(parameter)  # which may be done in parts
            if len(parameter._backward_hooks or ()) > averages:
                return True
            if len(parameter._post_accumulate_grad_hooks or ()) > self.reduced_once.counts(parameter):
                return True
        return False

    def join(self, made: Made, graph: Graph, name: str, check: Callable[[], None]) -> Weight:
        """Adds the part of this tensor to the graph, where it is not there, and returns the tensor.

        `check` is that of `Projection.part`.
        """
        if name in graph.nodes:
            return graph.nodes[name]
        group = made.group_of[name]
        part = next(part for part in group.parts if name in part.plan.shapes)
        kind = Weight if self.memory == "step" else BlockWeight
        with torch.inference_mode(False), torch.enable_grad(), undisturbed():
            weights = group.projection.part(graph.theta, graph.factors, part, made.flats[group], kind.of, check)
        for tensor, weight in zip(part.plan.names, cast(Sequence[Weight], weights), strict=True):
            graph.nodes[tensor] = weight
            weight.w0, weight.source = made.w0[tensor], made.source
            if isinstance(weight, BlockWeight):
                weight.of_model = weakref.ref(made), tensor
        return graph.nodes[name]
