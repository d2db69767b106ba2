"""dtheta and dfactors from the gradients of all tensors. Each gradient is read once for every chunk of theta.

A program processes an item (tables.py): a run of blocks of a segment, or several runs side by side. For each run it
stores sum_b G_b H^T g_b. Three small kernels then add the runs of each group and the groups of each segment, transform
the sums, and add the segments. All additions are in the order of the plan, so the result is deterministic to the bit
(docs/rng.md). If blocks are listed, there is one gradient, of these blocks side by side, and each of its items has as
many runs as fit. Only the device knows the list.
"""

import triton
import triton.language as tl

from hsaid_kernels.fastfood.triton.memory import element, listed_at, load_floats, tensor_at
from hsaid_kernels.fastfood.triton.streams import times_diagonal
from hsaid_kernels.fastfood.triton.tables import (
    COLS,
    COLUMNS,
    COUNT,
    FIRST,
    FROM,
    LAST,
    OFFSET,
    ROW_STRIDE,
    SEGMENT,
    STREAM,
    TENSOR,
    TO,
)
from hsaid_kernels.fastfood.triton.tile import a_to_natural, make_z, place_in_z, transform_reversed, transposed_z


@triton.jit
def read_tile(
    grad,
    code,
    count,
    cols,
    row_stride,
    first,
    scratch,
    GRADS: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    """The piece's elements first ... first + 2^T - 1 as float32, 0 beyond its end. May use scratch [2^T]."""
    ROWS: tl.constexpr = 1 << (T - Q)
    if (cols == 0) & (grad % 16 == 0) & (first + (1 << T) <= count):
        at = tl.arange(0, ROWS)[:, None] * (1 << Q) + tl.arange(0, 1 << Q)[None, :]
        x = tl.reshape(load_floats(grad, code, first, at, None, GRADS, 2), (1 << T,))
    else:
        STEP: tl.constexpr = 1 << (T - 4)
        tl.debug_barrier()
        for i in range(0, 1 << T, STEP):
            e = i + tl.arange(0, STEP)
            at = first + e
            offsets = element(at, cols, row_stride)
            tl.store(scratch + e, load_floats(grad, code, 0, offsets, at < count, GRADS, 0))
        tl.debug_barrier()
        x = tl.load(scratch + tl.arange(0, 1 << T))
    return x


@triton.jit(
    do_not_specialize=["seed", "chunk", "run_blocks", "num_listed", "first_item"],
    do_not_specialize_on_alignment=["listed"],
)
def adjoint_groups_kernel(
    grads,  # table_of the tensors
    seed: tl.int64,
    chunk: tl.int32,
    items,  # [programs, COLUMNS]; of listed blocks one row, the piece's
    listed,  # [num_listed], rising: which RUNS blocks of the only segment have gradients; None: all pieces
    num_listed: tl.int32,
    first_item: tl.int32,  # of listed blocks, in this wave
    sums,  # [programs, 2^T]
    lines,
    run_blocks: tl.int32,
    GRADS: tl.constexpr,
    RADEMACHER: tl.constexpr,
    RUNS: tl.constexpr,  # of a group: 2^(14-Q)
    Q: tl.constexpr,
    T: tl.constexpr,
):
    item = tl.program_id(0)
    ALL: tl.constexpr = listed is None
    row = items + item * COLUMNS if ALL else items
    seed = seed.to(tl.int64)
    grad, code = tensor_at(grads, tl.load(row + TENSOR), tl.load(row + OFFSET) if ALL else 0)
    if grad != 0:
        cols, row_stride, stream = tl.load(row + COLS), tl.load(row + ROW_STRIDE), tl.load(row + STREAM)
        if ALL:
            count, first = tl.load(row + COUNT), tl.load(row + FIRST)
            runs = (tl.load(row + LAST) - first).to(tl.int32)
        else:
            count, first = num_listed.to(tl.int64) * (RUNS << Q), (first_item + item).to(tl.int64) << (T - Q)
            runs = 1 << (T - Q)
        first_block = (first // RUNS * run_blocks * RUNS + first % RUNS).to(tl.int32)
        blocks = ((count + (1 << Q) - 1) >> Q).to(tl.int32)
        out = sums + (item.to(tl.int64) << T)
        u = tl.zeros((64, 1 << (T - 6)), tl.float32)
        for block in range(first_block, tl.minimum(first_block + run_blocks * RUNS, blocks), RUNS):
            at = tl.cast(block, tl.int64) << Q
            x = read_tile(grad, code, count, cols, row_stride, at, out, GRADS, Q, T)
            x = transform_reversed(x, Q, T)
            of_stream = listed_at(listed, block, RUNS)
            u += times_diagonal(x, seed, stream, of_stream, 1, chunk, lines, RADEMACHER, Q, T)
        tl.debug_barrier()
        e = tl.arange(0, 1 << T)
        tl.store(out + e, a_to_natural(u, T), mask=e < runs << Q)


@triton.jit(do_not_specialize=["num_runs", "before", "after"])
def adjoint_sums_kernel(
    grads,
    parts,  # [programs, COLUMNS]
    num_runs,  # of listed blocks: FIRST is 0; LAST, FROM and TO are these three. None: they are in the table
    before,
    after,
    sums,
    carry,  # [2, 2^Q]
    RUNS: tl.constexpr,
    Q: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Adds the runs of each group, and the groups of a part, in order: into the first run's place, or into `carry`."""
    row = parts + tl.program_id(0) * COLUMNS
    grad, _ = tensor_at(grads, tl.load(row + TENSOR), 0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    if num_runs is None:
        first, last = tl.load(row + FIRST), tl.load(row + LAST)
        before, after = tl.load(row + FROM), tl.load(row + TO)
    else:
        first, last = tl.full([], 0, tl.int64), num_runs.to(tl.int64)
    if grad != 0:
        sum = tl.load(carry + (before << Q) + at, mask=at < tl.where(before < 0, 0, 1 << Q), other=0.0)
        if RUNS == 1:
            for i in tl.range(first, last, loop_unroll_factor=8):
                sum += tl.load(sums + (i << Q) + at)
        else:
            for group in range(first, last, RUNS):
                of_group = tl.zeros((SIZE,), tl.float32)
                for i in tl.range(group, tl.minimum(group + RUNS, last), loop_unroll_factor=8):
                    of_group += tl.load(sums + (i << Q) + at)
                sum += of_group
        if after < 0:
            tl.store(sums + (first << Q) + at, sum)
        else:
            tl.store(carry + (after << Q) + at, sum)


@triton.jit
def fold(values, Q: tl.constexpr, STEP: tl.constexpr):
    """The sum of 2^Q values in memory, which it overwrites: adds the upper half to the lower until one is left."""
    half = 1 << (Q - 1)
    for _ in range(Q):
        for i in range(0, half, STEP):
            at = i + tl.arange(0, STEP)
            lower = tl.load(values + at, mask=at < half, other=0.0)
            tl.store(values + at, lower + tl.load(values + half + at, mask=at < half, other=0.0), mask=at < half)
        tl.debug_barrier()
        half //= 2
    return tl.load(values)


@triton.jit(do_not_specialize=["seed", "dim", "chunk", "finished"])
def adjoint_segments_kernel(
    theta,
    dim: tl.int32,
    factors,
    grads,
    seed: tl.int64,
    chunk: tl.int32,
    parts,  # [parts, COLUMNS]
    finished: tl.int32,  # parts that are the last of their segments
    sums,
    scratch,  # [programs, 2, 2^T]
    dfactors,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    """Adds <U, z> of a segment's sum U to its factor's gradient, and replaces U by factor * B H^T Pi^T U."""
    N: tl.constexpr = 1 << T
    STEP: tl.constexpr = 1 << (T - 4)
    program = tl.program_id(0)
    seed = seed.to(tl.int64)
    scratch += program.to(tl.int64) << (T + 1)
    z = scratch + N
    for i in range(program, finished, tl.num_programs(0)):
        row = parts + i * COLUMNS
        grad, _ = tensor_at(grads, tl.load(row + TENSOR), 0)
        u = sums + (tl.load(row + FIRST) << Q)
        if grad == 0:
            for first in range(0, 1 << Q, STEP):
                e = first + tl.arange(0, STEP)
                tl.store(u + e, tl.zeros((STEP,), tl.float32), mask=e < 1 << Q)
        else:
            stream, segment = tl.load(row + STREAM), tl.load(row + SEGMENT)
            make_z(theta, dim, seed, stream, chunk, scratch, z, Q, T)
            for first in range(0, 1 << Q, STEP):
                e = first + tl.arange(0, STEP)
                inside = e < 1 << Q
                product = tl.load(u + e, mask=inside) * tl.load(z + place_in_z(e, T), mask=inside)
                tl.store(scratch + e, product, mask=inside)
            tl.debug_barrier()
            dot = fold(scratch, Q, STEP)
            # A factor's gradient is a sum over the chunks, each of which has a launch.
            before = tl.load(dfactors + segment)
            tl.debug_barrier()
            tl.store(dfactors + segment, before + dot)

            x = transposed_z(u, seed, stream, chunk, scratch, Q, T)
            e = tl.arange(0, N)
            tl.store(u + e, tl.load(factors + segment) * x, mask=e < 1 << Q)


@triton.jit(do_not_specialize=["count", "finished"])
def adjoint_gradients_kernel(
    parts,
    sums,
    dtheta,  # of one chunk
    count: tl.int32,  # values of it
    finished: tl.int32,
    Q: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Adds the segments to dtheta, in order."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    sum = tl.load(dtheta + at, mask=inside, other=0.0)
    for i in tl.range(finished, loop_unroll_factor=8):
        sum += tl.load(sums + (tl.load(parts + i * COLUMNS + FIRST) << Q) + at, mask=inside, other=0.0)
    tl.store(dtheta + at, sum, mask=inside)
