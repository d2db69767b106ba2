"""`HSAID`: a model whose weights are W0 + factor_i * P_i theta, trained through theta and the multipliers alone.

W0 is the model's own parameters, where they are: never copied, never written.  While the model runs, the projected
weights stand in their places; before and after, the model is what it was.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import MAX_DIM, Plan, check_int
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.selection import Patterns, split_tensors
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.attention import pieces_of
from hsaid_kernels.hierarchy.paths import HEADS
from hsaid_kernels.wrapper import checkpoint
from hsaid_kernels.wrapper.blocks import blocks_of, joined
from hsaid_kernels.wrapper.comparison import check_ranks, check_state, differences
from hsaid_kernels.wrapper.configuration import TASK, Config, describe, encode_state
from hsaid_kernels.wrapper.exchange import Cache, Exchange, Late, Places, aliases_of, apply_masks, masks, merged_copy
from hsaid_kernels.wrapper.heads import Heads, check_heads, pruned_heads
from hsaid_kernels.wrapper.tasks import Tasks, check_task

if TYPE_CHECKING:
    from typing_extensions import Self

_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HSAID]] = weakref.WeakKeyDictionary()


class HSAID(Tasks):
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
        train_fully: regular expressions that choose tensors to train as they are, beside theta (a new head, say).
            They are not projected, and not counted in intrinsic_dim; W0 stays as it is here too.
        heads: whether attention heads are level L5 of the hierarchy, each with a part of its own of the tensors that
            are divided among them. None for where the partition names L5 or heads are pruned.
        pruned: {layer: [heads]} of which W0 is kept: no update is written there (in tensors that are projected). None
            for `heads.pruned_heads(model)`, those whose weights are all zero.
        dtype: of the projected weights: float32, bfloat16 or float16. None for that of W0, also after `.to(dtype)`;
            another one only where W0 is in float32.
        backend: "auto", or one of `available_backends()`.
        task: the name of the first task, see `add_task`.

    Attributes:
        theta: nn.Parameter, float32 [d - m], zeros at the start.  multipliers: nn.Parameter, float32 [m], ones.
        full: {name: nn.Parameter} of what is trained fully.  task: the name of the task that all these belong to.
        model: the wrapped model.  hierarchy, partition, plan: what theta and the multipliers mean.
        pruned: {attention module: heads} that get no update.

    Equivalent to `torch.func.functional_call(model, hsaid.weights() | hsaid.full, args, kwargs)`.

    `parameters()` and `state_dict()` are those of the task (and the configuration). `train`, `eval` and `to` reach the
    model too, and every other attribute is the model's: its methods (`generate`) run on the projected weights, but a
    submodule (`hsaid.encoder`) holds W0. Where no gradient is wanted, the weights are kept until theta, the multipliers
    or W0 change; a write to W0 through `.data`, which torch does not count, is noticed only when `train()` or `eval()`
    changes the mode. transformers' gradient checkpointing works; a model that calls `torch.utils.checkpoint` itself
    must not do so here, because backward would run it again on W0. In backward, the gradients of a block's weights are
    used and freed as soon as backward has left the block.

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
        include: Patterns = None,
        exclude: Patterns = None,
        train_fully: Patterns = None,
        heads: bool | None = None,
        pruned: Heads | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        task: str = TASK,
    ):
        super().__init__()
        if isinstance(model, nn.Module) and any(isinstance(module, HSAID) for module in model.modules()):
            raise TypeError("model: expected a plain module, got one that is or holds an HSAID")
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype: expected torch.float32, bfloat16, float16 or None, got {dtype}")
        self.include, self.exclude, self.train_fully = map(_patterns, (include, exclude, train_fully))
        tensors, full = split_tensors(model, self.include, self.exclude, self.train_fully)
        check_int("intrinsic_dim", intrinsic_dim, 1, MAX_DIM)
        if heads is not None and not isinstance(heads, bool):
            raise TypeError(f"heads: expected True, False or None, got {heads!r}")
        self.pruned = pruned_heads(model) if pruned is None else check_heads(model, pruned, "pruned")
        if self.pruned and heads is False:
            raise ValueError(f"heads: expected True or None where heads are pruned ({self.pruned}), got {heads}")
        heads = bool(self.pruned) or HEADS in str(partition) if heads is None else heads
        self.hierarchy = Hierarchy.from_model(model, skip, merge, heads)
        self.hierarchy = self.hierarchy.select(tensors, without=pieces_of(model, self.pruned))
        self.partition = self.hierarchy.partition(partition, combine)
        m = self.partition.num_multipliers
        if intrinsic_dim <= m:
            spec = self.partition.spec
            raise ValueError(f"intrinsic_dim: expected more than the {m} multipliers of {spec!r}, got {intrinsic_dim}")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.plan = Plan(
            shapes,
            intrinsic_dim - m,
            seed,
            width=width,
            diagonal=diagonal,
            normalize=normalize,
            segments=self.hierarchy.segments,
        )
        self.given_dtype = dtype
        self.backend = backend
        self._whole = Part(self.plan)
        self._parts = [(modules, Part(self.plan, names)) for modules, names in joined(blocks_of(model, shapes), shapes)]
        self._kept: dict[str, Tensor] | None = None  # W0, while the model holds the projected weights
        self._aliases = aliases_of(model)
        self._masked = [(module, hook._tensor_name) for module, hook in masks(model.modules())]
        self.task, self._tasks, self._full_names = check_task(task), {}, tuple(full)
        self.training = model.training
        self._forget()
        self._stand_in_for(model)  # from now on, what is new and the model has is set there
        self._start_task()
        self._projection(self.w0().values())  # refuses dtypes and devices that do not go together
        self._upload()
        self._register()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments, on the projected weights."""
        if torch.compiler.is_compiling():
            self._ranks_checked()
            # Tied places are all named: looking for them itself, functional_call would fill those of a module that the
            # model has twice one time too often, and leave a projected weight in W0's place.
            kept = [(module, key, getattr(module, key)) for module, key in self._masked]
            result = torch.func.functional_call(self.model, self._traced(), args, kwargs, tie_weights=False)
            for module, key, value in kept:
                setattr(module, key, value)
            return result
        with self._computing():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """{name: W0_i + factor_i * P_i theta}, differentiable where gradients are enabled.

        The tensors are views of one buffer. Without gradients they are the ones that the next calls use: read only.
        """
        with self._lock:
            return self._weights()[0]

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors: the model's own parameters, as it has them now."""
        with self._lock:
            own = self._own() if self._kept is None else self._kept
            return {name: own[name] for name in self.plan.names}

    @property
    def merged(self) -> bool:
        """Whether the model holds the projected weights: from `merge(inplace=True)` to `unmerge()`."""
        return self._kept is not None

    def load_task(self, directory: str | os.PathLike[str]) -> str:
        """Adds and sets the task of a checkpoint that was saved on the same W0 and basis; returns its name.

        Raises as `from_pretrained` does, and ValueError for another basis or a task that is there already.
        """
        return checkpoint.load_task(self, directory)

    def merge(self, inplace: bool = False) -> nn.Module:
        """The model with the projected weights (and `full`) as its parameters.

        By default a copy, an ordinary model without a trace of this one: `requires_grad` is as in the model, tied
        parameters are tied, and the dtype is that of the projected weights. For a moment W0 and the weights twice are
        in memory; afterwards this HSAID and its model are as before.

        With `inplace` the model itself, until `unmerge()` gives it W0 back. Meanwhile this HSAID only calls it: there
        is no training, no other task and no moving.
        """
        with self._lock, torch.no_grad():
            self._refuse_merged("merge()")
            own, values = self._own(), self._weights()[0] | self.full
            self._cache = None
            if not inplace:
                return merged_copy(self.model, own, values)
            self._kept = {name: own[name].data for name in values}
            for name, value in values.items():  # those trained fully are not to change with the model
                own[name].data = value.data if name in self.plan.shapes else value.data.clone()
            apply_masks(self.model)
            return self.model

    def unmerge(self) -> None:
        """Gives the model W0 back, bit for bit, after `merge(inplace=True)`; RuntimeError without that."""
        with self._lock:
            if self._kept is None:
                raise RuntimeError("unmerge(): expected weights that merge(inplace=True) has merged, found none")
            own = dict(self.model.named_parameters())
            for name, value in self._kept.items():
                own[name].data = value
            apply_masks(self.model)
            self._kept = None

    def save_pretrained(self, directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any) -> None:
        """Writes what `task` has trained, and the configuration, a few kilobytes; see `checkpoint.save_pretrained`.

        Nothing where `is_main_process` is False. What else scripts pass to transformers' method is ignored.
        """
        if is_main_process:
            checkpoint.save_pretrained(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], model: nn.Module, *, backend: str = "auto") -> HSAID:
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

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self._cache = None
        self.model.train(mode)
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        return encode_state(describe(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Compared before anything is loaded, so that a state dict of another configuration leaves this one untouched.
        try:
            self._refuse_merged("load_state_dict()")
            if (key := f"{prefix}_extra_state") in state_dict:
                check_state(state_dict[key], self)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._refuse_merged("to()")
        if recurse:
            self.model._apply(fn)

        def apply(tensor: Tensor) -> Tensor:
            # theta and the multipliers follow to the device, and stay float32 whatever the model's dtype becomes
            projects = any(tensor is own or tensor is own.grad for own in (self.theta, self.multipliers))
            return tensor.to(fn(tensor).device) if projects else fn(tensor)

        active = self.task
        for task in self.tasks:
            self.set_task(task)
            super()._apply(apply, recurse)
        self.set_task(active)
        self._upload()
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "HSAID does not run in torch.nn.DataParallel, because W0 stays on one device: use DistributedDataParallel "
            "(torchrun, accelerate launch), or let this process see one device only (CUDA_VISIBLE_DEVICES=0)"
        )

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_places", "_cache", "_lock", "_running", "_ranks_agree")  # by _forget
        return {key: value for key, value in self.__dict__.items() if key not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)
        self._upload()
        self._register()

    def __repr__(self) -> str:
        full = f", {len(self._full_names)} trained fully" if self._full_names else ""
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers){full}, partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )

    def _forget(self) -> None:
        self._places: Places | None = None
        self._cache: Cache | None = None
        self._lock = threading.RLock()  # the model is one: two threads must not exchange its weights at a time
        self._running = False
        self._ranks_agree = False

    def _register(self) -> None:
        other = _wrappers.get(self.model, lambda: None)()
        if other is not None and other is not self:
            raise ValueError(
                f"model: expected one that no HSAID wraps, got a {type(self.model).__name__} that already is: "
                "wrap copy.deepcopy(model), or delete the first wrapper before"
            )
        _wrappers[self.model] = weakref.ref(self)

    def _upload(self) -> None:
        """Small tables to where theta is: in good time, because torch.compile would see them change after one step."""
        device = self.theta.device
        with torch.no_grad():
            self.partition.factors(self.multipliers)
        self.plan.scales_on(device)
        ops.prepare(self.plan, device, self.backend)
        for _, part in self._parts:
            part.rows_on(device)
            ops.prepare(part.plan, device, self.backend)

    def _refuse_merged(self, call: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"{call}: expected a model on its W0, got one that merge(inplace=True) has merged: unmerge()"
            )

    def _refuse_merged_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            self._refuse_merged("training")

    def _check_ranks(self) -> None:
        """At the first step under DistributedDataParallel, which sends around neither basis nor W0: do they agree?"""
        ddp = DistributedDataParallel._get_active_ddp_module()
        here = ddp is not None and bool({self, self.model} & set(ddp.module.modules()))
        if self._ranks_agree or not here or not torch.is_grad_enabled():  # one rank alone may evaluate
            return
        found: list[Config] = [{}] * dist.get_world_size(ddp.process_group)
        dist.all_gather_object(found, describe(self), ddp.process_group)
        check_ranks(found)
        self._ranks_agree = True

    def _ranks_checked(self) -> bool:
        """For torch.compile, which calls this once, while it traces."""
        self._check_ranks()
        return True

    # What torch.compiler.assume_constant_result sets, which as a decorator would import all of torch._dynamo here.
    _ranks_checked.__dict__["_dynamo_marked_constant"] = True

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """A context in which the projected weights are the model's parameters, and the others are detached."""
        with self._lock:
            if self._running:  # called from within the model: the weights are in place
                yield
                return
            self._check_ranks()
            if self.merged:
                self._refuse_merged_training()
                tensors: dict[str, Tensor] = {}  # no gradient is to reach the model's own parameters
                late: list[Late] = []
                self._own()
            else:
                weights, late = self._weights()
                tensors = weights | self.full
            assert self._places is not None  # _own() has found them
            self._running = True
            try:
                with Exchange(self._places, tensors, self._lock, late):
                    yield
            finally:
                self._running = False

    def _own(self) -> dict[str, nn.Parameter]:
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

    def _weights(self) -> tuple[dict[str, Tensor], list[Late]]:
        """The projected weights; and for each block of the model, where gradients are wanted, how it gets its own."""
        w0 = list(self.w0().values())
        trained = [self.theta, self.multipliers]
        wanted = torch.is_grad_enabled() and (self.theta.requires_grad or self.multipliers.requires_grad)
        late: list[Late] = []
        cache = self._cache  # train() and eval() drop it, in whichever thread
        # Never as inference tensors, which no later call outside inference mode could use.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            if wanted or cache is None or not cache.serves(trained, w0):
                cache = self._cache = None  # its memory is needed now
                join = self._projection(w0).parts(self.theta, self.partition.factors(self.multipliers), w0)
                made = join(self._whole)
                if wanted:
                    late = [
                        (
                            [self.model.get_submodule(name) for name in modules],
                            part.plan.names,
                            partial(_join, join, part),
                        )
                        for modules, part in self._parts
                    ]
                else:
                    self._cache = Cache(trained, w0, made)
            else:
                made = cache.weights
        return dict(zip(self.plan.names, made, strict=True)), late

    def _traced(self) -> dict[str, Tensor]:
        """What stands in for the model's parameters in a graph of torch.compile, which knows no lock and no cache."""
        own = dict(self.model.named_parameters())
        tensors = {name: parameter.detach() for name, parameter in own.items()}
        if self.merged:
            self._refuse_merged_training()
        else:
            w0 = [own[name] for name in self.plan.names]
            join = self._projection(w0).parts(self.theta, self.partition.factors(self.multipliers), w0)
            for _, part in self._parts:
                tensors |= zip(part.plan.names, join(part), strict=True)
            tensors |= self.full
        return tensors | {alias: tensors[name] for alias, name in self._aliases.items()}

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


def _patterns(given: Patterns) -> str | list[str] | None:
    """As a checkpoint's JSON has them."""
    return given if given is None or isinstance(given, str) else list(given)


def _join(join: Callable[[Part], Sequence[Tensor]], part: Part) -> Sequence[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():  # whatever the model is doing
        return join(part)
