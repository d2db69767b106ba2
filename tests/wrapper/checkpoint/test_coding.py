"""Arithmetic coding: there and back, as short as it says, and the same bytes for ever."""

import numpy as np
import pytest

from hsaid_kernels.wrapper.checkpoint.coding import Decoder, Encoder, coded_bits

pytest.importorskip("constriction")


def numbers(count, bits, seed=0):
    found = np.random.default_rng(seed).normal(2 ** (bits - 1), 2**bits / 7, count)
    return found.round().clip(0, 2**bits - 1).astype(np.int32)


def test_there_and_back():
    parts = [(numbers(count, bits), bits) for bits in (1, 2, 4, 5, 6, 8, 16) for count in (0, 1, 7, 1000)]
    encoder = Encoder()
    for part in parts:
        encoder.add(*part)
    data = encoder.finish()
    decoder = Decoder(data)
    for part, bits in parts:
        assert np.array_equal(decoder.take(len(part), bits), part)
    assert len(data) - sum(coded_bits(*part) for part in parts) / 8 < 8  # two words of the coder, at most


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_as_short_as_their_frequencies(bits):
    """But for what it costs that the frequencies are not known, at most log2(count) bits for each of 32 levels, and for
    what the values within a group of levels differ in frequency."""
    found = numbers(20_000, bits)
    shares = np.unique(found, return_counts=True)[1] / len(found)
    entropy = -(shares * np.log2(shares)).sum() * len(found)
    more = coded_bits(found, bits) - entropy
    assert 0 < more < 2 ** min(bits, 5) * np.log2(len(found)) + (0.01 * len(found) if bits > 5 else 0)


def test_the_same_bytes_for_ever():
    encoder = Encoder()
    encoder.add(np.array([0, 1, 2, 3, 3, 3, 2, 3, 1, 3, 3], np.int32), 2)
    encoder.add(np.array([255, 0, 7, 128], np.int32), 8)
    assert encoder.finish().hex() == "c9409819418e515b"
