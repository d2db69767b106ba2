"""`HSAID`: a model whose weights are W0 + factor_i * P_i theta, trained through theta and the multipliers alone.

W0 is the model's own parameters, where they are: never copied, never written.  While the model runs, the projected
weights stand in their places; before and after, the model is what it was.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.selection import Patterns
from hsaid_kernels.wrapper import checkpoint
from hsaid_kernels.wrapper.basis import basis_of
from hsaid_kernels.wrapper.comparison import check_active_ranks, check_state
from hsaid_kernels.wrapper.configuration import TASK, describe, encode_state
from hsaid_kernels.wrapper.exchange import merged_copy
from hsaid_kernels.wrapper.heads import Heads
from hsaid_kernels.wrapper.projected import ProjectedWeights
from hsaid_kernels.wrapper.stand_in import StandIn
from hsaid_kernels.wrapper.tasks import Tasks, check_task, groups_of

if TYPE_CHECKING:
    from typing_extensions import Self

_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HSAID]] = weakref.WeakKeyDictionary()


class HSAID(StandIn):
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
        basis = basis_of(
            model,
            intrinsic_dim,
            partition,
            seed,
            skip=skip,
            merge=merge,
            combine=combine,
            normalize=normalize,
            diagonal=diagonal,
            width=width,
            include=self.include,
            exclude=self.exclude,
            train_fully=self.train_fully,
            heads=heads,
            pruned=pruned,
        )
        self.hierarchy, self.partition = basis.hierarchy, basis.partition
        self.plan, self.pruned = basis.plan, basis.pruned
        self._projected = ProjectedWeights(model, basis.plan, basis.partition, dtype, backend)
        self._tasks = Tasks(check_task(task), basis.full)
        self._ranks_agree = False
        self.training = model.training
        self._stand_in_for(model)  # from now on, what is new and the model has is set there
        self._start_task(task)
        self._projected.projection(self.w0().values(), self.theta)  # refuses dtypes and devices that do not go together
        self._projected.upload(self.multipliers)
        self._register()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments, on the projected weights."""
        if torch.compiler.is_compiling():
            self._ranks_checked()
            return self._projected.call_traced(self, args, kwargs)
        with self._computing():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """{name: W0_i + factor_i * P_i theta}, differentiable where gradients are enabled.

        The tensors are views of one buffer. Without gradients they are the ones that the next calls use: read only.
        """
        with self._projected.lock:
            return self._projected.now(self)[0]

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors: the model's own parameters, as it has them now."""
        return self._projected.w0()

    @property
    def merged(self) -> bool:
        """Whether the model holds the projected weights: from `merge(inplace=True)` to `unmerge()`."""
        return self._projected.kept is not None

    @property
    def task(self) -> str:
        """The name of the set task: `theta`, `multipliers` and `full` are its own."""
        return self._tasks.current

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they came."""
        return self._tasks.names

    @property
    def full(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the tensors that are trained fully."""
        return self._tasks.full_of(self._parameters)

    def parameter_groups(
        self,
        *,
        lr_theta: float | None = None,
        lr_multipliers: float | None = None,
        lr_full: float | None = None,
        weight_decay: float | None = None,
        task: str | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, of `task` or else the set one: "theta", "multipliers", "full", without empty ones.

        What is None is left to the optimizer, but the multipliers get no weight decay: it would draw them to 0, which
        is not where they start.
        """
        rates = {"theta": lr_theta, "multipliers": lr_multipliers, "full": lr_full}
        return groups_of(self._tasks.parameters_of(task, self._parameters), rates, weight_decay)

    def add_task(self, name: str) -> None:
        """A further task on the same W0 and basis: theta, multipliers and `full` of its own, where training starts.

        The set task stays set. An optimizer is for the parameters of one task, whether that is set or not.
        """
        with self._projected.lock:
            self._projected.refuse_merged("add_task()")
            before = self.task
            self._tasks.add(name, self._parameters)
            self._start_task(name)
            self.set_task(before)

    def set_task(self, name: str) -> None:
        """From now on `theta`, `multipliers`, `full`, `parameters()`, `state_dict()` and all calls are this task's.

        Set a task before wrapping this module into DistributedDataParallel, which keeps the parameters that it found.
        """
        self._tasks.check(name)
        with self._projected.lock:
            self._projected.refuse_merged("set_task()")
            self._tasks.switch(name, self._parameters)
            self._projected.drop_cache()

    def remove_task(self, name: str) -> None:
        """Forgets what a task has trained; ValueError for the set one."""
        self._tasks.remove(name)

    def _start_task(self, name: str) -> None:
        """The parameters of a task that has none yet, where training starts; it is set."""
        own = self._projected.own()
        device = own[self.plan.names[0]].device
        theta = torch.zeros(self.plan.dim, dtype=torch.float32, device=device)
        ones = self.partition.initial().to(device)
        # Without multipliers (DID) no gradient reaches them: DistributedDataParallel must not wait for one.
        parameters = {"theta": nn.Parameter(theta), "multipliers": nn.Parameter(ones, requires_grad=len(ones) > 0)}
        self._tasks.start(name, parameters, own, self._parameters)

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
        projected = self._projected
        with projected.lock, torch.no_grad():
            projected.refuse_merged("merge()")
            values = projected.now(self)[0] | self.full
            projected.drop_cache()
            if not inplace:
                return merged_copy(self.model, projected.own(), values)
            projected.merge(values)
            return self.model

    def unmerge(self) -> None:
        """Gives the model W0 back, bit for bit, after `merge(inplace=True)`; RuntimeError without that."""
        with self._projected.lock:
            self._projected.unmerge()

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
    def given_dtype(self) -> torch.dtype | None:
        """The argument `dtype`."""
        return self._projected.given_dtype

    @property
    def backend(self) -> str:
        """The argument `backend`."""
        return self._projected.backend

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projected weights."""
        return self.given_dtype or self.model.get_parameter(self.plan.names[0]).dtype

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self._projected.drop_cache()
        self.model.train(mode)
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        return encode_state(describe(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Compared before anything is loaded, so that a state dict of another configuration leaves this one untouched.
        try:
            self._projected.refuse_merged("load_state_dict()")
            if (key := f"{prefix}_extra_state") in state_dict:
                check_state(state_dict[key], self)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._projected.refuse_merged("to()")
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
        self._projected.upload(self.multipliers)
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "HSAID does not run in torch.nn.DataParallel, because W0 stays on one device: use DistributedDataParallel "
            "(torchrun, accelerate launch), or let this process see one device only (CUDA_VISIBLE_DEVICES=0)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ranks_agree = False
        self._projected.upload(self.multipliers)
        self._register()

    def __repr__(self) -> str:
        full = f", {len(self._tasks.full)} trained fully" if self._tasks.full else ""
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers){full}, partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )

    def _register(self) -> None:
        other = _wrappers.get(self.model, lambda: None)()
        if other is not None and other is not self:
            raise ValueError(
                f"model: expected one that no HSAID wraps, got a {type(self.model).__name__} that already is: "
                "wrap copy.deepcopy(model), or delete the first wrapper before"
            )
        _wrappers[self.model] = weakref.ref(self)

    def _check_ranks(self) -> None:
        """At the first step under DistributedDataParallel, which sends around neither basis nor W0: do they agree?"""
        if not self._ranks_agree and torch.is_grad_enabled():  # one rank alone may evaluate
            self._ranks_agree = check_active_ranks(self, {self, self.model})

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with self._projected.computing(self, self._check_ranks):
            yield

    def _ranks_checked(self) -> bool:
        """For torch.compile, which calls this once, while it traces."""
        self._check_ranks()
        return True

    # What torch.compiler.assume_constant_result sets, which as a decorator would import all of torch._dynamo here.
    _ranks_checked.__dict__["_dynamo_marked_constant"] = True


def _patterns(given: Patterns) -> str | list[str] | None:
    """As a checkpoint's JSON has them."""
    return given if given is None or isinstance(given, str) else list(given)
