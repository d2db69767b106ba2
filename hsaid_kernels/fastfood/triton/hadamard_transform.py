"""scale * H x for rows of any length n = 2^q, in float32, the stages at bits 2, 3, ..., q-1, 0, 1.

Up to n = 2^14 a program processes one row, or several short ones, and reads and writes each value once. Longer rows
take such a pass for the bits 2 ... 13 and another pass for every six bits that follow; the last pass includes bits 0
and 1. Between passes the values are in memory in float32.
"""

import triton
import triton.language as tl

from hsaid_kernels.fastfood.triton.memory import narrowed, widened
from hsaid_kernels.fastfood.triton.tile import natural_to_a, stages, transform

COLUMN_BITS = 6  # stages of a later pass, at most


@triton.jit(do_not_specialize=["rows"])
def hadamard_rows_kernel(
    x,  # [rows, dim]; the rest of a row of 2^Q * row_tiles values is 0
    out,  # [rows, out_dim]
    rows,
    dim,
    out_dim,
    row_tiles,  # tiles of a row, each of which is transformed by itself
    scale,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    FINISH: tl.constexpr,  # the stages 0 and 1, and the scale
    Q: tl.constexpr,
    T: tl.constexpr,
):
    ROWS: tl.constexpr = 1 << (T - Q)
    tile = tl.program_id(0).to(tl.int64)
    row, first = tile // row_tiles * ROWS, tile % row_tiles << Q
    r, k = tl.arange(0, ROWS)[:, None], tl.arange(0, 1 << Q)[None, :]
    if Q >= 2:
        k = tl.max_contiguous(tl.multiple_of(k, [1, 4]), [1, 4])  # in fours, as load_floats does it
    inside = r < rows - row
    at = r * tl.cast(dim, tl.int32) + k
    v = tl.load(x + row * dim + first + at, mask=inside & (k < dim - first), other=0)
    v = transform(natural_to_a(widened(v, IN), T), Q, T, FINISH)
    if FINISH:
        v *= scale
    at = r * tl.cast(out_dim, tl.int32) + k
    v = tl.reshape(narrowed(v, OUT), (ROWS, 1 << Q))
    tl.store(out + row * out_dim + first + at, v, mask=inside & (k < out_dim - first))


@triton.jit
def hadamard_columns_kernel(
    x,  # [rows, n]
    out,  # [rows, out_dim]
    n,
    out_dim,
    scale,
    OUT: tl.constexpr,
    FINISH: tl.constexpr,
    BIT: tl.constexpr,
    M: tl.constexpr,  # stages BIT ... BIT + M - 1
    T: tl.constexpr,
):
    C: tl.constexpr = T - M
    tile = tl.program_id(0).to(tl.int64)
    row, tile = tile // (n >> T), tile % (n >> T)
    low, high = tile & ((1 << (BIT - C)) - 1), tile >> (BIT - C)
    line, column = tl.arange(0, 1 << M)[:, None].to(tl.int64), tl.arange(0, 1 << C)[None, :]
    at = (high << (BIT + M)) + (line << BIT) + (low << C) + column
    v = stages(tl.load(x + row * n + at), 0, M, C, False, T)
    if FINISH:
        v = stages(v, 0, 2, 0, False, T) * scale
    v = tl.reshape(narrowed(v, OUT), (1 << M, 1 << C))
    tl.store(out + row * out_dim + at, v, mask=at < out_dim)
