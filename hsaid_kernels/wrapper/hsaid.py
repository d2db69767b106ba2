"""`HSAID`: a model with weights W_i = W0_i + factor_i * P_i theta, of which only theta and the multipliers are trained.

W0 is the set of the model's own parameters. They are neither copied nor written. While the model runs, the *projected
weights* W_i replace them in the modules; afterwards the model has its own parameters again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.selection import Patterns
from hsaid_kernels.wrapper import checkpoint
from hsaid_kernels.wrapper.basis import as_json, basis_of
from hsaid_kernels.wrapper.comparison import check_active_ranks, check_state
from hsaid_kernels.wrapper.configuration import TASK, describe, encode_state
from hsaid_kernels.wrapper.exchange import merged_copy
from hsaid_kernels.wrapper.heads import Heads
from hsaid_kernels.wrapper.projected import ProjectedWeights
from hsaid_kernels.wrapper.stand_in import StandIn
from hsaid_kernels.wrapper.tasks import Tasks, check_task, groups_of
from hsaid_kernels.wrapper.wrapped import claim, plain

if TYPE_CHECKING:
    from typing_extensions import Self


class HSAID(StandIn):
    """Wraps a model for fine-tuning inside a random subspace: DID, SAID or H-SAID (docs/method.md).

    Args:
        model: any module. Its parameters are W0 and are not changed. Tied parameters stay tied. Of
            `torch.compile(module)`, the module inside is wrapped: compile the HSAID instead.
        intrinsic_dim: d, the total number of trained values, len(theta) + len(multipliers). From 1 to 2**20, and larger
            than the number m of multipliers.
        partition: which tensors share multipliers, given by levels of the hierarchy: "L1+L2|L3|L4" (the default, also
            called "hsaid-3"), "said", "did", ...; see `Hierarchy.partition`.
        seed: 0 to 2**64 - 1. Determines the random basis, that is, all matrices P_i.
        skip, merge: nodes of the hierarchy to skip or to treat as the same node, see `Hierarchy.from_model`.
        combine: "product" or "sum", how a tensor's multipliers are combined into its factor, see `Partition`.
        normalize, diagonal, width: options of the projection, see `Plan`.
        include, exclude: regular expressions that select the tensors to project, see `select_tensors`. All other
            parameters of the model are frozen, except those that `train_fully` selects.
        train_fully: regular expressions that select tensors to train directly, as in ordinary fine-tuning (a new
            classification head, for example). They are not projected and do not count towards intrinsic_dim. The
            trained values are copies; the model's own tensors keep W0.
        heads: whether the attention heads form level L5 of the hierarchy. Each head's part of a tensor then has its own
            random basis and factor. None means True if the partition names L5 or if heads are pruned, else False.
        pruned: {layer: [heads]}, the heads that receive no update: their weights in the projected tensors stay at W0.
            None means `heads.pruned_heads(model)`, the heads whose weights are all zero.
        dtype: of the projected weights: torch.float32, bfloat16 or float16. None means the dtype of W0, and follows
            `.to(dtype)`. A dtype other than that of W0 requires W0 in float32.
        backend: "auto", or one of `available_backends()`.
        task: the name of the first task, see `add_task`.

    Attributes:
        theta: nn.Parameter, float32 [d - m], initially zeros.
        multipliers: nn.Parameter, float32 [m], initially ones.
        full: {name: nn.Parameter}, the fully trained tensors.
        task: the name of the current task, to which theta, multipliers and full belong.
        model: the wrapped model.
        hierarchy, partition, plan: the `Hierarchy`, `Partition` and `Plan` that define what theta and the multipliers
            mean.
        pruned: {attention module: [heads]}, the heads that receive no update.

    A call is equivalent to `torch.func.functional_call(model, hsaid.weights() | hsaid.full, args, kwargs)`.

    `parameters()` returns the parameters of the current task; `state_dict()` returns them and the configuration.
    `train`, `eval` and `to` also apply to the model. Every other attribute is the model's. The model's methods
    (`generate`, for example) run on the projected weights, but a submodule (`hsaid.encoder`) holds W0.

    Without gradients, the projected weights are cached until theta, the multipliers or W0 change. PyTorch does not
    track writes through `.data`: such a write to W0 takes effect only after `train()` or `eval()` changes the mode.

    During backward, the gradients of a block's weights are used and freed as soon as backward has left the block, or
    the last of a group of neighbouring blocks that together are at most half as large as the largest block.
    Gradient checkpointing as implemented in transformers works. A model that calls `torch.utils.checkpoint` itself must
    not do so inside HSAID, because backward would recompute that part with W0.

    Raises:
        TypeError: model is not a module, is or contains an HSAID or a parallel wrapper (wrap the HSAID in
            DistributedDataParallel instead), or has sharded parameters; a parameter's dtype or the argument `dtype`
            cannot be projected; another argument has the wrong type.
        ValueError: another argument has a value that is not listed above; intrinsic_dim <= m; another HSAID already
            wraps the model.
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
        model = plain(model)
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype: expected torch.float32, bfloat16, float16 or None, got {dtype}")
        self.include, self.exclude, self.train_fully = map(as_json, (include, exclude, train_fully))
        named: dict[str, Any] = dict(skip=skip, merge=merge, combine=combine, heads=heads, pruned=pruned)
        named |= dict(normalize=normalize, diagonal=diagonal, width=width)
        named |= dict(include=self.include, exclude=self.exclude, train_fully=self.train_fully)
        basis = basis_of(model, intrinsic_dim, partition, seed, **named)
        self.hierarchy, self.partition = basis.hierarchy, basis.partition
        self.plan, self.pruned = basis.plan, basis.pruned
        self._projected = ProjectedWeights(model, basis.plan, basis.partition, dtype, backend)
        self._tasks = Tasks(check_task(task), basis.full)
        self._ranks_agree = False
        self.training = model.training
        self._stand_in_for(model)  # from here on, a new attribute that the model also has is set on the model
        self._start_task(task)
        self._projected.projection(self.w0().values(), self.theta)  # raises for incompatible dtypes and devices
        self._projected.upload(self.multipliers)
        claim(self.model, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the projected weights and returns its output."""
        if torch.compiler.is_compiling():
            self._ranks_checked()
            return self._projected.call_traced(self, args, kwargs)
        with self._computing():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """The projected weights, {name: W0_i + factor_i * P_i theta}; differentiable if gradients are enabled.

        Each has the shape of W0_i and the dtype `self.dtype`. The tensors are views of one buffer. Without gradients
        that buffer is the cache that later calls use, so do not write to it.
        """
        with self._projected.lock:
            return self._projected.now(self)[0]

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors: the model's own parameters, not copies."""
        return self._projected.w0()

    @property
    def merged(self) -> bool:
        """Whether the model holds the projected weights: True from `merge(inplace=True)` until `unmerge()`."""
        return self._projected.kept is not None

    @property
    def task(self) -> str:
        """The name of the current task, to which `theta`, `multipliers` and `full` belong."""
        return self._tasks.current

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they were added."""
        return self._tasks.names

    @property
    def full(self) -> dict[str, nn.Parameter]:
        """{name: parameter} for the tensors that are trained fully in the current task."""
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
        """Parameter groups for an optimizer: "theta", "multipliers" and "full", in this order, empty groups omitted.

        Args:
            lr_theta, lr_multipliers, lr_full: learning rate of each group. None leaves it to the optimizer.
            weight_decay: of theta and the fully trained tensors. None leaves it to the optimizer. The multipliers
                always get 0, because weight decay would pull them towards 0 and their neutral value is 1.
            task: the task whose parameters are grouped. None means the current task.

        Raises ValueError for an unknown task.
        """
        rates = {"theta": lr_theta, "multipliers": lr_multipliers, "full": lr_full}
        return groups_of(self._tasks.parameters_of(task, self._parameters), rates, weight_decay)

    def add_task(self, name: str) -> None:
        """Adds a task: a separate theta, multipliers and `full` with their initial values, on the same W0 and basis.

        The current task does not change. Use one optimizer per task: it keeps the parameters of the task it was created
        for, also while another task is current.

        Raises TypeError if name is not a non-empty string, ValueError if the task exists, RuntimeError while merged in
        place.
        """
        with self._projected.lock:
            self._projected.refuse_merged("add_task()")
            before = self.task
            self._tasks.add(name, self._parameters)
            self._start_task(name)
            self.set_task(before)

    def set_task(self, name: str) -> None:
        """Makes `name` the current task, which `theta`, `multipliers`, `full`, `parameters()` and all calls refer to.

        `state_dict()` too is that of the current task. Set the task before wrapping this module in
        DistributedDataParallel, which keeps the parameters it finds at construction.

        Raises ValueError for an unknown task, RuntimeError while merged in place.
        """
        self._tasks.check(name)
        with self._projected.lock:
            self._projected.refuse_merged("set_task()")
            self._tasks.switch(name, self._parameters)
            self._projected.drop_cache()

    def remove_task(self, name: str) -> None:
        """Deletes a task and its parameters. Raises ValueError for the current task and for an unknown one."""
        self._tasks.remove(name)

    def _start_task(self, name: str) -> None:
        """Creates the parameters of a new task with their initial values, and makes it the current task."""
        own = self._projected.own()
        device = own[self.plan.names[0]].device
        theta = torch.zeros(self.plan.dim, dtype=torch.float32, device=device)
        ones = self.partition.initial().to(device)
        # DID has no multipliers, so this parameter is empty and gets no gradient. requires_grad=False keeps
        # DistributedDataParallel from waiting for one.
        parameters = {"theta": nn.Parameter(theta), "multipliers": nn.Parameter(ones, requires_grad=len(ones) > 0)}
        self._tasks.start(name, parameters, own, self._parameters)

    def load_task(self, directory: str | os.PathLike[str]) -> str:
        """Adds the task stored in a checkpoint, makes it the current task and returns its name.

        The checkpoint must come from the same basis, tensors and W0. A different W0 only causes a warning. Raises what
        `from_pretrained` raises, and ValueError for a different basis or a task whose name already exists.
        """
        return checkpoint.load_task(self, directory)

    def merge(self, inplace: bool = False) -> nn.Module:
        """Returns a model whose parameters are the projected weights and `full`.

        By default this is a copy: an ordinary model that does not depend on this HSAID. `requires_grad` and tying are
        those of the original; the dtype is that of the projected weights. During the call memory holds W0 and two
        copies of the projected weights. This HSAID and its model are unchanged.

        With `inplace=True` the model itself is changed and returned, until `unmerge()` restores W0. In the meantime
        this HSAID can run the model, but training, `add_task`, `set_task`, `load_state_dict` and `to` raise
        RuntimeError, and so does another `merge`.
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
        """Restores W0 bit for bit after `merge(inplace=True)`. Raises RuntimeError if nothing is merged in place."""
        with self._projected.lock:
            self._projected.unmerge()

    def save_pretrained(self, directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any) -> None:
        """Saves the current task's parameters and the configuration, a few kilobytes; see `checkpoint.save_pretrained`.

        Does nothing if `is_main_process` is False. Other arguments of transformers' `save_pretrained` are accepted and
        ignored.
        """
        if is_main_process:
            checkpoint.save_pretrained(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], model: nn.Module, *, backend: str = "auto") -> HSAID:
        """Wraps `model` as saved in a checkpoint; its W0 must be that of training. See `checkpoint.from_pretrained`."""
        return checkpoint.from_pretrained(cls, directory, model, backend=backend)

    @property
    def intrinsic_dim(self) -> int:
        """d = len(theta) + len(multipliers)."""
        return self.plan.dim + self.partition.num_multipliers

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The argument `dtype`, which may be None."""
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
        """Does nothing: `_load_from_state_dict` has already checked the configuration."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Checked before anything is loaded, so that a state_dict with another configuration changes nothing here.
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
            # theta and the multipliers move to the new device but always stay float32
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
        claim(self.model, self)

    def __repr__(self) -> str:
        full = f", {len(self._tasks.full)} trained fully" if self._tasks.full else ""
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers){full}, partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )

    def _check_ranks(self) -> None:
        """At the first training step under DistributedDataParallel, checks that all ranks have the same basis and W0.

        DistributedDataParallel itself broadcasts neither. Raises ValueError if they differ.
        """
        if not self._ranks_agree and torch.is_grad_enabled():  # evaluation may run on a single rank
            self._ranks_agree = check_active_ranks(self, {self, self.model})

    def _computing(self) -> AbstractContextManager[None]:
        """A context in which the model runs on the projected weights."""
        return self._projected.computing(self, self._check_ranks)

    def _ranks_checked(self) -> bool:
        """`_check_ranks` for torch.compile, which calls this once, while tracing."""
        self._check_ranks()
        return True

    # Sets what torch.compiler.assume_constant_result sets. The decorator itself would import all of torch._dynamo here.
    _ranks_checked.__dict__["_dynamo_marked_constant"] = True
