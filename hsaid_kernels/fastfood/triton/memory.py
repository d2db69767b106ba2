"""Loads and stores of tensor values by address, because a kernel for all tensors at once cannot take them as arguments.

A launch takes a table with one word for each tensor: address << 3 | dtype << 1 | 1, or `MISSING`. Triton specializes
kernels on the values of integer arguments. All words are odd and longer than 32 bits, so a single compiled kernel
serves them all.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DTYPE = operator.attrgetter("dtype")
WORDS = 256  # of a launch of write_words
MISSING = 1 << 62 | 1  # the word of a missing tensor: no tensor has this address
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Table(NamedTuple):
    words: Tensor  # int64 on the device
    codes: int  # a bit for the code of each dtype among the tensors
    kept: list[Tensor]  # what must live until the launches are queued


@triton.jit
def write_words(table, words):
    for i in tl.static_range(len(words)):
        tl.store(table + i, words[i])


def _ordinary(
    tensors: Sequence[Tensor | None], needed: Sequence[int], index: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(addresses, codes) of the tensors if all are there, dense and large enough, else None.

    This runs for every tensor of a model in every step, so it asks little, one question for all tensors at a time.
    """
    try:
        addresses = tuple(map(Tensor.data_ptr, tensors))
        dense = all(map(Tensor.is_contiguous, tensors)) and all(map(operator.ge, map(Tensor.numel, tensors), needed))
        if dense and set(map(Tensor.get_device, tensors)) <= {index}:
            return addresses, tuple(map(CODES.__getitem__, map(_DTYPE, tensors)))
    except (TypeError, AttributeError, KeyError):  # a missing tensor, another dtype
        pass
    return None


def _any(
    tensors: Sequence[Tensor | None], needed: Sequence[int], device: torch.device, index: int, what: str
) -> tuple[tuple[int | None, ...], tuple[int, ...], list[Tensor]]:
    """(addresses, codes, row-major copies of those that are not dense); addresses of missing tensors are None."""
    found: list[tuple[int | None, int]] = []
    kept = []
    for number, (tensor, count) in enumerate(zip(tensors, needed)):
        if tensor is None:
            found.append((None, 0))
            continue
        if tensor.get_device() != index:
            got = tensor.device
            raise RuntimeError(f"{what}: expected a tensor on {device}, where theta is, got one on {got}")
        code = CODES.get(tensor.dtype)
        if code is None:
            raise RuntimeError(f"{what}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.numel() < count:
            has = f"tensor {number} has {tensor.numel()} elements"
            raise RuntimeError(f"{what}: {has}, the plan needs {count}")
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            kept.append(tensor)
        found.append((tensor.data_ptr(), code))
    return tuple(address for address, _ in found), tuple(code for _, code in found), kept


@functools.lru_cache(maxsize=64)  # W0 has the addresses of the step before, and gradients often do
def _words_of(addresses: tuple[int | None, ...], codes: tuple[int, ...]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(a bit for the code of each dtype, the words in launches of WORDS)."""
    words, bits = [], 0
    for address, code in zip(addresses, codes):
        if address is None:
            words.append(MISSING)
            continue
        bits |= 1 << code
        words.append((address - (1 << 64 if address >= 1 << 63 else 0)) << 3 | code << 1 | 1)  # as a signed number
    words += [MISSING] * (-len(words) % WORDS or WORDS * (not words))
    return bits, tuple(tuple(words[i : i + WORDS]) for i in range(0, len(words), WORDS))


def table_of(tensors: Sequence[Tensor | None], needed: Sequence[int], device: torch.device, what: str) -> Table:
    """The table of the tensors, each of at least as many elements as `needed` says; if one is not dense, of a copy.

    The words travel as kernel parameters. This needs no copy for which the host would have to wait, and a CUDA graph
    can capture it.

    Raises RuntimeError if a tensor is on another device, of another dtype than the three, or has too few elements.
    """
    index = -1 if device.type == "cpu" else device.index
    tensors = tensors[: len(needed)]
    found = _ordinary(tensors, needed, index)
    addresses, codes, kept = (*found, []) if found else _any(tensors, needed, device, index, what)
    bits, launches = _words_of(addresses, codes)
    table = torch.empty(len(launches) * WORDS, dtype=torch.int64, device=device)
    for i, words in enumerate(launches):
        write_words[(1,)](table[i * WORDS :] if i else table, words, num_warps=1, enable_fp_fusion=False)
    return Table(table, bits, kept)


@triton.jit
def tensor_at(table, number, offset):
    """(address of element `offset`, dtype's code) of a tensor; address 0 if it is missing or its number is -1."""
    word = tl.load(table + number, mask=number >= 0, other=(1 << 62) + 1)
    code = (word >> 1).to(tl.int32) & 3
    size = tl.where(code == 0, 4, 2)
    return tl.where(word == (1 << 62) + 1, 0, (word >> 3) + offset * size), code


@triton.jit
def widened(x, CODE: tl.constexpr):
    """Values as they are in memory, bfloat16 as 16-bit integers, to float32."""
    if CODE == 1:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, CODE: tl.constexpr):
    """The inverse of `widened`: float32, rounded to nearest even, to values as they are in memory."""
    if CODE == 0:
        return x
    elif CODE == 2:
        return x.to(tl.float16)
    elif INTERPRETED:  # the interpreter's own cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)
        return (rounded >> 16).to(tl.int16)
    else:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def pointer(address, first, CODE: tl.constexpr):
    """A pointer to element `first` of a tensor of the dtype with this code."""
    SIZE: tl.constexpr = 4 if CODE == 0 else 2
    TYPE: tl.constexpr = tl.float32 if CODE == 0 else tl.int16 if CODE == 1 else tl.float16
    return (address + first * SIZE).to(tl.pointer_type(TYPE))


@triton.jit
def prefetch(address, bytes, MOST: tl.constexpr):
    """Prefetches `bytes` bytes, a power of two and at most MOST, into the second-level cache of an NVIDIA GPU."""
    lines = address + (tl.arange(0, MOST // 128) * 128 & (bytes - 1))
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], tl.int32, False, 1)


@triton.jit
def load_as(address, first, offsets, mask, CODE: tl.constexpr, FOURS: tl.constexpr):
    FOUR: tl.constexpr = 16 if CODE == 0 else 8  # bytes
    p = pointer(address, first, CODE) + offsets
    if FOURS == 1:
        x = tl.load(tl.max_contiguous(tl.multiple_of(p, FOUR), 4), eviction_policy="evict_first")
    elif FOURS == 2:
        x = tl.load(tl.max_contiguous(tl.multiple_of(p, [FOUR // 4, FOUR]), [1, 4]), eviction_policy="evict_first")
    else:
        x = tl.load(p, mask=mask, other=0, eviction_policy="evict_first")
    return widened(x, CODE)


@triton.jit
def load_floats(address, code, first, offsets, mask, CODES: tl.constexpr, FOURS: tl.constexpr):
    """Elements first + offsets as float32, 0 where `mask` is not set.

    FOURS is the rank of `offsets` if values can be read in fours, else 0. In fours, all must be inside, consecutive in
    the last dimension, and begin at a multiple of 16 bytes. CODES has a bit for each dtype that `code` may be; any
    other code is that of a missing tensor.
    """
    if CODES == 1:
        x = load_as(address, first, offsets, mask, 0, FOURS)
    elif CODES == 2:
        x = load_as(address, first, offsets, mask, 1, FOURS)
    elif CODES == 4:
        x = load_as(address, first, offsets, mask, 2, FOURS)
    else:
        if code == 0:
            x = load_as(address, first, offsets, mask, 0, FOURS)
        elif code == 1:
            x = load_as(address, first, offsets, mask, 1, FOURS)
        else:
            x = load_as(address, first, offsets, mask, 2, FOURS)
    return x


@triton.jit
def store_floats(address, first, offsets, x, mask, CODE: tl.constexpr, FOURS: tl.constexpr):
    """Writes x to elements first + offsets where `mask` is set. FOURS is 0 or 1, as in load_floats."""
    FOUR: tl.constexpr = 16 if CODE == 0 else 8  # bytes
    p = pointer(address, first, CODE) + offsets
    if FOURS == 1:
        tl.store(tl.max_contiguous(tl.multiple_of(p, FOUR), 4), narrowed(x, CODE), cache_modifier=".cs")
    else:
        tl.store(p, narrowed(x, CODE), mask=mask)


@triton.jit
def listed_at(listed, place, SPAN: tl.constexpr):
    """The number of the tile or block at a place. An entry of `listed` is for SPAN places; if None, it is the place."""
    if listed is None:
        return place
    else:
        return tl.load(listed + place // SPAN).to(tl.int32) * SPAN + place % SPAN


@triton.jit
def element(e, cols, row_stride):
    """Offset of a piece's e-th element in row-major order. A dense piece has cols 0; others have < 2^32 elements."""
    if cols == 0:
        offset = e
    else:  # a 64-bit division would be a call
        row = e.to(tl.uint32) // cols.to(tl.uint32)
        offset = row.to(tl.int64) * row_stride + (e - row.to(tl.int64) * cols)
    return offset
