"""The CUDA backend on a device: the CPU backend's bits, determinism, graphs, streams, devices, bad input.

    pytest -m gpu

What needs no device, every width and kind of segment under sanitizers, is tests/csrc/test_cuda.cpp.
"""

import pytest
import shapes
import torch
from helpers import assert_same_bits, poison
from torch import nn

from hsaid_kernels import HSAID, Projection, available_backends, hadamard_transform, ops
from hsaid_kernels.plan import Plan, Segment, whole

REASON = available_backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not True, reason=f"cuda: {REASON}")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"a": (3, 12000), "b": (5003,), "c": (7,), "w": (70, 96)}
BANDS = [
    whole("a", (3, 12000)),
    whole("b", (5003,)),
    Segment("w", 32, 70, 32, 96, "head 1"),
    Segment("w", 0, 70, 32, 96),
]


def values(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """[plan.numel]: the tensors of a plan, all with full mantissas."""
    return torch.randn(plan.numel, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(plan: Plan, dtype: torch.dtype, missing: tuple[int, ...] = ()):
    """(forward, dtheta, dfactors) of the CPU and of the CUDA backend."""
    theta = torch.randn(plan.dim, generator=torch.Generator().manual_seed(2))
    factors = plan.scales * torch.linspace(0.5, 1.5, len(plan.scales))
    flat = values(plan, dtype)
    for backend, device in (("cpu", "cpu"), ("cuda", "cuda")):
        tensors = plan.views(flat.to(device))
        grads = [None if i in missing else t for i, t in enumerate(tensors)]
        on = theta.to(device), factors.to(device)
        yield (
            ops.fastfood_forward(plan, *on, tensors, dtype, backend).cpu(),
            *(x.cpu() for x in ops.fastfood_adjoint(plan, *on, grads, backend)),
        )


def assert_same_everywhere(plan: Plan, dtype: torch.dtype, missing: tuple[int, ...] = ()) -> None:
    cpu, cuda = both(plan, dtype, missing)
    for what, got, expected in zip(("forward", "dtheta", "dfactors"), cuda, cpu, strict=True):
        assert_same_bits(got, expected, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dim", [1000, 16384])
def test_all_of_mbert(dim, diagonal, dtype):
    assert_same_everywhere(Plan(shapes.mbert(), dim, seed=5, diagonal=diagonal), dtype)


@pytest.mark.parametrize("segments", [None, BANDS], ids=["whole", "bands"])
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
@pytest.mark.parametrize("width", [2**q for q in range(5, 15)])
def test_every_width(width, diagonal, segments):
    for dim in (width - 3, 2 * width + 5):
        plan = Plan(SMALL, dim, seed=5, width=width, diagonal=diagonal, segments=segments)
        for dtype in DTYPES:
            assert_same_everywhere(plan, dtype)


def test_missing_gradients():
    plan = Plan(SMALL, 1000)
    assert_same_everywhere(plan, torch.float32, missing=(0, 2))
    assert_same_everywhere(plan, torch.float32, missing=(0, 1, 2, 3))


def test_strided_and_misaligned():
    plan = Plan({"a": (300, 200), "b": (40000,)}, 500, seed=1)
    theta, factors = torch.randn(500), plan.scales
    x, y = torch.randn(200, 300).T, torch.randn(40001)[1:]
    cpu = ops.fastfood_forward(plan, theta, factors, [x, y], torch.float32, "cpu")
    cpu_grads = ops.fastfood_adjoint(plan, theta, factors, [x, y], "cpu")
    x, y = x.cuda(), torch.cat([y[:1], y]).cuda()[1:]
    assert not x.is_contiguous() and y.data_ptr() % 16
    cuda = ops.fastfood_forward(plan, theta.cuda(), factors.cuda(), [x, y], torch.float32, "cuda")
    assert_same_bits(cuda.cpu(), cpu)
    for got, expected in zip(ops.fastfood_adjoint(plan, theta.cuda(), factors.cuda(), [x, y], "cuda"), cpu_grads):
        assert_same_bits(got.cpu(), expected)


def test_theta_of_many_chunks_in_little_memory():
    plan = Plan({"a": (20, 16384)}, 2**20)
    assert_same_everywhere(plan, torch.float32)
    theta, factors = torch.randn(plan.dim, device="cuda"), plan.scales.cuda()
    tensors = plan.views(values(plan, torch.float32).cuda())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.fastfood_adjoint(plan, theta, factors, tensors, "cuda")
    assert torch.cuda.max_memory_allocated() - before <= 45e6


def test_twenty_runs():
    plan = Plan(shapes.mbert(), 16384)
    theta, factors = torch.randn(plan.dim, device="cuda"), plan.scales.cuda()
    tensors = plan.views(values(plan, torch.float32).cuda())
    runs = []
    for _ in range(20):
        weights = ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, "cuda")
        runs.append((weights.view(torch.int32).sum(), *ops.fastfood_adjoint(plan, theta, factors, tensors, "cuda")))
        del weights
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 31, 64, 500, 1024, 3000, 16384, 32768, 40000, 2**17, 2**20])
def test_hadamard_transform(dim, dtype):
    x = torch.randn(3, dim).to(dtype)
    poison(3 * dim)
    assert_same_bits(hadamard_transform(x.cuda(), 0.3).cpu(), hadamard_transform(x, 0.3))
    if dim > 1:  # rows that begin anywhere
        assert_same_bits(hadamard_transform(x.cuda()[:, :-1], 0.3).cpu(), hadamard_transform(x[:, :-1], 0.3))


def test_hadamard_transform_is_differentiable():
    x = torch.randn(2, 12, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
    assert hadamard_transform(torch.randn(0, 5, device="cuda")).shape == (0, 5)


def test_stream_values():
    for purpose in (0, 1, 2):
        for rademacher in (False, True):
            arguments = (2**63 - 3, -77, purpose, 5 * (purpose == 0), 3, 4096, rademacher)
            cpu, cuda = (
                torch.ops.hsaid_kernels.stream_values(torch.ones(1, device=d), *arguments) for d in ("cpu", "cuda")
            )
            assert_same_bits(cuda.cpu(), cpu)


# --- as PyTorch expects of a CUDA operation


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 4))


def test_training_ends_where_it_does_on_the_cpu_within_rounding():
    x, y = torch.randn(64, 40), torch.randint(4, (64,))
    losses = {}
    for device in ("cpu", "cuda"):
        hsaid = HSAID(model().to(device), intrinsic_dim=300, partition="said")
        optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.5)
        for _ in range(5):
            loss = nn.functional.cross_entropy(hsaid(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[device] = loss.item()
        assert hsaid.theta.device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)


def test_a_training_step_as_a_cuda_graph():
    plan = Projection.from_shapes(SMALL, dim=1000, seed=4)
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


def test_two_streams():
    plan = Plan(shapes.mbert(), 1000)
    factors, tensors = plan.scales.cuda(), plan.views(values(plan, torch.float32).cuda())
    thetas = [torch.randn(1000, device="cuda") for _ in range(2)]
    expected = [ops.fastfood_adjoint(plan, theta, factors, tensors, "cuda") for theta in thetas]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in thetas]
    for _ in range(3):
        got = []
        for stream, theta in zip(streams, thetas):
            with torch.cuda.stream(stream):
                ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, "cuda")
                got.append(ops.fastfood_adjoint(plan, theta, factors, tensors, "cuda"))
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_second_device():
    plan = Plan(SMALL, 1000)
    theta, factors, flat = torch.randn(1000), plan.scales, values(plan, torch.float32)
    first, second = (
        ops.fastfood_forward(plan, theta.to(d), factors.to(d), plan.views(flat.to(d)), torch.float32, "cuda")
        for d in ("cuda:0", "cuda:1")
    )
    assert second.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(second.cpu(), first.cpu())


# --- bad input


def arguments(**changes):
    plan = Plan(SMALL, 200)
    theta, tensors = torch.ones(200, device="cuda"), plan.views(torch.ones(plan.numel, device="cuda"))
    given = dict(theta=theta, factors=plan.scales.cuda(), base=tensors, segments=plan.segments, seed=0, width=256)
    return given | dict(rademacher=False, holes=plan.holes, numel=plan.numel, dtype=torch.float32) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda a: {"theta": a["theta"].cpu()}, "theta: expected a tensor on a CUDA device, got one on the CPU"),
        (lambda a: {"factors": a["factors"].cpu()}, "factors: expected a tensor on CUDA device 0.*got one on the CPU"),
        (
            lambda a: {"base": [*a["base"][:3], a["base"][3].cpu()]},
            "base: expected .* CUDA device 0.*got one on the CPU",
        ),
        (lambda a: {"base": [t.double() for t in a["base"]]}, "base: expected float32, bfloat16 or float16"),
        (lambda a: {"base": [t.half() for t in a["base"]]}, "base: expected tensors in float32 or in the dtype of the"),
        (lambda a: {"base": a["base"][:3]}, "segments: row 3 is no segment of this plan"),
        (lambda a: {"theta": a["theta"].double()}, "theta: expected a float32 tensor of 200 values"),
        (lambda a: {"factors": a["factors"][:2]}, "factors: expected a float32 tensor of 4 values"),
        (lambda a: {"segments": a["segments"].cuda()}, "segments: expected a contiguous int64 table .* on the CPU"),
        (lambda a: {"width": 128}, "segments: row 1 is no segment of this plan"),
        (lambda a: {"width": 100}, "width: expected a power of two from 32 to 16384, got 100"),
        (lambda a: {"numel": 64}, "numel: expected at least 36000, got 64"),
    ],
)
def test_bad_arguments(changes, message):
    given = arguments()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hsaid_kernels.fastfood_forward(**(given | changes(given)))
    torch.cuda.synchronize()  # and nothing has been launched that fails later


def test_bad_arguments_of_a_projection():
    projection = Projection.from_shapes(SMALL, dim=200)
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        projection.forward(torch.ones(200, device="cuda"), base={n: torch.ones(s) for n, s in SMALL.items()})
    with pytest.raises(RuntimeError, match="backend: 'cpu' expects tensors on the CPU, got tensors on cuda:0"):
        Projection.from_shapes(SMALL, dim=200, backend="cpu").forward(torch.ones(200, device="cuda"))
    with pytest.raises(RuntimeError, match="backend: 'cuda' expects tensors on a CUDA device, got tensors on cpu"):
        Projection.from_shapes(SMALL, dim=200, backend="cuda").forward(torch.ones(200))
