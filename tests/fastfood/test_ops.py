"""The ops as torch sees them, `hadamard_transform`, the choice of a backend, and arguments that lie to an op."""

import functools
import math
import re

import pytest
import scipy.linalg
import torch
from helpers import ISAS, assert_same_bits, cpu_isa, poison
from torch import Tensor

from hsaid_kernels import available_backends, hadamard_transform
from hsaid_kernels.fastfood import ops, reference
from hsaid_kernels.fastfood.plan import COLUMNS, Plan, stream_id
from hsaid_kernels.fastfood.projection import Projection

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.hsaid_kernels
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_cpu = pytest.mark.skipif(not ISAS, reason=f"cpu: {available_backends()['cpu']}")


def forward_arguments(**changes) -> dict:
    plan = Plan({"a": (4, 100), "b": (7,)}, 100, 2**64 - 1)
    arguments = {
        "theta": torch.randn(plan.dim),
        "factors": plan.scales,
        "base": [torch.randn(4, 100), torch.randn(7)],
        "segments": plan.segments,
        "seed": -1,
        "width": plan.width,
        "rademacher": False,
        "holes": plan.holes,
        "numel": plan.numel,
        "dtype": torch.float32,
    }
    return arguments | changes


def adjoint_arguments(**changes) -> dict:
    arguments = forward_arguments()
    grads = arguments.pop("base")
    del arguments["holes"], arguments["numel"], arguments["dtype"]
    return arguments | {"grads": grads, "run_blocks": 4096} | changes


# --- what torch asks of an op


@needs_cpu
@pytest.mark.parametrize("rademacher", [False, True])
@pytest.mark.parametrize("dtype", ops.WEIGHT_DTYPES)
def test_opcheck_forward(dtype, rademacher):
    for base in ([], [torch.randn(4, 100), torch.randn(7, dtype=dtype)]):
        arguments = forward_arguments(base=base, dtype=dtype, rademacher=rademacher)
        torch.library.opcheck(OPS.fastfood_forward.default, (), arguments)


@needs_cpu
@pytest.mark.parametrize("rademacher", [False, True])
@pytest.mark.parametrize("dtype", ops.WEIGHT_DTYPES)
def test_opcheck_adjoint(dtype, rademacher):
    grads = [torch.randn(100, 4, dtype=dtype).T, None]
    torch.library.opcheck(OPS.fastfood_adjoint.default, (), adjoint_arguments(grads=grads, rademacher=rademacher))


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (2, 5), (3, 0, 7), (2, 3, 64)])
def test_opcheck_hadamard_transform(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for grad in (False, True):
        torch.library.opcheck(OPS.hadamard_transform.default, (x.requires_grad_(grad), 0.5))
    strided = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].to(dtype).requires_grad_()
    torch.library.opcheck(OPS.hadamard_transform.default, (strided, 2.0))


@needs_cpu
def test_opcheck_stream_values():
    torch.library.opcheck(OPS.stream_values.default, (torch.empty(0), 7, -5, 0, 3, 1, 64, False))


@needs_cpu
def test_ops_do_not_alias(isa):
    """Outputs share memory with no input and with no other output."""
    arguments = forward_arguments()
    flat = OPS.fastfood_forward(**arguments)
    dtheta, dfactors = OPS.fastfood_adjoint(**adjoint_arguments())
    x = torch.randn(4)
    tensors = [flat, dtheta, dfactors, hadamard_transform(x), x, arguments["theta"], *arguments["base"]]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@needs_cpu
@pytest.mark.parametrize("width", [32, 256, 16384])
def test_stream_values(width):
    """The scalar streams of csrc/core, which every kernel is tested against, are the reference's."""
    seed, stream, block, chunk = 2**63 + 11, stream_id("a"), 2**28 - 1, 5
    numbers, first = torch.tensor([block]), torch.tensor([0])
    values = functools.partial(OPS.stream_values, torch.empty(0), seed - 2**64, stream)
    gaussian = reference.gaussian(seed, stream, numbers, chunk, width)[0]
    signs = reference.rademacher(seed, stream, reference.DIAGONAL, numbers, chunk, width)[0]
    b = reference.rademacher(seed, stream, reference.SIGNS, first, chunk, width)[0]
    pi = reference.permutation(seed, stream, chunk, width).float()
    assert_same_bits(values(reference.DIAGONAL, block, chunk, width, False), gaussian, "gaussian")
    assert_same_bits(values(reference.DIAGONAL, block, chunk, width, True), signs, "rademacher")
    assert_same_bits(values(reference.SIGNS, 0, chunk, width, False), b, "B")
    assert_same_bits(values(reference.PERMUTATION, 0, chunk, width, False), pi, "permutation")


# --- hadamard_transform


def exact_transform(x: Tensor) -> Tensor:
    """float64 H x by scipy's matrix: H of order 2^a 2^b is the Kronecker product of those of order 2^a and 2^b."""
    dim = x.shape[-1]
    q = max(0, dim - 1).bit_length()
    high, low = (torch.tensor(scipy.linalg.hadamard(2**bits), dtype=torch.float64) for bits in (q // 2, q - q // 2))
    padded = torch.nn.functional.pad(x.double(), (0, 2**q - dim)).view(*x.shape[:-1], len(high), len(low))
    return (high @ padded @ low).flatten(-2)[..., :dim]


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [*range(1, 41), 1000, 4096, 2**15, 2**17])
def test_hadamard_transform(dim, dtype):
    """A stage is orthogonal but for its rounding: q stages and the scaling err by (q + 1) u |H x| at most."""
    x = torch.randn(3, dim).to(dtype)
    n = 1 << max(0, dim - 1).bit_length()
    scale = 1 / math.sqrt(n)
    poison(x.numel(), dtype)
    y = hadamard_transform(x, scale)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    exact = exact_transform(x) * scale
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    bound = n.bit_length() * compute.eps / 2 * x.double().norm(dim=-1, keepdim=True)
    if dtype in (torch.bfloat16, torch.float16):
        bound = bound + torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dim", [1, 2, 3, 31, 32, 33, 100, 128, 1000, 2**14, 2**15, 2**17])
def test_hadamard_transform_has_the_same_bits_on_every_isa(dim, isa):
    x = torch.randn(2, dim)
    assert_same_bits(hadamard_transform(x, 0.3), reference.hadamard_transform(x, 0.3), isa)
    assert_same_bits(hadamard_transform(x.double(), 0.3), reference.hadamard_transform(x.double(), 0.3), isa)


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (4, 0, 5), (2, 3, 4, 5), (7, 1, 5)])
def test_hadamard_transform_takes_any_leading_shape(shape, name):
    x = torch.randn(shape)
    y = hadamard_transform(x, backend=name)
    assert y.shape == shape
    torch.testing.assert_close(y.double(), exact_transform(x), rtol=0, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_hadamard_transform_of_strided_tensors(dtype):
    x = torch.randn(6, 50, 4).to(dtype)
    for strided in (x.mT, x[:, ::3].mT, x[::2, 7:40].mT, x[:, :, :1].expand(6, 50, 9), x[..., 1], x[5]):
        before = strided.clone()
        assert_same_bits(hadamard_transform(strided), hadamard_transform(strided.contiguous()))
        assert torch.equal(strided, before), "the input is left as it was"


@needs_cpu
def test_hadamard_transform_scale():
    x = torch.randint(-8, 9, (3, 24)).float()
    assert torch.equal(hadamard_transform(x, 0.25), hadamard_transform(x) * 0.25)
    assert torch.equal(hadamard_transform(x, 0), torch.zeros(3, 24))
    orthonormal = hadamard_transform(hadamard_transform(torch.eye(64), 1 / 8), 1 / 8)
    assert torch.equal(orthonormal, torch.eye(64))


@needs_cpu
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_hadamard_transform_of_nan_and_inf(value):
    x = torch.ones(2, 40)
    x[1, 17] = value
    y = hadamard_transform(x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@needs_cpu
def test_hadamard_transform_compiles_whole():
    f = torch.compile(lambda x: hadamard_transform(x * 2, 0.5).sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 10, requires_grad=True)
    f(x).backward()
    expected = torch.autograd.grad(hadamard_transform(x * 2, 0.5).sum(), x)[0]
    assert_same_bits(x.grad, expected)


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([1.0, 2.0], TypeError, "x: expected a tensor in float32, .*, int32 or int64, got list"),
        (torch.ones(4, dtype=torch.int8), TypeError, "got torch.int8"),
        (torch.ones(4, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.tensor(1.0), ValueError, r"x: expected at least one dimension, got shape \(\)"),
        (torch.ones(3, 0), ValueError, r"x: expected a size of at least 1 along dimension -1, got shape \(3, 0\)"),
    ],
)
def test_hadamard_transform_refuses(x, error, message):
    with pytest.raises(error, match=message):
        hadamard_transform(x)


# --- backends


def test_available_backends():
    """True, or a reason in words; a copy, which nobody can spoil."""
    found = available_backends()
    assert set(found) == {"cpu", "cuda", "triton", "reference"} and found["reference"] is True
    for reason in found.values():
        assert reason is True or (isinstance(reason, str) and len(reason) > 10)
    found["reference"] = "gone"
    assert available_backends()["reference"] is True


def test_choose_backend(monkeypatch):
    everything = dict.fromkeys(("cpu", "cuda", "triton", "reference"), True)
    monkeypatch.setattr(ops, "_AVAILABLE", everything)
    monkeypatch.setattr(ops, "_capability", lambda device: (9, 0))
    cpu, cuda, xpu = torch.device("cpu"), torch.device("cuda", 1), torch.device("xpu")
    assert ops.choose_backend("auto", cpu) == ops.choose_backend("cpu", cpu) == "cpu"
    assert ops.choose_backend("auto", cuda) == ops.choose_backend("cuda", cuda) == "cuda"
    assert ops.choose_backend("auto", xpu) == ops.choose_backend("triton", cuda) == "triton"
    assert ops.choose_backend("reference", cpu) == "reference"
    monkeypatch.setattr(ops, "_AVAILABLE", everything | {"cuda": "not built"})
    assert ops.choose_backend("auto", cuda) == "triton"
    monkeypatch.setattr(ops, "_AVAILABLE", everything | {"cuda": "not built", "triton": "not installed"})
    message = "^backend: 'cuda' cannot be used: not built; 'triton' cannot be used: not installed$"
    with pytest.raises(RuntimeError, match=message):
        ops.choose_backend("auto", cuda)
    monkeypatch.setattr(ops, "_AVAILABLE", everything)
    for backend, device in [("cpu", cuda), ("cuda", cpu), ("triton", cpu), ("reference", cuda)]:
        message = f"backend: '{backend}' expects tensors on .*, got tensors on {device}"
        with pytest.raises(RuntimeError, match=message):
            ops.choose_backend(backend, device)
    with pytest.raises(RuntimeError, match="backend: nothing serves tensors on device type 'mps'"):
        ops.choose_backend("auto", torch.device("mps"))
    expected = "backend: expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'gpu'"
    with pytest.raises(ValueError, match=expected):
        ops.choose_backend("gpu", cpu)


@pytest.fixture
def gpus(monkeypatch):
    """gpus((7, 5), ...): from then on the machine has GPUs of these compute capabilities, and all backends."""
    asked_each_time = ops._capability.__wrapped__

    def plug_in(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(ops, "_AVAILABLE", dict.fromkeys(("cpu", "cuda", "triton", "reference"), True))
        monkeypatch.setattr(ops, "_capability", asked_each_time)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])

    return plug_in


OF_CUDA = "{} has compute capability {}, and 8.0 is needed at least: its kernels take 99 KB of shared memory"
OF_TRITON = "{} has compute capability {}, and 7.5 is needed at least: its kernels are compiled for none that is older"


def test_turing_takes_triton(gpus):
    gpus((7, 5))
    t4 = torch.device("cuda", 0)
    assert available_backends() == {
        "cpu": True,
        "cuda": OF_CUDA.format("cuda:0", "7.5"),
        "triton": True,
        "reference": True,
    }
    assert ops.choose_backend("auto", t4) == ops.choose_backend("triton", t4) == "triton"
    assert ops.choose_device() == torch.device("cuda")
    with pytest.raises(RuntimeError, match=f"^backend: 'cuda' cannot be used: {OF_CUDA.format('cuda:0', '7.5')}$"):
        ops.choose_backend("cuda", t4)


def test_older_gpus_are_refused(gpus):
    gpus((7, 0))
    v100 = torch.device("cuda", 0)
    found = available_backends()
    assert (found["cuda"], found["triton"]) == (OF_CUDA.format("cuda:0", "7.0"), OF_TRITON.format("cuda:0", "7.0"))
    message = f"backend: 'cuda' cannot be used: {found['cuda']}; 'triton' cannot be used: {found['triton']}"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        ops.choose_backend("auto", v100)
    assert ops.choose_device() == torch.device("cpu")


def test_each_gpu_is_asked(gpus):
    """Backends are there where one GPU of several can have them, and chosen for each by itself."""
    gpus((7, 5), (8, 6), (6, 1))
    assert available_backends()["cuda"] is True
    chosen = [ops.choose_backend("auto", torch.device("cuda", i)) for i in range(2)]
    assert chosen == ["triton", "cuda"]
    with pytest.raises(RuntimeError, match=OF_TRITON.format("cuda:2", "6.1")):
        ops.choose_backend("auto", torch.device("cuda", 2))


@needs_cpu
def test_a_gpu_is_not_asked_in_graphs(monkeypatch):
    """torch.compile takes the answer for a constant, here of the CPU, as if its capability mattered."""
    monkeypatch.setitem(ops._NEEDED, "cpu", ((7, 0), "a reason"))
    monkeypatch.setattr(ops, "_capability", lambda device: tuple(torch.ones(2, dtype=torch.int64).add(7).tolist()))
    projection, theta = Projection.from_shapes({"a": (3, 5)}, 10), torch.randn(10)
    compiled = torch.compile(lambda theta: projection.forward(theta)["a"], fullgraph=True, backend="eager")
    assert torch.equal(compiled(theta), projection.forward(theta)["a"])


@pytest.mark.parametrize("capability", [(9, 4), (6, 1)])
def test_rocm_takes_triton(capability, gpus, monkeypatch):
    """ROCm's torch is a CUDA build with devices called "cuda", whose capability is on another scale."""
    gpus(capability)
    monkeypatch.setattr(torch.version, "hip", "7.1.52802")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    reason = ops._load_cuda()
    assert reason == "this torch is built for ROCm, and the CUDA library for NVIDIA's GPUs"
    assert ops._find_triton() is True
    monkeypatch.setitem(ops._AVAILABLE, "cuda", reason)
    assert available_backends() == {"cpu": True, "cuda": reason, "triton": True, "reference": True}
    mi300 = torch.device("cuda", 0)
    assert ops.choose_backend("auto", mi300) == ops.choose_backend("triton", mi300) == "triton"
    assert ops.choose_device() == torch.device("cuda")
    with pytest.raises(RuntimeError, match=f"^backend: 'cuda' cannot be used: {reason}$"):
        ops.choose_backend("cuda", mi300)


def test_choose_device(monkeypatch):
    everything = dict.fromkeys(("cpu", "cuda", "triton", "reference"), True)
    monkeypatch.setattr(ops, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there, device in (({}, "cuda"), ({"cuda": "no"}, "cuda"), ({"cuda": "no", "triton": "no"}, "cpu")):
        monkeypatch.setattr(ops, "_AVAILABLE", everything | there)
        assert ops.choose_device() == torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    for there, device in (({"cuda": "no"}, "xpu"), ({"triton": "no"}, "cpu")):
        monkeypatch.setattr(ops, "_AVAILABLE", everything | there)
        assert ops.choose_device() == torch.device(device)


def test_missing_library(monkeypatch, tmp_path):
    """One clear sentence that says what to do; the reference still works."""
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "fastfood" / "ops.py"))
    reason = ops._load("_cpu", "CPU")
    assert reason == "_cpu is not built: install the package with a C++ compiler (and nvcc for CUDA) at hand"
    there = {"cpu": reason, "cuda": "no CUDA device", "triton": "no GPU", "reference": True}
    monkeypatch.setattr(ops, "_AVAILABLE", there)
    sentence = f"^{re.escape(f'''backend: 'cpu' cannot be used: {reason}''')}$"
    with pytest.raises(RuntimeError, match=sentence):
        hadamard_transform(torch.ones(4))
    shapes, theta = {"a": (3, 5)}, torch.ones(10)
    for backend in ("auto", "cpu"):
        projection = Projection.from_shapes(shapes, 10, backend=backend)
        with pytest.raises(RuntimeError, match=sentence):
            projection.forward(theta)
        with pytest.raises(RuntimeError, match=sentence):
            projection.adjoint({"a": torch.ones(3, 5)}, theta)
    assert Projection.from_shapes(shapes, 10, backend="reference").forward(theta)["a"].shape == (3, 5)


def test_broken_library(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_text("no library")
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "fastfood" / "ops.py"))
    assert str(ops._load("_cpu", "CPU")).startswith(
        f"_cpu.so does not load into torch {torch.__version__}, build the package again: "
    )


def test_a_slower_backend_does_not_serve_unexplained(recwarn):
    reason = "_cuda.so does not load into torch 2.11.0: undefined symbol: of_ours"
    ops._warn_of_a_broken_library({"cuda": "_cuda is not built: ...", "triton": True})
    ops._warn_of_a_broken_library({"cuda": reason, "triton": "no GPU"})
    assert not recwarn
    with pytest.warns(UserWarning, match=f"Triton serves CUDA tensors, because {reason}"):
        ops._warn_of_a_broken_library({"cuda": reason, "triton": True})


@needs_cpu
def test_unknown_instruction_set():
    names = ", ".join(ISAS)
    with cpu_isa("mmx"), pytest.raises(RuntimeError, match=f"HSAID_CPU_ISA: expected one of {names} .*, got mmx"):
        hadamard_transform(torch.ones(4))
    with cpu_isa("mmx"), pytest.raises(RuntimeError, match="HSAID_CPU_ISA"):
        OPS.fastfood_forward(**forward_arguments())
    with cpu_isa("mmx"), pytest.raises(RuntimeError, match="HSAID_CPU_ISA"):
        OPS.fastfood_adjoint(**adjoint_arguments())
    with cpu_isa(""):
        assert hadamard_transform(torch.ones(4)).tolist() == [4, 0, 0, 0]


# --- arguments that lie


def changed(table: Tensor, row: int, columns: dict[str, int]) -> Tensor:
    table = table.clone()
    for name, value in columns.items():
        table[row, COLUMNS.index(name)] = value
    return table


def table(row: int, **columns: int) -> Tensor:
    return changed(forward_arguments()["segments"], row, columns)


def holes(**columns: int) -> Tensor:
    """The gap of 48 elements behind tensor "a"."""
    return changed(forward_arguments()["holes"][:1], 0, columns)


@needs_cpu
@pytest.mark.parametrize(
    "op, arguments", [(OPS.fastfood_forward, forward_arguments), (OPS.fastfood_adjoint, adjoint_arguments)]
)
@pytest.mark.parametrize(
    "row, columns",
    [
        (0, {"tensor": 2}),
        (1, {"tensor": -1}),
        (0, {"offset": -1}),
        (0, {"offset": 1}),
        (1, {"offset": 2**40}),
        (0, {"out_offset": -1}),
        (0, {"rows": 0}),
        (0, {"rows": 2}),
        (1, {"rows": 8}),
        (0, {"cols": 0}),
        (1, {"cols": -7}),
        (1, {"cols": 8, "row_stride": 8}),
        (1, {"row_stride": 6}),
        (0, {"row_stride": -400}),
        (1, {"first_block": 0}),
        (0, {"first_block": 1}),
        (1, {"first_block": 2**62}),
        (1, {"offset": 2**63 - 1}),
        (1, {"rows": 2**40, "cols": 1, "row_stride": 2**40}),
        (1, {"rows": 2**32, "cols": 2**32, "row_stride": 2**32}),
    ],
    ids=str,
)
def test_malformed_segments(op, arguments, row, columns):
    message = "segments: row|tensor . has . elements, the plan needs|tensor 0 has 400 elements, the plan needs 401"
    with pytest.raises(RuntimeError, match=message):
        op(**arguments(segments=table(row, **columns)))


BAD_TABLE = "segments: expected a contiguous int64 table"


@needs_cpu
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segments": table(1, out_offset=512)}, "numel: expected at least 519, got 512"),
        ({"segments": table(1, out_offset=2**63 - 3)}, "numel|segments"),
        ({"segments": table(0)[:, :7]}, BAD_TABLE),
        ({"segments": table(0).int()}, BAD_TABLE),
        ({"segments": table(0)[:0]}, BAD_TABLE),
        ({"segments": table(0)[0]}, BAD_TABLE),
        ({"segments": table(0).T.contiguous().T}, BAD_TABLE),
        ({"holes": holes()[:, :7]}, "holes: expected a contiguous int64 table"),
        ({"holes": holes().int()}, "holes: expected a contiguous int64 table"),
        ({"holes": holes(tensor=2)}, "holes: row 0 is no hole of this plan"),
        ({"holes": holes(tensor=-2)}, "holes: row 0 is no hole of this plan"),
        ({"holes": holes(rows=0)}, "holes: row 0 is no hole of this plan"),
        ({"holes": holes(rows=2**40, row_stride=2**40)}, "holes: row 0 is no hole of this plan"),
        ({"holes": holes(out_offset=-1)}, "holes: row 0 is no hole of this plan"),
        ({"holes": holes(out_offset=500)}, "numel: expected at least 548, got 512"),
        ({"holes": holes(tensor=1, offset=0)}, "base: tensor 1 has 7 elements, the plan needs 48"),
        ({"width": 100}, "width: expected a power of two from 32 to 16384, got 100"),
        ({"width": 16}, "width: .* got 16"),
        ({"width": 2**15}, "width: .* got 32768"),
        ({"width": 2**62 + 1}, "width: .* got 4611686018427387905"),
        ({"width": -128}, "width: .* got -128"),
        ({"numel": 390}, "numel: expected at least 400, got 390"),
        ({"numel": -1}, "numel: expected at least 400, got -1"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
        ({"dtype": torch.int32}, "dtype: expected float32, bfloat16 or float16"),
        ({"theta": torch.ones(0)}, "theta: expected 1 to 16777216 values, got 0"),
        ({"theta": torch.ones(2**24 + 1)}, "theta: expected 1 to 16777216 values, got 16777217"),
        ({"theta": torch.ones(10, 10)}, "theta: expected a float32 tensor of 100 values"),
        ({"theta": torch.ones(100).double()}, "theta: expected a float32 tensor of 100 values"),
        ({"factors": torch.ones(3)}, "factors: expected a float32 tensor of 2 values"),
        ({"factors": torch.ones(2).double()}, "factors: expected a float32 tensor of 2 values"),
        ({"base": [torch.ones(400)]}, "segments: row 1 is no segment of this plan"),
        ({"base": [torch.ones(400), torch.ones(6)]}, "base: tensor 1 has 6 elements"),
        ({"base": [torch.ones(400), torch.ones(7).int()]}, "base: expected float32, bfloat16 or float16"),
        ({"base": [torch.ones(400), torch.ones(7).half()]}, "base: expected tensors in float32 or in the dtype of the"),
    ],
)
def test_bad_arguments_of_forward(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.fastfood_forward(**forward_arguments(**changes))


@needs_cpu
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grads": []}, "segments: row 0 is no segment of this plan"),
        ({"grads": [torch.ones(399), None]}, "grads: tensor 0 has 399 elements"),
        ({"grads": [torch.ones(400).double(), None]}, "grads: expected float32, bfloat16 or float16"),
        ({"run_blocks": 0}, "run_blocks: expected at least 1, got 0"),
        ({"factors": torch.ones(1)}, "factors: expected a float32 tensor of 2 values"),
        ({"theta": torch.ones(10, 10)}, "theta: expected a float32 tensor of 100 values"),
    ],
)
def test_bad_arguments_of_adjoint(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.fastfood_adjoint(**adjoint_arguments(**changes))


@needs_cpu
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"purpose": 3}, "purpose: expected 0, 1 or 2, got 3"),
        ({"block": 2**28}, r"block: expected 0 to 2\*\*28 - 1, got 268435456"),
        ({"block": -1}, "block: .* got -1"),
        ({"chunk": 2**16}, "chunk: expected 0 to 65535, got 65536"),
        ({"width": 33}, "width: expected a power of two from 32 to 16384, got 33"),
    ],
)
def test_bad_arguments_of_stream_values(changes, message):
    good = {"like": torch.empty(0), "seed": 0, "stream": 0, "purpose": 0, "block": 0, "chunk": 0, "width": 32}
    with pytest.raises(RuntimeError, match=message):
        OPS.stream_values(**{**good, "rademacher": False, **changes})
