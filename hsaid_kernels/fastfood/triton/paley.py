"""Paley's Hadamard matrices of order 12, 20 and 28 (csrc/core/paley.h) over rows of [order, columns] floats."""

import functools

import triton
import triton.language as tl

from hsaid_kernels.fastfood import reference

ORDERS = (12, 20, 28)


@functools.cache
def plus_bits(order: int) -> int:
    """PLUS of the kernel."""
    signs = reference.conference_matrix(order // 2).flatten().tolist()
    return sum(1 << k for k, sign in enumerate(signs) if sign > 0)


@triton.jit(do_not_specialize=["total"])
def paley_kernel(
    x,  # [total / columns, ORDER, columns]
    out,
    columns: tl.int64,
    total: tl.int64,
    ORDER: tl.constexpr,
    PLUS: tl.constexpr,  # bit ORDER / 2 * i + j is set where C_ij is 1
    SIZE: tl.constexpr,
):
    HALF: tl.constexpr = ORDER // 2
    k = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = k < total
    first = k // columns * columns * ORDER + k % columns
    for row in tl.static_range(HALF):
        a = tl.load(x + first + 2 * row * columns, mask=inside)
        b = tl.load(x + first + (2 * row + 1) * columns, mask=inside)
        even, odd = a - b, (a + b) * -1.0  # Triton's negative of 0 is 0
        for step in tl.static_range(1, HALF):  # what the first row has read is in the first-level cache
            a = tl.load(x + first + 2 * ((row + step) % HALF) * columns, mask=inside)
            b = tl.load(x + first + (2 * ((row + step) % HALF) + 1) * columns, mask=inside)
            if PLUS >> (HALF * row + (row + step) % HALF) & 1:
                even += a + b
                odd += a - b
            else:
                even -= a + b
                odd -= a - b
        tl.store(out + first + 2 * row * columns, even, mask=inside)
        tl.store(out + first + (2 * row + 1) * columns, odd, mask=inside)
