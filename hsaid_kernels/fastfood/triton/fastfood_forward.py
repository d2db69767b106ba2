"""W = W0 + factor * H(sum_c G_c z_c) for all tensors in one launch, after another launch that computes z.

The programs are persistent: each processes its runs of tiles (tables.py), with equal shares for all programs, and does
not depend on the others. z of all segments is computed by a separate launch. A program that computed z whenever it
reached a new segment would spend most of its time on that if tensors are small, because in Triton, unlike in CUDA, the
computation goes through memory step by step.

If tiles are listed, there is one segment, and the programs compute equal shares of the list, which only the device
knows.

If each block is made from one chunk, z is the same for all segments, [chunks, 2^Q].
"""

import triton
import triton.language as tl

from hsaid_kernels.fastfood.triton.memory import element, listed_at, load_floats, prefetch, store_floats, tensor_at
from hsaid_kernels.fastfood.triton.streams import SHARED, times_diagonal
from hsaid_kernels.fastfood.triton.tables import (
    COLS,
    COLUMNS,
    COUNT,
    FIRST,
    FROM,
    LAST,
    OFFSET,
    OUT_OFFSET,
    ROW_STRIDE,
    SEGMENT,
    STREAM,
    TENSOR,
)
from hsaid_kernels.fastfood.triton.tile import load_shared_z, load_z, make_z, transform


@triton.jit
def write_elements(
    out,
    base,
    code,
    count,
    cols,
    row_stride,
    first,
    x,
    factor,
    OUT: tl.constexpr,
    BASES: tl.constexpr,
    T: tl.constexpr,
    REST: tl.constexpr = False,
):
    """Writes base + factor * x, or the base if factor is None, to the piece's elements first ... first + 2^T - 1.

    With REST, writes 0 to those beyond the piece's end.
    """
    STEP: tl.constexpr = 1 << (T - 4)  # four values a thread at a time: offsets take many registers
    for i in range(0, 1 << T if REST else tl.minimum(count - first, 1 << T).to(tl.int32), STEP):
        at = i + tl.arange(0, STEP)
        mask = first + at < count
        offsets = element(first + at, cols, row_stride)
        if BASES == 0:
            w = tl.zeros((STEP,), tl.float32)
        else:
            w = load_floats(base, code, 0, offsets, first + at < tl.where(base == 0, 0, count), BASES, 0)
        if factor is not None:
            w += factor * tl.load(x + at)
        if REST:
            store_floats(out, 0, offsets, tl.where(mask, w, 0.0), at >= 0, OUT, 0)
        else:
            store_floats(out, 0, offsets, w, mask, OUT, 0)


@triton.jit
def prefetch_base(base, code, count, cols, t, BASES: tl.constexpr, T: tl.constexpr):
    """Prefetches the base of a whole tile, so that it arrives while the tile is drawn and transformed."""
    if (cols == 0) & (base != 0) & ((tl.cast(t, tl.int64) + 1 << T) <= count):
        bytes = tl.where(code == 0, 4, 2) << T
        prefetch(base + tl.cast(t, tl.int64) * bytes, bytes, (4 if BASES & 1 else 2) << T)


@triton.jit
def write_tile(
    out,
    base,
    code,
    count,
    cols,
    row_stride,
    t,
    x,
    factor,
    scratch,
    OUT: tl.constexpr,
    BASES: tl.constexpr,
    T: tl.constexpr,
    REST: tl.constexpr,
):
    """Writes base + factor * x to tile t of the piece that begins at the addresses `out` and `base` (0: zeros).

    BASES 0 means that no piece has a base. REST is as in write_elements.
    """
    at = tl.arange(0, 1 << T)
    first = tl.cast(t, tl.int64) << T
    whole = (cols == 0) & (first + (1 << T) <= count) & ((base | out) % 16 == 0)
    if whole & ((base != 0) | (BASES == 0)):
        w = 0.0 if BASES == 0 else load_floats(base, code, first, at, None, BASES, 1)
        store_floats(out, first, at, w + factor * x, None, OUT, 1)
    else:
        tl.debug_barrier()
        tl.store(scratch + at, x)
        tl.debug_barrier()
        write_elements(out, base, code, count, cols, row_stride, first, scratch, factor, OUT, BASES, T, REST)


@triton.jit(do_not_specialize=["seed", "dim", "chunks", "count"])
def forward_z_kernel(
    theta,
    dim: tl.int32,
    chunks: tl.int32,
    seed: tl.int64,
    pieces,  # [pieces, COLUMNS]; None: z is the same for all of them
    count: tl.int32,  # pieces times chunks
    zs,  # [pieces, chunks, 2^T], or [chunks, 2^Q]
    scratch,  # [programs, 2^T]
    Q: tl.constexpr,
    T: tl.constexpr,
):
    program = tl.program_id(0)
    seed = seed.to(tl.int64)
    scratch += program.to(tl.int64) << T
    for i in range(program, count, tl.num_programs(0)):
        if pieces is None:
            make_z(theta, dim, seed, tl.full([], SHARED, tl.int64), i, scratch, zs + (i << Q), Q, T, Q < T)
        else:
            row = pieces + i // chunks * COLUMNS
            if tl.load(row + SEGMENT) >= 0:  # not a hole
                z = zs + (tl.cast(i, tl.int64) << T)
                make_z(theta, dim, seed, tl.load(row + STREAM), i % chunks, scratch, z, Q, T)


@triton.jit(do_not_specialize=["seed", "num_listed"], do_not_specialize_on_alignment=["chunks", "listed"])
def fastfood_forward_kernel(
    chunks,
    factors,
    seed: tl.int64,
    runs,  # [runs, COLUMNS]; of listed tiles one row, the piece's
    first_runs,  # [programs + 1]
    listed,  # [num_listed], rising: which 2^14 values of the only segment are written; None: all pieces
    num_listed: tl.int32,
    bases,  # table_of the tensors
    out,
    lines,
    zs,  # [pieces, chunks, 2^T], or [chunks, 2^Q]
    scratch,  # [programs, 2^T]
    OUT: tl.constexpr,
    BASES: tl.constexpr,
    PREFETCH: tl.constexpr,
    RADEMACHER: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    seed = seed.to(tl.int64)
    scratch += program << T
    ALL: tl.constexpr = listed is None
    SPAN: tl.constexpr = 1 << (14 - T)  # tiles of an entry
    if ALL:
        begin, end = tl.load(first_runs + program), tl.load(first_runs + program + 1)
    else:
        begin, end = program * 0, program * 0 + 1
    for i in range(begin, end):
        row = runs + i * COLUMNS
        base, code = tensor_at(bases, tl.load(row + TENSOR), tl.load(row + OFFSET))
        to = out.to(tl.int64) + tl.load(row + OUT_OFFSET) * (4 if OUT == 0 else 2)
        count, cols, row_stride = tl.load(row + COUNT), tl.load(row + COLS), tl.load(row + ROW_STRIDE)
        stream, segment = tl.load(row + STREAM), tl.load(row + SEGMENT)
        if ALL:
            first, last = tl.load(row + FIRST).to(tl.int32), tl.load(row + LAST).to(tl.int32)
        else:
            first = (program * num_listed * SPAN // tl.num_programs(0)).to(tl.int32)
            last = ((program + 1) * num_listed * SPAN // tl.num_programs(0)).to(tl.int32)
        if segment < 0:
            for t in range(first, last):
                at = tl.cast(t, tl.int64) << T
                write_elements(to, base, code, count, cols, row_stride, at, None, None, OUT, BASES, T)
        else:
            factor = tl.load(factors + segment)
            if ONE_CHUNK:
                first_chunk = tl.load(row + FROM).to(tl.int32)
            else:
                z = zs + (tl.load(row + FROM) * chunks << T if ALL else 0)
            for place in range(first, last):
                t = listed_at(listed, place, SPAN)
                if PREFETCH and BASES != 0:
                    prefetch_base(base, code, count, cols, t, BASES, T)
                block = t << (T - Q)
                if ONE_CHUNK:
                    chunk = (first_chunk + block) % chunks
                    of_chunk = load_shared_z(zs, chunk, chunks, Q, T)
                    x = times_diagonal(of_chunk, seed, stream, block, 1, chunk, lines, RADEMACHER, Q, T, chunks)
                else:
                    x = times_diagonal(load_z(z, T), seed, stream, block, 1, 0, lines, RADEMACHER, Q, T)
                    for chunk in range(1, chunks):
                        of_chunk = load_z(z + (tl.cast(chunk, tl.int64) << T), T)
                        x += times_diagonal(of_chunk, seed, stream, block, 1, chunk, lines, RADEMACHER, Q, T)
                w = transform(x, Q, T)
                # Tile t is written at its place in the list: it lies there in a buffer that begins at `at`.
                at = to + (tl.cast(place - t, tl.int64) << T) * (4 if OUT == 0 else 2)
                write_tile(at, base, code, count, cols, row_stride, t, w, factor, scratch, OUT, BASES, T, not ALL)
