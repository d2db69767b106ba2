"""The static tables: where tensors, segments, blocks and groups lie, scales, stream ids, and every bad input."""

import math
import re

import pytest
import shapes
import torch
from helpers import assert_same_bits, sequence

from hsaid_kernels import available_backends
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import ALIGNMENT, COLUMNS, Plan, Segment, default_width, stream_id, whole

BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is True]
SHAPES = {"a": (40, 128), "b": (768,), "c": (3, 7), "scalar": ()}


def column(plan: Plan, name: str) -> list[int]:
    return plan.segments[:, COLUMNS.index(name)].tolist()


def test_tensors_lie_on_cache_lines():
    """Every tensor starts at a multiple of 64 elements, right after the one before it."""
    plan = Plan(SHAPES, 200)
    assert list(plan.offsets.values()) == [0, 5120, 5120 + 768, 5120 + 768 + 64]
    assert plan.numel == 5120 + 768 + 64 + 64 and all(offset % ALIGNMENT == 0 for offset in plan.offsets.values())
    flat = torch.arange(plan.numel)
    views = plan.views(flat)
    assert [tuple(view.shape) for view in views] == list(SHAPES.values())
    assert [int(view.flatten()[0]) for view in views] == list(plan.offsets.values())
    assert all(view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in views)


def test_table():
    plan = Plan(SHAPES, 200)
    assert plan.segments.dtype == torch.int64 and plan.segments.shape == (4, 8) and plan.segments.is_contiguous()
    assert column(plan, "tensor") == [0, 1, 2, 3]
    assert column(plan, "offset") == [0, 0, 0, 0]
    assert column(plan, "out_offset") == list(plan.offsets.values())
    assert column(plan, "rows") == [1, 1, 1, 1]
    assert column(plan, "cols") == column(plan, "row_stride") == [5120, 768, 21, 1]
    assert column(plan, "stream") == [stream_id(name) for name in SHAPES]
    assert column(plan, "first_block") == [0, 20, 23, 24]


def test_sums_of_groups_fit_in_44_megabytes():
    """Of mBERT at the largest width, which is what the groups' size was chosen for."""
    plan = Plan(shapes.mbert(), 16384)
    groups = sum(-(-plan.blocks(piece) // plan.run_blocks) for piece in plan.pieces)
    assert groups * plan.width * 4 <= 44e6


def test_segments():
    heads = [Segment("w", 32 * h, 24, 32, 96, f"head {h}") for h in range(3)]
    plan = Plan({"v": (5,), "w": (24, 96)}, 100, width=128, segments=[whole("v", (5,)), *heads])
    assert column(plan, "tensor") == [0, 1, 1, 1]
    assert column(plan, "offset") == [0, 0, 32, 64]
    assert column(plan, "out_offset") == [0, 64, 96, 128]
    assert column(plan, "rows") == [1, 24, 24, 24] and column(plan, "cols") == [5, 32, 32, 32]
    assert column(plan, "row_stride") == [5, 96, 96, 96]
    assert column(plan, "stream") == [stream_id("v"), *(stream_id("w", f"head {h}") for h in range(3))]
    assert column(plan, "first_block") == [0, 1, 7, 13]


@pytest.mark.parametrize(
    "dim, width",
    [(1, 256), (256, 256), (257, 512), (951, 1024), (1024, 1024), (16384, 16384), (16385, 16384), (2**20, 16384)],
)
def test_default_width(dim, width):
    assert default_width(dim) == Plan({"a": (3,)}, dim, chunks="all").width == width
    assert Plan({"a": (3,)}, min(dim, 2**20), width=32, chunks="all").width == 32


@pytest.mark.parametrize(
    "dim, width, chunks", [(200, None, 1), (200, 64, 4), (192, 64, 3), (2**20, None, 64), (1, 32, 1)]
)
def test_chunks(dim, width, chunks):
    assert Plan({"a": (3,)}, dim, width=width, chunks="all").chunks == chunks


def test_one_chunk_a_block():
    shapes = {"a": (40, 64), "b": (5, 64), "c": (7,)}
    one, every = (Plan(shapes, 300, width=64, chunks=chunks) for chunks in ("one", "all"))
    assert one.one_chunk and not every.one_chunk and one.chunks == every.chunks == 5
    assert torch.equal(one.scales, torch.tensor([math.sqrt(5 / (64 * n)) for n in (2560, 320, 7)]))
    assert one.key != every.key == Plan(shapes, 300, width=64).key
    # Where theta is one chunk there is nothing to choose.
    assert Plan(shapes, 64, width=64, chunks="one").key == Plan(shapes, 64, width=64).key
    # By default: where theta is longer than the longest block.
    large = {"a": (70, 1024)}
    assert not Plan(large, 16384).one_chunk and Plan(large, 16385).one_chunk
    assert not Plan(large, 16385, chunks="all").one_chunk and Plan(large, 16385, width=4096).one_chunk


def test_blocks_use_the_chunks_in_turn():
    plan = Plan({"a": (40, 64), "b": (5, 64), "c": (7,)}, 300, width=64, chunks="one")
    assert [plan.first_chunk(piece) for piece in plan.pieces] == [stream_id(n) % 2**64 % 5 for n in "abc"]
    used = {(plan.first_chunk(piece) + b) % 5 for piece in plan.pieces for b in range(plan.blocks(piece))}
    assert len(used) == plan.chunks_reached() == 5
    few = plan.select(["b", "c"])
    assert few.one_chunk and few.chunks_reached() == 5
    for names, dim in ((["c"], 300), (["c", "b"], 2000)):
        some = Plan({name: plan.shapes[name] for name in names}, dim, width=64, chunks="one", part=True)
        used = {(some.first_chunk(p) + b) % some.chunks for p in some.pieces for b in range(some.blocks(p))}
        assert some.chunks_reached() == len(used) < some.chunks


def test_scales():
    """1 / sqrt(n D), rounded once to float32; with normalize="global" D is the sum over all tensors."""
    numels = [math.prod(shape) for shape in SHAPES.values()]
    plan, whole_model = Plan(SHAPES, 200), Plan(SHAPES, 200, normalize="global")
    assert_same_bits(plan.scales, torch.tensor([1 / math.sqrt(256 * numel) for numel in numels]))
    assert_same_bits(whole_model.scales, torch.tensor([1 / math.sqrt(256 * sum(numels))] * 4))


def test_scales_are_copied_to_a_device_once():
    plan = Plan(SHAPES, 200)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert plan.scales_on(cpu) is plan.scales
    assert plan.scales_on(meta) is plan.scales_on(meta) and plan.scales_on(meta).device == meta


@pytest.mark.parametrize(
    "segments",
    [
        None,
        [Segment("a", 32, 40, 64, 128, "middle columns")],
        [Segment("a", 0, 40, 1, 128, "first"), Segment("a", 127, 40, 1, 128, "last"), whole("c", (3, 7))],
        [Segment("b", 700, 1, 68, 68), Segment("a", 128, 39, 128, 128), Segment("c", 8, 1, 3, 3)],
        [Segment("b", 0, 3, 1, 5, "ragged"), Segment("b", 20, 4, 2, 9, "steps")],
    ],
    ids=["whole", "one band", "two bands", "parts", "odd steps"],
)
def test_segments_and_holes_cover_the_buffer_once(segments):
    plan = Plan(SHAPES, 200, segments=segments)
    times, at = torch.zeros(plan.numel), {name: i for i, name in enumerate(COLUMNS)}
    for row in [*plan.segments.tolist(), *plan.holes.tolist()]:
        shape, start = (row[at["rows"]], row[at["cols"]]), row[at["out_offset"]]
        times.as_strided(shape, (row[at["row_stride"]], 1), start).add_(1)
        if row[at["tensor"]] >= 0:
            assert start == plan.offsets[plan.names[row[at["tensor"]]]] + row[at["offset"]]
    assert (times == 1).all()


def test_default_device_does_not_matter():
    with torch.device("meta"):
        for segments in (None, [Segment("b", 0, 1, 5, 5)]):
            plan = Plan(SHAPES, 200, segments=segments)
            assert {table.device for table in (plan.segments, plan.holes, plan.scales)} == {torch.device("cpu")}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"shapes": {}}, ValueError, "shapes: expected at least one tensor, got none"),
        ({"shapes": {"a": (2,), "b": (0, 3)}}, ValueError, "shapes: expected tensors .* got 'b' of shape (0, 3)"),
        ({"shapes": {"a": (-2, -3)}}, ValueError, "shapes: expected tensors .* got 'a' of shape (-2, -3)"),
        ({"dim": 0}, ValueError, "dim: expected an integer from 1 to 16777216, got 0"),
        ({"dim": -3}, ValueError, "dim: expected an integer from 1 to 16777216, got -3"),
        ({"dim": 2**24 + 1}, ValueError, "dim: expected an integer from 1 to 16777216, got 16777217"),
        ({"dim": 200.0}, TypeError, "dim: expected an integer, got float 200.0"),
        ({"dim": True}, TypeError, "dim: expected an integer, got bool True"),
        ({"dim": None}, TypeError, "dim: expected an integer, got NoneType None"),
        ({"seed": -1}, ValueError, "seed: expected an integer from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer from 0 to .* got 18446744073709551616"),
        ({"seed": "7"}, TypeError, "seed: expected an integer, got str '7'"),
        ({"width": 0}, ValueError, "width: expected an integer from 32 to 16384, got 0"),
        ({"width": 16}, ValueError, "width: expected an integer from 32 to 16384, got 16"),
        ({"width": 32768}, ValueError, "width: expected an integer from 32 to 16384, got 32768"),
        ({"width": 48}, ValueError, "width: expected a power of two from 32 to 16384, got 48"),
        ({"width": 64.0}, TypeError, "width: expected an integer, got float 64.0"),
        ({"chunks": "two"}, ValueError, "chunks: expected one of 'all', 'one', got 'two'"),
        (
            {"dim": 200, "width": 32, "shapes": {"a": (60,)}, "chunks": "one"},
            ValueError,
            "chunks: expected blocks that use each of 7 chunks of theta, got 2 blocks of 32 weights, which use 2",
        ),
        ({"dim": 2**24, "width": 128}, ValueError, "width: expected at least 256 with dim 16777216, got 128"),
        ({"diagonal": "cauchy"}, ValueError, "diagonal: expected one of 'gaussian', 'rademacher', got 'cauchy'"),
        ({"normalize": "row"}, ValueError, "normalize: expected one of 'tensor', 'global', got 'row'"),
        ({"shapes": {"a": (2**28, 33)}, "width": 32}, ValueError, "width: 'a' has 276824064 blocks of 32, at most"),
        (
            {"segments": [Segment("b", 0, 1, 5, 5), Segment("b", 5, 1, 5, 5)]},
            ValueError,
            "segments: ('b', '') and ('b', '') have the same stream id",
        ),
    ],
)
def test_bad_input(changes, error, message):
    expression = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(error, match=f"^{expression}"):
        Plan(**{"shapes": SHAPES, "dim": 200, **changes})


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Segment("z", 0, 1, 5, 5)],
        [Segment("b", 0, 1, 769, 769)],
        [Segment("b", -1, 1, 5, 5)],
        [Segment("b", 0, 0, 5, 5)],
        [Segment("a", 0, 40, 32, 31)],
        [Segment("a", 97, 40, 32, 128)],
        [Segment("b", 0, 1, 5, 5, "first"), Segment("b", 4, 1, 5, 5, "second")],
    ],
    ids=str,
)
def test_bad_segments(segments):
    with pytest.raises(ValueError, match="segments: "):
        Plan(SHAPES, 200, segments=segments)


def test_numpy_integers_are_integers():
    plan = Plan({"a": torch.Size([3, 4])}, torch.tensor(200), torch.tensor(7), width=torch.tensor(64))
    assert (plan.dim, plan.seed, plan.width, plan.shapes) == (200, 7, 64, {"a": (3, 4)})


@pytest.mark.parametrize("normalize", ["tensor", "global"])
def test_select_is_the_same_basis_at_the_same_scale(normalize):
    plan = Plan({"a": (5, 60), "b": (70,), "c": (3, 3)}, 40, 6, normalize=normalize)
    part = plan.select(["c", "a"])
    assert part.names == ("c", "a") and part.dim == plan.dim and part.width == plan.width and part.seed == plan.seed
    assert column(part, "stream") == [stream_id("a"), stream_id("c")]
    assert part.scales.tolist() == [plan.scales[0], plan.scales[2]]


def test_views_of_some():
    plan = Plan({"a": (5, 60), "b": (70,), "c": (3, 3)}, 40)
    flat = torch.arange(plan.numel)
    assert [view.tolist() for view in plan.views(flat, ["c", "a"])] == [
        view.tolist() for view in (plan.views(flat)[2], plan.views(flat)[0])
    ]


def test_a_key_stands_for_every_scale():
    """`find_plan` may return a plan with other scales than the one that was meant: no op reads them."""
    options = dict(normalize="global", width=32)
    selected, alone = (
        Plan({"a": (5, 60), "b": (70,)}, 40, 6, **options).select(["a"]),
        Plan({"a": (5, 60)}, 40, 6, **options),
    )
    assert selected.key == alone.key and not torch.equal(selected.scales, alone.scales)
    theta, factors, grad = sequence(40), torch.tensor([0.25]), sequence(300).view(5, 60)
    found = []
    for plan in (selected, alone):
        plan.scales = torch.full_like(plan.scales, torch.nan)
        plan._scales = {"cpu": plan.scales}
        found += [
            (
                ops.fastfood_forward(plan, theta, factors, [], torch.float32, backend),
                *ops.fastfood_adjoint(plan, theta, factors, [grad], backend),
            )
            for backend in BACKENDS
        ]
    assert found[0][0].isfinite().all()
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            assert_same_bits(got, expected)
