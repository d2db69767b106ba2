"""Arithmetic coding of level numbers, by the range coder of the package `constriction`.

The probability of a number is its share among those before it, so that no table of frequencies is stored. Before the
first, each counts as if it had been there half as often as it is from the outer end of its side: once for the two
outermost ones together, most often for those in the middle. The shares are those at the beginning of a block; blocks
grow with what has been coded. Of more than 32 levels, the shares are those of 32 equal groups; which level of a group
it is takes as many bits as there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

COARSE = 5  # bits of a number whose shares are counted


class Encoder:
    """Codes sequences of level numbers, one after another, into bytes."""

    def __init__(self) -> None:
        self._coder = _constriction().queue.RangeEncoder()

    def add(self, numbers: np.ndarray, bits: int) -> None:
        """Appends numbers, int32, from 0 to 2**bits - 1."""
        model, fine = _constriction().model, max(0, bits - COARSE)
        coarse = numbers >> fine
        for start, stop, shares in _blocks(coarse, min(bits, COARSE)):
            self._coder.encode(coarse[start:stop], model.Categorical(shares, perfect=False))
        if fine:
            self._coder.encode(numbers & (2**fine - 1), model.Uniform(2**fine))

    def finish(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Decoder:
    """The inverse of `Encoder`: gives the sequences back, if asked for the same lengths and bits in the same order."""

    def __init__(self, data: bytes) -> None:
        data += bytes(-len(data) % 4)
        self._coder = _constriction().queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def take(self, count: int, bits: int) -> np.ndarray:
        """The next numbers, int32 [count], from 0 to 2**bits - 1."""
        model, fine = _constriction().model, max(0, bits - COARSE)
        coarse = np.zeros(count, np.int32)
        for start, stop, shares in _blocks(coarse, min(bits, COARSE)):
            coarse[start:stop] = self._coder.decode(model.Categorical(shares, perfect=False), stop - start)
        if fine:
            return (coarse << fine) | self._coder.decode(model.Uniform(2**fine), count)
        return coarse


def coded_bits(numbers: np.ndarray, bits: int) -> float:
    """The number of bits that numbers take: the sum of -log2 of their probabilities, without a coder's rounding."""
    coarse = numbers >> max(0, bits - COARSE)
    blocks = _blocks(coarse, min(bits, COARSE))
    found = sum(-np.log2(shares[coarse[start:stop]]).sum() for start, stop, shares in blocks)
    return float(found) + len(numbers) * max(0, bits - COARSE)


def _blocks(numbers: np.ndarray, bits: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, probabilities float64 [2**bits]) of each block; `numbers` is read after its block was yielded."""
    places = np.arange(2**bits)
    twice = np.minimum(places + 1, 2**bits - places).astype(np.float64)  # the number of times, doubled
    start = 0
    while start < len(numbers):
        stop = min(len(numbers), start + 1 + start // 8)
        yield start, stop, twice / twice.sum()
        twice += 2 * np.bincount(numbers[start:stop], minlength=2**bits)
        start = stop


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError("packed checkpoints need the package constriction: pip install constriction") from error
    return constriction.stream
