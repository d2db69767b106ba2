"""`ProjectedWeights`: computes and caches a model's projected weights, and puts them in place while the model runs."""

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
    """What the weights are computed from in addition to W0. `HSAID` implements it."""

    theta: nn.Parameter
    multipliers: nn.Parameter
    training: bool

    @property
    def full(self) -> dict[str, nn.Parameter]: ...


class ProjectedWeights:
    """Computes W0_i + factor_i * P_i theta for the tensors of a plan, and runs the model on these weights.

    Args:
        model: the model whose parameters are W0.
        plan, partition: define what theta and the multipliers mean.
        dtype: of the weights. None means the dtype of W0.
        backend: "auto", or one of `available_backends()`.

    Attributes:
        parts: [(module names, Part)], one for each call of the adjoint in backward.
        kept: {name: W0_i} while the model holds the projected weights (`merge`), else None.
        lock: held while the projected weights replace the model's parameters, because all threads share one model.
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
        """The model's own parameters by name, where a tied parameter appears once.

        Raises ValueError if the names, shapes or tying of the projected tensors have changed since the model was
        wrapped.
        """
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
        """Discards the cached weights, so that the next call recomputes them."""
        self._cache = None

    def now(self, of: Trained) -> tuple[dict[str, Tensor], list[Late]]:
        """Returns ({name: projected weight}, late), where `late` is the argument of `Exchange`.

        `late` has an entry for each of `parts` if gradients are wanted, and is empty otherwise.
        """
        w0 = list(self.w0().values())
        trained = [of.theta, of.multipliers]
        wanted = torch.is_grad_enabled() and (of.theta.requires_grad or of.multipliers.requires_grad)
        late: list[Late] = []
        cache = self._cache  # read once: train() or eval() in another thread may drop it meanwhile
        # Never created as inference tensors, because calls outside inference mode could not use those.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            if wanted or cache is None or not cache.serves(trained, w0):
                cache = self._cache = None  # frees the memory before the new weights need it
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
        """A context manager inside which the projected weights are the model's parameters; the others are detached.

        Calls `before` first, except in a nested call, where the weights are already in place.
        """
        with self.lock:
            if self._running:  # nested call from inside the model: the weights are already in place
                yield
                return
            before()
            if self.kept is not None:
                self._refuse_training(of)
                tensors: dict[str, Tensor] = {}  # all parameters are detached, so none of them gets a gradient
                late: list[Late] = []
                self.own()
            else:
                weights, late = self.now(of)
                tensors = weights | of.full
            assert self._places is not None  # set by own()
            self._running = True
            try:
                with Exchange(self._places, tensors, self.lock, late):
                    yield
            finally:
                self._running = False

    def call_traced(self, of: Trained, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the model on newly computed weights, for torch.compile, which cannot trace the lock or the cache."""
        # All names of tied parameters are given explicitly, with tie_weights=False. If functional_call looked for them
        # itself, it would swap the parameters of a module that occurs twice in the model once too often, and leave a
        # projected weight in the place of W0.
        kept = [(module, key, getattr(module, key)) for module, key in self._masked]
        result = torch.func.functional_call(self.model, self._traced(of), tuple(args), dict(kwargs), tie_weights=False)
        for module, key, value in kept:
            setattr(module, key, value)
        return result

    def _traced(self, of: Trained) -> dict[str, Tensor]:
        """{name: replacement} for all names of all parameters of the model, inside a graph of torch.compile."""
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
        """The `Projection` for W0 tensors of these dtypes and devices.

        Raises ValueError if W0 is not on theta's device, if W0 has several dtypes and no `dtype` was given, or if W0
        has a dtype other than the weights' dtype and float32. Raises TypeError for a dtype that cannot be projected.
        """
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
        """Replaces the data of the model's own parameters by `values`, until `unmerge`."""
        own = self.own()
        self.kept = {name: own[name].data for name in values}
        # Fully trained tensors are cloned, so that writes to the merged model do not change them.
        for name, value in values.items():
            own[name].data = value.data if name in self.plan.shapes else value.data.clone()
        apply_masks(self.model)

    def unmerge(self) -> None:
        """Restores the data that `merge` replaced. Raises RuntimeError if nothing is merged."""
        if self.kept is None:
            raise RuntimeError("unmerge(): expected weights that merge(inplace=True) has merged, found none")
        own = dict(self.model.named_parameters())
        for name, value in self.kept.items():
            own[name].data = value
        apply_masks(self.model)
        self.kept = None

    def refuse_merged(self, call: str) -> None:
        """Raises RuntimeError, which names `call`, if the model holds the projected weights."""
        if self.kept is not None:
            raise RuntimeError(
                f"{call}: expected a model on its W0, got one that merge(inplace=True) has merged: unmerge()"
            )

    def _refuse_training(self, of: Trained) -> None:
        if of.training and torch.is_grad_enabled():
            self.refuse_merged("training")

    def upload(self, multipliers: Tensor) -> None:
        """Copies small index and scale tables to the device of theta and the multipliers before the first call.

        If the first call did this, torch.compile would see attributes change and compile again.
        """
        device = multipliers.device
        with torch.no_grad():
            self.partition.factors(multipliers)
        self.plan.scales_on(device)
        ops.prepare(self.plan, device, self.backend)
        for _, part in self.parts:
            part.rows_on(device)
            ops.prepare(part.plan, device, self.backend)


def _join(join: Callable[[Part], Sequence[Tensor]], part: Part) -> Sequence[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():  # also if the model has turned gradients off here
        return join(part)
