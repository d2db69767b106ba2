"""The projected weights of a model: made when they are wanted, kept while nothing changes, in place while it runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.blocks import blocks_of, joined
from hsaid_kernels.wrapper.comparison import differences
from hsaid_kernels.wrapper.exchange import Cache, Exchange, Late, Places, aliases_of, apply_masks, masks


class Trained(Protocol):
    """What the weights are made from, beside W0: an `HSAID`."""

    theta: nn.Parameter
    multipliers: nn.Parameter
    training: bool

    @property
    def full(self) -> dict[str, nn.Parameter]: ...


class ProjectedWeights:
    """W0 + factor * P theta for the tensors of a plan, and the places in the model where they stand while it runs.

    Args:
        model: whose parameters are W0.
        plan, partition: what theta and the multipliers mean.
        dtype: of the weights; None for that of W0.
        backend: "auto", or one of `available_backends()`.

    Attributes:
        parts: (modules, Part) for each call of the adjoint.
        kept: W0 by name while the model holds the projected weights, or else None.
        lock: held while the model runs on other parameters than its own: it is one for all threads.
    """

    def __init__(self, model: nn.Module, plan: Plan, partition: Partition, dtype: torch.dtype | None, backend: str):
        self.model, self.plan, self.partition, self.given_dtype, self.backend = model, plan, partition, dtype, backend
        self._whole = Part(plan)
        self.parts = [
            (modules, Part(plan, names)) for modules, names in joined(blocks_of(model, plan.shapes), plan.shapes)
        ]
        self._aliases = aliases_of(model)
        self._masked = [(module, hook._tensor_name) for module, hook in masks(model.modules())]
        self.kept: dict[str, Tensor] | None = None
        self._forget()

    def _forget(self) -> None:
        self.lock = threading.RLock()
        self._places: Places | None = None
        self._cache: Cache | None = None
        self._running = False

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("lock", "_places", "_cache", "_running")
        return {key: value for key, value in self.__dict__.items() if key not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def own(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name; ValueError where the projected ones are no longer what they were."""
        if self._places is None or not (self._running or self._places.hold()):
            self._places = Places(self.model)
        own = self._places.parameters
        if untied := sorted(self._aliases.keys() & own.keys()):
            raise ValueError(
                f"model: expected {untied[0]!r} to be tied as it was when it was wrapped, got one of its own"
            )
        shapes = {name: own[name].shape for name in self.plan.names if name in own}
        if shapes != self.plan.shapes:
            reason = differences(self.plan.shapes, shapes)
            raise ValueError(f"model: expected the tensors that it had when it was wrapped, got others: {reason}")
        return own

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors."""
        with self.lock:
            own: Mapping[str, Tensor] = self.own() if self.kept is None else self.kept
            return {name: own[name] for name in self.plan.names}

    def drop_cache(self) -> None:
        """The next weights are made anew."""
        self._cache = None

    def now(self, of: Trained) -> tuple[dict[str, Tensor], list[Late]]:
        """The projected weights; and for each block of the model, where gradients are wanted, how it gets its own."""
        w0 = list(self.w0().values())
        trained = [of.theta, of.multipliers]
        wanted = torch.is_grad_enabled() and (of.theta.requires_grad or of.multipliers.requires_grad)
        late: list[Late] = []
        cache = self._cache  # train() and eval() drop it, in whichever thread
        # Never as inference tensors, which no later call outside inference mode could use.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            if wanted or cache is None or not cache.serves(trained, w0):
                cache = self._cache = None  # its memory is needed now
                join = self.projection(w0, of.theta).parts(of.theta, self.partition.factors(of.multipliers), w0)
                made = join(self._whole)
                if wanted:
                    late = [
                        (
                            [self.model.get_submodule(name) for name in modules],
                            part.plan.names,
                            partial(_join, join, part),
                        )
                        for modules, part in self.parts
                    ]
                else:
                    self._cache = Cache(trained, w0, made)
            else:
                made = cache.weights
        return dict(zip(self.plan.names, made, strict=True)), late

    @contextlib.contextmanager
    def computing(self, of: Trained, before: Callable[[], None]) -> Iterator[None]:
        """A context in which the projected weights are the model's parameters, and the others are detached.

        `before` is called first, where the model does not run on them already.
        """
        with self.lock:
            if self._running:  # called from within the model: the weights are in place
                yield
                return
            before()
            if self.kept is not None:
                self._refuse_training(of)
                tensors: dict[str, Tensor] = {}  # no gradient is to reach the model's own parameters
                late: list[Late] = []
                self.own()
            else:
                weights, late = self.now(of)
                tensors = weights | of.full
            assert self._places is not None  # own() has found them
            self._running = True
            try:
                with Exchange(self._places, tensors, self.lock, late):
                    yield
            finally:
                self._running = False

    def call_traced(self, of: Trained, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns on the weights of now, for torch.compile, which knows no lock and no cache."""
        # Tied places are all named: looking for them itself, functional_call would fill those of a module that the
        # model has twice one time too often, and leave a projected weight in W0's place.
        kept = [(module, key, getattr(module, key)) for module, key in self._masked]
        result = torch.func.functional_call(self.model, self._traced(of), tuple(args), dict(kwargs), tie_weights=False)
        for module, key, value in kept:
            setattr(module, key, value)
        return result

    def _traced(self, of: Trained) -> dict[str, Tensor]:
        """What stands in for the model's parameters in a graph of torch.compile, which knows no lock and no cache."""
        own = dict(self.model.named_parameters())
        tensors = {name: parameter.detach() for name, parameter in own.items()}
        if self.kept is not None:
            self._refuse_training(of)
        else:
            w0 = [own[name] for name in self.plan.names]
            join = self.projection(w0, of.theta).parts(of.theta, self.partition.factors(of.multipliers), w0)
            for _, part in self.parts:
                tensors |= zip(part.plan.names, join(part), strict=True)
            tensors |= of.full
        return tensors | {alias: tensors[name] for alias, name in self._aliases.items()}

    def projection(self, w0: Collection[Tensor], theta: Tensor) -> Projection:
        """The operator; ValueError or TypeError for dtypes and devices of W0 that do not go together."""
        dtypes, devices = {tensor.dtype for tensor in w0}, {tensor.device for tensor in w0}
        if elsewhere := devices - {theta.device}:
            raise ValueError(
                f"model: expected its tensors on {theta.device}, where theta is, got some on {elsewhere.pop()}: "
                "hsaid.to(device) moves both"
            )
        found = ", ".join(sorted(map(str, dtypes)))
        if self.given_dtype is None and len(dtypes) > 1:
            raise ValueError(f"dtype: expected one for the weights, because the model's tensors have several: {found}")
        dtype = self.given_dtype or dtypes.pop()
        if dtype not in WEIGHT_DTYPES:
            raise TypeError(f"model: expected tensors in float32, bfloat16 or float16, got {found}")
        if not dtypes <= {dtype, torch.float32}:
            raise ValueError(f"dtype: expected the dtype of the model's tensors ({found}) or None, got {dtype}")
        return Projection(self.plan, dtype=dtype, backend=self.backend)

    def merge(self, values: Mapping[str, Tensor]) -> None:
        """Puts values in the place of the model's own parameters, until `unmerge`."""
        own = self.own()
        self.kept = {name: own[name].data for name in values}
        for name, value in values.items():  # those trained fully are not to change with the model
            own[name].data = value.data if name in self.plan.shapes else value.data.clone()
        apply_masks(self.model)

    def unmerge(self) -> None:
        """Gives the model back what `merge` has taken out."""
        if self.kept is None:
            raise RuntimeError("unmerge(): expected weights that merge(inplace=True) has merged, found none")
        own = dict(self.model.named_parameters())
        for name, value in self.kept.items():
            own[name].data = value
        apply_masks(self.model)
        self.kept = None

    def refuse_merged(self, call: str) -> None:
        """RuntimeError where the model holds the projected weights."""
        if self.kept is not None:
            raise RuntimeError(
                f"{call}: expected a model on its W0, got one that merge(inplace=True) has merged: unmerge()"
            )

    def _refuse_training(self, of: Trained) -> None:
        if of.training and torch.is_grad_enabled():
            self.refuse_merged("training")

    def upload(self, multipliers: Tensor) -> None:
        """Puts small tables where theta is, before the first call: torch.compile would see them change after it."""
        device = multipliers.device
        with torch.no_grad():
            self.partition.factors(multipliers)
        self.plan.scales_on(device)
        ops.prepare(self.plan, device, self.backend)
        for _, part in self.parts:
            part.rows_on(device)
            ops.prepare(part.plan, device, self.backend)


def _join(join: Callable[[Part], Sequence[Tensor]], part: Part) -> Sequence[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():  # whatever the model is doing
        return join(part)
