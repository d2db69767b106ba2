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

from hsaid_kernels.fastfood.selection import Patterns
from hsaid_kernels.wrapper.basis import CHOICE, Settings
from hsaid_kernels.wrapper.checkpoint.configuration import TASK
from hsaid_kernels.wrapper.heads import Heads
from hsaid_kernels.wrapper.merging import merged_copy
from hsaid_kernels.wrapper.stand_in import StandIn
from hsaid_kernels.wrapper.state import State
from hsaid_kernels.wrapper.w0.checks import check_plain, plain
from hsaid_kernels.wrapper.w0.quantized import as_floats, check_known, others_dtype, with_layers
from hsaid_kernels.wrapper.w0.stored import show, showing
from hsaid_kernels.wrapper.weights.attachment import unwrapped_before
from hsaid_kernels.wrapper.weights.outside import TRACED
from hsaid_kernels.wrapper.weights.traced import call_traced

if TYPE_CHECKING:
    from typing_extensions import Self

TASKS_IN_GRAPHS = (
    "torch.compile: expected one task in all threads, got different ones (use_task(), or set_task() in several "
    "threads), of which a compiled graph would run the registered one: call the HSAID uncompiled"
)


class HSAID(State, StandIn):
    """Wraps a model for fine-tuning inside a random subspace: DID, SAID or H-SAID (docs/method.md).

    Args:
        model: any module. Its parameters are W0 and are not changed. Tied parameters stay tied. Of
            `torch.compile(module)`, the module inside is wrapped: compile the HSAID instead.
        intrinsic_dim: d, the total number of trained values, len(theta) + len(multipliers). From 1 to 2**24, and larger
            than the number m of multipliers.
        partition: which tensors share multipliers, given by levels of the hierarchy: "L1+L2|L3|L4" (the default, also
            called "hsaid-3"), "said", "did", ...; see `Hierarchy.partition`.
        seed: 0 to 2**64 - 1. Determines the random basis, that is, all matrices P_i.
        skip, merge: nodes of the hierarchy to skip or to treat as the same node, see `Hierarchy.from_model`.
        combine: "product" or "sum", how a tensor's multipliers are combined into its factor, see `Partition`.
        normalize, diagonal, width, chunks: options of the projection, see `Plan`. The published scale is
            normalize="tensor", with which some seeds collapse at the learning rates that others need (docs/method.md).
        include, exclude: regular expressions that select the tensors to project, see `select_tensors`. All other
            parameters of the model are frozen, except those that `train_fully` selects.
        train_fully: regular expressions that select tensors to train directly, as in ordinary fine-tuning (a new
            classification head, for example). They are not projected and do not count towards intrinsic_dim. The
            trained values are copies; the model's own tensors keep W0.
        frozen: names of tensors to leave out. None means those with requires_grad=False or without elements, or none if
            `include` is given.
        heads: whether the attention heads form level L5 of the hierarchy. Each head's part of a tensor then has its own
            random basis and factor. None means True if the partition names L5 or if heads are pruned, else False.
        experts: whether the experts of mixtures form level L6. Each expert's part of a tensor then has its own random
            basis and factor, gate and up apart. None means True if the partition names L6 or if experts are pruned.
        layouts: the version of the rules by which tensors are divided among heads. None means the newest; 1 those of
            versions that knew no other, for `load_task` and `load_state_dict` of what they saved.
        names: what tensors were called when they were trained; `from_pretrained(names=)` sets it.
        pruned: {layer: [heads]} and {module of experts: [experts]} that receive no update: their weights in the
            projected tensors stay at W0. None means `heads.pruned_heads(model)`, the heads whose weights are all zero,
            and the experts whose weights are.
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
        pruned: {module: [numbers]}, the heads and experts that receive no update.
        padding_rows: {name: row}, the rows that receive no update.
        frozen: {name: shape} of the tensors that are left out because they were frozen or have no elements.

    Learning rates of full fine-tuning (2e-5, for example) move theta too little to learn anything: use
    `torch.optim.AdamW(hsaid.parameter_groups())`, whose rates learn, or see docs/integration.md.

    From wrapping to `unwrap()`, every read of a weight in the model, such as `hsaid.model.encoder.weight`, gives the
    projected weight of that moment (inside a call of the HSAID, of the beginning of the call), in any thread,
    differentiable where gradients are enabled. So submodules, methods and generators of the model, and recomputation in
    backward, run on it. `hsaid.w0()`, `hsaid.model.named_parameters()` and `hsaid.model.state_dict()` have W0, which
    does not require gradients meanwhile.

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
        chunks: str | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        train_fully: Patterns = None,
        frozen: Iterable[str] | None = None,
        heads: bool | None = None,
        experts: bool | None = None,
        layouts: int | None = None,
        names: Mapping[str, Any] | None = None,
        pruned: Heads | None = None,
        padding_rows: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        memory: str = "step",
        task: str = TASK,
    ):
        super().__init__()
        options: dict[str, Any] = dict(intrinsic_dim=intrinsic_dim, partition=partition, seed=seed, skip=skip)
        options |= dict(
            merge=merge, combine=combine, normalize=normalize, diagonal=diagonal, width=width, chunks=chunks
        )
        options |= dict(include=include, exclude=exclude, train_fully=train_fully, frozen=frozen, heads=heads)
        options |= dict(experts=experts, layouts=layouts, names=names)
        options |= dict(pruned=pruned, padding_rows=padding_rows, dtype=dtype, backend=backend, memory=memory)
        settings = Settings(**options, task=task)
        if isinstance(model, nn.Module) and any(isinstance(module, HSAID) for module in model.modules()):
            raise TypeError("model: expected a plain module, got one that is or holds an HSAID")
        model = plain(model)
        if isinstance(model, nn.Module):
            unwrapped_before(model, self)
        with showing(model, stay=True):
            if include is None and frozen is None and isinstance(model, nn.Module):
                check_known(model)  # otherwise it has been said what is projected
            self._begin(model, settings)
            basis = self._basis
            self.hierarchy, self.partition, self.plan = basis.hierarchy, basis.partition, basis.plan
            self.pruned, self.padding_rows, self.frozen = basis.pruned, basis.padding_rows, basis.frozen
            self.include, self.exclude, self.train_fully = (getattr(basis.settings, key) for key in CHOICE)
            self._stand_in_for(model)  # from here on, a new attribute that the model also has is set on the model
            self._new_task(task)
            self._source.maker.upload()  # raises for incompatible dtypes and devices
        self._claim()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the projected weights and returns its output."""
        if torch.compiler.is_compiling():
            if self._tasks.threaded:
                raise RuntimeError(TASKS_IN_GRAPHS)
            self._traced()
            return call_traced(self._source.maker, self.training, args, kwargs)
        if torch.jit.is_tracing():
            raise RuntimeError(TRACED)
        with self._computing():
            return self.model(*args, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """The projected weights, {name: W0_i + factor_i * P_i theta}; differentiable if gradients are enabled.

        Each has the shape of W0_i, and its dtype unless `dtype` was given. They are views of buffers that later calls
        use, so they are read only. Of a sharded model, all ranks must call this together.
        """
        return self._source.now()

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors: the model's own parameters, not copies."""
        return self._source.attachment.w0()

    @property
    def merged(self) -> bool:
        """Whether the model holds the projected weights: True from `merge(inplace=True)` until `unmerge()`."""
        return self._source.attachment.merged is not None

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
        source, attachment = self._source, self._source.attachment
        attachment.check_on_w0("merge()")
        if attachment.ranks is not None:
            raise RuntimeError(
                "merge(): expected a whole model, got one that FSDP2 has sharded: save_pretrained(), load that into a "
                "whole model by from_pretrained(), and merge this"
            )
        with torch.no_grad():
            if inplace:
                hint = "they cannot hold projected weights, and merge() makes an ordinary model"
                written = with_layers(attachment.own(), {*self.plan.names, *self.full})
                check_plain("merge()", written, "which inplace=True can write to", hint)
            values = source.now() | self.full
            source.drop_cache()
            if inplace:
                attachment.merge(values)
                return self.model
            own = attachment.own()
            floats, trained = as_floats(own, values, self.given_dtype or others_dtype(own))
            return merged_copy(self.model, own, floats, attachment.flags | trained)

    def unmerge(self) -> None:
        """Restores W0 bit for bit after `merge(inplace=True)`. Raises RuntimeError if nothing is merged in place."""
        self._source.attachment.unmerge()

    def unwrap(self) -> nn.Module:
        """Gives back the plain model as it was: W0, its buffers, and whether its parameters require gradients.

        Returns the model, which another HSAID may wrap then. theta, the multipliers and `full` stay here, to be read
        and saved, with the buffers that training changed; calls and changes raise RuntimeError. Does nothing if the
        model has been unwrapped already.
        """
        if self._source.attachment.attached:
            with self._tasks.using(self._tasks.registered):  # whatever has become of this thread's
                self._described = self.configuration()
            self._tasks.buffers[self._tasks.registered] = self.buffers_changed()
            self._source.drop_cache()
            self._source.attachment.detach()
        return self.model

    @contextlib.contextmanager
    def unwrapped(self) -> Iterator[nn.Module]:
        """A context manager for the time of which the model is the plain one, as `unwrap` gives it back."""
        model = self.unwrap()
        try:
            yield model
        finally:
            unwrapped_before(model, self)
            self._compare_anew()
            self._claim()
            self._source.attachment.buffers.put(model, self._tasks.buffers.pop(self._tasks.registered, {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unwrap()

    @property
    def intrinsic_dim(self) -> int:
        """d = len(theta) + len(multipliers)."""
        return self._basis.settings.intrinsic_dim

    @property
    def given_dtype(self) -> torch.dtype | None:
        """The argument `dtype`, which may be None."""
        return self._basis.settings.dtype

    @property
    def backend(self) -> str:
        """The argument `backend`."""
        return self._basis.settings.backend

    @property
    def memory(self) -> str:
        """The argument `memory`."""
        return self._basis.settings.memory

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `nn.Module.to`, but W0 that is on the CPU stays where it is, and shared with other processes if it is.

        To "cpu:0", the device of Accelerate's processes without a GPU, `Tensor.to` would copy it.
        """
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            device = torch.device("cpu")
        return super().to(device, dtype, non_blocking, memory_format=memory_format)  # type: ignore[call-overload]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._source.attachment.check_on_w0("to()")
        if recurse:
            self.model._apply(fn)
        self._tasks.apply(fn)
        self._source.drop_cache()
        self._source.attachment.note_change()  # quantized layers may have moved
        with contextlib.suppress(TypeError, ValueError):  # which the next read raises: dtypes may be changed once more
            show(self.model)
            self._source.maker.upload()
        return self

    def __repr__(self) -> str:
        full = f", {len(self._tasks.full)} trained fully" if self._tasks.full else ""
        return (
            f"HSAID({type(self.model).__name__}, {len(self.plan.names)} tensors, "
            f"{sum(piece.numel for piece in self.plan.pieces):,} weights, intrinsic_dim={self.intrinsic_dim} "
            f"({self.partition.num_multipliers} multipliers){full}, partition={self.partition.spec!r}, "
            f"seed={self.plan.seed}, dtype={self.dtype})"
        )
