"""dtheta and dfactors if each block is made from one chunk of theta. Each gradient is read once.

    t_b = G_b . H^T g_b        dot_b = <t_b, z_c>        U_c = sum of f t_b over the blocks b of chunk c

The blocks of a chunk, of all segments, are a list, which is divided into groups, and these into runs (tables.py). A
program processes a run, one block after the other: it adds up f t_b and stores dot_b. Blocks that are smaller than a
tile have it to themselves, because those of a list lie anywhere. Three small kernels then add the runs of each group
and the groups of each chunk, transform the sums, and add the dots of each segment. All additions are in the order of
the plan, so the result is deterministic to the bit (docs/rng.md). If blocks are listed, only the device knows how many
blocks a chunk has: programs that find no block have nothing to do.
"""

import triton
import triton.language as tl

from hsaid_kernels.fastfood import reference
from hsaid_kernels.fastfood.triton.fastfood_adjoint import read_tile
from hsaid_kernels.fastfood.triton.memory import listed_at, tensor_at
from hsaid_kernels.fastfood.triton.streams import SHARED, times_diagonal
from hsaid_kernels.fastfood.triton.tables import COLS, COLUMNS, COUNT, FROM, OFFSET, ROW_STRIDE, STREAM, TENSOR
from hsaid_kernels.fastfood.triton.tile import a_to_natural, load_shared_z, transform_reversed, transposed_z

LANES = tl.constexpr(reference.LANES)  # 2^8: sums into which the dots of a segment are added in turn


@triton.jit
def added(sum, x, BITS: tl.constexpr):
    """sum + x[0] + x[1] + ..., one after the other; sum is [M], x [2^BITS, M]."""
    M: tl.constexpr = x.shape[1]
    if BITS == 0:
        return sum + tl.reshape(x, (M,))
    else:
        lower, upper = tl.split(tl.permute(tl.reshape(x, (2, 1 << (BITS - 1), M)), (1, 2, 0)))
        return added(added(sum, lower, BITS - 1), upper, BITS - 1)


@triton.jit
def fold(x, ROWS: tl.constexpr, BITS: tl.constexpr):
    """The sum of each row of x, [ROWS * 2^BITS] values: adds the upper half to the lower until one is left."""
    for i in tl.static_range(BITS):
        x = tl.sum(tl.reshape(x, (ROWS, 2, 1 << (BITS - 1 - i))), 1)  # of two, whose order makes no difference
    return tl.reshape(x, (ROWS,))


@triton.jit
def dots_of_blocks(x, Q: tl.constexpr, T: tl.constexpr):
    """The sum of each block of a tile in order A, [2^(T-Q)]: over bits 4 to 7 of the position, then those left."""
    SUMMED: tl.constexpr = min(Q, 8) - 4  # of these bits; the others tell blocks
    x = tl.reshape(x, (1 << (4 - SUMMED), 1 << SUMMED, 1 << (T - 4)))
    x = tl.reshape(tl.permute(x, (1, 0, 2)), (1 << SUMMED, 1 << (T - SUMMED)))
    sums = added(tl.zeros((1 << (T - SUMMED),), tl.float32), x, SUMMED)
    sums = tl.permute(tl.reshape(sums, (1 << (4 - SUMMED), 4, 1 << (T - 8), 4)), (2, 0, 1, 3))
    return fold(sums, 1 << (T - Q), Q - SUMMED)


@triton.jit(
    do_not_specialize=["seed", "chunks", "num_listed", "first_chunk", "first_group", "run_blocks"],
    do_not_specialize_on_alignment=["listed"],
)
def adjoint_lists_kernel(
    grads,  # table_of the tensors
    factors,
    seed: tl.int64,
    chunks: tl.int32,
    pieces,  # [segments, COLUMNS]
    places,  # [blocks], chunk by chunk
    first_places,  # [chunks + 1]
    listed,  # [num_listed], rising: which RUNS blocks of the only segment have gradients; None: all pieces
    num_listed: tl.int32,
    first_chunk: tl.int32,  # of this wave
    first_group: tl.int32,
    zs,  # [chunks, 2^Q]
    sums,  # [chunks of the wave, runs of the wave's groups of a chunk, 2^T]
    dots,  # [blocks], segment by segment
    lines,
    run_blocks: tl.int32,
    GRADS: tl.constexpr,
    RADEMACHER: tl.constexpr,
    RUNS: tl.constexpr,  # of a group: 2^(14-Q)
    Q: tl.constexpr,
    T: tl.constexpr,
):
    run, chunk = tl.program_id(0), first_chunk + tl.program_id(1)
    seed = seed.to(tl.int64)
    size = run_blocks.to(tl.int64) * RUNS  # of a group
    group = tl.load(first_places + chunk) + (first_group + run // RUNS) * size
    begin, end = group + run % RUNS, tl.minimum(group + size, tl.load(first_places + chunk + 1))
    if begin < end:
        out = sums + ((tl.program_id(1) * tl.num_programs(0) + run).to(tl.int64) << T)
        u = tl.zeros((64, 1 << (T - 6)), tl.float32)
        for i in range(begin, end, RUNS):
            place = tl.load(places + i)
            segment, number = place >> 32, place.to(tl.int32)
            row = pieces + segment * COLUMNS
            grad, code = tensor_at(grads, tl.load(row + TENSOR), tl.load(row + OFFSET) if listed is None else 0)
            if grad != 0:
                cols, row_stride, stream = tl.load(row + COLS), tl.load(row + ROW_STRIDE), tl.load(row + STREAM)
                count = tl.load(row + COUNT) if listed is None else num_listed.to(tl.int64) * (RUNS << Q)
                at = number.to(tl.int64) << Q
                count = tl.minimum(count, at + (1 << Q))
                x = transform_reversed(read_tile(grad, code, count, cols, row_stride, at, out, GRADS, Q, T), Q, T)
                block = listed_at(listed, number, RUNS)
                x = times_diagonal(x, seed, stream, block, 1, chunk, lines, RADEMACHER, Q, T)
                u += tl.load(factors + segment) * x
                dot = dots_of_blocks(x * load_shared_z(zs, chunk, chunks, Q, T), Q, T)
                b = tl.arange(0, 1 << (T - Q))
                tl.store(dots + (tl.load(row + FROM) + number) + b, dot, mask=b < 1)
        tl.debug_barrier()
        e = tl.arange(0, 1 << T)
        tl.store(out + e, a_to_natural(u, T), mask=e < 1 << Q)


@triton.jit(do_not_specialize=["first_chunk", "first_group", "wave_runs", "run_blocks"])
def adjoint_lists_sums_kernel(
    first_places,
    first_chunk: tl.int32,
    first_group: tl.int32,
    wave_runs: tl.int32,  # of a chunk
    run_blocks: tl.int32,
    sums,
    totals,  # [chunks, 2^Q]
    RUNS: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Adds the runs of each group, and the groups of a chunk, in order, to the chunk's total."""
    chunk = first_chunk + tl.program_id(0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    size = run_blocks.to(tl.int64) * RUNS
    blocks = tl.load(first_places + chunk + 1) - tl.load(first_places + chunk) - first_group * size
    sums += tl.program_id(0).to(tl.int64) * wave_runs << T
    total = tl.load(totals + (chunk << Q) + at)
    groups = tl.minimum((wave_runs + RUNS - 1) // RUNS, (blocks + size - 1) // size)
    if RUNS == 1:
        for group in tl.range(0, groups, loop_unroll_factor=8):
            total += tl.load(sums + (tl.cast(group, tl.int64) << T) + at)
    else:
        for group in range(groups):
            of_group = tl.zeros((SIZE,), tl.float32)
            for run in tl.range(0, tl.minimum(RUNS, blocks - group * size), loop_unroll_factor=8):
                of_group += tl.load(sums + (tl.cast(group * RUNS + run, tl.int64) << T) + at)
            total += of_group
    tl.store(totals + (chunk << Q) + at, total)


@triton.jit(do_not_specialize=["seed", "dim", "chunks"])
def adjoint_chunks_kernel(
    seed: tl.int64,
    dim: tl.int32,
    chunks: tl.int32,
    totals,
    scratch,  # [programs, 2^T]
    dtheta,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    """Writes dtheta: B H^T Pi^T of each chunk's total."""
    program = tl.program_id(0)
    seed = seed.to(tl.int64)
    scratch += program.to(tl.int64) << T
    e = tl.arange(0, 1 << T)
    for chunk in range(program, chunks, tl.num_programs(0)):
        x = transposed_z(totals + (chunk << Q), seed, tl.full([], SHARED, tl.int64), chunk, scratch, Q, T)
        at = (chunk << Q) + e
        tl.store(dtheta + at, x, mask=(e < 1 << Q) & (at < dim))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["entries"])
def adjoint_factors_kernel(
    pieces,
    entries: tl.int32,  # of `listed`, RUNS blocks each; None: all blocks
    dots,
    dfactors,
    RUNS: tl.constexpr,
    Q: tl.constexpr,
):
    """Adds the dots of a segment's blocks, in turn to each of the LANES sums, which are then folded."""
    row = pieces + tl.program_id(0) * COLUMNS
    if entries is None:
        blocks = tl.load(row + COUNT) + ((1 << Q) - 1) >> Q
    else:
        blocks = entries.to(tl.int64) * RUNS
    dots += tl.load(row + FROM)
    b = tl.arange(0, LANES)
    sums = tl.zeros((LANES,), tl.float32)
    for first in range(0, blocks, LANES):
        sums += tl.load(dots + first + b, mask=first + b < blocks, other=0.0)
    tl.store(dfactors + tl.program_id(0) + tl.arange(0, 1), fold(sums, 1, 8))
