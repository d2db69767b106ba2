"""`Projection`: the operator theta -> {name: base_i + factors_i * P_i theta} and its adjoint, with autograd support."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan, check_choice, check_int
from hsaid_kernels.fastfood.selection import Patterns, check_tensor, select_tensors

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _Options(TypedDict, total=False):
        diagonal: str
        normalize: str
        width: int | None
        chunks: str | None
        backend: str
        dtype: torch.dtype


class Part:
    """Tensors of a plan that share one node of the autograd graph.

    Autograd runs the node once the gradients of all these tensors have arrived. The node computes their contribution to
    the gradients of theta and the factors, after which the gradients of the tensors can be freed.

    plan  the plan of these tensors only
    """

    def __init__(self, plan: Plan, names: Sequence[str] | None = None):
        self.plan = plan if names is None else plan.select(names)
        rows = [row for row, piece in enumerate(plan.pieces) if piece.tensor in self.plan.shapes]
        self._rows = {"cpu": None if names is None else torch.tensor(rows, device="cpu")}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {"cpu": self._rows["cpu"]}}  # as in Plan.__getstate__

    def rows_on(self, device: torch.device) -> Tensor | None:
        """int64 indices of the part's segments in the whole plan, on `device`; None if the part is the whole plan.

        The copy on each device is made once and kept.
        """
        key = str(device)
        if key not in self._rows:
            rows = self._rows["cpu"]
            self._rows[key] = None if rows is None else rows.to(device)
        return self._rows[key]

    def own(self, factors: Tensor) -> Tensor:
        """The part's entries of `factors`, which are those of the whole plan."""
        rows = self.rows_on(factors.device)
        return factors if rows is None else factors[rows]

    def among(self, own: Tensor, factors: Tensor) -> Tensor:
        """The transpose of `own`: entries for all segments of the whole plan, 0 for those outside of the part."""
        rows = self.rows_on(factors.device)
        return own if rows is None else torch.zeros_like(factors).index_copy(0, rows, own)


class Project(torch.autograd.Function):
    """(theta, factors) -> the weights of a part, as views of `flat`. Backward gives the exact gradients of both.

    `factors` [S] are those of all S segments of the whole plan, already multiplied by the scales s_i. The weights of
    all parts are computed by one call of the forward op, before this Function, and stored in `flat`. Their gradients
    arrive part by part, which is why this is a Function for each part and not an autograd formula of the op.
    """

    @staticmethod
    def forward(ctx, theta, factors, projection, part, flat, kind, check):
        ctx.projection, ctx.part, ctx.check = projection, part, check
        # save_for_backward does not work here. The first layer of the part that runs creates this node. Under gradient
        # checkpointing that layer runs again in backward without creating the node, and torch.utils.checkpoint raises
        # an error if the recomputation saves other tensors than the forward did.
        ctx.theta, ctx.factors = theta, factors
        ctx.version = version(theta)
        ctx.set_materialize_grads(False)
        views = projection.plan.views(flat, part.plan.names)
        return tuple(views if kind is None else map(kind, views))

    @staticmethod
    def backward(ctx, *grads):
        theta, factors, part = ctx.theta, ctx.factors, ctx.part
        backend = backend_for_backward(ctx, grads)
        with torch.no_grad():
            counted = ctx.projection.counted(part.plan.names, grads)
            dtheta, own = ops.fastfood_adjoint(part.plan, theta, part.own(factors), counted, backend)
            dfactors = part.among(own, factors)
        if torch.is_grad_enabled():  # create_graph=True
            given = (g for g in grads if g is not None)
            dtheta, dfactors = NoSecondDerivative.apply(theta, factors, *given, dtheta, dfactors)
        return dtheta, dfactors, None, None, None, None, None


def backend_for_backward(ctx: Any, grads: Sequence[Tensor | None]) -> str:
    """The backend for the backward of `Project` and of `Rows`, after the checks that both need.

    Raises RuntimeError if theta has changed or a gradient is a batch of gradients, and what `check` raises.
    """
    if not torch.compiler.is_compiling() and any(
        is_legacy_batchedtensor(grad) or is_batchedtensor(grad) for grad in grads if grad is not None
    ):
        raise RuntimeError(
            "backward(): expected one gradient at a time, got a batch of them (is_grads_batched=True, vectorize=True, "
            "vmap): call torch.autograd.grad for each"
        )
    if version(ctx.theta) != ctx.version:
        raise RuntimeError("theta has been changed in place between forward and backward, which needs it unchanged")
    if ctx.check is not None:
        ctx.check()
    return ops.choose_backend(ctx.projection.backend, ctx.theta.device)


def version(tensor: Tensor) -> int | None:
    """The tensor's version counter; None in a compiled graph and for inference tensors, which have none."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def without_row(grad: Tensor, row: int) -> Tensor:
    """The gradient, strided, with zeros in this row. Does not write to `grad`, which others may hold."""
    grad = grad.to_dense()
    # The row is usually 0 already, because a lookup with padding_idx gives it no gradient. This is checked on the CPU
    # only: the host would have to wait for a GPU, and a graph of torch.compile cannot depend on it.
    if grad.device.type == "cpu" and not torch.compiler.is_compiling() and not grad[row].any():
        return grad
    grad = grad.clone()
    grad[row] = 0
    return grad


def check_kept(argument: str, kept: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """{name: row} in the order of the plan's tensors.

    Raises TypeError if `kept` has another type, ValueError if the plan has no such tensor or row. The message begins
    with `argument`.
    """
    if not isinstance(kept, Mapping):
        raise TypeError(f"{argument}: expected rows by tensor, {{name: row}}, got {kept!r}")
    for name, row in kept.items():
        if not plan.shapes.get(name):
            among = f"a tensor with rows, of the {len(plan.names)} that are projected ({plan.names[0]!r}, ...)"
            raise ValueError(f"{argument}: expected {among}, got {name!r}")
        check_int(f"{argument}: row of {name!r}", row, 0, plan.shapes[name][0] - 1)
    return {name: int(kept[name]) for name in plan.names if name in kept}


class NoSecondDerivative(torch.autograd.Function):
    """Returns the last two arguments. They depend on all the others, but differentiating them raises RuntimeError.

    torch's `once_differentiable` is not enough: it only looks at the incoming gradients. If these do not require grad,
    the second derivative with respect to theta and the factors would silently be zero.
    """

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[-2:])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("the projection's gradient cannot be differentiated again: it has no second derivative")


class Projection:
    """Computes W_i = base_i + factors_i * P_i theta for all tensors of a plan, and the adjoint.

    Each P_i is a random Fastfood matrix that is regenerated from the seed when needed and never stored.

    Args:
        plan: the tensors, their segments, and the options of the projection.
        dtype: of the weights: torch.float32, bfloat16 or float16; with backend="reference" any floating-point dtype.
        backend: "auto" (the best backend for theta's device), or one of `available_backends()`.
        kept: {name: row}, for tensors of which one row (an index of the first dimension) stays that of the base: it
            gets no update, and its gradient does not count.

    theta and the factors are float32, or float64 if `dtype` is float64. Factors are per segment; unless the plan was
    made with `segments`, there is one segment per tensor.

    Raises TypeError for another dtype, ValueError for an unknown backend, and what `check_kept` raises.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        kept: Mapping[str, int] | None = None,
    ):
        check_choice("backend", backend, ops.BACKENDS)
        allowed = "a floating-point dtype" if backend == "reference" else "float32, bfloat16 or float16"
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not known or (backend != "reference" and dtype not in ops.WEIGHT_DTYPES):
            raise TypeError(f"dtype: expected {allowed} for backend {backend!r}, got {dtype!r}")
        self.plan = plan
        self.dtype = dtype
        self.backend = backend
        self.kept = check_kept("kept", kept or {}, plan)

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]],
        dim: int,
        seed: int = 0,
        *,
        diagonal: str = "gaussian",
        normalize: str = "tensor",
        width: int | None = None,
        chunks: str | None = None,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> Projection:
        """The projection of theta [dim] to tensors given as {name: shape}. Other arguments and errors as in `Plan`."""
        plan = Plan(shapes, dim, seed, width=width, chunks=chunks, diagonal=diagonal, normalize=normalize)
        return cls(plan, dtype=dtype, backend=backend)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        dim: int,
        seed: int = 0,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        **options: Unpack[_Options],
    ) -> Projection:
        """The projection of theta [dim] to a model's parameters, where tied ones count once.

        `include` and `exclude` are those of `select_tensors`, which raises for invalid ones; the other arguments are
        those of `from_shapes`.
        """
        tensors = select_tensors(model, include, exclude)
        return cls.from_shapes({name: t.shape for name, t in tensors.items()}, dim, seed, **options)

    def __repr__(self) -> str:
        p = self.plan
        chunks = "chunks='one', " if p.one_chunk else ""
        return (
            f"Projection({len(p.names)} tensors, {sum(s.numel for s in p.pieces):,} weights, dim={p.dim}, "
            f"seed={p.seed}, width={p.width}, {chunks}diagonal={p.diagonal!r}, normalize={p.normalize!r}, "
            f"dtype={self.dtype}, backend={self.backend!r})"
        )

    def forward(
        self, theta: Tensor, factors: Tensor | None = None, base: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns {name: base_i + factors_i * P_i theta}, differentiable with respect to theta and factors.

        Args:
            theta: float32 [dim] (float64 if `self.dtype` is float64).
            factors: [segments], in theta's dtype. None means ones.
            base: a tensor for each name, of the plan's shape, on theta's device, in `self.dtype` or float32. None means
                zeros. It gets no gradient and is not changed. With backend="reference" any dtype is allowed.

        The results have `self.dtype` and are views of one flat buffer.

        Raises:
            TypeError: an argument is not a tensor or has another dtype.
            ValueError: a shape, device or name does not fit the plan, or `base` lacks a tensor.
            RuntimeError: the backend cannot be used, or not for theta's device.
        """
        self._check(theta, factors)
        tensors = []
        if base is not None:
            self._check_names("base", base)
            if missing := [name for name in self.plan.names if name not in base]:
                raise ValueError(
                    f"base: expected a tensor for each of {len(self.plan.names)} names, got none for {missing[0]!r}"
                )
            tensors = [base[name] for name in self.plan.names]
            for name, shape, tensor in zip(self.plan.names, self.plan.shapes.values(), tensors, strict=True):
                self._check_tensor(f"base: {name!r}", tensor, shape, theta.device, (self.dtype, torch.float32))
        weights = self.weights(theta, factors, tensors)
        return dict(zip(self.plan.names, weights, strict=True))

    def weights(self, theta: Tensor, factors: Tensor | None, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The weights as in `forward`, in the order of the plan. Does not check its arguments."""
        scaled = self._scaled(theta, factors)
        return self.part(theta, scaled, Part(self.plan), self.flat(theta, scaled, base))

    def flat(self, theta: Tensor, scaled: Tensor, base: Sequence[Tensor]) -> Tensor:
        """All weights in one flat buffer [plan.numel], without a graph. Does not check its arguments.

        `scaled` [segments] are the factors, multiplied by the plan's scales.
        """
        backend = ops.choose_backend(self.backend, theta.device)
        with torch.no_grad():
            flat = ops.fastfood_forward(self.plan, theta, scaled, base, self.dtype, backend)
            for name, row in self.kept.items():
                (weight,) = self.plan.views(flat, [name])
                weight[row] = base[self.plan.names.index(name)][row] if base else 0
            return flat

    @torch.no_grad()
    def some(self, theta: Tensor, scaled: Tensor, base: Tensor, begin: int, end: int) -> Tensor:
        """The weights from `begin` to `end` of the plan's only tensor, counted row by row: [end - begin].

        The tensor must be a single segment, and `begin` a multiple of MAX_WIDTH, on the CPU of the plan's width. `base`
        is the tensor's base, `theta` and `scaled` are those of `flat`. There is no graph. Does not check its arguments.
        """
        backend = ops.choose_backend(self.backend, theta.device)
        span = ops.row_span(self.plan, backend)
        values = self.plan.width * span  # of an entry of `listed`
        listed = torch.arange(begin // values, -(-end // values), device=theta.device)
        flat = ops.fastfood_forward(self.plan, theta, scaled, [base], self.dtype, backend, listed, span)[: end - begin]
        own = base.reshape(-1)[begin:end]
        for row in self.kept.values():
            columns = base.numel() // base.shape[0]
            kept = slice(max(0, row * columns - begin), max(0, (row + 1) * columns - begin))
            flat[kept] = own[kept]
        return flat

    def part(
        self,
        theta: Tensor,
        scaled: Tensor,
        part: Part,
        flat: Tensor,
        kind: Callable[[Tensor], Tensor] | None = None,
        check: Callable[[], None] | None = None,
    ) -> tuple[Tensor, ...]:
        """The weights of a part as views of `flat`, with one node of the autograd graph for all of them.

        `flat` must be the result of `Projection.flat` for this theta and `scaled`. `kind` may turn each view into one
        of a subclass of Tensor; `check` is called in backward, and may raise. Does not check its arguments.
        """
        return Project.apply(theta, scaled, self, part, flat, kind, check)

    def counted(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients of these tensors with zeros in the rows that are kept."""
        if not self.kept:
            return grads
        rows = map(self.kept.get, names)
        return [g if g is None or row is None else without_row(g, row) for g, row in zip(grads, rows, strict=True)]

    def adjoint(
        self, grads: Mapping[str, Tensor | None], theta: Tensor, factors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (dtheta, dfactors), the gradients of theta and the factors.

        dtheta [dim] is sum_i factors_i P_i^T grads_i, and dfactors [segments] is <grads_i, P_i theta> for each segment
        i; both are in theta's dtype. Deterministic.

        Args:
            grads: {name: gradient of W_i}, of the plan's shape, on theta's device, in float32, bfloat16 or float16. A
                missing gradient or None counts as zero.
            theta, factors: as in `forward`.

        Raises as `forward` does.
        """
        self._check(theta, factors)
        self._check_names("grads", grads)
        tensors = [grads.get(name) for name in self.plan.names]
        for name, shape, tensor in zip(self.plan.names, self.plan.shapes.values(), tensors, strict=True):
            if tensor is not None:
                self._check_tensor(f"grads: {name!r}", tensor, shape, theta.device, ops.WEIGHT_DTYPES)
        with torch.no_grad():
            scaled = self._scaled(theta, factors)
            backend = ops.choose_backend(self.backend, theta.device)
            counted = self.counted(self.plan.names, tensors)
            dtheta, dscaled = ops.fastfood_adjoint(self.plan, theta, scaled, counted, backend)
            return dtheta, dscaled * self._scales(theta)

    def _scales(self, theta: Tensor) -> Tensor:
        return self.plan.scales_on(theta.device).to(theta.dtype)

    def _scaled(self, theta: Tensor, factors: Tensor | None) -> Tensor:
        return self._scales(theta) if factors is None else factors * self._scales(theta)

    def _check(self, theta: Tensor, factors: Tensor | None) -> None:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        expected = {"theta": (theta, (self.plan.dim,)), "factors": (factors, (len(self.plan.pieces),))}
        for name, (tensor, shape) in expected.items():
            if tensor is None and name == "factors":
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected a {dtype} tensor of shape {shape}, got {got}")
            self._check_tensor(name, tensor, shape, theta.device, (dtype,))

    def _check_names(self, argument: str, tensors: Mapping[str, Tensor | None]) -> None:
        if unknown := [name for name in tensors if name not in self.plan.shapes]:
            raise ValueError(
                f"{argument}: expected names of the plan ({self.plan.names[0]!r}, ...), got {unknown[0]!r}"
            )

    def _check_tensor(
        self, what: str, tensor: Tensor, shape: Sequence[int], device: torch.device, dtypes: Sequence[torch.dtype]
    ) -> None:
        check_tensor(what, tensor)
        if self.backend != "reference" and tensor.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise TypeError(f"{what}: expected a tensor in {expected}, got {tensor.dtype}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{what}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{what}: expected a tensor on {device}, where theta is, got one on {tensor.device}")
