"""What the ops of the Triton backend ask of their arguments. Raises RuntimeError, as the compiled libraries do."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hsaid_kernels.fastfood import plan
from hsaid_kernels.fastfood.triton import paley

INTERPRETED = bool(triton.knobs.runtime.interpret)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_device(tensor: Tensor, theta: Tensor, what: str) -> None:
    check(
        tensor.device == theta.device,
        f"{what}: expected a tensor on {theta.device}, where theta is, got one on {tensor.device}",
    )


def floats(tensor: Tensor, theta: Tensor, count: int, what: str) -> Tensor:
    check_device(tensor, theta, what)
    good = tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.numel() == count
    check(good, f"{what}: expected a float32 tensor of {count} values")
    return tensor.contiguous()


def check_place(tensor: Tensor, what: str) -> None:
    expected = "the CPU, where the interpreter runs" if INTERPRETED else "a GPU"
    good = (tensor.device.type == "cpu") == INTERPRETED
    check(good, f"{what}: expected a tensor on {expected}, got one on {tensor.device}")


def theta_of(theta: Tensor) -> Tensor:
    check_place(theta, "theta")
    dim = theta.numel()
    check(1 <= dim <= plan.MAX_DIM, f"theta: expected 1 to {plan.MAX_DIM} values, got {dim}")
    return floats(theta, theta, dim, "theta")


def width_bits(width: int) -> int:
    good = plan.MIN_WIDTH <= width <= plan.MAX_WIDTH and width & (width - 1) == 0
    check(good, f"width: expected a power of two from {plan.MIN_WIDTH} to {plan.MAX_WIDTH}, got {width}")
    return width.bit_length() - 1


def num_chunks(theta: Tensor, width: int) -> int:
    chunks = -(-theta.numel() // width)
    good = chunks <= plan.MAX_CHUNKS
    check(good, f"width: expected chunks of theta that are at most {plan.MAX_CHUNKS}, got {chunks}")
    return chunks


def check_listed(listed: Tensor, span: int, theta: Tensor, segments: Tensor, width: int) -> None:
    """Raises RuntimeError for a list that does not fit; looks at its values only in the interpreter, not on a GPU."""
    expected = plan.MAX_WIDTH // width
    check(span == expected, f"span: expected {expected}, a tile of {plan.MAX_WIDTH} values, got {span}")
    _, _, out_offset, rows, cols, row_stride, *_ = segments[0].tolist()
    dense = len(segments) == 1 and (rows == 1 or row_stride == cols) and out_offset == 0
    check(dense, "segments: expected one dense segment that begins at 0 with `listed`")
    check_device(listed, theta, "listed")
    good = listed.dtype == torch.int64 and listed.dim() == 1 and listed.is_contiguous()
    check(good, "listed: expected a contiguous int64 tensor [count]")
    entries = -(-rows * cols // plan.MAX_WIDTH)
    check(len(listed) <= entries, f"listed: expected at most {entries} entries of {span} blocks, got {len(listed)}")
    if INTERPRETED:
        rising = torch.equal(listed, listed.unique()) and bool(((listed >= 0) & (listed < entries)).all())
        check(rising, f"listed: expected rising numbers from 0 to {entries - 1}, got {listed.tolist()}")


def check_stream(purpose: int, block: int, chunk: int) -> None:
    check(0 <= purpose <= 2, f"purpose: expected 0, 1 or 2, got {purpose}")
    check(0 <= block < 1 << 28, f"block: expected 0 to 2**28 - 1, got {block}")
    check(0 <= chunk < 1 << 16, f"chunk: expected 0 to 65535, got {chunk}")


def check_order(order: int, x: Tensor) -> None:
    check(order in paley.ORDERS, f"order: expected 1, 12, 20 or 28, got {order}")
    check_place(x, "x")
    columns, rest = divmod(x.shape[-1], order)
    good = x.dtype == torch.float32 and rest == 0 and columns & (columns - 1) == 0
    got = f"{x.dtype} and {x.shape[-1]}"
    check(good, f"x: expected float32 and rows of {order} times a power of two with this order, got {got}")
