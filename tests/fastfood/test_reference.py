"""The generator "philox4x32-10.v1" and the reference: known answers, which an independent implementation gives too, and
statistical tests of the streams with fixed seeds.

Bounds of the statistical tests are a number of standard deviations of what truly random values give, stated with the
probability that those would pass the test.
"""

import hashlib
import itertools
import json
import math

import independent
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from helpers import assert_same_bits, sequence
from torch import Tensor

from hsaid_kernels.fastfood import reference
from hsaid_kernels.fastfood.plan import GENERATOR, Plan, stream_id
from hsaid_kernels.fastfood.projection import Projection
from hsaid_kernels.fastfood.reference import DIAGONAL, SIGNS

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = json.loads(independent.KNOWN_ANSWERS.read_text(encoding="utf-8"))
DIAGONALS = ("gaussian", "rademacher")


def digest(x: Tensor) -> str:
    return hashlib.blake2b(x.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def patterns(x: Tensor) -> list[str]:
    return [f"{bits & 0xFFFFFFFF:08x}" for bits in x.reshape(-1).view(torch.int32).tolist()]


def assert_known(x: Tensor, known: dict) -> None:
    """First and last values, then the digest over all of them."""
    show = patterns if x.dtype == torch.float32 else torch.Tensor.tolist
    assert show(x[: len(known["first"])]) == known["first"]
    assert show(x[-len(known["last"]) :]) == known["last"]
    assert digest(x) == known["digest"]


def assert_known_integers(x: Tensor, known: dict) -> None:
    assert x[:8].tolist() == known["first"] and x[-8:].tolist() == known["last"]
    assert digest(x) == known["digest"]


# --- known answers


def test_independent_implementation_agrees():
    """Everything in the file but Random123's own vectors is what the second implementation gives."""
    assert independent.pretty(independent.known_answers()) == independent.KNOWN_ANSWERS.read_text(encoding="utf-8")
    assert KNOWN["generator"] == GENERATOR


@pytest.mark.parametrize("known", KNOWN["philox4x32-10"])
def test_philox(known):
    key, counter, words = ([int(word, 16) for word in known[name].split()] for name in ("key", "counter", "words"))
    assert independent.philox4x32_10(key, counter) == tuple(words)
    assert [int(word) for word in reference.philox(key[0] | key[1] << 32, counter)] == words


@pytest.mark.parametrize("known", KNOWN["stream ids"])
def test_stream_ids(known):
    assert stream_id(known["name"], known.get("label", "")) % 2**64 == int(known["id"], 16)


def test_normals():
    assert patterns(reference.TABLE_A) == KNOWN["normal table A"]
    assert patterns(reference.TABLE_B) == KNOWN["normal table B"]
    halves = torch.tensor([int(half, 16) for half in KNOWN["normals"]])
    assert patterns(reference.normal(halves)) == list(KNOWN["normals"].values())
    assert digest(reference.normal(torch.arange(2**16))) == KNOWN["normals of all halves 0000 to ffff"]["digest"]


@pytest.mark.parametrize("known", KNOWN["streams"], ids=lambda known: f"n={known['n']}")
def test_streams(known):
    at, chunk, n = (int(known["seed"], 16), stream_id(known["stream"])), known["chunk"], known["n"]
    block, first = torch.tensor([known["block"]]), torch.zeros(1, dtype=torch.int64)
    assert_known(reference.gaussian(*at, block, chunk, n)[0], known["gaussian diagonal"])
    assert_known_integers(reference.rademacher(*at, DIAGONAL, block, chunk, n)[0], known["rademacher diagonal"])
    assert_known_integers(reference.rademacher(*at, SIGNS, first, chunk, n)[0], known["signs B (block 0)"])
    assert_known_integers(reference.permutation(*at, chunk, n).int(), known["permutation"])


@pytest.mark.parametrize(
    "known",
    KNOWN["plans"],
    ids=lambda known: f"{known['plan']['diagonal']}-{known['plan']['width']}-{known['plan'].get('chunks', 'all')}",
)
def test_forward_and_adjoint(known, backend):
    """A whole small projection, on every backend."""
    given = known["plan"]
    options = {"width": given["width"], "diagonal": given["diagonal"], "chunks": given.get("chunks", "all")}
    plan = Plan(given["shapes"], given["dim"], int(given["seed"], 16), **options)
    theta, lambdas = sequence(plan.dim), torch.tensor(list(given["lambda"].values()))
    if backend == "reference":
        for z in known["z"]:
            stream = reference.SHARED if plan.one_chunk else stream_id(z["tensor"])
            assert_known(reference._z(plan, stream, theta)[z["chunk"]], z)
    base = {name: sequence(math.prod(shape), 29, 97).view(shape) for name, shape in plan.shapes.items()}
    grads = {name: sequence(math.prod(shape), 31, 89).view(shape) for name, shape in plan.shapes.items()}
    assert patterns(lambdas * plan.scales) == [tensor["factor"] for tensor in known["forward"].values()]

    projection = Projection(plan, backend=backend)
    weights = projection.forward(theta, lambdas, base)
    for name, expected in known["forward"].items():
        assert_known(weights[name].flatten(), expected)
    dtheta, dlambdas = projection.adjoint(grads, theta, lambdas)
    assert_known(dtheta, known["adjoint"]["dtheta"])
    dfactors = torch.tensor([int(bits, 16) for bits in known["adjoint"]["dfactors"]]).int().view(torch.float32)
    assert_same_bits(dlambdas, dfactors * plan.scales)
    if backend != "reference":
        for dtype in (torch.bfloat16, torch.float16):
            weights = Projection(plan, backend=backend, dtype=dtype).forward(theta, lambdas, base)
            for name, expected in known["forward"].items():
                assert digest(weights[name]) == expected[f"{str(dtype).removeprefix('torch.')} digest"]


@pytest.mark.parametrize("q", range(5, 15))
def test_every_width(q):
    """Streams of every width against the independent implementation, at the far end of the counters."""
    n, seed, stream, block, chunk = 2**q, 2**64 - 59, 2**64 - 83, 2**28 - 7, 2**20 // 2**q - 1
    for got, expected in [
        (reference.gaussian(seed, stream, torch.tensor([block]), chunk, n)[0], independent.gaussian),
        (reference.rademacher(seed, stream, DIAGONAL, torch.tensor([block]), chunk, n)[0], diagonal_signs),
    ]:
        assert_same_bits(got, torch.from_numpy(expected(seed, stream, block, chunk, n)))
    expected = torch.from_numpy(independent.permutation(seed, stream, chunk, n).astype(np.int64))
    assert torch.equal(reference.permutation(seed, stream, chunk, n), expected)
    assert torch.equal(expected.sort().values, torch.arange(n))


def diagonal_signs(seed: int, stream: int, block: int, chunk: int, n: int) -> np.ndarray:
    return independent.signs(seed, stream, DIAGONAL, block, chunk, n)


@pytest.mark.parametrize("q", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("transpose", [False, True])
def test_walsh_hadamard(q, transpose):
    """In float64 the matrix H[i, j] = (-1)^popcount(i & j); the order of its stages shows in the known answers."""
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(2**q)] for i in range(2**q)], dtype=torch.float64)
    x = torch.randint(-9, 10, (3, 2**q)).double()
    assert torch.equal(reference.walsh_hadamard(x, transpose), x @ h)


def test_fold():
    """The upper half onto the lower: (1 + e) + (e + 0) rounds to 1 where (1 + 0) + (e + e) would not."""
    e = 2.0**-24
    assert reference.fold(torch.tensor([1.0, e, e, 0.0])).item() == 1
    assert reference.fold(torch.tensor([1.0, e, 0.0, e])).item() == 1 + 2 * e


# --- statistics of the streams

SEED, STREAM = 20240229, stream_id("statistics")


def blocks_of(kind: str, n: int, count: int, seed: int = SEED, stream: int = STREAM, chunk: int = 0) -> Tensor:
    """[count, n] values of the first blocks of a diagonal, or of the signs B of streams beginning at `stream`."""
    if kind == "gaussian":
        return reference.gaussian(seed, stream, torch.arange(count), chunk, n).double()
    if kind == "rademacher":
        return reference.rademacher(seed, stream, DIAGONAL, torch.arange(count), chunk, n).double()
    first = torch.zeros(1, dtype=torch.int64)
    return torch.cat([reference.rademacher(seed, stream + i, SIGNS, first, chunk, n) for i in range(count)]).double()


def test_normal_recipe_enumerated():
    g = reference.normal(torch.arange(2**16)).double()
    assert torch.equal(g, -g.flip(0)), "odd symmetric"
    assert g.sum() == 0
    assert abs((g**2).mean() - 1) < 1e-8
    assert abs((g**4).mean() - 2.9915) < 5e-5
    assert abs((g**6).mean() - 14.76) < 5e-3
    assert abs(g.max() - 3.757) < 5e-4
    values, counts = g.unique(return_counts=True)
    assert len(values) == 2**15 and bool((counts == 2).all())
    # The distance of two distributions is the largest at a step of the discrete one, on either side of it.
    above = torch.arange(1, 2**15 + 1).double() / 2**15
    cdf = torch.special.ndtr(values)
    assert torch.maximum((above - cdf).abs(), (above - 2**-15 - cdf).abs()).max() < 2.1e-4


def test_normals_are_normal():
    """10^6 of them; bounds of 4 standard deviations: all of 12 together pass with probability 0.999."""
    exact = reference.normal(torch.arange(2**16)).double()
    g = blocks_of("gaussian", 2**14, 62).flatten()
    assert len(g) > 1_000_000
    for power in (1, 2, 3, 4):
        deviation = (exact**power).std() / math.sqrt(len(g))
        assert abs((g**power).mean() - (exact**power).mean()) < 4 * deviation, power
    # The recipe's own distance, 2.05e-4, is small against 1.95 / sqrt(10^6), which is exceeded with probability 0.001.
    assert scipy.stats.kstest(g.numpy(), "norm").pvalue > 1e-3
    for tail in (1, 2, 3, 3.4):
        for side in (1, -1):
            p = float((side * exact > tail).double().mean())
            found = int((side * g > tail).sum())
            assert abs(found - p * len(g)) < 4 * math.sqrt(p * (1 - p) * len(g)), (tail, side)
    assert 3.5 < g.abs().max() <= exact.max()


@pytest.mark.parametrize("n", [64, 1024, 16384])
@pytest.mark.parametrize("kind", [*DIAGONALS, "B"])
def test_no_serial_correlation(kind, n):
    """Between positions up to 200 or a power of two apart, and between neighbouring blocks (streams, for B).

    Up to 2^19 products of mean 0 and variance 1: 220 sums stay below 5 standard deviations with probability 0.9998.
    """
    x = blocks_of(kind, n, min(2**19 // n, 512))
    bound = lambda products: 5 * math.sqrt(products.numel())  # noqa: E731
    assert abs(x.sum()) < bound(x)
    for lag in {*range(1, min(n, 200)), *(2**i for i in range(n.bit_length() - 1))}:
        products = x[:, lag:] * x[:, :-lag]
        assert abs(products.sum()) < bound(products), f"lag {lag}"
    for distance in (1, 2, 3, 4):
        products = x[distance:] * x[:-distance]
        assert abs(products.sum()) < bound(products), f"block distance {distance}"


@pytest.mark.parametrize("kind", ["rademacher", "B"])
def test_runs_of_signs(kind):
    """The number of runs of equal signs, and each length's, within 5 standard deviations (16 counts: 0.99999)."""
    x = blocks_of(kind, 16384, 32).flatten()
    ends = (x[1:] != x[:-1]).nonzero().flatten()
    assert abs(len(ends) - (len(x) - 1) / 2) < 5 * math.sqrt(len(x)) / 2
    lengths = ends.diff()
    for length in range(1, 16):
        p = 2.0**-length
        deviation = math.sqrt(p * (1 - p) * len(lengths))
        assert abs(int((lengths == length).sum()) - p * len(lengths)) < 5 * deviation, length


def test_bits_are_balanced():
    """Each of a call's 128 bits and each pair of neighbours, within 5 deviations over 2^16 calls (256 sums: 0.9998)."""
    words = reference.words(SEED, STREAM, DIAGONAL, torch.arange(32)[:, None], 0, torch.arange(2**11)).view(-1, 4)
    bits = (words[..., None] >> torch.arange(32) & 1).view(-1, 128) * 2.0 - 1
    for products in (bits, bits * bits.roll(1, 1)):
        assert products.sum(0).abs().max() < 5 * math.sqrt(len(bits))


@pytest.mark.parametrize("kind", [*DIAGONALS, "B"])
def test_streams_are_uncorrelated(kind):
    """Of other names, seeds (also by one bit) and chunks: 153 pairs of 18 streams below 5 deviations (0.9999)."""
    n, count = 4096, 16
    seeds = [SEED, SEED ^ 1, SEED ^ 2**31, SEED ^ 2**32, SEED ^ 2**63, 0, 2**64 - 1]
    streams = [stream_id("a"), stream_id("b"), stream_id("a", "a"), STREAM ^ 1 << 8, STREAM ^ 2**40]
    x = torch.stack(
        [blocks_of(kind, n, count, seed=seed) for seed in seeds]
        + [blocks_of(kind, n, count, stream=stream) for stream in streams]
        + [blocks_of(kind, n, count, chunk=chunk) for chunk in (1, 2, 3, 255, 256, 32767)]
    ).flatten(1)
    sums = x @ x.T
    sums.fill_diagonal_(0)
    assert sums.abs().max() < 5 * math.sqrt(n * count)


def test_purposes_are_uncorrelated():
    """A diagonal of signs, a diagonal of normals and the signs B of one stream use different calls."""
    x = torch.stack([blocks_of(kind, 16384, 1)[0] for kind in (*DIAGONALS, "B")])
    sums = x @ x.T
    sums.fill_diagonal_(0)
    assert sums.abs().max() < 5 * math.sqrt(16384)


# --- the permutation


@pytest.mark.parametrize("q", range(5, 15))
def test_permutations_are_permutations(q):
    for seed, chunk in itertools.product((0, 1, 2**64 - 1), (0, 1, 63)):
        pi = reference.permutation(seed, STREAM, chunk, 2**q)
        assert torch.equal(pi.sort().values, torch.arange(2**q)), (seed, chunk)


def linear_correlation(pi: Tensor, masks: Tensor) -> float:
    """max over all a and the masks b of |1/n sum_k (-1)^(a.k + b.pi(k))|."""
    n = len(pi)
    parity = masks[:, None] & pi  # [masks, n]
    for shift in (8, 4, 2, 1):
        parity = parity ^ parity >> shift
    h = torch.tensor(
        scipy.linalg.hadamard(math.isqrt(n)), dtype=torch.float32
    )  # that of order n is its Kronecker square
    signs = (1.0 - 2.0 * (parity & 1)).view(-1, *h.shape)
    return float((h @ signs @ h).abs().max()) / n


@pytest.mark.parametrize("q", [10, 14])
def test_linear_correlation_of_permutations(q):
    """At most 1.5 times that of uniformly random permutations: every single-bit b and 200 random ones, all a."""
    n = 2**q
    generator = torch.Generator().manual_seed(0)
    masks = torch.cat([2 ** torch.arange(q), torch.randint(1, n, (200,), generator=generator)])
    uniform = [linear_correlation(torch.randperm(n, generator=generator), masks) for _ in range(4)]
    for seed, name, chunk in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]:
        pi = reference.permutation(seed, stream_id(name), chunk, n)
        assert linear_correlation(pi, masks) < 1.5 * max(uniform), (seed, name, chunk)
    affine = (5 * torch.arange(n) + 3) % n
    assert linear_correlation(affine, masks) == 1, "the test sees what it is for"


def test_permutations_are_uncorrelated():
    """Of different seeds, names, chunks: the places where two agree are Poisson(1), above 10 with p = 1e-8 each."""
    n = 4096
    ways = [(seed, stream_id(name), chunk) for seed in (0, 1, 2**32) for name in "ab" for chunk in (0, 1, 256)]
    permutations = torch.stack([reference.permutation(*way, n) for way in ways])
    identity = torch.arange(n)
    for first, second in itertools.combinations([identity, *permutations], 2):
        assert int((first == second).sum()) <= 10
    # Neighbours go anywhere: a displacement between neighbours, cyclic, has mean n / 2 and deviation n / sqrt(12).
    steps = (permutations.roll(1, 1) - permutations) % n
    assert ((steps.double().mean(1) - n / 2).abs() < 5 * n / math.sqrt(12 * n)).all()
