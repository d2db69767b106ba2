"""The random streams of docs/rng.md for a whole tile at a time, in the tile's order A (tile.py).

A Philox call gives eight normals or 128 signs. All of them are used by the thread that makes the call and stay in its
registers, so no transposition is needed. The counter is (block | purpose << 28, ctr | chunk << 16, stream).
"""

import torch
import triton
import triton.language as tl

from hsaid_kernels.fastfood import reference

DIAGONAL = tl.constexpr(reference.DIAGONAL)
SIGNS = tl.constexpr(reference.SIGNS)
PERMUTATION = tl.constexpr(reference.PERMUTATION)
SHARED = tl.constexpr(reference.SHARED)


def normal_lines(device: torch.device) -> torch.Tensor:
    """int64 table of B << 32 | A by the upper 11 bits of v. It repeats the 32 lines, so that these need no mask."""
    a, b = (t.view(torch.int32).to(torch.int64) & 0xFFFFFFFF for t in (reference.TABLE_A, reference.TABLE_B))
    return (b << 32 | a).repeat(18).to(device)  # v < 2^16, so its upper bits are below 576


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: four words for counters of four words, as uint32; seed int64."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, stream, purpose: tl.constexpr, block, chunk, ctr):
    """The four words of each call of `ctr`; `block` is of the same shape or a scalar."""
    return philox(
        seed,
        tl.cast(block, tl.uint32) | purpose << 28,
        ctr.to(tl.uint32) | tl.cast(chunk, tl.uint32) << 16,
        stream.to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )


@triton.jit
def position(r, t):
    """The position e in a tile, of which r (the register) is bits 2 ... 7, and t (the thread) the others in order."""
    return (t & 3) | r << 2 | t >> 2 << 8


@triton.jit
def block_of(e, first, step, Q: tl.constexpr, T: tl.constexpr):
    """The block of position e, the tile's blocks being first, first + step, ..."""
    if Q < T:
        return first + (e >> Q) * step
    else:
        return first


@triton.jit
def chunk_of(e, first, chunks, Q: tl.constexpr, T: tl.constexpr):
    """The chunk of position e's block: `first`; or, given how many chunks there are, the next one for every block."""
    if chunks is None:
        chunk = first
    elif Q < T:
        chunk = (first + (e >> Q)) % chunks
    else:
        chunk = first
    return chunk


@triton.jit
def normal(half, lines):
    """Standard normals from 16-bit integers or-ed with 0x4B000001. Each operation is rounded by itself."""
    y = half.to(tl.float32, bitcast=True) - 8421376.0
    v = 32928.0 - tl.abs(y)
    line = tl.load(lines + (v.to(tl.uint32, bitcast=True) >> 21))
    a = line.to(tl.uint32).to(tl.float32, bitcast=True)
    b = (line >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return y * (a + b * v)


@triton.jit
def gaussian(seed, stream, first, step, chunk, lines, Q: tl.constexpr, T: tl.constexpr, chunks=None):
    """G of the tile's blocks: [64, 2^(T-6)] in order A. `chunks` is as in chunk_of."""
    S: tl.constexpr = min(4, Q - 3)  # a call's eight halves are at bits S, S + 1, S + 2 of the position
    THREADS: tl.constexpr = 1 << (T - 6)
    r = tl.arange(0, 8)[:, None]
    t = tl.arange(0, THREADS)[None, :]
    e = position((r & ((1 << (S - 2)) - 1)) | r >> (S - 2) << (S + 1), t)  # [8, threads], those of slot 0
    k = e & ((1 << Q) - 1)
    ctr = (k & ((1 << S) - 1)) | k >> (S + 3) << S
    of_e = chunk_of(e, chunk, chunks, Q, T)
    w0, w1, w2, w3 = words(seed, stream, DIAGONAL, block_of(e, first, step, Q, T), of_e, ctr)
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [8, threads, word & 2, word & 1]
    halves = tl.join((w & 0xFFFF) | 0x4B000001, w >> 16 | 0x4B000001)
    halves = tl.reshape(halves, (1 << (5 - S), 1 << (S - 2), THREADS, 2, 2, 2))
    halves = tl.reshape(tl.permute(halves, (0, 3, 4, 5, 1, 2)), (64, THREADS))
    # Threads first: if addresses are contiguous along no dimension, Triton 3.6 assigns the first one to lanes.
    return tl.permute(normal(tl.permute(halves, (1, 0)), lines), (1, 0))


@triton.jit
def sign_bits(seed, stream, purpose: tl.constexpr, first, step, chunk, Q: tl.constexpr, T: tl.constexpr, chunks=None):
    """The signs of the tile's blocks in bit 31: [64, 2^(T-6)] uint32 in order A. The other bits are arbitrary."""
    THREADS: tl.constexpr = 1 << (T - 6)
    CALLS: tl.constexpr = 1 << max(0, 8 - Q)  # of a thread; each covers the bits 2 ... min(7, Q - 1) of the position
    WORDS: tl.constexpr = 1 << max(1, 8 - Q)  # that a thread uses
    t = tl.arange(0, THREADS)[None, :]
    e = position(tl.arange(0, CALLS)[:, None] << max(0, Q - 2), t)  # [calls, threads]
    if Q >= 8:
        e = position(tl.zeros((1, 1), tl.int32), t)
    k = e & ((1 << Q) - 1)
    of_e = chunk_of(e, chunk, chunks, Q, T)
    w0, w1, w2, w3 = words(seed, stream, purpose, block_of(e, first, step, Q, T), of_e, (k & 3) | k >> 9 << 2)
    if Q >= 8:  # a thread has both values of bit 7
        upper = (k >> 8 & 1) == 1
        w = tl.join(tl.where(upper, w2, w0), tl.where(upper, w3, w1))  # [1, threads, 2]
        w = tl.reshape(tl.permute(w, (2, 0, 1)), (2, 1, THREADS))
    else:  # bits 7 and 8 of a position are 0
        w = tl.reshape(w0, (WORDS, 1, THREADS))
    bit = tl.arange(0, 64 // WORDS).to(tl.uint32)
    return tl.reshape(w << (31 - bit)[None, :, None], (64, THREADS))


@triton.jit
def with_signs(x, bits):
    """x, negated where bit 31 of `bits` is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def permutation_keys(seed, stream, chunk):
    """The keys of the six rounds, uint32."""
    zero = tl.full([], 0, tl.uint32)
    k0, k1, k2, k3 = words(seed, stream, PERMUTATION, zero, chunk, zero)
    k4, k5, _, _ = words(seed, stream, PERMUTATION, zero, chunk, zero + 1)
    return k0, k1, k2, k3, k4, k5


@triton.jit
def permute(k, keys, Q: tl.constexpr):
    """pi(k), uint32: a six-round Feistel network on the Q bits of k."""
    LOW: tl.constexpr = Q // 2
    low = k.to(tl.uint32) & ((1 << LOW) - 1)
    high = k.to(tl.uint32) >> LOW
    for i in tl.static_range(0, 6, 2):
        x = (low ^ keys[i]) * 0x9E3779B1
        high ^= (x ^ x >> 15) * 0x85EBCA77 >> (32 - (Q - LOW))
        x = (high ^ keys[i + 1]) * 0x9E3779B1
        low ^= (x ^ x >> 15) * 0x85EBCA77 >> (32 - LOW)
    return high << LOW | low


@triton.jit
def times_diagonal(
    z, seed, stream, first, step, chunk, lines, RADEMACHER: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, chunks=None
):
    """G z for the blocks first, first + step, ... of the tile: [64, 2^(T-6)] in order A. `chunks` is as in chunk_of."""
    if RADEMACHER:
        return with_signs(z, sign_bits(seed, stream, DIAGONAL, first, step, chunk, Q, T, chunks))
    else:
        return gaussian(seed, stream, first, step, chunk, lines, Q, T, chunks) * z
