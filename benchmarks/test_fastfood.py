"""The projection of all of mBERT against the speed of memory.

Floor of the forward: torch.add(base, 1.0, out=weights), W0 read and W written once. Floor of the adjoint: torch.sum of
the gradients. Every round times the floor and the kernels one after the other, and a ratio is the median over the
rounds, so that a machine that is busy for a while does not decide it.
"""

import statistics
import time

import pytest
import shapes
import torch

from hsaid_kernels import Projection, ops

ROUNDS = 9


@pytest.fixture(scope="module")
def gate():
    """No speed is reported of kernels that are wrong: their bits must be the reference's, forward and adjoint."""
    small = {"a": (70, 128), "b": (768,), "c": (3, 7)}
    generator = torch.Generator().manual_seed(0)
    for diagonal in ("gaussian", "rademacher"):
        cpu = Projection.from_shapes(small, dim=1000, seed=1, diagonal=diagonal)
        ref = Projection.from_shapes(small, dim=1000, seed=1, diagonal=diagonal, backend="reference")
        theta = torch.randn(1000, generator=generator)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in small.items()}
        for ours, theirs in zip(cpu.forward(theta, base=tensors).values(), ref.forward(theta, base=tensors).values()):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(cpu.adjoint(tensors, theta), ref.adjoint(tensors, theta), strict=True):
            assert torch.equal(ours, theirs)


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request, monkeypatch):
    monkeypatch.setenv("HSAID_CPU_ISA", request.param)
    try:
        ops.hadamard_transform(torch.ones(1))
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    return request.param


@pytest.mark.parametrize("dim", [1000, 16384])
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mbert(gate, report, isa, dtype, diagonal, dim):
    projection = Projection.from_shapes(shapes.mbert(), dim=dim, diagonal=diagonal, dtype=dtype)
    plan = projection.plan
    flat = torch.randn(plan.numel).to(dtype)
    out = torch.empty_like(flat)
    tensors = plan.views(flat)  # W0, and the gradients too
    theta, factors = torch.randn(dim), plan.scales

    def run(what):
        return {
            "floor": lambda: torch.add(flat, 1.0, out=out),
            "forward": lambda: ops.fastfood_forward(plan, theta, factors, tensors, dtype, "cpu"),
            "sum": lambda: flat.sum(),
            "adjoint": lambda: ops.fastfood_adjoint(plan, theta, factors, tensors, "cpu"),
        }[what]

    parts = ("floor", "forward", "sum", "adjoint")
    for part in parts:
        run(part)()
    rounds = [{part: seconds(run(part)) for part in parts} for _ in range(ROUNDS)]

    def ratio(a, b):
        return f"{statistics.median(r[a] / r[b] for r in rounds):.2f}"

    report(
        isa=isa,
        dtype=str(dtype).removeprefix("torch."),
        diagonal=diagonal,
        d=dim,
        threads=torch.get_num_threads(),
        **{part: f"{1e3 * statistics.median(r[part] for r in rounds):.1f}" for part in parts},
        **{
            "forward/floor": ratio("forward", "floor"),
            "adjoint/sum": ratio("adjoint", "sum"),
            "adjoint/forward": ratio("adjoint", "forward"),
        },
    )
