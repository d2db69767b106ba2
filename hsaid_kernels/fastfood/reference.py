"""The reference implementation of the projection in plain PyTorch: slow and short. All backends are tested against it.

    z_ic     = Pi_ic H B_ic theta_c                      one vector [n] per segment i and chunk c of theta
    W_i      = W0_i + f_i * concat_b H(sum_c G_ibc z_ic)  cut to D_i values;  f_i = s_i * factor_i
    u_ic     = sum_b G_ibc . (H g_ib)                     the adjoint's only pass over the gradients
    df_i     = sum_c <u_ic, z_ic>
    dtheta_c = sum_i f_i * B_ic H Pi_ic^T u_ic

With one chunk a block, there is no sum over c: block b of segment i is made from one chunk c(i, b), and all segments
have the same z:

    W_i      = W0_i + f_i * concat_b H(G_ibc z_c)         with c = c(i, b)
    dtheta_c = B_c H Pi_c^T (sum of f_i * G_ibc . (H g_ib) over all i, b with c(i, b) = c)
    df_i     = sum_b <G_ibc . (H g_ib), z_c>

Here n is the plan's width, b the index of a block, G a random diagonal, B random signs, Pi a random permutation, H the
Walsh-Hadamard matrix, "." the elementwise product, and g_ib block b of the gradient of W_i.

The random streams are those of docs/rng.md bit for bit. The order of all floating-point operations is specified too, so
float32 results equal the kernels' bit for bit. In float64 this module is the baseline for measuring errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hsaid_kernels.fastfood.plan import MAX_WIDTH, Plan, Segment

DIAGONAL, SIGNS, PERMUTATION = range(3)  # the purpose of a Philox call, part of its counter
SHARED = 0  # the stream id of B and Pi where blocks are made from one chunk: those of all segments
MASK32 = 0xFFFFFFFF
LANES = 256  # sums into which the products of a segment's blocks are added in turn
SLICE = 2**22  # number of values computed at a time, to limit memory


def _table(bits: str) -> Tensor:
    return torch.tensor([int(b, 16) for b in bits.split()], dtype=torch.int64).to(torch.int32).view(torch.float32)


# Bit patterns of 32 float32 values each, fitted to the normal quantile function, with unit variance (docs/rng.md).
TABLE_A = _table("""
    38bebad1 38b777fe 38b1fb4f 38ad9167 38a853d4 38a2af6c 389e2841 389a5ea8 3895bb09 389094f5 388c5ba4 3888c61a
    3884574c 387eb7e8 38767b8f 386f7583 3866c44e 385ce404 3854a76a 384d8a70 3844a637 3839eea5 38303f0c 3827d33b
    3820b527 3948c35c 390e0f82 38fb72b6 38e5c2fe 38d64b5d 38ccce68 38c60bb6
""")
TABLE_B = _table("""
    b2ceaf73 b2a00b00 b282b4f9 b25cfd44 b2339c16 b20f61ff b1ee5bef b1cbac86 b1a70aae b185fb8d b15ece91 b13dfb3c
    b11af7d9 b0f5f0a6 b0c9e6dd b0a9bacf b08760f2 b04f44cb b0233125 b002964c afbec636 af736134 af0b562c ae7596a6
    ac1146f2 b5000d54 b44466a4 b3f2a1de b39cc491 b355fc93 b3233672 b3043cd3
""")


def philox(seed: int, counter: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, stored as int64, for a counter of four such words.

    Counter words may be integers or tensors, which are broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        # int64 products wrap around, but their 64 bits equal those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & MASK32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32 & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def words(seed: int, stream: int, purpose: int, block: Tensor | int, chunk: Tensor | int, ctr: Tensor) -> Tensor:
    """The four words of each Philox call, int64 [..., 4], for broadcast `block`, `chunk` and call numbers `ctr`.

    The counter is (block | purpose << 28, ctr | chunk << 16, low word of stream, high word of stream).
    """
    counter = (
        torch.as_tensor(block) | purpose << 28,
        ctr | torch.as_tensor(chunk) << 16,
        stream & MASK32,
        stream >> 32 & MASK32,
    )
    return torch.stack(philox(seed, counter), -1)


def _column(chunk: Tensor | int) -> Tensor | int:
    return chunk[:, None] if isinstance(chunk, Tensor) else chunk


def normal(half: Tensor) -> Tensor:
    """float32 standard normals from 16-bit integers. Each operation is rounded to float32 separately (no FMA)."""
    y = ((half | 1) - 32768).to(torch.float32)
    v = 32928.0 - y.abs()
    s = (v.view(torch.int32) >> 21) & 31
    return y * (TABLE_A[s] + TABLE_B[s] * v)


def gaussian(seed: int, stream: int, block: Tensor, chunk: Tensor | int, n: int) -> Tensor:
    """G as float32 [blocks, n] for block numbers [blocks]. A Philox call gives eight values at positions 2**s apart."""
    k = torch.arange(n)
    s = min(4, n.bit_length() - 4)
    slot = k >> s & 7
    ctr = k & (1 << s) - 1 | k >> s + 3 << s
    w = words(seed, stream, DIAGONAL, block[:, None], _column(chunk), torch.arange(n // 8))  # [blocks, n / 8, 4]
    return normal(w[:, ctr, slot >> 1] >> 16 * (slot & 1) & 0xFFFF)


def rademacher(seed: int, stream: int, purpose: int, block: Tensor, chunk: Tensor | int, n: int) -> Tensor:
    """Random signs +1 or -1 as float32 [blocks, n], each from one random bit."""
    k = torch.arange(n)
    ctr = k & 3 | k >> 9 << 2
    b = k >> 2 & 127
    w = words(seed, stream, purpose, block[:, None], _column(chunk), torch.arange(max(4, n // 128)))
    return 1.0 - 2.0 * (w[:, ctr, b >> 5] >> (b & 31) & 1).to(torch.float32)


def permutation(seed: int, stream: int, chunk: int, n: int) -> Tensor:
    """pi as int64 [n], where (Pi h)[k] = h[pi(k)]: a six-round Feistel network on the q = log2(n) bits of k."""
    q = n.bit_length() - 1
    low_bits, high_bits = q // 2, q - q // 2
    keys = words(seed, stream, PERMUTATION, 0, chunk, torch.arange(2)).flatten()[:6]
    k = torch.arange(n)
    low, high = k & (1 << low_bits) - 1, k >> low_bits

    def mix(x: Tensor, key: Tensor) -> Tensor:
        x = (x ^ key) * 0x9E3779B1 & MASK32
        return (x ^ x >> 15) * 0x85EBCA77 & MASK32

    for r in range(6):
        if r % 2 == 0:
            high = high ^ mix(low, keys[r]) >> 32 - high_bits
        else:
            low = low ^ mix(high, keys[r]) >> 32 - low_bits
    return high << low_bits | low


def walsh_hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """H x along the last dimension of x [..., n], not normalized; n = 2**q.

    The stages (one for each bit of the position) run in the order 2, ..., q-1, 0, 1, reversed if `transpose`. H is
    symmetric, so `transpose` changes the rounding only.
    """
    n = x.shape[-1]
    q = n.bit_length() - 1
    order = [*range(2, q), *range(min(2, q))]
    for bit in reversed(order) if transpose else order:
        pairs = x.reshape(*x.shape[:-1], n >> bit + 1, 2, 1 << bit)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).reshape(x.shape)
    return x


def _diagonal(plan: Plan, stream: int, block: Tensor, chunk: Tensor | int, dtype: torch.dtype) -> Tensor:
    if plan.rademacher:
        return rademacher(plan.seed, stream, DIAGONAL, block, chunk, plan.width).to(dtype)
    return gaussian(plan.seed, stream, block, chunk, plan.width).to(dtype)


def _chunk_streams(plan: Plan, stream: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (signs [n], permutation [n]) for each chunk of theta."""
    for chunk in range(plan.chunks):
        signs = rademacher(plan.seed, stream, SIGNS, torch.zeros(1, dtype=torch.int64), chunk, plan.width)[0]
        yield signs.to(dtype), permutation(plan.seed, stream, chunk, plan.width)


def _z(plan: Plan, stream: int, theta: Tensor) -> Tensor:
    """z_ic for all chunks c of theta, [chunks, n], for this stream id: that of a segment, or `SHARED`."""
    n = plan.width
    spread = plan.spread(theta)
    padded = torch.nn.functional.pad(spread, (0, plan.chunks * n - len(spread))).view(plan.chunks, n)
    streams = _chunk_streams(plan, stream, theta.dtype)
    return torch.stack([walsh_hadamard(t * signs)[pi] for t, (signs, pi) in zip(padded, streams, strict=True)])


def _chunk_of(plan: Plan, piece: Segment, block: Tensor) -> Tensor:
    """The chunks from which these blocks of a segment are made, if a block is made from one."""
    return (plan.first_chunk(piece) + block) % plan.chunks


def _slices(plan: Plan, piece: Segment) -> Iterator[Tensor]:
    return torch.arange(plan.blocks(piece)).split(max(plan.run_blocks, SLICE // plan.width))


def _elements(piece: Segment, tensor: Tensor) -> Tensor:
    """The segment's elements of `tensor` as a 2-D view; if `tensor` is not contiguous, a view of a copy."""
    return tensor.contiguous().view(-1)[piece.offset :].as_strided((piece.rows, piece.cols), (piece.row_stride, 1))


def forward(
    plan: Plan,
    theta: Tensor,
    factors: Tensor,
    base: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    listed: Tensor | None = None,
    span: int = 1,
) -> Tensor:
    """The weights W_i = base_i + factors_i * (P_i theta / s_i) as a flat buffer [plan.numel] in `dtype`.

    `factors` [S] already contain the scales s_i. `base` has a tensor for each tensor of the plan, or is empty for
    zeros. With `listed`, as in `ops.fastfood_forward`, only these blocks: [len(listed) * span * n], 0 behind the end of
    the segment. Computes in theta's dtype, on the CPU.
    """
    if listed is not None:
        whole = forward(plan, theta, factors, base, dtype)[: plan.pieces[0].numel]
        size = span * plan.width
        return torch.nn.functional.pad(whole, (0, -len(whole) % size)).view(-1, size)[listed].flatten()
    flat = torch.zeros(plan.numel, dtype=theta.dtype)
    weights = plan.views(flat)
    for w, b in zip(weights, base):
        w.copy_(b)
    shared = _z(plan, SHARED, theta) if plan.one_chunk else None
    for i, piece in enumerate(plan.pieces):
        stream = piece.stream_id
        z = _z(plan, stream, theta) if shared is None else shared
        values = []
        for block in _slices(plan, piece):
            x = torch.zeros(len(block), plan.width, dtype=theta.dtype)
            chunks: Iterable[Tensor | int] = range(plan.chunks)
            if plan.one_chunk:
                chunks = [_chunk_of(plan, piece, block)]
            for number, chunk in enumerate(chunks):
                gz = _diagonal(plan, stream, block, chunk, theta.dtype) * z[chunk]
                x = x + gz if number else gz
            values.append(factors[i] * walsh_hadamard(x).flatten())
        target = _elements(piece, weights[plan.names.index(piece.tensor)])
        target += torch.cat(values)[: piece.numel].view(target.shape)
    return flat.to(dtype)


def adjoint(
    plan: Plan,
    theta: Tensor,
    factors: Tensor,
    grads: Sequence[Tensor | None],
    listed: Tensor | None = None,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    """Returns (dtheta [dim], dfactors [S]) for the gradients of the plan's tensors, where None counts as zero.

    `factors` [S] already contain the scales s_i; dfactors are the gradients of these. With `listed`, as in
    `ops.fastfood_adjoint`, the one gradient is that of these blocks. Computes in theta's dtype, on the CPU.
    """
    if plan.one_chunk:
        return _adjoint_of_one_chunk(plan, theta, factors, grads, listed, span)
    n, dtype = plan.width, theta.dtype
    dtheta, dfactors = torch.zeros(plan.chunks, n, dtype=dtype), torch.zeros(len(plan.pieces), dtype=dtype)
    for i, piece in enumerate(plan.pieces):
        grad = grads[plan.names.index(piece.tensor)]
        if grad is None:
            continue
        stream = piece.stream_id
        g, numbers = _blocks(plan, piece, grad, dtype, listed, span)
        u = torch.zeros(plan.chunks, n, dtype=dtype)
        runs = MAX_WIDTH // n  # number of runs in a group
        for group_blocks in torch.arange(len(g)).split(plan.run_blocks * runs):
            group = torch.zeros_like(u)
            for block in (group_blocks[i::runs] for i in range(min(runs, len(group_blocks)))):
                hg = walsh_hadamard(g[block], transpose=True)
                run = torch.zeros_like(u)
                for chunk in range(plan.chunks):
                    for product in _diagonal(plan, stream, numbers[block], chunk, dtype) * hg:
                        run[chunk] += product
                group += run
            u += group
        for p in fold(u * _z(plan, stream, theta)):
            dfactors[i] += p
        for chunk, (signs, pi) in enumerate(_chunk_streams(plan, stream, dtype)):
            scattered = torch.empty(n, dtype=dtype)
            scattered[pi] = u[chunk]
            dtheta[chunk] += factors[i] * (signs * walsh_hadamard(scattered, transpose=True))
    return dtheta.flatten()[: plan.dim].clone(), dfactors


def _blocks(
    plan: Plan, piece: Segment, grad: Tensor, dtype: torch.dtype, listed: Tensor | None, span: int
) -> tuple[Tensor, Tensor]:
    """The blocks of a segment's gradient [blocks, n], padded with zeros, and their numbers [blocks]."""
    n = plan.width
    g = (grad.flatten() if listed is not None else _elements(piece, grad).flatten()).to(dtype)
    g = torch.nn.functional.pad(g, (0, -len(g) % n)).view(-1, n)
    numbers = torch.arange(len(g)) if listed is None else (listed[:, None] * span + torch.arange(span)).flatten()
    return g, numbers


def _adjoint_of_one_chunk(
    plan: Plan,
    theta: Tensor,
    factors: Tensor,
    grads: Sequence[Tensor | None],
    listed: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor]:
    """`adjoint` if each block is made from one chunk: the sums are over the blocks of a chunk, of all segments."""
    n, dtype = plan.width, theta.dtype
    z, dfactors = _z(plan, SHARED, theta), torch.zeros(len(plan.pieces), dtype=dtype)
    lists: list[list[Tensor]] = [[] for _ in range(plan.chunks)]  # of f G_b H g_b; missing gradients keep their places
    nothing = torch.zeros(n, dtype=dtype)
    for i, piece in enumerate(plan.pieces):
        grad = grads[plan.names.index(piece.tensor)]
        if grad is None:
            for chunk in _chunk_of(plan, piece, torch.arange(plan.blocks(piece))).tolist():
                lists[chunk].append(nothing)
            continue
        g, numbers = _blocks(plan, piece, grad, dtype, listed, span)
        chunks = _chunk_of(plan, piece, numbers)
        diagonal = _diagonal(plan, piece.stream_id, numbers, chunks, dtype)
        drawn = diagonal * walsh_hadamard(g, transpose=True)
        for chunk, product in zip(chunks.tolist(), factors[i] * drawn, strict=True):
            lists[chunk].append(product)
        dots = dots_of_blocks(drawn * z[chunks])
        of_lanes = torch.zeros(LANES, dtype=dtype)
        for some in torch.nn.functional.pad(dots, (0, -len(dots) % LANES)).view(-1, LANES):
            of_lanes = of_lanes + some
        dfactors[i] = fold(of_lanes)
    runs = MAX_WIDTH // n  # number of runs in a group
    dtheta = torch.empty(plan.chunks, n, dtype=dtype)
    for chunk, (signs, pi) in enumerate(_chunk_streams(plan, SHARED, dtype)):
        u = torch.zeros(n, dtype=dtype)
        for begin in range(0, len(lists[chunk]), plan.run_blocks * runs):
            products = lists[chunk][begin : begin + plan.run_blocks * runs]
            group = torch.zeros(n, dtype=dtype)
            for first in range(min(runs, len(products))):
                group = group + sum(products[first::runs], torch.zeros(n, dtype=dtype))
            u = u + group
        scattered = torch.empty(n, dtype=dtype)
        scattered[pi] = u
        dtheta[chunk] = signs * walsh_hadamard(scattered, transpose=True)
    return plan.gathered(dtheta.flatten()), dfactors


def dots_of_blocks(products: Tensor) -> Tensor:
    """Sums over the last dimension, [blocks, n] -> [blocks], in the order of docs/rng.md.

    First over bits 4 to 7 of the position, one value after another, then those left, as `fold` does.
    """
    blocks, n = products.shape
    sums = torch.zeros(blocks, -(-n // 256), 16, dtype=products.dtype)
    for some in products.view(blocks, sums.shape[1], -1, 16).unbind(2):
        sums = sums + some
    return fold(sums.flatten(1))


def fold(x: Tensor) -> Tensor:
    """Sum over the last dimension, [..., n] -> [...]. Adds the upper half to the lower half until one value is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def padded_size(dim: int, order: int) -> int:
    """The least order * 2^k, k >= 0, that is not less than dim."""
    return order << max(0, -(-dim // order) - 1).bit_length()


def hadamard_transform(x: Tensor, scale: float = 1.0, order: int = 1) -> Tensor:
    """H x * scale along the last dimension, padded with zeros to `padded_size`; the result is truncated again."""
    dim = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, padded_size(dim, order) - dim))
    if order > 1:
        x = paley(x.unflatten(-1, (order, -1)))
    x = walsh_hadamard(x)
    return ((x.flatten(-2) if order > 1 else x)[..., :dim] * scale).contiguous()


def conference_matrix(half: int) -> Tensor:
    """Paley's symmetric conference matrix C of order 6, 10 or 14 [half, half], in int64: C C^T = (half - 1) I.

    C_ij, for i, j >= 1, is 1 where the difference of the field's elements i - 1 and j - 1 is a square, else -1. Of the
    field of 9 elements, a + 3 b stands for a + b sqrt(-1).
    """
    field = half - 1
    p = 3 if field == 9 else field
    element = torch.arange(field)
    a, b = ((part[:, None] - part) % p for part in (element % p, element // p))
    square = (a * a + b * b) % p == 1 if field == 9 else torch.isin(a, element[1:] ** 2 % p)
    c = torch.ones(half, half, dtype=torch.int64)
    c[1:, 1:] = torch.where(square, 1, -1)
    return c.fill_diagonal_(0)


def paley(x: Tensor) -> Tensor:
    """The product of Paley's symmetric Hadamard matrix with x [..., order, columns], not normalized; order 12, 20, 28.

    The matrix is the Kronecker product of C with [[1, 1], [1, -1]] plus that of I with [[1, -1], [-1, -1]] (Paley's
    second construction). Row i adds the terms of the pairs i + 1, i + 2, ... in this order, modulo order / 2.
    """
    half = x.shape[-2] // 2
    a, b = x.unflatten(-2, (half, 2)).unbind(-2)
    total, difference = a + b, a - b
    signs = conference_matrix(half)
    row = torch.arange(half)
    even, odd = difference, -total
    for step in range(1, half):
        pair = (row + step) % half
        plus = (signs[row, pair] > 0)[:, None].to(x.device)
        pair = pair.to(x.device)
        even = torch.where(plus, even + total[..., pair, :], even - total[..., pair, :])
        odd = torch.where(plus, odd + difference[..., pair, :], odd - difference[..., pair, :])
    return torch.stack((even, odd), -2).flatten(-3, -2)


def integer_hadamard_transform(x: Tensor, order: int = 1) -> Tensor:
    """H x along the last dimension of integers, padded and truncated as in `hadamard_transform`; exact.

    Raises RuntimeError if a value of the result does not fit x's dtype.
    """
    halves = (x.long() >> 32, x.long() & MASK32)  # x = 2^32 high + low; sums of halves fit int64
    high, low = (hadamard_transform(half, 1, order) for half in halves)
    high = high + (low >> 32)
    limits = torch.iinfo(x.dtype)
    result = (high << 32) + (low & MASK32)
    if ((high < -(2**31)) | (high >= 2**31) | (result < limits.min) | (result > limits.max)).any():
        raise RuntimeError(f"x: expected integers whose transform fits {limits.dtype}, got larger ones")
    return result.to(x.dtype)
