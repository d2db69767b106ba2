"""The Triton backend's host side, without a GPU: tables, what is launched and how it is compiled, for which targets.

What the kernels compute is in test_gpu.py, which also runs by Triton's interpreter.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch

from hsaid_kernels.fastfood.plan import COLUMNS, Plan, Segment, whole

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton_offline
from triton.backends.compiler import GPUTarget

from hsaid_kernels.fastfood.triton import memory, ops, tables, tile

CPU = torch.device("cpu")
MBERT = Plan(shapes.mbert(), 1000)


def column(rows: torch.Tensor, which) -> np.ndarray:
    return rows[:, which.value].numpy()


# --- tables


@pytest.mark.parametrize("programs", [1, 7, 264, 10**6])
@pytest.mark.parametrize("t", [12, 14])
def test_runs_have_every_tile_once(t, programs):
    bands = [Segment("w", 32 * h, 700, 32, 96, f"head {h}") for h in (0, 2)]
    plan = Plan({"a": (3, 50000), "b": (7,), "w": (700, 96)}, 100, segments=[whole("a", (3, 50000)), *bands])
    for p in (plan, MBERT):
        pieces = tables.pieces_of(p.segments.numpy(), p.holes.numpy())
        rows, first, of_z = tables.runs_of(pieces, t, programs, CPU)
        tiles = Counter()
        for row in rows.tolist():
            key = tuple(row[: tables.FIRST.value])
            assert key == tuple(of_z[row[tables.FROM.value]][: tables.FIRST.value].tolist())
            tiles.update((key, i) for i in range(row[tables.FIRST.value], row[tables.LAST.value]))
        expected = {(tuple(r[: tables.FIRST.value]), i) for r in pieces.tolist() for i in range(-(-r[3] // 2**t))}
        assert tables.COUNT.value == 3 and tiles == Counter(expected)
        assert first[0] == 0 and first[-1] == len(rows) and (first.diff() >= 0).all()
        lengths = column(rows, tables.LAST) - column(rows, tables.FIRST)
        assert lengths.min() >= 1
        # nobody has more than a share
        cost = [lengths[a:b].sum() + tables.PIECE_COST * (b - a) for a, b in zip(first[:-1], first[1:])]
        share = (len(tiles) + tables.PIECE_COST * len(pieces)) / (len(first) - 1)
        assert max(cost) <= share + 2 * tables.PIECE_COST + 1


def test_waves_of_the_forward_have_every_piece_once(monkeypatch):
    pieces = tables.pieces_of(MBERT.segments.numpy(), MBERT.holes.numpy())
    monkeypatch.setattr(tables, "SUMS_FLOATS", 120 << 14)
    waves = tables.forward_waves_of(pieces, 14, 264, 3, CPU)
    assert max(len(wave.pieces) for wave in waves) == 40
    got = torch.cat([wave.pieces for wave in waves]).numpy()
    assert np.array_equal(got[:, : tables.FIRST.value], pieces[:, : tables.FIRST.value])


def test_pieces_are_the_plans():
    plan = Plan({"v": (3,), "w": (24, 96)}, 100, segments=[Segment("w", 32, 24, 32, 96, "head 1"), whole("v", (3,))])
    rows = tables.pieces_of(plan.segments.numpy(), plan.holes.numpy())
    got = [[row[c.value] for c in (tables.TENSOR, tables.OFFSET, tables.OUT_OFFSET, tables.COUNT)] for row in rows]
    assert got[:2] == [[1, 32, 64 + 32, 24 * 32], [0, 0, 0, 3]]
    assert [row[tables.COLS.value] for row in rows[:2]] == [32, 0] and rows[0, tables.ROW_STRIDE.value] == 96
    assert [row[tables.SEGMENT.value] for row in rows] == [0, 1] + [-1] * len(plan.holes)
    assert rows[0, tables.STREAM.value] == plan.segments[0, COLUMNS.index("stream")]


@pytest.mark.parametrize("most", [1, 2, 5, 10**6])
@pytest.mark.parametrize("q", [5, 10, 14])
def test_waves_of_listed_blocks_are_those_of_a_segment_that_is_as_long(q, most, monkeypatch):
    t = tile.tile_bits(q)
    monkeypatch.setattr(tables, "SUMS_FLOATS", most << 14)
    for count in (1, 24, 25, 7 * 24 + 5):
        plan = Plan({"a": (count << 14,)}, 100, width=2**q)
        expected = tables.waves_of(tables.pieces_of(plan.segments.numpy()), q, t, 24, CPU)
        got = tables.listed_waves_of(count, q, t, 24)
        assert len(got) == len(expected)
        for wave, of_segment in zip(got, expected):
            assert wave.items == len(of_segment.items) and wave.runs == of_segment.parts[0, tables.LAST.value]
            assert wave.first_item << (t - q) == of_segment.items[0, tables.FIRST.value]
            assert (wave.before < 0) == (of_segment.parts[0, tables.FROM.value] < 0)
            assert (wave.after < 0) == (of_segment.finished == 1)


@pytest.mark.parametrize("most", [1, 2, 5, 10**6])
@pytest.mark.parametrize("q", [5, 10, 14])
def test_waves_have_every_run_once(q, most, monkeypatch):
    """And no group is cut; of the last one there are as many runs as it has blocks, up to all of them."""
    t = tile.tile_bits(q)
    of_group = 2 ** (14 - q)
    monkeypatch.setattr(tables, "SUMS_FLOATS", most << t)
    counts = [3 * 24 * 2**14 + 5, 7, 2**q, 24 * 2**14 + 1, 10 * 24 * 2**14, 24 * 2**14 + 2**14]
    plan = Plan({f"t{i}": (n,) for i, n in enumerate(counts)}, 100, width=2**q)
    pieces = tables.pieces_of(plan.segments.numpy())
    waves = tables.waves_of(pieces, q, t, 24, CPU)
    places = 1 << (t - q)
    parts, carried = [[] for _ in counts], None
    for wave in waves:
        assert len(wave.items) <= max(most, of_group >> (t - q))
        where = {}  # place of the sum of a run of a tensor
        for number, item in enumerate(wave.items.tolist()):
            runs = range(item[tables.FIRST.value], item[tables.LAST.value])
            assert 1 <= len(runs) <= places and runs[0] // of_group == runs[-1] // of_group
            where |= {number * places + j: (item[tables.TENSOR.value], run) for j, run in enumerate(runs)}
        for number, part in enumerate(wave.parts.tolist()):
            tensor, before, after = (part[c.value] for c in (tables.TENSOR, tables.FROM, tables.TO))
            assert before == (-1 if carried is None else carried), "a part goes on where the wave before left it"
            carried = None if after < 0 else after
            assert (after < 0) == (number < wave.finished)
            assert after < 0 or (part[tables.LAST.value] - part[tables.FIRST.value]) % of_group == 0
            got = [where.pop(place) for place in range(part[tables.FIRST.value], part[tables.LAST.value])]
            assert {t for t, _ in got} == {tensor}
            parts[tensor] += [g for _, g in got]
        assert not where
    assert carried is None
    blocks = [math.ceil(n / 2**q) for n in counts]
    expected = [b // (24 * of_group) * of_group + min(b % (24 * of_group), of_group) for b in blocks]
    assert parts == [list(range(n)) for n in expected]


@pytest.mark.parametrize("q", [5, 10, 14])
def test_lists_have_every_block_once(q):
    """In the list of its chunk, in the order of the plan; and of listed blocks the lists are what is left of these."""
    bands = [Segment("w", 2**q * h, 7, 2**q, 3 * 2**q, f"head {h}") for h in (0, 2)]
    tensors = {"a": (5 * 2**q + 1,), "b": (7,), "w": (7, 3 * 2**q)}
    segments = [whole("a", tensors["a"]), whole("b", (7,)), *bands]
    plan = Plan(tensors, 3 * 2**q - 1, width=2**q, chunks="one", segments=segments)
    assert (plan.segments[:, COLUMNS.index("stream")] < 0).any(), "whose remainder is that of an unsigned number"
    lists = tables.lists_of(tables.pieces_of(plan.segments.numpy()), q, 3, CPU)
    expected = [[], [], []]
    for i, piece in enumerate(plan.pieces):
        for block in range(plan.blocks(piece)):
            expected[(plan.first_chunk(piece) + block) % 3].append(i << 32 | block)
    assert [lists.places[a:b].tolist() for a, b in zip(lists.first[:-1], lists.first[1:])] == expected
    assert lists.longest == max(map(len, expected)) and lists.first_chunk == plan.first_chunk(plan.pieces[0])
    assert column(lists.pieces, tables.FROM).tolist() == plan.segments[:, COLUMNS.index("first_block")].tolist()

    span = 2 ** (14 - q)
    plan = Plan({"a": (9 * 2**14 + 1,)}, 3 * 2**q - 1, width=2**q, chunks="one")
    whole_lists = tables.lists_of(tables.pieces_of(plan.segments.numpy()), q, 3, CPU)
    for entries in ([0], [1, 4], [2, 5, 8], [7, 9], list(range(10))):
        lists = tables.listed_of(whole_lists, torch.tensor(entries), span)
        blocks = [entry * span + i for entry in entries for i in range(span)]
        expected = [
            [place for place, block in enumerate(blocks) if (plan.first_chunk(plan.pieces[0]) + block) % 3 == chunk]
            for chunk in range(3)
        ]
        assert [lists.places[a:b].tolist() for a, b in zip(lists.first[:-1], lists.first[1:])] == expected
        assert max(map(len, expected)) <= lists.longest <= len(blocks)


def test_words_tell_addresses_and_dtypes(monkeypatch):
    written = []
    monkeypatch.setattr(
        memory, "write_words", defaultdict(lambda: lambda table, words, **options: written.append(words))
    )
    tensors = [torch.ones(3), None, torch.ones(3).bfloat16(), torch.ones(6).half()[::2]]
    table = memory.table_of(tensors, [3, 9, 2, 0], CPU, "grads")
    (words,) = written
    assert len(words) == len(table.words) == 256 and set(words[4:]) == {words[1]} == {memory.MISSING}
    assert all(word & 1 and word > 2**31 for word in words)
    (copy,) = table.kept
    expected = [(tensors[0].data_ptr(), 0), (2**59, 0), (tensors[2].data_ptr(), 1), (copy.data_ptr(), 2)]
    assert [(word >> 3, word >> 1 & 3) for word in words[:4]] == expected
    assert table.codes == 0b111
    assert memory.table_of([None] * 257, [1] * 257, CPU, "grads").codes == 0 and len(written) == 3
    assert len(memory.table_of([], [], CPU, "base").words) == 256


def test_a_strided_piece_of_too_many_elements_is_refused():
    plan = Plan({"w": (2, 8192)}, 100, segments=[Segment("w", 0, 2, 4096, 8192)])
    plan.segments[0, COLUMNS.index("rows")] = 2**20
    with pytest.raises(RuntimeError, match=r"segments: .* less than 2\*\*32 elements, got one of 4294967296"):
        tables.pieces_of(plan.segments.numpy())


# --- an installation without compiled libraries

PROGRAM = """
import torch
from hsaid_kernels import Projection, available_backends
assert "not built" in available_backends()["cpu"] and available_backends()["cuda"] is not True
theta, shapes = torch.linspace(-1, 1, 40), {"a": (300, 20)}
expected = Projection.from_shapes(shapes, dim=40, backend="reference").forward(theta)["a"]
assert torch.equal(Projection.from_shapes(shapes, dim=40, backend="triton").forward(theta)["a"], expected)
Projection.from_shapes(shapes, dim=40).forward(theta)
"""


def test_without_compiled_libraries(tmp_path):
    """On a GPU, which the interpreter stands in for, all works; on a CPU a sentence says what to do."""
    package = Path(ops.__file__).parents[2]
    shutil.copytree(package, tmp_path / "hsaid_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    reason = "_cpu is not built: install the package with a C++ compiler (and nvcc for CUDA) at hand"
    assert run.stderr.strip().splitlines()[-1] == f"RuntimeError: backend: 'cpu' cannot be used: {reason}"


# --- launches


@pytest.fixture
def device():
    with triton_offline.fake_device() as fake:
        yield fake


def call(plan: Plan, dtype=torch.float32, gradients: bool = True):
    theta, factors = torch.ones(plan.dim), plan.scales
    tensors = plan.views(torch.zeros(plan.numel, dtype=dtype))
    table = (plan.segments, plan.seed - 2**64 if plan.seed >= 2**63 else plan.seed, plan.width, plan.rademacher)
    of_chunks = (None, 1, plan.one_chunk)
    ops.fastfood_forward(theta, factors, tensors, *table, plan.holes, plan.numel, dtype, *of_chunks)
    if gradients:
        ops.fastfood_adjoint(theta, factors, tensors, *table, plan.run_blocks, *of_chunks)


def test_all_tensors_in_one_launch(device):
    """And two before it, which leave their addresses and z in memory."""
    call(MBERT, gradients=False)
    assert [name for name, _, _ in device.launches] == ["write_words", "forward_z_kernel", "fastfood_forward_kernel"]
    assert device.launches[1][1] == (202, 1, 1) and device.launches[2][1] == (132 * 8, 1, 1)
    device.launches.clear()
    call(MBERT)
    names = ["write_words", "adjoint_groups_kernel", "adjoint_sums_kernel"]
    names += ["adjoint_segments_kernel", "adjoint_gradients_kernel"]
    assert [name for name, _, _ in device.launches[3:]] == names
    assert device.launches[6][1] == (128, 1, 1)


def test_one_chunk_in_as_many_launches(device, monkeypatch):
    """As one that is short has, but for z of the adjoint, which was made with each segment's sum; and more in waves."""
    plan = Plan(shapes.mbert(), 2**20)
    blocks = Counter((plan.first_chunk(piece) + b) % 64 for piece in plan.pieces for b in range(plan.blocks(piece)))
    groups = math.ceil(max(blocks.values()) / plan.run_blocks)
    ops.prepare(plan, CPU)
    made = [*ops._made[plan.segments].values()]
    call(plan)
    assert [*ops._made[plan.segments].values()] == made, "prepared is all that is needed"
    names = ["write_words", "forward_z_kernel", "fastfood_forward_kernel"]
    of_adjoint = ["adjoint_lists_kernel", "adjoint_lists_sums_kernel"]
    names += ["write_words", "forward_z_kernel", *of_adjoint, "adjoint_chunks_kernel", "adjoint_factors_kernel"]
    assert [name for name, _, _ in device.launches] == names
    grids = [grid for _, grid, _ in device.launches]
    assert grids[1] == grids[4] == grids[7] == (64, 1, 1) and grids[2] == (264, 1, 1) and grids[8] == (201, 1, 1)
    assert grids[5] == (groups, 64, 1) and grids[6] == (64, 64, 1)
    monkeypatch.setattr(tables, "SUMS_FLOATS", 25 * groups << 14)
    device.launches.clear()
    call(plan)
    assert [name for name, _, _ in device.launches] == names[:5] + 3 * of_adjoint + names[7:]
    assert [grid[1] for name, grid, _ in device.launches if name == of_adjoint[0]] == [25, 25, 14]


def test_nothing_is_compiled_twice(device):
    """Not for another seed, length of theta, number or address of tensors."""
    call(Plan({"a": (5000,), "b": (7,)}, 1000))
    compiled = len(device.binaries)
    assert compiled == len({name for name, _, _ in device.launches})
    for dim, seed in ((1001, 16), (1008, 1), (600, 2**32), (1024, 2**64 - 16), (513, 2**63)):
        call(Plan({f"t{i}": (6000, 16) for i in range(5 if dim % 2 else 300)} | {"b": (16,)}, dim, seed))
        assert len(device.binaries) == compiled, (dim, seed)
    call(Plan({"a": (5000,)}, 3000, width=1024))
    several_chunks = len(device.binaries)
    assert several_chunks <= compiled + 1
    call(Plan({"a": (5000,)}, 16 * 1024, width=1024))
    assert len(device.binaries) == several_chunks
    call(Plan({"a": (5000,)}, 3000, width=1024, chunks="one"))
    one_chunk = len(device.binaries)
    for dim in (16 * 1024, 99 * 1024 + 1):
        call(Plan({f"t{i}": (6000, 16) for i in range(3)}, dim, width=1024, chunks="one"))
    assert len(device.binaries) == one_chunk


@pytest.mark.parametrize(
    "width, dim, rademacher, chunks",
    [
        (32, 32, 0, "all"),
        (64, 192, 1, "all"),
        (64, 192, 1, "one"),
        (128, 128, 1, "all"),
        (2048, 6000, 0, "one"),
        (8192, 24576, 0, "all"),
        (16384, 16384, 0, "all"),
        (16384, 40000, 0, "one"),
    ],
)
def test_everything_compiles(width, dim, rademacher, chunks, device):
    """Also for dtypes that are mixed, of which each kernel then takes any."""
    diagonal = ("gaussian", "rademacher")[rademacher]
    plan = Plan({"a": (70, 96), "b": (7,)}, dim, width=width, chunks=chunks, diagonal=diagonal, part=True)
    of_chunks = (None, 1, plan.one_chunk)
    theta, factors, table = torch.ones(plan.dim), plan.scales, (plan.segments, 3, width, bool(rademacher))
    a, b = (torch.ones(shape) for shape in plan.shapes.values())
    ops.fastfood_forward(theta, factors, [a.half(), b], *table, plan.holes, plan.numel, torch.float16, *of_chunks)
    ops.fastfood_adjoint(theta, factors, [a.bfloat16(), b.half()], *table, plan.run_blocks, *of_chunks)
    for purpose in range(3):
        ops.stream_values(theta, -5, 2**63 - 1, purpose, 0, 1, width, bool(rademacher))
    ops.hadamard_transform(torch.ones(3, width - 1).bfloat16(), 0.5)


@pytest.mark.parametrize("chunks", ["all", "one"])
def test_listed_tiles_leave_nothing_behind(chunks, device):
    """Whatever a list's length, nothing is compiled or made for it, nor is it read: its values are none."""
    plan = Plan({"a": (9 * 2**14 + 5,)}, 300, width=256, chunks=chunks)
    plan.run_blocks = 2
    theta, factors, base = torch.ones(300), plan.scales, torch.zeros(plan.numel)
    table = (plan.segments, 3, 256, False)

    def call_listed(count: int) -> list[tuple[str, tuple]]:
        device.launches.clear()
        listed, grad = torch.full((count,), -1), torch.zeros(count * 2**14)
        of_list = (listed, 64, plan.one_chunk)
        out = ops.fastfood_forward(theta, factors, [base], *table, plan.holes, plan.numel, base.dtype, *of_list)
        ops.fastfood_adjoint(theta, factors, [grad], *table, plan.run_blocks, *of_list)
        assert out.shape == (count * 2**14,)
        return [(name, grid) for name, grid, _ in device.launches]

    first = call_listed(1)
    binaries, made = len(device.binaries), len(ops._made[plan.segments])
    for count in (2, 5, 9, 10):
        launches = call_listed(count)
        assert [name for name, _ in launches] == [name for name, _ in first]
        grids = {name: grid[0] for name, grid in launches}
        assert grids["forward_z_kernel"] == 2 and grids["fastfood_forward_kernel"] == 4 * count
        if chunks == "one":
            most = min(64 * count, -(-577 // 2) + 32)  # blocks of a chunk
            assert grids["adjoint_lists_kernel"] == min(64 * -(-most // 128), most)
            continue
        groups = -(-count // 2)
        assert grids["adjoint_groups_kernel"] == 4 * groups and grids["adjoint_sums_kernel"] == 1
    assert (len(device.binaries), len(ops._made[plan.segments])) == (binaries, made)
    assert call_listed(0) == []


def test_launches_on_amd():
    """The same kernels in the same order, as many threads in waves of 64, and no option or instruction of NVIDIA's."""
    plan = Plan({"a": (5000,), "b": (7,)}, 1000)
    with triton_offline.fake_device() as nvidia:
        call(plan)
        assert ops._options(256, 128) == {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 128}
    with triton_offline.fake_device(GPUTarget("hip", "gfx942", 64)) as amd:
        call(Plan({"a": (5000,), "b": (7,)}, 1000))
        assert ops._options(256, 128) == {"num_warps": 4, "enable_fp_fusion": False}
    assert [launch[:2] for launch in amd.launches] == [launch[:2] for launch in nvidia.launches]
    assert len(amd.binaries) == len(nvidia.binaries) and all(b"gfx942" in binary for binary in amd.binaries)


def test_hadamard_transform_of_any_length_compiles(device):
    for dim in (1, 2, 5, 2**15, 2**22 - 1):
        ops.hadamard_transform(torch.ones(1, dim), 0.5)
    names = [name for name, _, _ in device.launches]
    assert names == ["hadamard_rows_kernel"] * 4 + ["hadamard_columns_kernel"] + [
        "hadamard_rows_kernel",
        "hadamard_columns_kernel",
        "hadamard_columns_kernel",
    ]


# --- compiled


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "gfx942"])
def test_compiles_for(target):
    """Without fused multiplications, within the shared memory and registers that are counted on."""
    kernels = triton_offline.kernels(qs=(14,), codes=(1,))
    listed = ("fastfood_forward_kernel, g", "adjoint_groups_kernel, g", "adjoint_sums_kernel")
    listed += ("fastfood_forward_kernel, one chunk, g", "adjoint_lists_kernel, g", "adjoint_factors_kernel")
    if target == "sm_90":  # the others are compiled from the same lines
        kernels += [kernel._replace(listed=True) for kernel in kernels if kernel.title.startswith(listed)]
    for kernel in kernels:
        built = triton_offline.compiled_for(kernel, target)
        assert built.metadata.shared <= 65536, kernel.title  # all that a block has on the smallest of these
        assert not triton_offline.inexact(built), kernel.title
        if target.startswith("sm_") and {"OUT", "GRADS"} & set(kernel.constants) and "hadamard" not in kernel.title:
            vectors = r"evict_first.*\.v2\.b32" if "GRADS" in kernel.constants else r"st\.global\.cs.*\.v2\.b32"
            assert len(re.findall(vectors, built.asm["ptx"])) >= 16, kernel.title


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_fused_multiplications_are_found(target, fusion, monkeypatch):
    """Where they are allowed there are some, and nowhere else."""
    (kernel,) = (k for k in triton_offline.kernels(qs=(10,), codes=(0,)) if k.title == triton_offline.MAIN[0])
    exact = triton_offline.triton.compile
    monkeypatch.setattr(
        triton_offline.triton,
        "compile",
        lambda source, target, options: exact(source, target=target, options=options | {"enable_fp_fusion": fusion}),
    )
    assert bool(triton_offline.inexact(triton_offline.compiled_for(kernel, target))) == fusion


def test_table_of_targets(monkeypatch):
    """Lanes, what compiles, and the kernels one by one; what does not compile says so and is counted."""
    sums = [k for k in triton_offline.kernels(qs=(10,), codes=()) if k.title == "adjoint_sums_kernel"]
    monkeypatch.setattr(triton_offline, "kernels", lambda: sums)
    lines = list(triton_offline.tables(["sm_75", "gfx942", "sm_1"], each=True))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    assert len(set(map(len, rows[:5]))) == 1 and rows[2][:4] == ["sm_75", "T4, RTX 20", "32", "1 of 1"]
    assert rows[3][:4] == ["gfx942", "MI300", "64", "1 of 1"] and rows[4][:4] == ["sm_1", "", "", "0 of 1"]
    of_kernels = [row for row in rows[5:] if row[0] == "adjoint_sums_kernel"]
    assert [len(row) for row in of_kernels] == [9, 9, 3] and of_kernels[2][2].startswith("does not compile: ")
    facts = [triton_offline.facts_of(triton_offline.compiled_for(sums[0], target)) for target in ("sm_75", "gfx942")]
    assert [[int(cell) for cell in row[3:]] for row in of_kernels[:2]] == [[*found[:-1]] for found in facts]
    assert all(found.registers > 10 for found in facts) and facts[0].scalar == 0 < facts[1].scalar
