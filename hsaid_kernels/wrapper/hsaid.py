"""`HSAID`: a model with weights W_i = W0_i + factor_i * P_i theta, of which only theta and the multipliers are trained.

W0 is the set of the model's own parameters. They are neither copied nor written. From wrapping to `unwrap()`, every
read of a weight in the model gives the *projected weight* W_i of that moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import check_choice
from hsaid_kernels.fastfood.selection import Patterns
from hsaid_kernels.wrapper.basis import as_json, basis_of
from hsaid_kernels.wrapper.checkpoint.compare import check_active_ranks, check_sharded_ranks
from hsaid_kernels.wrapper.checkpoint.configuration import TASK, w0_checks
from hsaid_kernels.wrapper.heads import Heads
from hsaid_kernels.wrapper.isolation import runs_eagerly
from hsaid_kernels.wrapper.merging import merged_copy
from hsaid_kernels.wrapper.multitask import MultiTask
from hsaid_kernels.wrapper.tasks import Tasks, check_task
from hsaid_kernels.wrapper.w0.checks import check_layers, check_parameters, plain
from hsaid_kernels.wrapper.w0.fsdp2 import is_fsdp
from hsaid_kernels.wrapper.w0.packed import warn_of_packed
from hsaid_kernels.wrapper.w0.quantized import dequantized, is_quantized
from hsaid_kernels.wrapper.weights.attachment import unwrapped_before
from hsaid_kernels.wrapper.weights.launches import MEMORY
from hsaid_kernels.wrapper.weights.outside import TRACED
from hsaid_kernels.wrapper.weights.source import ProjectedWeights

if TYPE_CHECKING:
    from typing_extensions import Self


TASKS_IN_GRAPHS = (
    "torch.compile: expected one task in all threads, got different ones (use_task(), or set_task() in several "
    "threads), of which a compiled graph would run the registered one: call the HSAID uncompiled"
)


class HSAID(MultiTask):
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
        normalize, diagonal, width: options of the projection, see `Plan`. The published scale is normalize="tensor",
            with which some seeds collapse at the learning rates that others need (docs/method.md).
        include, exclude: regular expressions that select the tensors to project, see `select_tensors`. All other
            parameters of the model are frozen, except those that `train_fully` selects.
        train_fully: regular expressions that select tensors to train directly, as in ordinary fine-tuning (a new
            classification head, for example). They are not projected and do not count towards intrinsic_dim. The
            trained values are copies; the model's own tensors keep W0.
        frozen: names of tensors to leave out. None means those with requires_grad=False or without elements, or none if
            `include` is given.
        heads: whether the attention heads form level L5 of the hierarchy. Each head's part of a tensor then has its own
            random basis and factor. None means True if the partition names L5 or if heads are pruned, else False.
        pruned: {layer: [heads]}, the heads that receive no update: their weights in the projected tensors stay at W0.
            None means `heads.pruned_heads(model)`, the heads whose weights are all zero.
        padding_rows: {name of a projected tensor: row}, the rows that receive no update. None means those at
            `padding_idx` of tables that only embeddings hold: fine-tuning does not train them either. {} means none.
        dtype: of the projected weights: torch.float32, bfloat16 or float16. None means for each tensor the dtype of its
            W0, and follows `.to(dtype)`. A dtype other than that of W0 requires W0 in float32.
        backend: "auto", or one of `available_backends()`.
        memory: "step" makes the weights of all blocks of the model in one launch, and keeps them. "block" makes those
            of a block when it runs, frees them when the next one runs, and makes them again, with the same bits, when
            backward needs them: a training step then holds W0, the activations, and about two blocks.
        task: the name of the first task, see `add_task`.

    Attributes:
        theta: nn.Parameter, float32 [d - m], initially zeros.
        multipliers: nn.Parameter, float32 [m], initially ones.
        full: {name: nn.Parameter}, the fully trained tensors.
        task: the name of the current task, to which theta, multipliers and full belong.
        model: the wrapped model, for inference and for its modules: optimizers, trainers and averages take the HSAID.
        hierarchy, partition, plan: the `Hierarchy`, `Partition` and `Plan` that define what theta and the multipliers
            mean.
        pruned: {attention module: [heads]}, the heads that receive no update.
        padding_rows: {name: row}, the rows that receive no update.
        frozen: {name: shape} of the tensors that are left out because they were frozen or have no elements.

    Learning rates of full fine-tuning (2e-5, for example) move theta too little to learn anything: use
    `torch.optim.AdamW(hsaid.parameter_groups())`, whose rates learn, or see docs/integration.md.

    From wrapping to `unwrap()`, every read of a weight in the model, such as `hsaid.model.encoder.weight`, gives the
    projected weight of that moment (inside a call of the HSAID, of the beginning of the call), in any thread,
    differentiable where gradients are enabled. So submodules, methods and generators of the model, and recomputation in
    backward, run on it. `hsaid.w0()`,
    `hsaid.model.named_parameters()` and `hsaid.model.state_dict()` have W0, which does not require gradients meanwhile.

    `modules()`, `buffers()`, `apply()`, `train()` and `to()` reach the model. `parameters()` returns the parameters of
    the current task; `state_dict()` returns them, the configuration, and the model's buffers (the statistics of
    BatchNorm). Every other attribute is the model's. As a context manager, an HSAID unwraps the model at the end.

    Projected weights are kept until theta, the multipliers or W0 change, with memory="block" until others need the
    room. PyTorch does not track writes through `.data`: such a write to W0 takes effect only after `train()` or
    `eval()` changes the mode, and such a write to theta on a GPU, or during a call of the HSAID, with the next call. A
    write to a projected weight raises an error.

    During backward, the gradients of a block's weights are used and freed as soon as backward has left the block, or
    the last of a group of neighbouring blocks that together are at most half as large as the largest block.

    Raises:
        TypeError: model is not a module, is or contains an HSAID, a parallel wrapper (wrap the HSAID in
            DistributedDataParallel instead) or a ScriptModule, has parameters in shards that are not FSDP2's, or
            weights in few bits that cannot be W0 (docs/integration.md); a parameter's dtype or the argument `dtype`
            cannot be projected; another argument has the wrong type.
        ValueError: another argument has a value that is not listed above; intrinsic_dim <= m; another HSAID wraps the
            model; it is sharded or quantized, and `memory` is not "block"; a parameter has gradient hooks or shares
            memory with another; an embedding has max_norm; all parameters are frozen.

    Warns of modules whose weights are packed into integers or objects and stay as they are, unless `include` or
    `frozen` is given.
    """

    _w0_checks: str | None = None
    _own_full = False  # whether the fully trained tensors are the model's own parameters, not copies

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
        normalize: str = "global",
        diagonal: str = "gaussian",
        width: int | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        train_fully: Patterns = None,
        frozen: Iterable[str] | None = None,
        heads: bool | None = None,
        pruned: Heads | None = None,
        padding_rows: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        memory: str = "step",
        task: str = TASK,
    ):
        super().__init__()
        check_choice("memory", memory, MEMORY)
        if isinstance(model, nn.Module) and any(isinstance(module, HSAID) for module in model.modules()):
            raise TypeError("model: expected a plain module, got one that is or holds an HSAID")
        model = plain(model)
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype: expected torch.float32, bfloat16, float16 or None, got {dtype}")
        if isinstance(model, nn.Module):
            unwrapped_before(model, self)
        self.include, self.exclude, self.train_fully = map(as_json, (include, exclude, train_fully))
        named: dict[str, Any] = dict(skip=skip, merge=merge, combine=combine, heads=heads, pruned=pruned)
        named |= dict(normalize=normalize, diagonal=diagonal, width=width, frozen=frozen)
        named |= dict(include=self.include, exclude=self.exclude, train_fully=self.train_fully)
        named |= dict(padding_rows=padding_rows)
        basis = basis_of(model, intrinsic_dim, partition, seed, **named)
        check_layers(model, basis.plan.names, basis.full)
        if not self._own_full:
            check_parameters(model, (*basis.plan.names, *basis.full))
        self.padding_rows = basis.padding_rows
        if include is None and frozen is None:  # otherwise it has been said what is projected
            warn_of_packed(model)
        self.hierarchy, self.partition = basis.hierarchy, basis.partition
        self.plan, self.pruned, self.frozen = basis.plan, basis.pruned, basis.frozen
        self._tasks = Tasks(check_task(task), basis.full, self._parameters)
        self._projected = ProjectedWeights(
            model,
            self._tasks,
            basis.full,
            basis.plan,
            basis.partition,
            dtype,
            backend,
            memory=memory,
            padding_rows=basis.padding_rows,
            own_full=self._own_full,
        )
        self._buffers_of = {}
        self._ranks_agree = False
        self._agreed: set[str] = set()  # tasks that all ranks of a sharded model have alike
        self.training = model.training
        self._stand_in_for(model)  # from here on, a new attribute that the model also has is set on the model
        self._new_task(task)
        self._projected.upload()  # raises for incompatible dtypes and devices
        self._claim()
        if self._projected.ranks is not None:
            self.w0_checks()

    def _claim(self) -> None:
        self._projected.belongs_to(self)
        self._projected.attach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the projected weights and returns its output."""
        if torch.compiler.is_compiling():
            if self._tasks.threaded:
                raise RuntimeError(TASKS_IN_GRAPHS)
            self._traced()
            return self._projected.call_traced(self.training, args, kwargs)
        if torch.jit.is_tracing():
            raise RuntimeError(TRACED)
        with self._computing():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """The projected weights, {name: W0_i + factor_i * P_i theta}; differentiable if gradients are enabled.

        Each has the shape of W0_i, and its dtype unless `dtype` was given. They are views of buffers that later calls
        use, so they are read only. Of a sharded model, all ranks must call this together.
        """
        return self._projected.now()

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors: the model's own parameters, not copies."""
        return self._projected.w0()

    def w0_checks(self) -> str:
        """Hashes of some values of each W0_i, as they are in checkpoints; see `configuration.w0_checks`."""
        if self._projected.ranks is None:
            return w0_checks(self._known_w0())
        # All ranks compute these together, when they have wrapped the model or at the first step, and one may save.
        if self._w0_checks is None:
            self._w0_checks = w0_checks(self._known_w0())
        return self._w0_checks

    def _known_w0(self) -> dict[str, Tensor]:
        """As `w0`, but a model that somebody has changed does not keep what was trained from being saved."""
        own: Mapping[str, Tensor] = self._projected.kept or self._projected.known()
        return {name: own[name] for name in self.plan.names}

    @property
    def merged(self) -> bool:
        """Whether the model holds the projected weights: True from `merge(inplace=True)` until `unmerge()`."""
        return self._projected.kept is not None

    def merge(self, inplace: bool = False) -> nn.Module:
        """Returns a model whose parameters are the projected weights and `full`.

        By default this is a copy: an ordinary model that does not depend on this HSAID. `requires_grad` and tying are
        those of the original; the dtype is that of the projected weights. Quantized tensors are dequantized, also those
        that are left out, and what was projected of them requires gradients. During the call memory holds W0 and two
        copies of the projected weights. This HSAID and its model are unchanged.

        With `inplace=True` the model itself is changed and returned, until `unmerge()` restores W0. In the meantime
        this HSAID can run the model, but training, `add_task`, `set_task`, `load_state_dict` and `to` raise
        RuntimeError, and so does another `merge`.
        """
        projected = self._projected
        projected.check_on_w0("merge()")
        if projected.ranks is not None:
            raise RuntimeError(
                "merge(): expected a whole model, got one that FSDP2 has sharded: save_pretrained(), load that into a "
                "whole model by from_pretrained(), and merge this"
            )
        if inplace and any(map(is_quantized, projected.w0().values())):
            raise RuntimeError(
                "merge(): expected plain parameters for inplace=True, got quantized ones, which cannot hold projected "
                "weights: merge() makes an ordinary model"
            )
        with torch.no_grad():
            values = projected.now() | self.full
            if inplace:
                projected.merged_task = self.task
                projected.merge(values)
                return self.model
            projected.drop_cache()
            own = projected.own()
            quantized = {name: parameter for name, parameter in own.items() if is_quantized(parameter)}
            flags = projected.flags | {name: True for name in quantized if name in values}  # which they could not have
            for name in quantized.keys() - values.keys():
                values[name] = dequantized(quantized[name]).to(self.given_dtype or quantized[name].dtype)
            return merged_copy(self.model, own, values, flags)

    def unmerge(self) -> None:
        """Restores W0 bit for bit after `merge(inplace=True)`. Raises RuntimeError if nothing is merged in place."""
        self._projected.unmerge()

    def unwrap(self) -> nn.Module:
        """Gives back the plain model as it was: W0, its buffers, and whether its parameters require gradients.

        Returns the model, which another HSAID may wrap then. theta, the multipliers and `full` stay here, to be read
        and saved, with the buffers that training changed; calls and changes raise RuntimeError. Does nothing if the
        model has been unwrapped already.
        """
        if self._projected.attached:
            with self._tasks.using(self._tasks.registered):  # whatever has become of this thread's
                self._described = self.configuration()
            self._buffers_of[self._tasks.registered] = self.buffers_changed()
            self._projected.detach()
        return self.model

    def unwrapped(self) -> contextlib.AbstractContextManager[nn.Module]:
        """A context manager for the time of which the model is the plain one, as `unwrap` gives it back."""
        return self._unwrapped()

    @contextlib.contextmanager
    def _unwrapped(self) -> Iterator[nn.Module]:
        model = self.unwrap()
        try:
            yield model
        finally:
            unwrapped_before(model, self)
            self._ranks_agree, self._w0_checks = False, None
            self._agreed.clear()
            self._claim()
            if self._projected.ranks is not None:
                self.w0_checks()
            self._projected.buffers.put(model, self._buffers_of.pop(self._tasks.registered, {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unwrap()

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
    def memory(self) -> str:
        """The argument `memory`."""
        return self._projected.memory

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projected weights; of the first one, if W0 has several."""
        return self.given_dtype or next(iter(self._known_w0().values())).dtype

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self._projected.drop_cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._projected.check_on_w0("to()")
        if recurse:
            self.model._apply(fn)
        every: list[Mapping[str, nn.Parameter | None]] = [self._parameters, *self._tasks.others()]
        for parameters in every:
            held = nn.Module()
            held.__dict__["_parameters"] = parameters
            held._apply(_float32_of(parameters, fn))
        self._projected.drop_cache()
        with contextlib.suppress(TypeError, ValueError):  # which the next read raises: dtypes may be changed once more
            self._projected.upload()
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "HSAID does not run in torch.nn.DataParallel, because W0 stays on one device: use DistributedDataParallel "
            "(torchrun, accelerate launch), or let this process see one device only (CUDA_VISIBLE_DEVICES=0)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ranks_agree, self._agreed = False, set()
        self._projected.belongs_to(self)

    def __repr__(self) -> str:
        full = f", {len(self._tasks.full)} trained fully" if self._tasks.full else ""
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers){full}, partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )

    def _check_ranks(self) -> None:
        """At the first training step of several ranks, or call of a sharded model, checks their basis and W0.

        DistributedDataParallel and FSDP2 themselves broadcast neither. Raises ValueError if they differ.
        """
        if self._ranks_agree:
            return
        if self._projected.ranks is None and (is_fsdp(self) or is_fsdp(self.model)):
            self._projected.own()  # sees that it has been sharded since
        if (ranks := self._projected.ranks) is not None:
            if self.task not in self._agreed:
                check_sharded_ranks(self, ranks, self._projected.own())
                self._agreed.add(self.task)
        elif torch.is_grad_enabled():  # under DistributedDataParallel evaluation may run on a single rank
            self._ranks_agree = check_active_ranks(self, {self, self.model})

    def _checked(self) -> None:
        self._check_buffers()
        self._check_ranks()

    @runs_eagerly
    def _computing(self) -> contextlib.AbstractContextManager[None]:
        self._checked()
        if torch.is_grad_enabled():
            self._projected.reduced_once.expect(self, (self.theta, self.multipliers))
        return self._projected.inside(self.training)

    def _traced(self) -> bool:
        """What `_computing` checks, for torch.compile, which calls this once, while tracing."""
        if torch.compiler.is_exporting():  # asked here, because torch.compile of torch 2.11 answers with True
            raise RuntimeError(TRACED)
        self._checked()
        self._projected.prepare_tracing()
        return True

    # Sets what torch.compiler.assume_constant_result sets. The decorator itself would import all of torch._dynamo here.
    _traced.__dict__["_dynamo_marked_constant"] = True


def _float32_of(
    parameters: Mapping[str, nn.Parameter | None], fn: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`fn`, but theta and the multipliers of a task, which move to the new device, always stay float32."""
    kept = [parameters["theta"], parameters["multipliers"]]

    def apply(tensor: Tensor) -> Tensor:
        keeps = any(own is not None and (tensor is own or tensor is own.grad) for own in kept)
        return tensor.to(fn(tensor).device) if keeps else fn(tensor)

    return apply
