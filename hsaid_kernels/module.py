"""`HSAID`: a model whose weights are W0 + factor_i * P_i theta, trained through theta and the multipliers alone.

W0 is the model's own parameters, where they are: never copied, never written.  While the model runs, the projected
weights stand in their places; before and after, the model is what it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels import checkpoint
from hsaid_kernels.exchange import Cache, Exchange, Places
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.ops import WEIGHT_DTYPES
from hsaid_kernels.plan import MAX_DIM, Plan, check_int
from hsaid_kernels.projection import Projection, select_tensors

_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HSAID]] = weakref.WeakKeyDictionary()


class HSAID(nn.Module):
    """Wraps a model for fine-tuning inside a random subspace: DID, SAID or H-SAID (docs/method.md).

    Args:
        model: any module; its parameters are W0 and stay as they are. Tied parameters stay tied.
        intrinsic_dim: d, trained values in all: len(theta) + len(multipliers), from 1 to 2**20.
        partition: which levels share multipliers: "L1+L2|L3|L4" (the default, also "hsaid-3"), "said", "did", ...
        seed: 0 to 2**64 - 1; decides the random basis.
        skip, merge: nodes of the hierarchy to pass over or to treat as the same, see `Hierarchy.from_model`.
        combine: "product" or "sum" of a tensor's multipliers, see `Hierarchy.partition`.
        normalize, diagonal, width: of the projection, see `Plan`.
        include, exclude: regular expressions that choose the projected tensors, see `select_tensors`; the model's
            other parameters are frozen.
        dtype: of the projected weights: float32, bfloat16 or float16. None for that of W0, also after `.to(dtype)`;
            another one only where W0 is in float32.
        backend: "auto", or one of `available_backends()`.

    Attributes:
        theta: nn.Parameter, float32 [d - m], zeros at the start.  multipliers: nn.Parameter, float32 [m], ones.
        model: the wrapped model.  hierarchy, partition, plan: what the two parameters mean.

    Equivalent to `torch.func.functional_call(model, hsaid.weights(), args, kwargs)`.

    `parameters()` and `state_dict()` are theta and the multipliers (and the configuration). `train`, `eval` and `to`
    reach the model too, and every other attribute is the model's: its methods (`generate`) run on the projected
    weights, but a submodule (`hsaid.encoder`) holds W0. Where no gradient is wanted, the weights are kept until theta,
    the multipliers or W0 change; a write through `.data`, which torch does not count, is noticed only when `train()` or
    `eval()` changes the mode. transformers' gradient checkpointing works; a model that calls `torch.utils.checkpoint`
    itself must not do so here, because backward would run it again on W0.

    Raises:
        TypeError: model is no module or holds an HSAID; a parameter or dtype is not of a kind that can be projected.
        ValueError: any other argument that is not as above, intrinsic_dim <= m, a model that an HSAID already wraps.
    """

    def __init__(
        self,
        model: nn.Module,
        intrinsic_dim: int,
        partition: str = "L1+L2|L3|L4",
        seed: int = 0,
        *,
        skip: Iterable[str] = (),
        merge: Mapping[str, Iterable[str]] | None = None,
        combine: str = "product",
        normalize: str = "tensor",
        diagonal: str = "gaussian",
        width: int | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if isinstance(model, nn.Module) and any(isinstance(module, HSAID) for module in model.modules()):
            raise TypeError("model: expected a plain module, got one that is or holds an HSAID")
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype: expected torch.float32, bfloat16, float16 or None, got {dtype}")
        self.include = include if include is None or isinstance(include, str) else list(include)
        self.exclude = exclude if exclude is None or isinstance(exclude, str) else list(exclude)
        tensors = select_tensors(model, self.include, self.exclude)
        check_int("intrinsic_dim", intrinsic_dim, 1, MAX_DIM)
        self.hierarchy = Hierarchy.from_model(model, skip, merge).select(tensors)
        self.partition = self.hierarchy.partition(partition, combine)
        m = self.partition.num_multipliers
        if intrinsic_dim <= m:
            spec = self.partition.spec
            raise ValueError(f"intrinsic_dim: expected more than the {m} multipliers of {spec!r}, got {intrinsic_dim}")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.plan = Plan(shapes, intrinsic_dim - m, seed, width=width, diagonal=diagonal, normalize=normalize)
        self.given_dtype = dtype
        self.backend = backend
        # Not a submodule: parameters(), state_dict(), apply() and an optimiser must not find W0 in here.
        self.__dict__["model"] = model
        self.training = model.training
        self._forget()
        device = next(iter(tensors.values())).device
        self.theta = nn.Parameter(torch.zeros(self.plan.dim, dtype=torch.float32, device=device))
        # Without multipliers (DID) no gradient reaches them: DistributedDataParallel must not wait for one.
        self.multipliers = nn.Parameter(self.partition.initial().to(device), requires_grad=m > 0)
        self._projection(self.w0().values())
        self._register()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments, on the projected weights."""
        with self._projected():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """{name: W0_i + factor_i * P_i theta}, differentiable where gradients are enabled.

        The tensors are views of one buffer. Without gradients they are the ones that the next calls use: read only.
        """
        with self._lock:
            return self._weights()

    def w0(self) -> dict[str, nn.Parameter]:
        """{name: the model's own parameter} for the projected tensors, as the model has them now."""
        with self._lock:
            if self._places is None or not (self._running or self._places.hold()):
                self._places = Places(self.model)
            own = self._places.parameters
            shapes = {name: own[name].shape for name in self.plan.names if name in own}
            if shapes != self.plan.shapes:
                reason = checkpoint.differences(self.plan.shapes, shapes)
                raise ValueError(f"model: expected the tensors that it had when it was wrapped, got others: {reason}")
            return {name: own[name] for name in self.plan.names}

    def merge(self) -> nn.Module:
        """A copy of the model with the projected weights as its parameters: an ordinary model, no trace of this one.

        `requires_grad` is as in the model, tied parameters are tied, and the dtype is that of the projected weights.
        For a moment W0 and the weights twice are in memory; afterwards this HSAID and its model are as before.
        """
        with self._lock, torch.no_grad():
            weights, w0 = self.weights(), self.w0()
            # deepcopy takes what it finds in the memo for the copy already made, so W0 itself is not copied.
            memo = {id(w0[name]): nn.Parameter(w.clone(), w0[name].requires_grad) for name, w in weights.items()}
            self._cache = None
            return copy.deepcopy(self.model, memo)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes theta, the multipliers and the configuration, a few kilobytes; see `checkpoint.save_pretrained`."""
        checkpoint.save_pretrained(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, model: nn.Module, *, backend: str = "auto") -> HSAID:
        """Wraps `model`, which must hold the W0 that was trained from; see `checkpoint.from_pretrained`."""
        return checkpoint.from_pretrained(cls, directory, model, backend=backend)

    @property
    def intrinsic_dim(self) -> int:
        """d = len(theta) + len(multipliers)."""
        return self.plan.dim + self.partition.num_multipliers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projected weights."""
        return self.given_dtype or self.model.get_parameter(self.plan.names[0]).dtype

    def train(self, mode: bool = True) -> HSAID:
        if mode != self.training:
            self._cache = None
        self.model.train(mode)
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        return checkpoint.encode_state(checkpoint.describe(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Compared before anything is loaded, so that a state dict of another configuration leaves this one untouched.
        try:
            if (key := f"{prefix}_extra_state") in state_dict:
                checkpoint.check_state(state_dict[key], self)
        except ValueError as error:
            errors.append(str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HSAID:
        self._cache = None
        if recurse:
            self.model._apply(fn)
        # theta and the multipliers follow to the device, and stay float32 whatever the model's dtype becomes
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")  # none yet while this object is being unpickled
            if model is None or name.startswith("__"):
                raise
        value = getattr(model, name)
        # A method computes with the model's weights (generate, encode, get_image_features), so it must find the
        # projected ones; those of transformers' base class are about the model (resize_token_embeddings, ...).
        about = "transformers.modeling_utils"
        if not inspect.ismethod(value) or value.__self__ is not model or value.__func__.__module__ == about:
            return value

        @functools.wraps(value)
        def on_projected_weights(*args: Any, **kwargs: Any) -> Any:
            with self._projected():
                return value(*args, **kwargs)

        return on_projected_weights

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_places", "_cache", "_lock", "_running")  # by _forget
        return {key: value for key, value in self.__dict__.items() if key not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._register()

    def __repr__(self) -> str:
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers), partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )

    def _forget(self) -> None:
        self._places: Places | None = None
        self._cache: Cache | None = None
        self._lock = threading.RLock()  # the model is one: two threads must not exchange its weights at a time
        self._running = False

    def _register(self) -> None:
        other = _wrappers.get(self.model, lambda: None)()
        if other is not None and other is not self:
            raise ValueError(
                f"model: expected one that no HSAID wraps, got a {type(self.model).__name__} that already is: "
                "wrap copy.deepcopy(model), or delete the first wrapper before"
            )
        _wrappers[self.model] = weakref.ref(self)

    @contextlib.contextmanager
    def _projected(self) -> Iterator[None]:
        """A context in which the projected weights are the model's parameters, and the others are detached."""
        with self._lock:
            if self._running:  # called from within the model: the weights are in place
                yield
                return
            weights = self._weights()
            self._running = True
            try:
                with Exchange(self._places, weights, self._lock):
                    yield
            finally:
                self._running = False

    def _weights(self) -> dict[str, Tensor]:
        w0 = list(self.w0().values())
        sources = [self.theta, self.multipliers, *w0]
        wanted = torch.is_grad_enabled() and (self.theta.requires_grad or self.multipliers.requires_grad)
        # Never as inference tensors, which no later call outside inference mode could use.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            if wanted or self._cache is None or not self._cache.serves(sources):
                self._cache = None  # its memory is needed now
                factors = self.partition.factors(self.multipliers)
                made = self._projection(w0).weights(self.theta, factors, w0)
                if not wanted:
                    self._cache = Cache(sources, made)
            else:
                made = self._cache.weights
        return dict(zip(self.plan.names, made, strict=True))

    def _projection(self, w0: Collection[Tensor]) -> Projection:
        dtypes, devices = {tensor.dtype for tensor in w0}, {tensor.device for tensor in w0}
        if elsewhere := devices - {self.theta.device}:
            raise ValueError(
                f"model: expected its tensors on {self.theta.device}, where theta is, got some on {elsewhere.pop()}: "
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
