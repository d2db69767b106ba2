"""For tests: one block of a random stream as a tensor of values, generated as in the other kernels."""

import triton
import triton.language as tl

from hsaid_kernels.fastfood.triton.streams import DIAGONAL, PERMUTATION, gaussian, permutation_keys, permute, sign_bits
from hsaid_kernels.fastfood.triton.tile import a_to_natural


@triton.jit(do_not_specialize=["seed", "stream", "block", "chunk"])
def stream_values_kernel(
    out,
    seed: tl.int64,
    stream: tl.int64,
    block: tl.int32,
    chunk: tl.int32,
    lines,
    PURPOSE: tl.constexpr,
    RADEMACHER: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
):
    # As they are typed, for the interpreter.
    seed, stream, block, chunk = seed.to(tl.int64), stream.to(tl.int64), block.to(tl.int32), chunk.to(tl.int32)
    e = tl.arange(0, 1 << T)
    if PURPOSE == PERMUTATION:
        v = permute(e & ((1 << Q) - 1), permutation_keys(seed, stream, chunk), Q).to(tl.float32)
    elif RADEMACHER or PURPOSE != DIAGONAL:
        signs = sign_bits(seed, stream, PURPOSE, block, 0, chunk, Q, T)
        v = a_to_natural(tl.where(signs >> 31 == 1, -1.0, 1.0), T)
    else:
        v = a_to_natural(gaussian(seed, stream, block, 0, chunk, lines, Q, T), T)
    tl.store(out + e, v, mask=e < 1 << Q)
