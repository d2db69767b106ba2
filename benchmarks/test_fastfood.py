"""Forward and adjoint of whole models against the speed of memory.

Floor of the forward: torch.add(W0, 1.0, out=W), W0 read and W written once. Floor of the adjoint: torch.sum of the
gradients.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import places
import pytest
import results
import shapes
import torch
from helpers import ISAS, cpu_isa, threads

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan

DIAGONALS = ("gaussian", "rademacher")
ALL_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Case:
    model: str = "mBERT"
    dtype: str = "float32"
    diagonal: str = "gaussian"
    dim: int = 1000
    isa: str = ISAS[0] if ISAS else "none"
    width: int | None = None
    threads: int = ALL_THREADS

    def __str__(self) -> str:
        return "-".join(map(str, (self.model, self.dtype, self.diagonal, self.dim, self.width, self.isa, self.threads)))


def cases() -> list:
    """The quick ones, then the others, each once; those of the same tensors one after the other."""
    quick = [Case(dtype=t, diagonal=g, dim=d) for t, g, d in product(("float32", "bfloat16"), DIAGONALS, (1000, 16384))]
    if ISAS[:1] == ["avx512"]:
        quick += [Case(isa="avx2", diagonal=g, dim=d) for g, d in product(DIAGONALS, (1000, 16384))]
    quick += [Case(diagonal=g, dim=200) for g in DIAGONALS] + [Case(threads=1), Case(threads=1, diagonal="rademacher")]
    quick += [Case(model=f"10^{k} weights", diagonal=g) for k, g in product((6, 7, 8), DIAGONALS)]
    full = [Case(diagonal=g, dim=d) for g, d in product(DIAGONALS, BY_D)]
    full += [Case(diagonal=g, dim=d, width=w) for g, (d, w) in product(DIAGONALS, WIDTHS)]
    full += [Case(threads=1, diagonal=g, dim=16384) for g in DIAGONALS]
    types = ("float32", "bfloat16")
    full += [Case(dtype=t, diagonal=g, dim=d, isa=i) for t, g, d, i in product(types, DIAGONALS, (1000, 16384), ISAS)]
    full += [Case(dtype="float16", diagonal=g, dim=d) for g, d in product(DIAGONALS, (1000, 16384))]
    full += [Case(model="10^9 weights", diagonal=g) for g in DIAGONALS]
    others = ("MiniLM", "XLM-R base", "Llama 1B")
    full += [Case(model=m, dtype=t, diagonal=g) for m, t, g in product(others, ("float32", "bfloat16"), DIAGONALS)]
    order = {(c.model, c.dtype): i for i, c in reversed(list(enumerate([*quick, *full])))}
    chosen = sorted(dict.fromkeys([*quick, *full]), key=lambda c: order[c.model, c.dtype])
    return [pytest.param(c, marks=() if c in quick else pytest.mark.full, id=str(c)) for c in chosen]


BY_D = (10, 50, 100, 500, 2000, 4000, 8000, 20_000, 32_768, 100_000)
WIDTHS = ((1000, 2048), (1000, 4096), (1000, 16384), (16384, 4096), (200, 32))


def _with_all_threads(f: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with threads(ALL_THREADS):
            f()

    return run


@pytest.mark.skipif(not ISAS, reason="the CPU library was not built")
@pytest.mark.parametrize("part", ["forward", "adjoint"])
@pytest.mark.parametrize("case", cases())
def test_fastfood(measure, record, weights, case, part):
    plan = Plan(shapes.tensors(case.model), case.dim, diagonal=case.diagonal, width=case.width, chunks="all")
    dtype = getattr(torch, case.dtype)
    flat, out = weights(case.model, dtype)
    tensors, theta = plan.views(flat), torch.randn(case.dim)
    arguments = (plan, theta, plan.scales, tensors)
    parts = {  # target, floor, how often each weight passes the memory
        "forward": (
            lambda: ops.fastfood_forward(*arguments, dtype, "cpu"),
            lambda: torch.add(flat, 1.0, out=out),
            2,
        ),
        "adjoint": (lambda: ops.fastfood_adjoint(*arguments, "cpu"), flat.sum, 1),
    }
    target, floor, passes = parts[part]
    beside = {"floor": floor}
    if case.threads < ALL_THREADS:  # in the same rounds with all of them
        beside |= {"all_threads": _with_all_threads(target), "floor_all_threads": _with_all_threads(floor)}
    with cpu_isa(case.isa), threads(case.threads):
        columns = measure(target, beside, rounds=5 if plan.numel > 5e8 else 9)
    gc.collect()
    count = sum(tensor.numel() for tensor in tensors)
    record(
        what=part,
        backend="cpu",
        isa=case.isa,
        threads=case.threads,
        model=case.model,
        tensors=len(tensors),
        weights=count,
        dtype=case.dtype,
        diagonal=case.diagonal,
        d=case.dim,
        width=plan.width,
        **columns,
        **{"GB/s": passes * count * flat.element_size() / columns["ms"] / 1e6},
    )


LONG = [524_288, *(pytest.param(dim, marks=pytest.mark.full) for dim in (20_000, 131_072, 2**20))]
ASKED = {"forward": {131_072: 1.15, 524_288: 1.25, 2**20: 1.4}, "adjoint": {131_072: 1.3, 524_288: 1.5, 2**20: 1.8}}


@pytest.mark.skipif(not ISAS, reason="the CPU library was not built")
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("part", ["forward", "adjoint"])
@pytest.mark.parametrize("dim", LONG)
def test_long_theta(measure, record, weights, dim, part, diagonal):
    """One chunk a block, against a theta of one chunk in the same rounds, and in one round against all chunks."""
    flat, out = weights("mBERT", torch.float32)
    plans = {d: Plan(shapes.mbert(), d, diagonal=diagonal) for d in (dim, 16384)}
    plans["all chunks"] = Plan(shapes.mbert(), dim, diagonal=diagonal, chunks="all")

    def run(which: object) -> Callable[[], object]:
        plan = plans[which]
        arguments = (plan, torch.randn(plan.dim), plan.scales, plan.views(flat))
        if part == "forward":
            return lambda: ops.fastfood_forward(*arguments, torch.float32, "cpu")
        return lambda: ops.fastfood_adjoint(*arguments, "cpu")

    floor = flat.sum if part == "adjoint" else lambda: torch.add(flat, 1.0, out=out)
    columns = measure(run(dim), {"floor": floor, "16384": run(16384)}, rounds=7)
    all_chunks = measure_once(run("all chunks"))
    columns |= {"all_ms": all_chunks, "all_times": all_chunks / columns["ms"]}
    if dim in ASKED[part]:
        columns |= results.remark(f"{part}, {diagonal}, d = {dim:,} / 16,384", columns["/16384"], ASKED[part][dim])
    isa, width = ISAS[0], plans[dim].width
    record(
        what=f"long {part}", isa=isa, model="mBERT", dtype="float32", diagonal=diagonal, d=dim, width=width, **columns
    )


def measure_once(f: Callable[[], object]) -> float:
    """In ms."""
    start = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - start)


QUICK_PLACES = [(isa, "forward", "rademacher", width) for isa in ISAS[:1] for width in (2048, 4096, 16384)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK_PLACES else pytest.mark.full, id="-".join(map(str, case)))
        for case in product(places.MEASURED, places.PARTS, DIAGONALS, places.WIDTHS)
    ],
)
def test_places(record, case):
    record(**places.row(*case))
