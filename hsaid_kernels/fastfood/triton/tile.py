"""A tile of 2^T values: the Walsh-Hadamard transform of its blocks of 2^Q values, and z.

T is 12, or Q if blocks are larger than 2^12. A program has 2^(T-6) threads with 64 values each. The transform has one
stage for each of the bits 2, 3, ..., Q-1, 0, 1 of a position, in this order (docs/rng.md). A stage needs no exchange
between threads if its bit selects a register. Therefore a tile changes between the following orders of its values, in
which bits of the position are listed from the highest bit of the index to the lowest:

    order A    7 ... 2 | T-1 ... 8, 1, 0              as [64, 2^(T-6)]; draws, stages 2 ... 7
    order B    12 ... 7 | T-1 ... 13, 1, 0, 6 ... 2   where Q > 12; stages 8 ... 12
    order C    T-1 ... T-4, 1, 0 | T-5 ... 2          the stages that are left, then 0 and 1
    natural    T-1 ... 0                              in memory

The six bits before the bar select a register of a thread, because by default Triton assigns the highest bits to
registers. C and natural order differ only in which register of a thread has a value, so threads exchange a tile once
(T = 12) or twice.
"""

import triton
import triton.language as tl

from hsaid_kernels.fastfood.triton.streams import (
    SIGNS,
    chunk_of,
    permutation_keys,
    permute,
    position,
    sign_bits,
    with_signs,
)


def tile_bits(q: int) -> int:
    """T for blocks of 2^q values."""
    return max(q, 12)


def threads(q: int) -> int:
    """The number of threads of a program, each of which holds 64 values."""
    return 1 << (tile_bits(q) - 6)


@triton.jit
def butterflies(x, BIT: tl.constexpr, T: tl.constexpr):
    """(a, b) -> (a + b, a - b) over bit BIT of the index of x, which is [2^T] in any order and shape."""
    pairs = tl.permute(tl.reshape(x, (1 << (T - 1 - BIT), 2, 1 << BIT)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.permute(tl.join(a + b, a - b), (0, 2, 1))


@triton.jit
def stages(x, FIRST: tl.constexpr, LAST: tl.constexpr, AT: tl.constexpr, REVERSED: tl.constexpr, T: tl.constexpr):
    """Stages FIRST ... LAST - 1, of which the first is at bit AT of the index."""
    for i in tl.static_range(LAST - FIRST):
        if REVERSED:
            x = butterflies(x, AT + LAST - FIRST - 1 - i, T)
        else:
            x = butterflies(x, AT + i, T)
    return x


@triton.jit
def a_to_natural(x, T: tl.constexpr):
    x = tl.permute(tl.reshape(x, (64, 1 << (T - 8), 4)), (1, 0, 2))
    return tl.reshape(x, (1 << T,))


@triton.jit
def natural_to_a(x, T: tl.constexpr):
    x = tl.permute(tl.reshape(x, (1 << (T - 8), 64, 4)), (1, 0, 2))
    return tl.reshape(x, (64, 1 << (T - 6)))


@triton.jit
def a_to_c(x, Q: tl.constexpr, T: tl.constexpr):
    """From order A to C, with the stages of order B on the way."""
    if Q > 12:
        x = tl.permute(tl.reshape(x, (2, 32, 1 << (T - 13), 32, 4)), (3, 0, 2, 4, 1))
        x = stages(x, 8, 13, T - 5, False, T)
        x = tl.reshape(x, (1 << (17 - T), 1 << (T - 12), 2, 1 << (T - 13), 4, 32))
        return tl.permute(x, (3, 0, 4, 1, 2, 5))
    else:
        return tl.permute(tl.reshape(x, (64, 16, 4)), (1, 2, 0))


@triton.jit
def c_to_a(x, Q: tl.constexpr, T: tl.constexpr):
    if Q > 12:
        x = tl.reshape(x, (1 << (T - 13), 1 << (17 - T), 4, 1 << (T - 12), 2, 32))
        x = stages(tl.permute(x, (1, 3, 4, 0, 2, 5)), 8, 13, T - 5, True, T)
        return tl.permute(tl.reshape(x, (32, 2, 1 << (T - 13), 4, 32)), (1, 4, 2, 0, 3))
    else:
        return tl.permute(tl.reshape(x, (16, 4, 64)), (2, 0, 1))


@triton.jit
def transform(x, Q: tl.constexpr, T: tl.constexpr, FINISH: tl.constexpr = True):
    """H of every block of the tile, from order A to natural, [2^T]; without FINISH, all but the stages 0 and 1."""
    x = stages(x, 2, max(2, min(8, Q)), T - 6, False, T)
    x = a_to_c(x, Q, T)
    DONE: tl.constexpr = 13 if Q > 12 else 8
    x = stages(x, DONE, max(DONE, Q), DONE, False, T)
    if FINISH:
        x = stages(x, 0, min(2, Q), T - 6, False, T)
    return tl.reshape(tl.permute(tl.reshape(x, (16, 4, 1 << (T - 6))), (0, 2, 1)), (1 << T,))


@triton.jit
def transform_reversed(x, Q: tl.constexpr, T: tl.constexpr):
    """H^T, the stages in reverse, from natural order to A, [64, 2^(T-6)]."""
    x = tl.permute(tl.reshape(x, (16, 1 << (T - 6), 4)), (0, 2, 1))
    x = stages(x, 0, min(2, Q), T - 6, True, T)
    DONE: tl.constexpr = 13 if Q > 12 else 8
    x = stages(x, DONE, max(DONE, Q), DONE, True, T)
    x = c_to_a(x, Q, T)
    x = stages(x, 2, max(2, min(8, Q)), T - 6, True, T)
    return tl.reshape(x, (64, 1 << (T - 6)))


@triton.jit
def place_in_z(e, T: tl.constexpr):
    """The index in z of position e. z is in order A with registers in fours, which a thread reads at once (load_z)."""
    return (e >> 4 & 15) << (T - 4) | e >> 8 << 4 | (e & 3) << 2 | (e >> 2 & 3)


@triton.jit
def position_in_z(i, T: tl.constexpr):
    """The inverse of place_in_z: the position at index i."""
    return position(i >> (T - 4) << 2 | (i & 3), i >> 2 & ((1 << (T - 6)) - 1))


@triton.jit
def load_z(z, T: tl.constexpr):
    """z in order A: [64, 2^(T-6)]."""
    x = tl.reshape(tl.load(z + tl.arange(0, 1 << T)), (16, 1 << (T - 6), 4))
    return tl.reshape(tl.permute(x, (0, 2, 1)), (64, 1 << (T - 6)))


@triton.jit
def load_shared_z(zs, chunk, chunks, Q: tl.constexpr, T: tl.constexpr):
    """z of the tile's blocks in order A, each of another chunk: `chunk` and those that follow. zs is [chunks, 2^Q]."""
    if Q == T:
        return load_z(zs + (chunk << Q), T)
    else:
        e = position(tl.arange(0, 64)[:, None], tl.arange(0, 1 << (T - 6))[None, :])
        return tl.load(zs + (chunk_of(e, chunk, chunks, Q, T) << Q | e & ((1 << Q) - 1)))


@triton.jit
def make_z(
    theta, dim, seed, stream, chunk, scratch, z, Q: tl.constexpr, T: tl.constexpr, NATURAL: tl.constexpr = False
):
    """Writes a segment's z of a chunk, for every block of a tile, to z [2^T] for load_z. Uses scratch [2^T].

    With NATURAL, writes it once and in natural order: [2^Q].
    """
    STEP: tl.constexpr = 1 << (T - 2)  # sixteen positions a thread at a time, because each takes several registers
    of_theta = (chunk << Q) + (tl.arange(0, 1 << T) & ((1 << Q) - 1))
    x = natural_to_a(tl.load(theta + of_theta, mask=of_theta < dim, other=0.0), T)
    first = tl.full([], 0, tl.int32)
    signs = sign_bits(seed, stream, SIGNS, first, 0, chunk, Q, T)
    x = transform(with_signs(x, signs), Q, T)
    tl.debug_barrier()  # no thread reads any more what was in scratch
    tl.store(scratch + tl.arange(0, 1 << T), x)
    tl.debug_barrier()
    keys = permutation_keys(seed, stream, chunk)
    for i in range(0, 1 << (Q if NATURAL else T), STEP):
        at = i + tl.arange(0, STEP)
        if NATURAL:
            tl.store(z + at, tl.load(scratch + permute(at & ((1 << Q) - 1), keys, Q)), mask=at < 1 << Q)
        else:
            k = position_in_z(at, T) & ((1 << Q) - 1)
            tl.store(z + at, tl.load(scratch + permute(k, keys, Q)))
    tl.debug_barrier()


@triton.jit
def transposed_z(u, seed, stream, chunk, scratch, Q: tl.constexpr, T: tl.constexpr):
    """B H^T Pi^T u for every block of a tile, [2^T] in natural order; u [2^Q] in memory. Uses scratch [2^T]."""
    STEP: tl.constexpr = 1 << (T - 4)
    keys = permutation_keys(seed, stream, chunk)
    for first in range(0, 1 << T, STEP):
        e = first + tl.arange(0, STEP)
        k = e & ((1 << Q) - 1)
        to = (e - k) + permute(k, keys, Q).to(tl.int32)
        tl.store(scratch + to, tl.load(u + k))
    tl.debug_barrier()
    x = transform_reversed(tl.load(scratch + tl.arange(0, 1 << T)), Q, T)
    block = tl.full([], 0, tl.int32)
    return a_to_natural(with_signs(x, sign_bits(seed, stream, SIGNS, block, 0, chunk, Q, T)), T)
