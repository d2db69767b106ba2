"""`Rows`: some rows of one weight W = W0 + factor * P theta, made alone: what an embedding needs for a batch.

A row of a table [V, D] lies in one or more consecutive blocks. Only these blocks are made, and only they take part in
the adjoint; their values are those of the whole table, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan, whole
from hsaid_kernels.fastfood.projection import NoSecondDerivative, Projection, version


def has_rows(plan: Plan, name: str) -> bool:
    """Whether rows of this tensor can be made alone: it is a matrix, and one segment."""
    shape = plan.shapes[name]
    pieces = [piece for piece in plan.pieces if piece.tensor == name]
    return len(shape) == 2 and [(p.offset, p.numel, p.row_stride) for p in pieces] == [
        (p.offset, p.numel, p.row_stride) for p in [whole(name, shape)]
    ]


@dataclass(frozen=True)
class Blocks:
    """Where rows are in the blocks that have them.

    listed  int64 [K]: the blocks, as `ops.fastfood_forward` takes them
    span    the blocks for which an entry of `listed` stands
    pieces  int64 [U, D / size]: the places of the rows' pieces of `size` values among the listed blocks' pieces
    size    the number of values in a piece
    """

    listed: Tensor
    span: int
    pieces: Tensor
    size: int

    @classmethod
    def of(cls, rows: Tensor, columns: int, width: int, span: int) -> Blocks:
        """The blocks of `rows`, int64 [U] in rising order, of a table with so many columns."""
        values = width * span  # of an entry
        begin = rows * columns
        first, last = begin // values, (begin + columns - 1) // values
        most = -(-(columns - 1) // values) + 1
        # Rows rise, so their entries do: equal ones lie beside each other.
        entries = torch.minimum(first[:, None] + torch.arange(most, device=rows.device), last[:, None])
        listed = torch.unique_consecutive(entries.flatten())
        size = math.gcd(columns, values)
        start = (torch.searchsorted(listed, first) * values + begin - first * values) // size
        return cls(listed, span, start[:, None] + torch.arange(columns // size, device=rows.device), size)

    def gathered(self, flat: Tensor) -> Tensor:
        """The rows [U, D] from the values of the listed blocks."""
        return flat.view(-1, self.size)[self.pieces].flatten(1)

    def scattered(self, rows: Tensor, width: int) -> Tensor:
        """The inverse of `gathered`: the listed blocks' values, 0 where they are in no row."""
        flat = rows.new_zeros(len(self.listed) * self.span * width)
        flat.view(-1, self.size).index_copy_(0, self.pieces.flatten(), rows.reshape(-1, self.size))
        return flat


class Rows(torch.autograd.Function):
    """(theta, factor) -> rows [U, D] of the only tensor of a plan. Backward gives the exact gradients of both.

    `factor` [1] is multiplied by the scale already; see `Project` for `check`.
    """

    @staticmethod
    def forward(ctx, theta, factor, projection, base, rows, check):
        plan = projection.plan
        (shape,) = plan.shapes.values()
        backend = ops.choose_backend(projection.backend, theta.device)
        blocks = Blocks.of(rows, shape[1], plan.width, ops.row_span(plan, backend))
        ctx.theta, ctx.factor, ctx.projection, ctx.blocks, ctx.check = theta, factor, projection, blocks, check
        ctx.version = version(theta)
        flat = ops.fastfood_forward(plan, theta, factor, [base], projection.dtype, backend, blocks.listed, blocks.span)
        return blocks.gathered(flat)

    @staticmethod
    def backward(ctx, grad):
        theta, factor, blocks, plan = ctx.theta, ctx.factor, ctx.blocks, ctx.projection.plan
        if version(theta) != ctx.version:
            raise RuntimeError("theta has been changed in place between forward and backward, which needs it unchanged")
        if ctx.check is not None:
            ctx.check()
        backend = ops.choose_backend(ctx.projection.backend, theta.device)
        with torch.no_grad():
            grads = [blocks.scattered(grad, plan.width)]
            dtheta, dfactor = ops.fastfood_adjoint(plan, theta, factor, grads, backend, blocks.listed, blocks.span)
        if torch.is_grad_enabled():  # create_graph=True
            dtheta, dfactor = NoSecondDerivative.apply(theta, factor, grad, dtheta, dfactor)
        return dtheta, dfactor, None, None, None, None


def rows_of(
    projection: Projection,
    theta: Tensor,
    factor: Tensor,
    base: Tensor,
    rows: Tensor,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """`rows` [U] of the only tensor of the projection's plan, a matrix: [U, D]. Does not check its arguments.

    `factor` [1] is multiplied by the plan's scale, `base` is W0 and contiguous, `rows` int64 in rising order without
    repetitions; `check` as in `Projection.part`.
    """
    return Rows.apply(theta, factor, projection, base, rows, check)
