"""The GPU backends, CUDA and Triton: the CPU backend's bits, determinism, graphs, streams, devices, bad input.

    pytest -m gpu                                         on a machine with a GPU
    HSAID_EMULATED=1 pytest tests/fastfood/test_gpu.py    CUDA's ops and kernels on the CPU over the emulated device
    TRITON_INTERPRET=1 pytest tests/fastfood/test_gpu.py  Triton's, by its interpreter

What of the CUDA kernels needs no device, every width and kind of segment under sanitizers, is tests/csrc/test_cuda.cpp.
"""

import functools
import math
import os

import pytest
import shapes
import torch
from emulated import emulate_cuda
from helpers import assert_same_bits, poison
from torch import nn

from hsaid_kernels import HSAID, Hierarchy, Projection, available_backends, hadamard_transform, hadamard_transform_
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan, Segment, stream_id, whole
from hsaid_kernels.hierarchy.attention import find_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("HSAID_EMULATED") == "1"
ON_CPU = INTERPRETED or EMULATED
DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
pytestmark = [] if ON_CPU else [pytest.mark.gpu]
on_a_device = pytest.mark.skipif(ON_CPU, reason="for a device: too large for a CPU, or not to be had there")
if EMULATED:
    emulate_cuda()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG_ROWS = [2**17, 2**20, 2**21, 2**23, 2**26]  # several groups from 2^21 on, three passes for the last
SMALL = {"a": (3, 2000 if ON_CPU else 12000), "b": (1003,), "c": (7,), "w": (70, 96)}
BANDS = [
    whole("a", SMALL["a"]),
    whole("b", SMALL["b"]),
    Segment("w", 32, 70, 32, 96, "head 1"),
    Segment("w", 0, 70, 32, 96),
]


@pytest.fixture(params=["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["cuda", "triton"])
def backend(request):
    wanted = request.config.getoption("--gpu-backend")
    if wanted not in (None, request.param):
        pytest.skip(f"left out: --gpu-backend={wanted}")
    reason = available_backends()[request.param]
    if reason is not True:
        if ON_CPU or torch.cuda.is_available():  # where there is a GPU, its backends are to be there
            pytest.fail(f"{request.param}: {reason}")
        pytest.skip(f"{request.param}: {reason}")
    return request.param


kernels = ops.kernels


def values(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """[plan.numel]: the tensors of a plan, all with full mantissas."""
    return torch.randn(plan.numel, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(plan: Plan, dtype: torch.dtype, backend: str, missing: tuple[int, ...] = ()):
    """(forward, dtheta, dfactors) of the CPU backend and of another."""
    theta = torch.randn(plan.dim, generator=torch.Generator().manual_seed(2))
    factors = plan.scales * torch.linspace(0.5, 1.5, len(plan.scales))
    flat = values(plan, dtype)
    for name, device in (("cpu", "cpu"), (backend, DEVICE)):
        tensors = plan.views(flat.to(device))
        grads = [None if i in missing else t for i, t in enumerate(tensors)]
        on = theta.to(device), factors.to(device)
        poison(plan.numel, dtype, device)
        yield (
            ops.fastfood_forward(plan, *on, tensors, dtype, name).cpu(),
            *(x.cpu() for x in ops.fastfood_adjoint(plan, *on, grads, name)),
        )


def assert_same_everywhere(plan: Plan, dtype: torch.dtype, backend: str, missing: tuple[int, ...] = ()) -> None:
    cpu, gpu = both(plan, dtype, backend, missing)
    for what, got, expected in zip(("forward", "dtheta", "dfactors"), gpu, cpu, strict=True):
        assert_same_bits(got, expected, what)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dim", [1000, 16384, 2**20])
def test_all_of_mbert(dim, diagonal, dtype, backend):
    assert_same_everywhere(Plan(shapes.mbert(), dim, seed=5, diagonal=diagonal), dtype, backend)


@pytest.mark.skipif(not EMULATED, reason="where there is a device, mBERT is not scaled down")
def test_all_of_a_small_mbert(backend):
    small = shapes._bert("bert.", 1000, 64, 2, 12, 32, 128) | {"classifier.weight": (2, 32), "classifier.bias": (2,)}
    assert list(small) == list(shapes.mbert())
    plan = Plan(small, 500, seed=5)
    plan.run_blocks = 2
    assert_same_everywhere(plan, torch.bfloat16, backend, missing=(3, 200))


KINDS = {
    "expanded": lambda: torch.randn(1).expand(50, 8),
    "transposed": lambda: torch.randn(8, 50).T,
    "sparse": lambda: torch.sparse_coo_tensor(
        torch.tensor([[7, 3, 7]]), torch.randn(3, 8), (50, 8), check_invariants=True
    ),
    "sliced": lambda: torch.randn(50, 30)[:, 4:12],
    "negated": lambda: torch.randn(50, 8, dtype=torch.complex64).conj().imag,
    "missing": lambda: None,
}


@pytest.mark.parametrize("kinds", [list(KINDS), *([kind] for kind in KINDS)], ids=lambda kinds: "-".join(kinds))
def test_gradients_of_every_kind(kinds, backend):
    plan = Plan(dict.fromkeys(["plain", *kinds], (50, 8)), 60, seed=3)
    grads = [torch.randn(50, 8), *(KINDS[kind]() for kind in kinds)]
    assert [grad.is_neg() for grad in grads if grad is not None].count(True) == ("negated" in kinds)
    theta, factors = torch.randn(60), plan.scales
    expected = ops.fastfood_adjoint(plan, theta, factors, grads, "reference")
    got = ops.fastfood_adjoint(
        plan, theta.to(DEVICE), factors.to(DEVICE), [g if g is None else g.to(DEVICE) for g in grads], backend
    )
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("dim, diagonal", [(1000, "gaussian"), (16384, "rademacher")])
def test_a_tensor_of_mbert(dim, diagonal, backend):
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    plan = Plan({name: shapes.mbert()[name] for name in names}, dim, seed=5, diagonal=diagonal)
    assert_same_everywhere(plan, torch.float32, backend)


@pytest.mark.parametrize("segments", [None, BANDS], ids=["whole", "bands"])
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
@pytest.mark.parametrize("q", range(5, 15))
def test_every_width(q, diagonal, segments, backend):
    width, tensors = 2**q, SMALL
    cases = [(dim, dtype) for dim in (width - 3, 2 * width + 5) for dtype in DTYPES]
    if backend == "triton":  # one of the six, another one each time
        if segments is None or (diagonal == "gaussian") != (q % 2 == 0):
            pytest.skip("left out: the interpreter takes seconds for each, the compiler too")
        cases = [cases[q % 6]]
    elif EMULATED:  # tests/csrc/test_cuda.cpp has the others
        cases = [cases[q % 6]]
    if ON_CPU:
        tensors = SMALL | {"a": (3, 2 * max(width, 4096) // 3)}
        segments = [whole("a", tensors["a"]), *BANDS[1:]]
    for dim, dtype in cases:
        options = {"diagonal": diagonal, "segments": segments, "chunks": "all"}
        plan = Plan(tensors, dim, seed=2**64 - 5, width=width, **options)
        plan.run_blocks = 1 + q % 3
        assert_same_everywhere(plan, dtype, backend)


@pytest.mark.parametrize("q", range(5, 15))
def test_one_chunk(q, backend):
    """Of every width: each block from one of three chunks; lists of blocks with several groups, a missing gradient."""
    if backend == "triton" and q not in (5, 8, 14):
        pytest.skip("left out: the interpreter takes seconds for each, the compiler too")
    width = 2**q
    tensors = {"a": (2 * width + 5,), "b": (7,), "w": (5, 3 * width // 4)}
    bands = [Segment("w", first, 5, width // 4, 3 * width // 4, f"head {first}") for first in (width // 4, width // 2)]
    segments = [whole("a", tensors["a"]), whole("b", (7,)), *bands]
    diagonal = ("gaussian", "rademacher")[q % 2]
    plan = Plan(tensors, 2 * width + 5, 5, width=width, chunks="one", diagonal=diagonal, segments=segments)
    plan.run_blocks = 1
    assert_same_everywhere(plan, DTYPES[q % 3], backend, missing=(1,))


def test_one_chunk_without_gradients(backend):
    """And of a chunk from which no block is made: what is written is zeros, of either sign."""
    plan = Plan({"f": (5,), "g": (9,)}, 90, width=32, chunks="one", part=True)
    assert max(map(stream_id, plan.names)) < 0, "whose remainders are those of unsigned numbers"
    assert plan.chunks_reached() == 2 < plan.chunks
    for missing in ((1,), (0, 1)):
        assert_same_everywhere(plan, torch.float32, backend, missing=missing)


class Conv1D(nn.Module):
    """As GPT-2 has it: the outputs are columns."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))


HEADS = {  # layers of attention modules with two heads of 6 values
    "rows and columns": {key: nn.Linear(12, 12) for key in ("query", "key", "value", "dense")},
    "three bands to a row": {"c_attn": Conv1D(36, 12), "c_proj": Conv1D(12, 12)},
    "shared key and value": {
        key: nn.Linear(12, outputs, bias=False)
        for key, outputs in {"q_proj": 12, "k_proj": 6, "v_proj": 6, "o_proj": 12}.items()
    },
}


@pytest.mark.parametrize("layout", HEADS)
def test_attention_heads(layout, backend):
    """A segment for each head of each tensor; one head is left out."""
    model = nn.ModuleDict(HEADS[layout])
    model.head_dim = 6
    hierarchy = Hierarchy.from_model(model, heads=True)
    without = find_attention(model, 0).pieces([1])
    hierarchy = hierarchy.select(hierarchy.tensors, without=without)
    plan = Plan(hierarchy.shapes, 20, segments=hierarchy.segments)
    assert len(without) >= 2 and len(plan.holes) > len(without)
    assert_same_everywhere(plan, torch.bfloat16, backend)


def test_missing_gradients(backend):
    plan = Plan(SMALL, 1000)
    assert_same_everywhere(plan, torch.float32, backend, missing=(0, 2))
    assert_same_everywhere(plan, torch.float32, backend, missing=(0, 1, 2, 3))


def test_sums_that_do_not_fit_come_in_waves(monkeypatch, backend):
    """Segments that end in the same wave, go on in the next and in one after that."""
    if backend != "triton":
        pytest.skip("Triton's: its tables can be made for less memory than there is")
    from hsaid_kernels.fastfood.triton import tables

    for most in (1, 2, 5):
        monkeypatch.setattr(tables, "SUMS_FLOATS", most << 12)
        plan = Plan({"a": (9 * 4096 + 5,), "b": (7,), "c": (3 * 4096,)}, 3000, seed=5, width=4096)
        plan.run_blocks = 2
        assert_same_everywhere(plan, torch.float32, "triton", missing=() if most == 2 else (1,))
    plan = Plan({"a": (9 * 4096 + 5,), "b": (7,), "c": (3 * 4096,)}, 8190, seed=5, width=4096, chunks="one")
    plan.run_blocks = 1
    assert_same_everywhere(plan, torch.float32, "triton")


def test_sums_of_many_chunks_come_in_waves(backend):
    """Of more groups than have a place in CUDA's workspace: a segment goes on in the next wave."""
    if INTERPRETED:
        pytest.skip("too long for the interpreter")
    plan = Plan({"a": (9 * 16384,), "b": (40,)}, 2**20, seed=5, chunks="all", diagonal="rademacher")
    assert plan.run_blocks == 1
    theta, factors, tensors = torch.randn(plan.dim), plan.scales, plan.views(values(plan, torch.float32))
    expected = ops.fastfood_adjoint(plan, theta, factors, tensors, "cpu")
    got = ops.fastfood_adjoint(plan, theta.to(DEVICE), factors.to(DEVICE), [t.to(DEVICE) for t in tensors], backend)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.fixture
def bfloat16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_no_base(backend, bfloat16_by_default):
    """Of a plan made in inference mode, whatever the default dtype."""
    with torch.inference_mode():
        plan = Plan(SMALL, 500, segments=BANDS)
    theta, factors = torch.randn(500, dtype=torch.float32), plan.scales.clone()
    for dtype in DTYPES:
        poison(plan.numel, dtype, DEVICE)
        got = ops.fastfood_forward(plan, theta.to(DEVICE), factors.to(DEVICE), [], dtype, backend)
        assert_same_bits(got.cpu(), ops.fastfood_forward(plan, theta, factors, [], dtype, "cpu"))


def test_mixed_dtypes(backend):
    """Each base in float32 or as the weights are, each gradient in any dtype."""
    plan = Plan(SMALL, 500, segments=BANDS)
    theta, factors, tensors = torch.randn(500), plan.scales, plan.views(values(plan, torch.float32))
    on = theta.to(DEVICE), factors.to(DEVICE)
    for half in DTYPES[1:]:
        base = [t.to(d) for t, d in zip(tensors, (half, torch.float32, half, torch.float32))]
        got = ops.fastfood_forward(plan, *on, [t.to(DEVICE) for t in base], half, backend)
        assert_same_bits(got.cpu(), ops.fastfood_forward(plan, theta, factors, base, half, "cpu"))
    grads = [t.to(d) for t, d in zip(tensors, (DTYPES[2], DTYPES[0], DTYPES[1], DTYPES[1]))]
    got = ops.fastfood_adjoint(plan, *on, [t.to(DEVICE) for t in grads], backend)
    for a, b in zip(got, ops.fastfood_adjoint(plan, theta, factors, grads, "cpu"), strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-42, 3e38])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_odd_values(value, backend):
    """Whatever the CPU makes of NaN, infinity, zeros with a sign, subnormal numbers and overflows."""
    plan = Plan({"a": (5000,), "b": (30,)}, 100)
    theta, factors, tensors = torch.randn(100), plan.scales.clone(), plan.views(torch.randn(plan.numel))
    for t in tensors:
        t[::3] = value
    on = theta.to(DEVICE), factors.to(DEVICE)
    for dtype in [torch.bfloat16] if ON_CPU else DTYPES:
        of_dtype = [t.to(dtype) for t in tensors]
        moved = [t.to(DEVICE) for t in of_dtype]
        got = ops.fastfood_forward(plan, *on, moved, dtype, backend), *ops.fastfood_adjoint(plan, *on, moved, backend)
        cpu = ops.fastfood_forward(plan, theta, factors, of_dtype, dtype, "cpu")
        for a, b in zip(got, (cpu, *ops.fastfood_adjoint(plan, theta, factors, of_dtype, "cpu")), strict=True):
            assert_same_bits(a.cpu(), b, str(dtype))


def test_strided_and_misaligned(backend):
    plan = Plan({"a": (300, 20), "b": (14000,)}, 500, seed=1)
    theta, factors = torch.randn(500), plan.scales
    x, y = torch.randn(20, 300).T, torch.randn(14000 + 1)[1:]
    cpu = ops.fastfood_forward(plan, theta, factors, [x, y], torch.float32, "cpu")
    cpu_grads = ops.fastfood_adjoint(plan, theta, factors, [x, y], "cpu")
    x, y = x.to(DEVICE), torch.cat([y[:1], y]).to(DEVICE)[1:]
    assert not x.is_contiguous() and y.data_ptr() % 16
    theta, factors = theta.to(DEVICE), factors.to(DEVICE)
    gpu = ops.fastfood_forward(plan, theta, factors, [x, y], torch.float32, backend)
    assert_same_bits(gpu.cpu(), cpu)
    for got, expected in zip(ops.fastfood_adjoint(plan, theta, factors, [x, y], backend), cpu_grads):
        assert_same_bits(got.cpu(), expected)


# --- some tiles of a segment alone

TILE = 2**14
LONG = 4 * TILE + 1003  # values: the last of five tiles is ragged


def listed_plan(width: int, dim: int, diagonal: str = "gaussian", chunks: str = "all") -> Plan:
    plan = Plan({"a": (LONG,)}, dim, seed=5, width=width, chunks=chunks, diagonal=diagonal)
    plan.run_blocks = 2
    return plan


def assert_same_listed(
    plan: Plan, entries: list[int], base: torch.Tensor | None, dtype: torch.dtype, backend: str, off: int = 0
) -> None:
    """Forward and adjoint, bit for bit the CPU backend's; base and gradient begin `off` elements into their memory."""
    listed, span = torch.tensor(entries, dtype=torch.int64), ops.row_span(plan, backend)
    theta = torch.randn(plan.dim, generator=torch.Generator().manual_seed(2))
    factors, bases = plan.scales.clone(), [] if base is None else [base]
    grad = torch.randn(len(entries) * TILE, generator=torch.Generator().manual_seed(3)).to(dtype)
    on = [t.to(DEVICE) for t in (theta, factors)]
    moved = [torch.cat([t[:off], t]).to(DEVICE)[off:] for t in (grad, *bases)]
    poison(len(entries) * TILE, dtype, DEVICE)
    got = ops.fastfood_forward(plan, *on, moved[1:], dtype, backend, listed.to(DEVICE), span)
    assert_same_bits(got.cpu(), ops.fastfood_forward(plan, theta, factors, bases, dtype, "cpu", listed, span))
    got = ops.fastfood_adjoint(plan, *on, moved[:1], backend, listed.to(DEVICE), span)
    expected = ops.fastfood_adjoint(plan, theta, factors, [grad], "cpu", listed, span)
    for what, a, b in zip(("dtheta", "dfactors"), got, expected, strict=True):
        assert_same_bits(a.cpu(), b, what)


@pytest.mark.parametrize(
    "width, dim, diagonal, dtype",
    [
        (32, 29, "rademacher", torch.float16),
        (32, 60, "gaussian", torch.float32),
        (256, 250, "gaussian", torch.bfloat16),
        (256, 500, "rademacher", torch.float32),
        (1024, 1000, "gaussian", torch.float32),
        (1024, 1000, "rademacher", torch.bfloat16),
        (TILE, TILE, "gaussian", torch.float16),
        (TILE, TILE + 5, "rademacher", torch.bfloat16),
    ],
)
def test_listed_tiles(width, dim, diagonal, dtype, backend):
    plan = listed_plan(width, dim, diagonal)
    base = torch.randn(LONG, generator=torch.Generator().manual_seed(1))
    for entries in ([2], [0, 4], list(range(5)), []):
        assert_same_listed(plan, entries, base.to(dtype), dtype, backend)
    assert_same_listed(plan, [1, 4], base, dtype, backend, off=1)
    assert_same_listed(plan, [1, 4], None, dtype, backend)


@pytest.mark.parametrize(
    "width, diagonal, dtype", [(TILE // 4, "rademacher", DTYPES[2]), (TILE, "gaussian", DTYPES[1])]
)
def test_listed_tiles_of_one_chunk(width, diagonal, dtype, backend):
    """Each block from one of two chunks, one of which none may be from."""
    plan = listed_plan(width, width + 5, diagonal, "one")
    base = torch.randn(LONG, generator=torch.Generator().manual_seed(1))
    for entries in ([0], [1, 2, 4], []):
        assert_same_listed(plan, entries, base.to(dtype), dtype, backend)


def test_all_tiles_listed_are_the_whole(backend):
    plan = listed_plan(256, 250)
    theta, factors, base = torch.randn(250).to(DEVICE), plan.scales.to(DEVICE), torch.randn(LONG).to(DEVICE)
    whole = ops.fastfood_forward(plan, theta, factors, [base], torch.float32, backend)
    listed = torch.arange(5, device=DEVICE)
    got = ops.fastfood_forward(plan, theta, factors, [base], torch.float32, backend, listed, 64)
    assert_same_bits(got[:LONG], whole[:LONG])
    assert not got[LONG:].any()
    padded = torch.nn.functional.pad(base, (0, 5 * TILE - LONG))
    got = ops.fastfood_adjoint(plan, theta, factors, [padded], backend, listed, 64)
    for a, b in zip(got, ops.fastfood_adjoint(plan, theta, factors, [base], backend), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("width", [1024, TILE])
def test_listed_tiles_come_in_waves(width, monkeypatch, backend):
    if backend != "triton":
        pytest.skip("Triton's, whose tables can be made for less memory than there is; CUDA's waves know of no list")
    from hsaid_kernels.fastfood.triton import tables

    monkeypatch.setattr(tables, "SUMS_FLOATS", 2 * TILE)
    plan = listed_plan(width, 1000)
    plan.run_blocks = 1
    for entries in ([1], [0, 1, 2, 4], list(range(5))):
        assert_same_listed(plan, entries, None, torch.float32, backend)


@on_a_device
@pytest.mark.parametrize("dim, chunks", [(1000, "all"), (2000, "one")])
def test_listed_tiles_in_a_cuda_graph(dim, chunks, backend):
    """Which the device alone knows: they differ from one replay to the next."""
    plan = listed_plan(1024, dim, chunks=chunks)
    theta, factors, base = torch.randn(dim), plan.scales.clone(), torch.randn(LONG)
    grad, listed, span = torch.randn(2 * TILE), torch.tensor([0, 4]), ops.row_span(plan, backend)
    on = [t.cuda() for t in (theta, factors, base, grad)]
    static = listed.cuda()

    def run():
        forward = ops.fastfood_forward(plan, *on[:2], [on[2]], torch.float32, backend, static, span)
        return forward, *ops.fastfood_adjoint(plan, *on[:2], [on[3]], backend, static, span)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for entries in ([0, 4], [1, 3]):
        listed = torch.tensor(entries)
        static.copy_(listed)
        graph.replay()
        forward = ops.fastfood_forward(plan, theta, factors, [base], torch.float32, "cpu", listed, span)
        expected = forward, *ops.fastfood_adjoint(plan, theta, factors, [grad], "cpu", listed, span)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.cpu(), b)


@on_a_device
@pytest.mark.parametrize("chunks", ["all", "one"])
def test_theta_of_many_chunks_in_little_memory(chunks, backend):
    plan = Plan({"a": (20, 16384)}, 2**20, chunks=chunks, part=True)
    assert_same_everywhere(plan, torch.float32, backend)
    theta, factors = torch.randn(plan.dim, device="cuda"), plan.scales.cuda()
    tensors = plan.views(values(plan, torch.float32).cuda())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.fastfood_adjoint(plan, theta, factors, tensors, backend)
    assert torch.cuda.max_memory_allocated() - before <= 70e6


@on_a_device
def test_twenty_runs(backend):
    plan = Plan(shapes.mbert(), 16384)
    theta, factors = torch.randn(plan.dim, device="cuda"), plan.scales.cuda()
    tensors = plan.views(values(plan, torch.float32).cuda())
    runs = []
    for _ in range(20):
        weights = ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, backend)
        runs.append((weights.view(torch.int32).sum(), *ops.fastfood_adjoint(plan, theta, factors, tensors, backend)))
        del weights
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@on_a_device
@pytest.mark.parametrize("chunks", ["all", "one"])
@pytest.mark.parametrize("width", [128, 1024, 16384])
def test_twenty_runs_of_all_that_goes_through_memory(width, chunks, backend):
    """Bands, misaligned tensors and several chunks: where a missing barrier would show, now and then."""
    plan = Plan(SMALL, 2 * width + 5, width=width, chunks=chunks, segments=BANDS)
    flat = values(plan, torch.float32)
    theta, factors, tensors = torch.randn(plan.dim), plan.scales, plan.views(flat)
    expected = (
        ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, "cpu"),
        *ops.fastfood_adjoint(plan, theta, factors, tensors, "cpu"),
    )
    off = plan.views(torch.cat([flat[:1], flat]).to(DEVICE)[1:])
    on = theta.to(DEVICE), factors.to(DEVICE)
    for _ in range(20):
        got = (
            ops.fastfood_forward(plan, *on, off, torch.float32, backend),
            *ops.fastfood_adjoint(plan, *on, off, backend),
        )
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 31, 64, 500, 1024, 3000, 16384, 32768, 40000, *LONG_ROWS])
def test_hadamard_transform(dim, dtype, backend):
    if ON_CPU and dim > 2**17:
        pytest.skip("too long for a CPU")
    x = torch.randn(3, dim).to(dtype)
    on = x.to(DEVICE)
    poison(3 * dim, dtype, DEVICE)
    assert_same_bits(hadamard_transform(on, 0.3, backend).cpu(), hadamard_transform(x, 0.3))
    if dim > 1:  # rows that begin anywhere
        assert_same_bits(hadamard_transform(on[:, :-1], 0.3, backend).cpu(), hadamard_transform(x[:, :-1], 0.3))


def test_forms_of_hadamard_transform(backend):
    """Other dimensions, complex numbers, in place and into a tensor: torch around the op."""
    for dtype in (torch.float32, torch.complex64):
        x = torch.randn(3, 5, 40, dtype=dtype)
        on = x.to(DEVICE)
        for dim in (0, 1, -1):
            expected = torch.view_as_real(hadamard_transform(x, 0.5, dim=dim) + 0j)
            out = torch.empty_like(on)
            forms = (
                hadamard_transform(on, 0.5, backend, dim=dim),
                hadamard_transform(on, 0.5, backend, dim=dim, out=out),
                hadamard_transform_(on.clone(), 0.5, backend, dim=dim),
            )
            for got in forms:
                assert got.dtype == dtype and got.device == on.device
                assert_same_bits(torch.view_as_real(got + 0j).cpu(), expected)
    with pytest.raises(TypeError, match=f"x: expected floating-point or complex numbers for backend '{backend}'"):
        hadamard_transform(torch.ones(4, dtype=torch.int32, device=DEVICE), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [12, 20, 28])
def test_order_of_hadamard_transform(order, dtype, backend):
    for size in (1, order, 5 * order, 1000, order << 8, *([order << 16] if order == 12 and not INTERPRETED else [])):
        x = torch.randn(3, size).to(dtype)
        got = hadamard_transform(x.to(DEVICE), 0.3, backend, order=order)
        assert got.is_contiguous()
        assert_same_bits(got.cpu(), hadamard_transform(x, 0.3, order=order))
    x = torch.randn(2, order, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(hadamard_transform(x, 0.7, backend, order=order).sum(), x)
    assert_same_bits(grad, hadamard_transform(torch.ones_like(x), 0.7, backend, order=order))
    assert hadamard_transform(x[:0], backend=backend, order=order).shape == (0, order)
    op = ops.kernels(backend).hadamard_transform
    for wrong, which in ((torch.ones(3, order + 1), order), (torch.ones(3, 3 * order), order), (torch.ones(3, 5), 5)):
        with pytest.raises(
            RuntimeError, match="(x: expected float32 and rows of|order: expected 1, 12, 20 or 28, got 5)"
        ):
            op(wrong.to(DEVICE), 1.0, which)


def test_hadamard_transform_is_differentiable(backend):
    x = torch.randn(2, 12, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard_transform(x, 0.7, backend), (x,))
    assert hadamard_transform(torch.randn(0, 5, device=DEVICE), backend=backend).shape == (0, 5)
    x = torch.randn(2, 12, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(hadamard_transform(x, 0.7, backend).sum(), x)
    assert_same_bits(grad, hadamard_transform(torch.ones_like(x), 0.7, backend))
    f = functools.partial(hadamard_transform, scale=0.7, backend=backend)
    assert_same_bits(torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))[1], grad)
    assert_same_bits(torch.func.vmap(f, 1)(x.detach().mT.contiguous()), f(x.detach()))
    hessian = torch.func.hessian(lambda x: f(x).square().sum() / 2)(x.detach()[0])
    torch.testing.assert_close(hessian, f(f(torch.eye(12, device=DEVICE))))


@pytest.mark.parametrize("width", [32, 64, 128, 256, 512, 4096, 8192, 16384])
def test_stream_values(width, backend):
    for purpose in (0, 1, 2):
        for rademacher in (False, True):
            arguments = (2**63 - 3, -77, purpose, 5 * (purpose == 0), 3, width, rademacher)
            cpu = torch.ops.hsaid_kernels.stream_values(torch.ones(1), *arguments)
            assert_same_bits(kernels(backend).stream_values(torch.ones(1, device=DEVICE), *arguments).cpu(), cpu)


# --- as PyTorch expects of an operation on a GPU


def model() -> nn.Module:
    torch.manual_seed(3)
    hidden = [] if ON_CPU else [nn.Linear(300, 300), nn.ReLU()]
    return nn.Sequential(nn.Linear(40, 300), nn.ReLU(), *hidden, nn.Linear(300, 4))


def test_training_ends_where_it_does_on_the_cpu_within_rounding(backend):
    x, y = torch.randn(64, 40), torch.randint(4, (64,))
    losses = {}
    for name, device in (("cpu", torch.device("cpu")), (backend, DEVICE)):
        hsaid = HSAID(model().to(device), intrinsic_dim=300, partition="said", backend=name)
        optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.5)
        for _ in range(2 if ON_CPU else 5):
            loss = nn.functional.cross_entropy(hsaid(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
        assert hsaid.theta.device.type == device.type
    assert losses[backend] == pytest.approx(losses["cpu"], rel=0 if ON_CPU else 1e-4)


@on_a_device
def test_a_training_step_as_a_cuda_graph(backend):
    plan = Projection.from_shapes(SMALL, dim=1000, seed=4, backend=backend)
    base = plan.plan.views(values(plan.plan, torch.float32).cuda())
    target = {name: torch.randn(shape, device="cuda") for name, shape in SMALL.items()}
    base = dict(zip(SMALL, base))

    def step(theta):
        weights = plan.forward(theta, base=base)
        sum(((weights[name] - target[name]) ** 2).sum() for name in SMALL).backward()
        with torch.no_grad():
            theta -= 1e-3 * theta.grad
            theta.grad.zero_()

    eager, static = (torch.zeros(1000, device="cuda", requires_grad=True) for _ in range(2))
    for _ in range(6):
        step(eager)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)
    for _ in range(4):
        graph.replay()
    assert_same_bits(static.detach().cpu(), eager.detach().cpu())


@on_a_device
def test_compiled_into_cuda_graphs(backend, monkeypatch):
    """mode="reduce-overhead": graphs are recorded, and give the same losses as eager mode, within rounding."""
    recorded = []

    class Recorded(torch.cuda.CUDAGraph):
        def capture_begin(self, *args, **kwargs):
            recorded.append(self)
            super().capture_begin(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    x, y = torch.randn(64, 40, device=DEVICE), torch.randint(4, (64,), device=DEVICE)
    losses = []
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(0)
        hsaid = HSAID(model().to(DEVICE), intrinsic_dim=300, partition="said", backend=backend)
        module = torch.compile(hsaid, mode=mode, fullgraph=True) if mode else hsaid
        optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.05)
        for _ in range(8):
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[0]) and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert recorded, "inductor found something that no CUDA graph can hold"


@on_a_device
def test_two_streams(backend):
    plan = Plan(shapes.mbert(), 1000)
    factors, tensors = plan.scales.cuda(), plan.views(values(plan, torch.float32).cuda())
    thetas = [torch.randn(1000, device="cuda") for _ in range(2)]
    expected = [ops.fastfood_adjoint(plan, theta, factors, tensors, backend) for theta in thetas]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in thetas]
    for _ in range(3):
        got = []
        for stream, theta in zip(streams, thetas):
            with torch.cuda.stream(stream):
                ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, backend)
                got.append(ops.fastfood_adjoint(plan, theta, factors, tensors, backend))
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@on_a_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_second_device(backend):
    plan = Plan(SMALL, 1000)
    theta, factors, flat = torch.randn(1000), plan.scales, values(plan, torch.float32)
    first, second = (
        ops.fastfood_forward(plan, theta.to(d), factors.to(d), plan.views(flat.to(d)), torch.float32, backend)
        for d in ("cuda:0", "cuda:1")
    )
    assert second.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(second.cpu(), first.cpu())


def test_opcheck(backend):
    plan = Plan({"a": (300,), "b": (7,)}, 100)
    theta, factors = torch.randn(100, device=DEVICE), plan.scales.to(DEVICE)
    tensors = [torch.randn(300, device=DEVICE), torch.randn(7, device=DEVICE)]
    table = (plan.segments, 3, plan.width, False)
    op = kernels(backend)
    torch.library.opcheck(
        op.fastfood_forward.default, (theta, factors, tensors, *table, plan.holes, plan.numel, torch.float32)
    )
    torch.library.opcheck(op.fastfood_adjoint.default, (theta, factors, [tensors[0], None], *table, plan.run_blocks))
    one, listed = Plan({"a": (300,)}, 100), torch.tensor([0], device=DEVICE)
    table = (one.segments, 3, one.width, False)
    of_listed = (listed, ops.row_span(one, backend))
    torch.library.opcheck(
        op.fastfood_forward.default,
        (theta, factors[:1], tensors[:1], *table, one.holes, one.numel, torch.float32, *of_listed),
    )
    grad = torch.randn(TILE, device=DEVICE)
    torch.library.opcheck(op.fastfood_adjoint.default, (theta, factors[:1], [grad], *table, one.run_blocks, *of_listed))
    torch.library.opcheck(op.hadamard_transform.default, (torch.randn(2, 5, device=DEVICE, requires_grad=True), 0.5))
    torch.library.opcheck(op.stream_values.default, (theta, 7, -5, 0, 3, 1, 64, False))


def test_compiles_without_a_graph_break(backend):
    plan = Plan({"a": (300,), "b": (7,)}, 100)
    theta, factors = torch.randn(100, device=DEVICE), plan.scales.to(DEVICE)

    def f(theta):
        return ops.fastfood_forward(plan, theta * 2, factors, [], torch.float32, backend) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(theta), f(theta))


# --- bad input


def arguments(**changes):
    plan = Plan(SMALL, 200)
    theta, tensors = torch.ones(200, device=DEVICE), plan.views(torch.ones(plan.numel, device=DEVICE))
    given = dict(theta=theta, factors=plan.scales.to(DEVICE), base=tensors, segments=plan.segments, seed=0, width=256)
    return given | dict(rademacher=False, holes=plan.holes, numel=plan.numel, dtype=torch.float32) | changes


def changed(table, row, column, value):
    table = table.clone()
    table[row, column] = value
    return table


@on_a_device
@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda a: {"theta": a["theta"].cpu()}, "theta: expected a tensor on a (CUDA device|GPU), got one on"),
        (lambda a: {"factors": a["factors"].cpu()}, "factors: expected a tensor on .*0, where theta is, got one on"),
        (lambda a: {"base": [*a["base"][:3], a["base"][3].cpu()]}, "base: expected a tensor on .*0, where theta is"),
        (lambda a: {"segments": a["segments"].cuda()}, "segments: expected a contiguous int64 table .* on the CPU"),
    ],
)
def test_arguments_elsewhere(changes, message, backend):
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        kernels(backend).fastfood_forward(**(given | changes(given)))
    torch.cuda.synchronize()  # and nothing has been launched that fails later


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda a: {"base": [t.double() for t in a["base"]]}, "base: expected float32, bfloat16 or float16"),
        (lambda a: {"base": [t.half() for t in a["base"]]}, "base: expected tensors in float32 or in the dtype of the"),
        (lambda a: {"base": a["base"][:3]}, "segments: row 3 is no segment of this plan"),
        (lambda a: {"base": [*a["base"][:3], a["base"][3][:69]]}, "base: tensor 3 has 6624 elements.* needs 6720"),
        (lambda a: {"theta": a["theta"].double()}, "theta: expected a float32 tensor of 200 values"),
        (lambda a: {"factors": a["factors"][:2]}, "factors: expected a float32 tensor of 4 values"),
        (lambda a: {"segments": a["segments"][:, :7]}, "segments: expected a contiguous int64 table"),
        (lambda a: {"segments": changed(a["segments"], 1, 0, -1)}, "segments: row 1 is no segment of this plan"),
        (lambda a: {"segments": changed(a["segments"], 2, 3, 2**62)}, "segments: row 2 is no segment of this plan"),
        (lambda a: {"holes": changed(a["holes"], 0, 4, 0)}, "holes: row 0 is no hole of this plan"),
        (lambda a: {"width": 128}, "segments: row 1 is no segment of this plan"),
        (lambda a: {"width": 100}, "width: expected a power of two from 32 to 16384, got 100"),
        (
            lambda a: {"width": 32, "theta": torch.ones(2**21 + 1, device=DEVICE)},
            "width: expected chunks .* 65536, got 65",
        ),
        (lambda a: {"numel": 64}, "numel: expected at least [0-9]+, got 64"),
        (lambda a: {"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments(changes, message, backend):
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        kernels(backend).fastfood_forward(**(given | changes(given)))
    if not ON_CPU:
        torch.cuda.synchronize()


def test_bad_arguments_of_the_others(backend):
    plan, op = Plan(SMALL, 200), kernels(backend)
    theta, factors, grads = torch.ones(200, device=DEVICE), plan.scales.to(DEVICE), [None] * 4
    with pytest.raises(RuntimeError, match="run_blocks: expected .*1.*, got 0"):
        op.fastfood_adjoint(theta, factors, grads, plan.segments, 0, 256, False, 0)
    if backend == "triton":
        with pytest.raises(RuntimeError, match="run_blocks: Triton expects at most 524287, got 67108864"):
            op.fastfood_adjoint(theta, factors, grads, plan.segments, 0, 256, False, 2**26)
    with pytest.raises(RuntimeError, match="grads: tensor 1 has 1002 elements, the plan needs 1003"):
        short = [None, torch.ones(1002, device=DEVICE), None, None]
        op.fastfood_adjoint(theta, factors, short, plan.segments, 0, 256, False, 24)
    with pytest.raises(RuntimeError, match="purpose: expected 0, 1 or 2, got 3"):
        op.stream_values(theta, 0, 0, 3, 0, 0, 64, False)


LISTED = torch.tensor([0, 4])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"span": 32}, "span: expected 64, a tile of 16384 values, got 32"),
        ({"listed": LISTED.int()}, r"listed: expected a contiguous int64 tensor \[count\]"),
        ({"listed": torch.arange(6)}, "listed: expected at most 5 entries of 64 blocks, got 6"),
        ({"listed": LISTED.flip(0)}, "listed: expected rising numbers from 0 to 4, got "),
        ({"listed": LISTED + 1}, "listed: expected rising numbers from 0 to 4, got "),
    ],
)
def test_bad_lists(changes, message, backend):
    if not ON_CPU and "rising" in message:
        pytest.skip("the values are the device's")
    plan = listed_plan(256, 200)
    given = {"listed": LISTED, "span": 64} | changes
    given["listed"] = given["listed"].to(DEVICE)
    theta, factors, table = torch.ones(200, device=DEVICE), plan.scales.to(DEVICE), (plan.segments, 0, 256, False)
    with pytest.raises(RuntimeError, match=message):
        kernels(backend).fastfood_forward(theta, factors, [], *table, plan.holes, plan.numel, torch.float32, **given)
    with pytest.raises(RuntimeError, match=message):
        grad = torch.ones(2 * TILE, device=DEVICE)
        kernels(backend).fastfood_adjoint(theta, factors, [grad], *table, plan.run_blocks, **given)


def test_lists_of_other_plans(backend):
    """Of several segments, of a gradient that is too short, and of a list that lies elsewhere."""
    given = arguments(listed=torch.tensor([0], device=DEVICE), span=64)
    with pytest.raises(RuntimeError, match="segments: expected one dense segment"):
        kernels(backend).fastfood_forward(**given)
    plan, op = listed_plan(256, 200), kernels(backend)
    rest = (plan.segments, 0, 256, False, plan.run_blocks)
    theta, factors, grad = torch.ones(200, device=DEVICE), plan.scales.to(DEVICE), torch.ones(TILE, device=DEVICE)
    with pytest.raises(RuntimeError, match="grads: tensor 0 has 16384 elements, the plan needs 32768"):
        op.fastfood_adjoint(theta, factors, [grad], *rest, LISTED.to(DEVICE), 64)
    if not ON_CPU:
        with pytest.raises(RuntimeError, match="listed: expected a tensor on .*0, where theta is, got one on"):
            op.fastfood_adjoint(theta, factors, [grad], *rest, LISTED, 64)


@pytest.mark.skipif(not EMULATED, reason="only of an emulated device the compute capability can be chosen")
def test_a_device_of_too_little_shared_memory(monkeypatch, backend):
    """A Turing card: named, the backend says what it needs; what goes round that fails, and leaves nothing behind."""
    monkeypatch.setenv("HSAID_EMULATED_CAPABILITY", "7.5")
    projection = Projection.from_shapes(SMALL, dim=200, backend=backend)
    message = (
        "^backend: 'cuda' cannot be used: cpu has compute capability 7.5, and 8.0 is needed at least: its kernels "
    )
    with pytest.raises(RuntimeError, match=message):
        projection.forward(torch.ones(200))
    with pytest.raises(RuntimeError, match=message):
        projection.adjoint({name: torch.ones(shape) for name, shape in SMALL.items()}, torch.ones(200))
    with pytest.raises(RuntimeError, match=message):
        hadamard_transform(torch.ones(4), backend=backend)
    with pytest.raises(RuntimeError, match="forward_z_kernel.* bytes of shared memory: the device has 65536"):
        kernels(backend).fastfood_forward(**arguments())
    monkeypatch.setenv("HSAID_EMULATED_CAPABILITY", "8.6")
    expected = Projection.from_shapes(SMALL, dim=200, backend="cpu").forward(torch.ones(200))
    for name, tensor in projection.forward(torch.ones(200)).items():
        assert_same_bits(tensor, expected[name], name)


@on_a_device
def test_bad_arguments_of_a_projection(backend):
    projection = Projection.from_shapes(SMALL, dim=200, backend=backend)
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        projection.forward(torch.ones(200, device="cuda"), base={n: torch.ones(s) for n, s in SMALL.items()})
    with pytest.raises(RuntimeError, match="backend: 'cpu' expects tensors on the CPU, got tensors on cuda:0"):
        Projection.from_shapes(SMALL, dim=200, backend="cpu").forward(torch.ones(200, device="cuda"))
    with pytest.raises(RuntimeError, match=f"backend: '{backend}' expects tensors on a .*, got tensors on cpu"):
        projection.forward(torch.ones(200))
