"""The fused CPU kernels: the reference's bits for every width, chunk count, dtype, stride and segment, from every
instruction set and any number of threads; nothing written that is not theirs; errors and memory within bounds."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from helpers import ISAS, assert_same_bits, poison, relative_error, sequence, threads
from torch import Tensor

from hsaid_kernels import available_backends, hadamard_transform
from hsaid_kernels.fastfood import ops, reference
from hsaid_kernels.fastfood.plan import MAX_DIM, Plan, Segment, stream_id, whole
from hsaid_kernels.fastfood.projection import Projection

pytestmark = [
    pytest.mark.skipif(not ISAS, reason=f"cpu: {available_backends()['cpu']}"),
    pytest.mark.usefixtures("one_thread"),
]
DIAGONALS = ("gaussian", "rademacher")
HALVES = (torch.bfloat16, torch.float16)
# dtype of the weights, of the base (None: no base)
DTYPES = [(torch.float32, None), (torch.float32, torch.float32)]
DTYPES += [(half, base) for half in HALVES for base in (None, half, torch.float32)]


def forward(plan: Plan, theta: Tensor, factors: Tensor, base: list, dtype: torch.dtype = torch.float32) -> Tensor:
    """The kernels' flat buffer, in memory that held NaN."""
    poison(plan.numel, dtype)
    return ops.fastfood_forward(plan, theta, factors, base, dtype, "cpu")


def adjoint(plan: Plan, theta: Tensor, factors: Tensor, grads: list) -> tuple[Tensor, Tensor]:
    poison(plan.dim)
    return ops.fastfood_adjoint(plan, theta, factors, grads, "cpu")


def assert_same_adjoint(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str = "") -> None:
    for name, mine, theirs in zip(("dtheta", "dfactors"), got, expected, strict=True):
        assert_same_bits(mine, theirs, f"{what} {name}")


def values(shape: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
    return sequence(math.prod(shape), 29, 97).view(shape).to(dtype)


def inputs(plan: Plan) -> tuple[Tensor, Tensor]:
    """(theta, factors)"""
    return sequence(plan.dim), plan.scales * torch.linspace(-2, 3, len(plan.pieces))


# --- every width, chunk count and dtype


@functools.cache
def example(width: int, chunks: int | str, diagonal: str) -> Plan:
    """Whole blocks, a ragged last block, less than a block; theta short of whole chunks."""
    shapes = {"whole": (2, width), "ragged": (width + width // 2 + 3,), "tiny": (5,)}
    one = chunks == "one"
    dim = (3 if one else chunks) * width - 3
    return Plan(shapes, dim, 2**64 - 1, width=width, diagonal=diagonal, chunks="one" if one else "all")


@functools.cache
def expected_forward(
    width: int, chunks: int | str, diagonal: str, dtype: torch.dtype, base: torch.dtype | None
) -> Tensor:
    plan = example(width, chunks, diagonal)
    bases = [values(shape, base) for shape in plan.shapes.values()] if base else []
    return reference.forward(plan, *inputs(plan), bases, dtype)


@functools.cache
def expected_adjoint(width: int, chunks: int | str, diagonal: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    plan = example(width, chunks, diagonal)
    return reference.adjoint(plan, *inputs(plan), [values(shape, dtype) for shape in plan.shapes.values()])


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("chunks", [1, 3, "one"])
@pytest.mark.parametrize("q", range(5, 15))
def test_every_width(q, chunks, diagonal, isa):
    width, plan = 2**q, example(2**q, chunks, diagonal)
    for dtype, base in DTYPES:
        bases = [values(shape, base) for shape in plan.shapes.values()] if base else []
        got = forward(plan, *inputs(plan), bases, dtype)
        assert_same_bits(got, expected_forward(width, chunks, diagonal, dtype, base), f"{dtype} on {base}")
    for dtype in (torch.float32, *HALVES):
        got = adjoint(plan, *inputs(plan), [values(shape, dtype) for shape in plan.shapes.values()])
        assert_same_adjoint(got, expected_adjoint(width, chunks, diagonal, dtype), str(dtype))


@functools.cache
def longest_theta() -> tuple:
    """(plan, flat, (dtheta, dfactors)) of the reference."""
    plan = Plan({"w": (100, 7)}, 2**20, 3, chunks="all")
    gradients = reference.adjoint(plan, *inputs(plan), [values((100, 7))])
    return plan, reference.forward(plan, *inputs(plan), []), gradients


def test_longest_theta(isa):
    """64 chunks on a small tensor."""
    plan, flat, gradients = longest_theta()
    assert_same_bits(forward(plan, *inputs(plan), []), flat)
    assert_same_adjoint(adjoint(plan, *inputs(plan), [values((100, 7))]), gradients)


@pytest.mark.parametrize("dim", [1, 2, 31, 33, 16385])
def test_short_and_odd_theta(dim, isa):
    plan = Plan({"a": (70,), "scalar": ()}, dim, 1, chunks="all")
    theta, factors = inputs(plan)
    grads = [values((70,)), values(())]
    assert_same_bits(forward(plan, theta, factors, []), reference.forward(plan, theta, factors, []))
    assert_same_adjoint(adjoint(plan, theta, factors, grads), reference.adjoint(plan, theta, factors, grads))


# --- one chunk a block


def one_chunk_example(count: int, width: int = 1024) -> tuple[Plan, list]:
    """A plan of `count` chunks with several groups of blocks, runs of several blocks, and gradients of every kind."""
    shapes = {"a": (117, width), "none": (3, width), "strided": (130, 90), "b": (2, width), "half": (9, width + 3)}
    plan = Plan(shapes, count * width - 9, 11, width=width, chunks="one")
    grads = [values(shape, torch.bfloat16 if name == "half" else torch.float32) for name, shape in shapes.items()]
    grads[1], grads[2] = None, values((90, 130)).T
    return plan, grads


@pytest.mark.parametrize("run_blocks, count", [(1, 2), (3, 2), (2, 5), (1, 40)])
def test_one_chunk_a_block_sums_over_blocks_of_all_segments(run_blocks, count, isa):
    plan, grads = one_chunk_example(count)
    plan.run_blocks = run_blocks
    expected = reference.adjoint(plan, *inputs(plan), grads)
    assert_same_adjoint(adjoint(plan, *inputs(plan), grads), expected)
    with threads(3):
        assert_same_adjoint(adjoint(plan, *inputs(plan), grads), expected, "three threads")
        flat = forward(plan, *inputs(plan), [])
    assert_same_bits(flat, reference.forward(plan, *inputs(plan), []), "three threads")


def test_sixteen_million_values():
    """d = 2^24 in 65,536 chunks, the most that the generator can number; a plan of some of the tensors."""
    width = 256
    plan = Plan({"a": (3, width)}, MAX_DIM, 5, width=width, part=True)
    assert plan.one_chunk and plan.chunks == MAX_DIM // width and plan.chunks_reached() == 3
    theta, grads = sequence(plan.dim), [values((3, width))]
    assert_same_bits(forward(plan, theta, plan.scales, []), reference_of_few_blocks(plan, theta))
    dtheta, _ = adjoint(plan, theta, plan.scales, grads)
    reached = dtheta.view(-1, width).count_nonzero(1).nonzero().flatten()
    assert sorted((plan.first_chunk(plan.pieces[0]) + b) % plan.chunks for b in range(3)) == reached.tolist()
    moved = torch.dot(forward(plan, theta, plan.scales, [])[: 3 * width].double(), grads[0].flatten().double())
    assert torch.dot(dtheta.double(), theta.double()).item() == pytest.approx(moved.item(), rel=1e-4)


def reference_of_few_blocks(plan: Plan, theta: Tensor) -> Tensor:
    """The weights of a plan with one tensor of few blocks, without z of the chunks that these do not use."""
    flat = torch.zeros(plan.numel)
    for block in range(plan.blocks(plan.pieces[0])):
        chunk = (plan.first_chunk(plan.pieces[0]) + block) % plan.chunks
        signs = reference.rademacher(
            plan.seed, 0, reference.SIGNS, torch.zeros(1, dtype=torch.int64), chunk, plan.width
        )
        z = reference.walsh_hadamard(signs[0] * theta.view(-1, plan.width)[chunk])
        z = z[reference.permutation(plan.seed, 0, chunk, plan.width)]
        g = reference.gaussian(plan.seed, stream_id("a"), torch.tensor([block]), chunk, plan.width)[0]
        flat[block * plan.width :][: plan.width] = plan.scales[0] * reference.walsh_hadamard(g * z)
    return flat


# --- the flat buffer


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gaps_are_zero(dtype, isa):
    """What lies between the tensors, up to the next multiple of 64 elements and at the end."""
    plan = Plan({name: (numel,) for name, numel in [("a", 1), ("b", 63), ("c", 64), ("d", 65), ("e", 200)]}, 40)
    flat = forward(plan, *inputs(plan), [], dtype)
    assert flat.shape == (plan.numel,) == (1 * 64 + 1 * 64 + 1 * 64 + 2 * 64 + 4 * 64,)
    gaps = torch.ones(plan.numel, dtype=torch.bool)
    for view in plan.views(gaps):
        view.fill_(False)
    assert int(gaps.sum()) == 63 + 1 + 0 + 63 + 56
    assert not flat[gaps].any() and flat[~gaps].isfinite().all()


def test_no_negative_zeros_without_a_base(isa):
    """A missing W0 counts as +0."""
    plan = Plan({"a": (600,), "b": (3,)}, 200)
    flat = forward(plan, torch.zeros(200), -plan.scales, [])
    assert_same_bits(flat, torch.zeros(plan.numel))
    assert_same_bits(flat, reference.forward(plan, torch.zeros(200), -plan.scales, []))


def test_inputs_are_left_as_they_are(isa):
    plan = Plan({"a": (40, 128), "c": (3, 7)}, 200)
    theta, factors = inputs(plan)
    tensors = [theta, factors, values((40, 128)), values((3, 7)), plan.segments, plan.scales]
    before = [t.clone() for t in tensors]
    forward(plan, theta, factors, tensors[2:4])
    adjoint(plan, theta, factors, tensors[2:4])
    assert all(torch.equal(t, was) for t, was in zip(tensors, before, strict=True))


# --- large outputs, which are stored past the caches and come from a pool

LARGE = {"a": (2000, 4300), "b": (777,)}  # over 16 MB in 16 bits too


@functools.cache
def large_weights() -> Tensor:
    plan = Plan(LARGE, 1000, diagonal="rademacher")
    return reference.forward(plan, *inputs(plan), [])


def test_large_output(isa):
    plan = Plan(LARGE, 1000, diagonal="rademacher")
    for dtype in (torch.float32, *HALVES):
        flat = ops.fastfood_forward(plan, *inputs(plan), [], dtype, "cpu")
        assert flat.nbytes > 2**24
        assert_same_bits(flat, large_weights().to(dtype), str(dtype))
        flat.fill_(torch.nan)  # the pool hands it out again
        del flat
        assert_same_bits(ops.fastfood_forward(plan, *inputs(plan), [], dtype, "cpu"), large_weights().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_any_place_of_the_base_within_a_page(dtype, isa):
    """Where loads of W0 would meet stores of W, lines go out in another order: at some places, in blocks longer than a
    page."""
    for width in (1024, 2048, 4096, 16384):
        plan = Plan({"a": (2 * width + 64,)}, 100, width=width, diagonal="rademacher")
        base = values((plan.numel,), dtype)
        expected = reference.forward(plan, *inputs(plan), [base], dtype)
        room = torch.empty(plan.numel + 4096, dtype=dtype)
        for place in range(0, 4096, 36):
            moved = room[place // room.element_size() :][: plan.numel].copy_(base)
            assert_same_bits(forward(plan, *inputs(plan), [moved], dtype), expected, f"n = {width}, place {place}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_place_of_the_base_of_a_large_output(dtype, isa):
    plan = Plan({"a": (2100, 4096)}, 100, width=8192, diagonal="rademacher")
    room = torch.empty(plan.numel + 4096, dtype=dtype)
    results = {}
    for place in (2048, 0, 64, 4032, 4064):  # W begins on a page
        first = (place - room.data_ptr()) % 4096 // room.element_size()
        moved = room[first : first + plan.numel].copy_(values((plan.numel,), dtype)).view(2100, 4096)
        results[place] = ops.fastfood_forward(plan, *inputs(plan), [moved], dtype, "cpu")
        assert results[place].nbytes > 2**24 and results[place].data_ptr() % 4096 == 0
        assert_same_bits(results[place], results[2048], f"place {place}")


def test_live_large_outputs_never_share_memory():
    plan = Plan(LARGE, 1000, diagonal="rademacher")
    theta, factors = inputs(plan)
    live = []
    for i in range(4):
        live.append(ops.fastfood_forward(plan, theta * 2**i, factors, [], torch.float32, "cpu"))
    starts = sorted(t.data_ptr() for t in live)
    assert all(after - before >= live[0].nbytes for before, after in zip(starts, starts[1:], strict=False))
    view = plan.views(live[1])[0]  # keeps its buffer
    for i in (3, 1, 0):
        del live[i]
    live.append(ops.fastfood_forward(plan, theta, factors, [], torch.float32, "cpu"))
    live.append(ops.fastfood_forward(plan, theta, factors, [], torch.float32, "cpu"))
    expected = large_weights()
    assert_same_bits(view, 2 * plan.views(expected)[0])
    for flat, factor in zip(live, (4, 1, 1), strict=True):
        assert_same_bits(flat, factor * expected)


# --- segments


def bands() -> Plan:
    """Bands of columns (heads) of one tensor, of rows of another, and a whole one."""
    heads = [Segment("w", 32 * h, 24, 32, 96, f"head {h}") for h in range(3)]
    rows = [Segment("v", 0, 1, 20 * 40, 20 * 40, "top"), Segment("v", 20 * 40, 30, 40, 40, "bottom")]
    return Plan({"w": (24, 96), "v": (50, 40), "o": (7,)}, 100, 5, segments=[*heads, *rows, whole("o", (7,))])


@pytest.mark.parametrize("dtype, base", DTYPES)
def test_segments(dtype, base, isa):
    plan = bands()
    theta, factors = inputs(plan)
    bases = [values(shape, base) for shape in plan.shapes.values()] if base else []
    grads = [values(shape, dtype) for shape in plan.shapes.values()]
    expected = reference.forward(plan, theta, factors, bases, dtype)
    assert_same_bits(forward(plan, theta, factors, bases, dtype), expected)
    strided = [b.T.contiguous().T if b.dim() == 2 else b for b in bases]
    assert_same_bits(forward(plan, theta, factors, strided, dtype), expected)
    expected = reference.adjoint(plan, theta, factors, grads)
    assert_same_adjoint(adjoint(plan, theta, factors, grads), expected)
    strided = [g.T.contiguous().T if g.dim() == 2 else g for g in grads]
    assert_same_adjoint(adjoint(plan, theta, factors, strided), expected)


def test_a_segment_is_a_tensor_of_its_own(backend):
    """A band has the values of a tensor with its stream id, wherever it lies."""
    plan = bands()
    theta, factors = inputs(plan)
    shapes = {f"w\0head {h}": (24, 32) for h in range(3)} | {"v\0top": (20, 40), "v\0bottom": (30, 40), "o": (7,)}
    assert [stream_id(name) for name in shapes] == [stream_id(p.tensor, p.label) for p in plan.pieces]
    alone = Plan(shapes, 100, 5)

    def made(plan: Plan) -> dict[str, Tensor]:
        flat = ops.fastfood_forward(plan, theta, factors, [], torch.float32, backend)
        return dict(zip(plan.names, plan.views(flat), strict=True))

    weights, pieces = made(plan), made(alone)
    w = torch.cat([pieces[f"w\0head {h}"] for h in range(3)], 1)
    assert_same_bits(weights["w"], w)
    assert_same_bits(weights["v"], torch.cat([pieces["v\0top"], pieces["v\0bottom"]]))
    assert_same_bits(weights["o"], pieces["o"])


def test_segments_move_a_tensor_as_far_as_the_whole(backend):
    """The scale is the tensor's: with signs, ||P theta|| = ||theta|| over its whole blocks, in segments or in one."""
    shapes, theta = {"w": (64, 96)}, torch.randn(64)
    heads = [Segment("w", 32 * h, 64, 32, 96, f"head {h}") for h in range(3)]

    def moved(segments: list[Segment] | None) -> Tensor:
        plan = Plan(shapes, 64, diagonal="rademacher", segments=segments)
        return Projection(plan, backend=backend).forward(theta)["w"]

    torch.testing.assert_close(moved(None).norm(), theta.norm())
    torch.testing.assert_close(moved(heads).norm(), theta.norm())
    assert_same_bits(moved(heads[1:])[:, 32:], moved(heads)[:, 32:], "with the first left out")


@pytest.mark.parametrize("dtype, base", DTYPES)
def test_elements_of_no_segment_are_the_base(dtype, base, isa):
    shapes, head = {"v": (3,), "w": (24, 96), "o": (7,)}, Segment("w", 32, 24, 32, 96, "head 1")
    plan = Plan(shapes, 100, 5, segments=[head, whole("o", (7,))])
    bases = [values(shape, base) for shape in shapes.values()] if base else []
    expected = reference.forward(plan, *inputs(plan), bases, dtype)
    assert_same_bits(forward(plan, *inputs(plan), bases, dtype), expected)
    strided = [torch.stack([b, b], -1)[..., 0] for b in bases]
    assert_same_bits(forward(plan, *inputs(plan), strided, dtype), expected)
    untouched = torch.ones(24, 96, dtype=torch.bool)
    untouched[:, 32:64] = False
    _, w, _ = plan.views(expected)
    assert torch.equal(w[untouched], bases[1][untouched].to(dtype) if base else torch.zeros(24 * 64, dtype=dtype))


def test_segments_in_any_order(isa):
    heads = [Segment("w", 50 * h, 10, 50, 100, f"head {h}") for h in (1, 0)]
    plan = Plan({"w": (10, 100), "o": (7,)}, 100, 5, segments=[whole("o", (7,)), *heads])
    assert_same_bits(forward(plan, *inputs(plan), []), reference.forward(plan, *inputs(plan), []))


# --- strides, missing and odd values


def strided(shape: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors [rows, cols] of all kinds of strides."""
    rows, cols = shape
    return {
        "transposed": values((cols, rows), dtype).T,
        "sliced": values((rows, 2 * cols + 1), dtype)[:, 1::2],
        "offset": values((rows + 2, cols + 5), dtype)[2:, 5:],
        "expanded rows": values((1, cols), dtype).expand(rows, cols),
        "expanded columns": values((rows, 1), dtype).expand(rows, cols),
        "one value": values((1,), dtype).expand(rows, cols),
        "overlapping": values((rows + cols - 1,), dtype).unfold(0, cols, 1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_strided_bases_and_gradients(dtype, isa):
    """As their contiguous copies; whole blocks and a ragged one."""
    plan = Plan({"m": (9, 75)}, 100, 5)
    theta, factors = inputs(plan)
    for name, tensor in strided((9, 75), dtype).items():
        dense = tensor.contiguous()
        got = forward(plan, theta, factors, [tensor], dtype)
        assert_same_bits(got, forward(plan, theta, factors, [dense], dtype), name)
        got = adjoint(plan, theta, factors, [tensor])
        assert_same_adjoint(got, adjoint(plan, theta, factors, [dense]), name)
        assert_same_adjoint(got, reference.adjoint(plan, theta, factors, [tensor]), name)


def test_strided_tensors_of_other_dimensions(isa):
    plan = Plan({"cube": (3, 5, 7), "vector": (100,), "scalar": ()}, 40)
    theta, factors = inputs(plan)
    tensors = [values((7, 3, 5)).permute(1, 2, 0), values((200,))[::2], values((3,))[2]]
    dense = [t.contiguous() for t in tensors]
    assert_same_bits(forward(plan, theta, factors, tensors), reference.forward(plan, theta, factors, dense))
    assert_same_adjoint(adjoint(plan, theta, factors, tensors), reference.adjoint(plan, theta, factors, dense))


def test_strided_theta_and_factors(isa):
    plan = Plan({"a": (300,), "b": (5,)}, 100)
    theta, factors = sequence(200)[::2], torch.ones(1).expand(2)
    dense = theta.contiguous(), factors.contiguous()
    assert_same_bits(forward(plan, theta, factors, []), forward(plan, *dense, []))
    grads = [values((300,)), values((5,))]
    assert_same_adjoint(adjoint(plan, theta, factors, grads), adjoint(plan, *dense, grads))


def test_missing_gradients_are_zeros(isa):
    plan = Plan({"a": (40, 128), "b": (768,), "c": (3, 7)}, 200)
    theta, factors = inputs(plan)
    grads = [values((40, 128)), None, values((3, 7))]
    dtheta, dfactors = adjoint(plan, theta, factors, grads)
    zeros = adjoint(plan, theta, factors, [grads[0], torch.zeros(768), grads[2]])
    assert torch.equal(dtheta, zeros[0]) and torch.equal(dfactors, zeros[1]) and dfactors[1] == 0
    assert_same_adjoint((dtheta, dfactors), reference.adjoint(plan, theta, factors, grads))
    for nothing in adjoint(plan, theta, factors, [None] * 3):
        assert not nothing.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_nan_and_inf(diagonal, value, backend):
    """They come out as NaN or infinite, where they have to and nowhere else."""
    p = Projection.from_shapes({"a": (600,), "b": (10,)}, 200, diagonal=diagonal, backend=backend)
    theta = sequence(200)
    grads = {"a": values((600,)), "b": values((10,))}
    grads["a"][599] = value
    dtheta, dfactors = p.adjoint(grads, theta)
    assert not dtheta.isfinite().any() and not dfactors[0].isfinite() and dfactors[1].isfinite()
    base = {"a": values((600,)), "b": values((10,))}
    base["a"][300] = value
    weights = p.forward(theta, None, base)
    assert weights["a"].isfinite().logical_not().nonzero().tolist() == [[300]] and weights["b"].isfinite().all()
    lambdas = torch.tensor([1.0, value])
    weights = p.forward(theta, lambdas)
    assert weights["a"].isfinite().all() and not weights["b"].isfinite().any()
    theta[150] = value
    assert not any(w.isfinite().any() for w in p.forward(theta).values())


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_subnormals_are_kept(diagonal, isa):
    """By the forward, also where the process has switched them off: values of about 1e-40 all the way."""
    plan = Plan({"a": (3000,), "b": (10,)}, 200, diagonal=diagonal)
    theta, factors = inputs(plan)
    tiny, halves = theta * 1e-38, [values(shape, torch.float16) * 2**-14 for shape in plan.shapes.values()]
    flat = forward(plan, tiny, factors, [])
    assert 0 < flat[:3000].abs().max() < torch.finfo(torch.float32).smallest_normal
    rounded = forward(plan, tiny, factors, halves, torch.float16)
    assert torch.set_flush_denormal(True)
    try:
        flushed = forward(plan, tiny, factors, []), forward(plan, tiny, factors, halves, torch.float16)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed[0], flat)
    assert_same_bits(flushed[1], rounded)


def test_size_of_the_cache_changes_no_bit_of_a_gradient(monkeypatch):
    """How many groups of blocks are summed at a time follows it."""
    plan = Plan({"a": (2000, 1500), "b": (700, 300)}, 5000, width=256, chunks="all")
    theta, factors = inputs(plan)
    grads = [values(shape) for shape in plan.shapes.values()]
    expected = adjoint(plan, theta, factors, grads)
    for size in ("32768", "524288", "67108864"):
        monkeypatch.setenv("HSAID_CPU_L2", size)
        for a, b in zip(adjoint(plan, theta, factors, grads), expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("chunks", ["all", "one"])
def test_gradients_and_transforms_of_a_process_without_subnormals(chunks, isa):
    """The sums over groups, segments and tensors too, of which some are subnormal here."""
    plan = Plan({"a": (3000,), "b": (40, 50), "c": (7,)}, 300, width=512 if chunks == "all" else 128, chunks=chunks)
    theta, factors = inputs(plan)
    theta = theta * 1e-5
    grads = [values(shape) * 1e-38 for shape in plan.shapes.values()]
    rows = values((3, 300)) * 1e-38
    expected = *adjoint(plan, theta, factors, grads), hadamard_transform(rows)
    assert 0 < expected[0].abs().min() < torch.finfo(torch.float32).smallest_normal
    assert torch.set_flush_denormal(True)
    try:
        got = *adjoint(plan, theta, factors, grads), hadamard_transform(rows)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits(dtype, isa):
    """Every float that lies halfway between two neighbours goes to the even one, up to and past the largest."""
    halves = torch.arange(2**15).to(torch.int16).view(dtype)
    finite = halves[halves.isfinite()].float()
    middles = torch.cat([(finite[:-1] + finite[1:]) / 2, torch.tensor([65520.0, 65519.99, 1e30, 3e38, math.inf])])
    for base in (middles, -middles, middles.nextafter(torch.tensor(math.inf)), middles.nextafter(torch.tensor(0.0))):
        plan = Plan({"a": tuple(base.shape)}, 10)
        got = forward(plan, torch.zeros(10), plan.scales, [base], dtype)[: len(base)]
        assert_same_bits(got, (base + 0.0).to(dtype))


def test_gradients_with_the_negative_bit():
    """Such as the imaginary part of a conjugate."""
    plan = Plan({"a": (100,)}, 40)
    theta, factors = inputs(plan)
    minus = torch._neg_view(values((100,)))
    assert_same_adjoint(adjoint(plan, theta, factors, [minus]), adjoint(plan, theta, factors, [-values((100,))]))


# --- threads and repetition

MANY = {f"t{i}": (numel,) for i, numel in enumerate([5000, 1, 64, 90000, 777, 33000, 2, 40000])}


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("dim, width", [(1000, None), (20000, None), (100, 32)])
def test_any_number_of_threads(dim, width, diagonal, isa):
    """Blocks and segments fall to threads in other ways; the bits stay, from run to run too."""
    plan = Plan(MANY, dim, 9, width=width, diagonal=diagonal)
    theta, factors = inputs(plan)
    grads = [values(shape) for shape in plan.shapes.values()]
    flat, gradients = forward(plan, theta, factors, grads), adjoint(plan, theta, factors, grads)
    for count in (2, 3, 2):
        with threads(count):
            assert_same_bits(forward(plan, theta, factors, grads), flat, f"{count} threads")
            assert_same_adjoint(adjoint(plan, theta, factors, grads), gradients, f"{count} threads")


def test_a_part_of_the_tensors_has_the_same_bits(isa):
    plan = Plan(MANY, 1000, 9)
    theta, factors = inputs(plan)
    weights = dict(zip(MANY, plan.views(forward(plan, theta, factors, [])), strict=True))
    for names in (["t3"], ["t7", "t0", "t2"]):
        part = Plan({name: MANY[name] for name in names}, 1000, 9)
        of_part = factors[[list(MANY).index(name) for name in names]]
        for count in (1, 2):
            with threads(count):
                for name, w in zip(names, part.views(forward(part, theta, of_part, [])), strict=True):
                    assert_same_bits(w, weights[name], name)


@functools.cache
def summed_groups() -> tuple:
    """(plan, gradients of the weights, the reference's adjoint of them)"""
    plan = Plan({"a": (100,), "b": (3, 2**19 - 1000), "c": (2**19 + 1,)}, 1000, 9, diagonal="rademacher")
    grads = [values(shape) for shape in plan.shapes.values()]
    return plan, grads, reference.adjoint(plan, *inputs(plan), grads)


def test_groups_are_added_in_order(isa):
    """A segment of several groups of blocks, among others: the order of the reference."""
    plan, grads, expected = summed_groups()
    for count in (1, 2):
        with threads(count):
            assert_same_adjoint(adjoint(plan, *inputs(plan), grads), expected, f"{count} threads")


def test_waves_of_groups(isa):
    """More sums than are held at a time (8 of 2 MB): segments one after the other, to the last bit."""
    plan = Plan({f"t{i}": (50,) for i in range(20)}, 2**19, chunks="all")
    theta, factors = inputs(plan)
    grads = [values((50,)) * (i + 1) for i in range(20)]
    with threads(2):
        dtheta, dfactors = adjoint(plan, theta, factors, grads)
    total = torch.zeros(plan.dim)
    for i in range(20):
        alone, factor = adjoint(plan, theta, factors, [g if i == j else None for j, g in enumerate(grads)])
        total += alone
        assert_same_bits(factor[i], dfactors[i])
    assert_same_bits(total, dtheta)


def test_a_segment_across_waves():
    """Twelve groups of one tensor in waves of eight: <P x, g> = <x, P^T g>."""
    plan = Plan({"a": (9, 2**19 - 5)}, 2**19, diagonal="rademacher")
    theta, factors = torch.randn(plan.dim), plan.scales
    (g,) = plan.views(torch.randn(plan.numel))
    with threads(2):
        (w,) = plan.views(ops.fastfood_forward(plan, theta, factors, [], torch.float32, "cpu"))
        dtheta, dfactors = ops.fastfood_adjoint(plan, theta, factors, [g], "cpu")
    product = (w.double() * g.double()).sum()
    size = w.norm() * g.norm()
    assert abs((theta.double() * dtheta.double()).sum() - product) < 1e-5 * size
    assert abs(dfactors[0] * factors[0] - product) < 1e-5 * size


# --- errors and memory


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("dim", [1000, 20000])
def test_error_against_float64(dim, diagonal):
    """On more than 10^6 weights: 1e-6 forward, 1e-5 adjoint, in the 2-norm."""
    plan = Plan({"a": (1000, 1000), "b": (300, 333), "c": (777,)}, dim, 1, diagonal=diagonal)
    theta = torch.randn(dim)
    grads = list(plan.views(torch.randn(plan.numel)))
    got = ops.fastfood_forward(plan, theta, plan.scales, [], torch.float32, "cpu")
    dtheta, dfactors = ops.fastfood_adjoint(plan, theta, plan.scales, grads, "cpu")
    exact = reference.forward(plan, theta.double(), plan.scales.double(), [], torch.float64)
    exact_dtheta, exact_dfactors = reference.adjoint(plan, theta.double(), plan.scales.double(), grads)
    assert relative_error(got, exact) < 1e-6
    assert relative_error(dtheta, exact_dtheta) < 1e-5
    # A dot product may cancel: its error is measured against the norms.
    bound = 1e-5 * torch.stack([g.norm() for g in grads]).double() * theta.norm() / plan.scales
    assert ((dfactors - exact_dfactors).abs() < bound).all()


MEMORY = """
import sys; sys.path[:0] = {path}
import torch
from helpers import memory
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan

torch.set_num_threads(2)
shapes, dim = {shapes}, {dim}
ops.fastfood_forward(warm := Plan({{"a": (9,)}}, 40), torch.ones(40), warm.scales, [], torch.float32, "cpu")
plan, theta = Plan(shapes, dim), torch.randn(dim)
base = [torch.randn(shape) for shape in shapes.values()]
before = memory("VmRSS")
flat = ops.fastfood_forward(plan, theta, plan.scales, base, torch.float32, "cpu")
forward = memory("VmHWM") - before - flat.nbytes
before = memory("VmRSS")
ops.fastfood_adjoint(plan, theta, plan.scales, plan.views(flat), "cpu")
print(forward, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set as Linux gives it")
@pytest.mark.parametrize(
    "shapes, dim", [({"a": (30000, 1024), "b": (40, 768, 1000)}, 16384), ({"a": (4300, 1024)}, 2**20)]
)
def test_memory(shapes, dim):
    """At most 64 MB beyond inputs and outputs, with 61.4M weights and with the longest theta."""
    child = subprocess.run(
        [sys.executable, "-c", MEMORY.format(path=sys.path, shapes=shapes, dim=dim)],
        capture_output=True,
        text=True,
        check=True,
    )
    for extra in map(int, child.stdout.split()):
        assert extra < 64 * 2**20
