"""`Rows`: only some rows of a weight W = W0 + factor * P theta, as an embedding needs them for a batch.

A row of a table [V, D] lies in one or more consecutive blocks. Only these blocks are made, and only they take part in
the adjoint. The rows are those of the whole table, bit for bit; their gradients are added up in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan, whole
from hsaid_kernels.fastfood.projection import (
    NoSecondDerivative,
    Part,
    Projection,
    backend_for_backward,
    version,
    without_row,
)

MOST = 2**23  # values of blocks that are held at a time, unless one row has more


def has_rows(plan: Plan, name: str) -> bool:
    """Whether single rows of this tensor can be made: it must be a matrix and a single segment."""
    return len(plan.shapes[name]) == 2 and is_whole(plan, name)


def is_whole(plan: Plan, name: str) -> bool:
    """Whether this tensor is a single segment."""
    pieces = [replace(piece, label="") for piece in plan.pieces if piece.tensor == name]
    return pieces == [whole(name, plan.shapes[name])]


@dataclass(frozen=True)
class Blocks:
    """Which blocks contain some rows of a table, and where the rows are in them.

    listed  int64 [K]: the blocks, as `ops.fastfood_forward` takes them
    span    the number of blocks for which an entry of `listed` stands
    width   the number of values in a block
    pieces  int64 [U, D / size]: rows and blocks are divided into pieces; the index of each piece of each row among
            those of the listed blocks
    size    the number of values in a piece
    """

    listed: Tensor
    span: int
    width: int
    pieces: Tensor
    size: int

    @property
    def numel(self) -> int:
        """The number of values in all listed blocks."""
        return len(self.listed) * self.span * self.width

    @classmethod
    def of(cls, rows: Tensor, columns: int, width: int, span: int) -> Blocks:
        """The blocks that contain `rows`, int64 [U] in rising order, of a table with so many columns."""
        values = width * span  # of an entry
        begin = rows * columns
        first, last = begin // values, (begin + columns - 1) // values
        most = -(-(columns - 1) // values) + 1
        # Rows are in rising order, so their entries are too, and equal ones are adjacent.
        entries = torch.minimum(first[:, None] + torch.arange(most, device=rows.device), last[:, None])
        listed = torch.unique_consecutive(entries.flatten())
        size = math.gcd(columns, values)
        start = (torch.searchsorted(listed, first) * values + begin - first * values) // size
        return cls(listed, span, width, start[:, None] + torch.arange(columns // size, device=rows.device), size)

    def gathered(self, flat: Tensor) -> Tensor:
        """The rows [U, D] from the values of the listed blocks."""
        return flat.view(-1, self.size)[self.pieces].flatten(1)

    def scattered(self, rows: Tensor, flat: Tensor) -> Tensor:
        """The inverse of `gathered`, into `flat`: the listed blocks' values, 0 where they are in no row."""
        flat.zero_().view(-1, self.size).index_copy_(0, self.pieces.flatten(), rows.reshape(-1, self.size))
        return flat


def _parts(rows: Tensor, columns: int, width: int, span: int) -> list[Blocks]:
    """The blocks of the rows, of as many rows at a time as need at most MOST values, or of one row."""
    values = width * span
    of_row = values * (-(-(columns - 1) // values) + 1)  # at most
    return [Blocks.of(some, columns, width, span) for some in rows.split(max(1, MOST // of_row))]


def place_among(rows: Tensor, row: int) -> int | None:
    """The index of a number in `rows`, int64 [U] in rising order; None if it is not there."""
    at = int(torch.searchsorted(rows, row))
    return at if at < len(rows) and int(rows[at]) == row else None


class Rows(torch.autograd.Function):
    """(theta, factors) -> rows [U, D] of the only tensor of a part. Backward gives the exact gradients of both.

    `factors` and `check` are those of `Project`.
    """

    @staticmethod
    def forward(ctx, theta, factors, projection, part, base, rows, check):
        plan = part.plan
        ((name, shape),) = plan.shapes.items()
        kept = projection.kept.get(name)
        ctx.at = None if kept is None else place_among(rows, kept)
        backend = ops.choose_backend(projection.backend, theta.device)
        parts = _parts(rows, shape[1], plan.width, ops.row_span(plan, backend))
        ctx.theta, ctx.factors, ctx.projection, ctx.part, ctx.parts = theta, factors, projection, part, parts
        ctx.check, ctx.version = check, version(theta)
        given = (plan, theta, part.own(factors), [base], projection.dtype, backend)
        made = [blocks.gathered(ops.fastfood_forward(*given, blocks.listed, blocks.span)) for blocks in parts]
        found = made[0] if len(made) == 1 else torch.cat(made)
        if ctx.at is not None:
            found[ctx.at] = base[kept]
        return found

    @staticmethod
    def backward(ctx, grad):
        theta, factors, part = ctx.theta, ctx.factors, ctx.part
        backend = backend_for_backward(ctx, [grad])
        with torch.no_grad():
            own = part.own(factors)
            counted = grad if ctx.at is None else without_row(grad, ctx.at)
            room = grad.new_empty(max(blocks.numel for blocks in ctx.parts))
            found = []
            for blocks, rows in zip(ctx.parts, counted.split([len(b.pieces) for b in ctx.parts]), strict=True):
                flat = blocks.scattered(rows, room[: blocks.numel])
                given = (part.plan, theta, own, [flat], backend)
                found.append(ops.fastfood_adjoint(*given, blocks.listed, blocks.span))
            dtheta, dfactor = (sum(some[1:], some[0]) for some in zip(*found, strict=True))
            dfactors = part.among(dfactor, factors)
        if torch.is_grad_enabled():  # create_graph=True
            dtheta, dfactors = NoSecondDerivative.apply(theta, factors, grad, dtheta, dfactors)
        return dtheta, dfactors, None, None, None, None, None


def rows_of(
    projection: Projection,
    theta: Tensor,
    scaled: Tensor,
    part: Part,
    base: Tensor,
    rows: Tensor,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """Rows [U, D] of the only tensor of a part, a matrix whose W0 is `base`. Does not check its arguments.

    `rows` is int64 [U], rising; the other arguments are those of `Projection.part`.
    """
    return Rows.apply(theta, scaled, projection, part, base, rows, check)
