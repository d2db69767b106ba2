"""`WeightMaker`: computes W0_i + factor_i * P_i theta, and attaches the results to the autograd graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hsaid_kernels.fastfood import ops
from hsaid_kernels.wrapper.basis import Basis
from hsaid_kernels.wrapper.isolation import isolated, runs_eagerly
from hsaid_kernels.wrapper.tasks import Tasks
from hsaid_kernels.wrapper.w0.checks import check_w0
from hsaid_kernels.wrapper.w0.fsdp2 import gathering_of
from hsaid_kernels.wrapper.w0.quantized import weight_dtypes
from hsaid_kernels.wrapper.w0.stored import parameters_of
from hsaid_kernels.wrapper.w0.values import W0
from hsaid_kernels.wrapper.weight import Weight, as_weight
from hsaid_kernels.wrapper.weights.attachment import Attachment
from hsaid_kernels.wrapper.weights.cache import Trained, WeightCache
from hsaid_kernels.wrapper.weights.graph import Graph, late_graph, root_graph, scaled_factors
from hsaid_kernels.wrapper.weights.launches import Launch, divided, launches_of, parts_of, tables_of
from hsaid_kernels.wrapper.weights.outside import ReducedOnce
from hsaid_kernels.wrapper.weights.saved_tensors import BlockWeight, as_block_weight

UNWRAPPED = "backward(): expected a call before unwrap(), because a part of the model may be recomputed"


class WeightMaker:
    """Computes the projected weights of a model.

    Args:
        basis: which tensors are projected, and how; the options of the HSAID.
        tasks: has theta and the multipliers, which are asked for anew each time, because tasks change.
        attachment: has the model.
        reduced_once: knows whether DistributedDataParallel reduces theta's gradient.

    Attributes:
        tables: names of the tensors of which single rows are made, for embeddings.
        parts: [names], the other tensors of each call of the adjoint in backward.
    """

    def __init__(self, basis: Basis, tasks: Tasks, attachment: Attachment, reduced_once: ReducedOnce):
        self.basis, self.tasks, self.attachment, self.reduced_once = basis, tasks, attachment, reduced_once
        plan = basis.plan
        self.tables: Collection[str] = tables_of(attachment.model, plan)
        self.parts = parts_of(attachment.model, [name for name in plan.names if name not in self.tables], plan.shapes)
        self._launches: tuple[Any, list[Launch]] = (None, [])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_launches": (None, [])}

    # --- launches

    def launches(self, w0: Mapping[str, nn.Parameter], theta: Tensor) -> list[Launch]:
        """Which tensors are made together. Raises as `launches_of` and `check_w0`."""
        basis, attachment = self.basis, self.attachment
        found: Any = [(tensor.dtype, tensor.device, tensor.shape) for tensor in w0.values()]
        together: dict[str, int] = {}
        dtypes = weight_dtypes(w0, attachment.parameters, basis.settings.dtype)
        if attachment.ranks is not None:
            together, dtypes = gathering_of(attachment.model, attachment.owner, w0)
        key = found, theta.device, dtypes, together
        if self._launches[0] != key:
            check_w0(w0, theta, basis.plan.shapes)
            options = basis.settings
            parts = divided(self.parts, together) if together else self.parts
            given = options.dtype, options.backend, options.memory, basis.padding_rows
            self._launches = key, launches_of(basis.plan, parts, self.tables, dtypes, *given)
        return self._launches[1]

    def upload(self) -> None:
        """Copies small index and scale tables to the device of theta and the multipliers before the first call.

        If the first call did this, torch.compile would see attributes change and compile again. Raises as `launches`.
        """
        own = parameters_of(self.attachment.model)
        theta, multipliers = self.tasks.trained()
        launches = self.launches({name: own[name] for name in self.basis.plan.names}, theta)
        with torch.no_grad():
            factors = scaled_factors(self.basis.plan, self.basis.partition, multipliers)
        for launch in launches:
            launch.whole.own(factors)
            ops.prepare(launch.whole.plan, multipliers.device, self.basis.settings.backend)
            for part in launch.parts:
                part.rows_on(multipliers.device)
                ops.prepare(part.plan, multipliers.device, self.basis.settings.backend)

    # --- values

    def new_cache(self, own: Mapping[str, nn.Parameter]) -> WeightCache:
        """The weights of now, but those that are made when they are read. `own` are the parameters of the model."""
        theta, multipliers = self.tasks.trained()
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, (theta, multipliers))):
            raise RuntimeError(
                "theta: expected an ordinary tensor, got one inside a transform of torch.func, which cannot "
                "differentiate a projection: use torch.autograd"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(theta).tangent is not None:
            raise RuntimeError(
                "theta: expected a tensor without a tangent, because a projection has no forward-mode derivative"
            )
        parameters = {name: own[name] for name in self.basis.plan.names}
        launches = self.launches(parameters, theta)
        blocks = (launch.nbytes for launch in launches if launch.names[0] not in self.tables)
        # A quarter more than the largest block, so that small tensors that are read after the last block do not push it
        # out before backward.
        room = max(blocks, default=0) * 5 // 4 if self.basis.settings.memory == "block" else None
        w0 = W0(parameters, self.attachment.parameter_now if self.attachment.ranks is not None else None)
        cache = WeightCache(self.attachment, Trained(theta, multipliers, self.tasks.steps), w0, launches, room)
        for launch in launches:
            if not launch.on_read:
                self.fill(cache, launch)
        return cache

    def factors(self, cache: WeightCache) -> Tensor:
        """Those of all segments, multiplied by the plan's scales, without a graph."""
        if cache.factors is None:
            cache.factors = scaled_factors(self.basis.plan, self.basis.partition, cache.trained.values[1])
        return cache.factors

    def fill(self, cache: WeightCache, launch: Launch) -> Tensor:
        """Computes the weights of a launch, where they are not there, and returns their buffer."""
        if (made := cache.buffers.get(launch)) is not None:  # without the lock: another thread may drop it meanwhile
            cache.check_unwritten(*made)
            return made[0]
        if not self.attachment.attached:
            raise RuntimeError(UNWRAPPED)
        with self.attachment.lock, isolated():
            if (name := cache.w0.changed(launch.names)) is not None:
                raise RuntimeError(
                    f"model: expected {name!r} to stay as it is between forward and backward, which makes its weight "
                    "again (memory='block'), got one that has been changed"
                )
            if launch not in cache.buffers:  # another thread may have been faster
                cache.fill(launch, self.factors(cache), cache.w0.values(launch.names, launch.projection.dtype))
            return cache.buffers[launch][0]

    # --- gradients

    @runs_eagerly
    def new_graph(self, cache: WeightCache) -> Graph:
        """theta and the factors with a graph, on which weights can hang."""
        trained = cache.trained
        with isolated(grad=True):
            if self.attachment.ranks is not None:
                self.attachment.ranks.average(trained.theta, trained.multipliers)
            graph = root_graph(trained.theta, trained.multipliers, self.basis.plan, self.basis.partition)
        with self.attachment.lock:
            cache.graphs.add(graph)
        return graph

    def late_graph(self, cache: WeightCache) -> Graph:
        """As `new_graph`, for layers that backward recomputes: the gradients reach theta with those of the rest."""

        def deliver(grads: list[Tensor | None]) -> None:
            if self.attachment.ranks is not None and self.tasks.trained()[0] is not cache.trained.theta:
                raise RuntimeError(
                    "theta: expected it to be gathered until backward ends, which recomputes all of the model, got a "
                    "shard again: checkpoint parts of the model with use_reentrant=False"
                )
            graph = self.new_graph(cache)
            found = {end: grad for end, grad in zip((graph.theta, graph.factors), grads) if grad is not None}
            torch.autograd.backward(list(found), list(found.values()))

        values = cache.trained.values[0], self.factors(cache)
        graph = late_graph(cache, cache.trained.theta, values, deliver)
        with self.attachment.lock:
            cache.graphs.add(graph)
        return graph

    def delivers_once(self, cache: WeightCache) -> bool:
        """Whether it makes a difference in how many parts the gradients of theta and the multipliers arrive."""
        once, ranks = self.reduced_once, self.attachment.ranks
        if once.reduces or once.at_end:
            return once.reduces
        for parameter in (cache.trained.theta, cache.trained.multipliers):
            averages = ranks is not None and ranks.averages(parameter)  # which may be done in parts
            if len(parameter._backward_hooks or ()) > averages:
                return True
            if len(parameter._post_accumulate_grad_hooks or ()) > once.counts(parameter):
                return True
        return False

    def join(self, cache: WeightCache, graph: Graph, name: str, check: Callable[[], None]) -> Weight:
        """Adds the part of this tensor to the graph, where it is not there, and returns the tensor.

        `check` is that of `Projection.part`.
        """
        if name in graph.nodes:
            return graph.nodes[name]
        launch = cache.launch_of[name]
        part = launch.part_of[name]
        kind = as_weight if self.basis.settings.memory == "step" else as_block_weight
        with isolated(grad=True):
            buffer = cache.buffers[launch][0]
            weights = launch.projection.part(graph.theta, graph.factors, part, buffer, kind, check)
        for tensor, weight in zip(part.plan.names, cast(Sequence[Weight], weights), strict=True):
            graph.nodes[tensor] = weight
            weight.w0, weight.changes = cache.w0.parameters[tensor], cache.changes
            if isinstance(weight, BlockWeight):
                weight.of_model = weakref.ref(cache), tensor
        return graph.nodes[name]
