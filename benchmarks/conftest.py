"""The gate, the profiles, and what becomes of the rows.

    pytest benchmarks            the quick profile: under three minutes on two cores
    pytest benchmarks --full     everything: about twenty minutes, 20 GB of memory

Prints tables at the end and writes the rows to benchmarks/results/<cpu>-quick.json or <cpu>.json (--results FILE for
another place), for report.py. No speed is reported of kernels that are wrong: the gate ends such a run before anything
is measured. A speed fails no run: the row of one that falls short of what is asked has a remark (results.remark). Rows
are printed but not written where -k or a path cuts the run short, or a benchmark breaks.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import report
import results
import shapes
import torch
from helpers import ISAS, cpu_isa

from hsaid_kernels import Projection, empty_cache
from hsaid_kernels.fastfood.plan import Plan

ABOUT = pytest.StashKey[dict]()
ROWS = pytest.StashKey[list[dict]]()
CUT_SHORT = pytest.StashKey[bool]()
WRITTEN = pytest.StashKey[Path]()


def pytest_addoption(parser):
    group = parser.getgroup("hsaid_kernels")
    group.addoption("--full", action="store_true", help="all benchmarks, not only the quick ones")
    group.addoption("--results", type=Path, help="the file of the rows (default: one in benchmarks/results/)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long; only with --full")
    config.stash[ABOUT] = results.machine()  # now: files may change while it runs
    config.stash[ROWS] = []
    config.stash[CUT_SHORT] = False
    config.option.benchmark_quiet = True  # our table has the ratios


def pytest_collection_modifyitems(config, items):
    if not config.option.full:
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_deselected(items):
    items[0].config.stash[CUT_SHORT] = True


@pytest.fixture(scope="session")
def gate():
    """No speed is reported of kernels that are wrong: their bits must be the reference's, forward and adjoint."""
    small = {"a": (70, 128), "b": (768,), "c": (3, 7)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in small.items()}
    for dim, width in ((1000, None), (100, 32), (16384, None)):
        theta = torch.randn(dim, generator=generator)
        for diagonal in ("gaussian", "rademacher"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                options = dict(dim=dim, width=width, seed=1, diagonal=diagonal, dtype=dtype)
                values = {name: tensor.to(dtype) for name, tensor in tensors.items()}
                expected = _both(Projection.from_shapes(small, backend="reference", **options), theta, values)
                for isa in ISAS:
                    with cpu_isa(isa):
                        got = _both(Projection.from_shapes(small, backend="cpu", **options), theta, values)
                    if not all(map(torch.equal, got, expected)):
                        what = f"{isa}, {diagonal}, d = {dim}, {dtype}"
                        pytest.exit(f"gate: the kernels and the reference differ ({what}); no speed is reported", 1)


def _both(projection: Projection, theta: torch.Tensor, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [*projection.forward(theta, base=values).values(), *projection.adjoint(values, theta)]


@pytest.fixture
def record(gate, request):
    """Call with the columns of a row."""
    return lambda **row: request.config.stash[ROWS].append(row)


@pytest.fixture
def measure(benchmark, record):
    """measure(target, {name: other}, rounds): times them one after the other in every round, `target` last.

    Returns columns: of `target` "ms", of the others "<name>_ms", and the ratios "/<name>", each a median with the 20th
    and the 80th percentile. A ratio is taken in each round, so that a machine that is busy for a while moves it little.
    """

    def run(
        target: Callable[[], object], beside: dict[str, Callable[[], object]], rounds: int = 9, warmup: int = 1
    ) -> dict:
        others: dict[str, list[float]] = {name: [] for name in beside}

        def before() -> None:
            for name, other in beside.items():
                others[name].append(_seconds(other))

        benchmark.pedantic(target, setup=before, rounds=rounds, warmup_rounds=warmup)
        if benchmark.stats is None:  # --benchmark-disable
            pytest.skip("nothing was measured")
        times = benchmark.stats.stats.data
        columns = results.spread("ms", [1e3 * t for t in times]) | {"rounds": rounds}
        for name, taken in others.items():
            taken = taken[-rounds:]  # without the one of the warm-up
            columns |= results.spread(f"{name}_ms", [1e3 * t for t in taken])
            columns |= results.spread(f"/{name}", [a / b for a, b in zip(times, taken)])
        return columns

    return run


def _seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


_held: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}  # of the model measured last


@pytest.fixture
def weights():
    """weights(model, dtype): W0 (and gradients) of all tensors in one flat buffer, and one to write into."""
    return _weights


def _weights(model: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if (model, dtype) not in _held:
        _held.clear()  # first: two of the largest would not fit
        empty_cache()
        _held[model, dtype] = _make_weights(model, dtype)
    return _held[model, dtype]


def _make_weights(model: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    numel = Plan(shapes.tensors(model), 1).numel
    flat = torch.empty(numel, dtype=dtype)
    for part in flat.split(2**24):  # normals in place would take several times the memory in bfloat16
        part.copy_(torch.randn(len(part)))
    return flat, torch.empty_like(flat)


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    rows = config.stash[ROWS]
    if exitstatus == 0 and rows and _whole(config):
        about = config.stash[ABOUT] | {"profile": "full" if config.option.full else "quick"}
        name = results.file_name(about["cpu"], *([] if config.option.full else ["quick"]))
        config.stash[WRITTEN] = config.option.results or results.FOLDER / name
        results.save(config.stash[WRITTEN], about, rows)


def _whole(config) -> bool:
    """All of the benchmarks were asked for, not a file or a test of them."""
    return not config.stash[CUT_SHORT] and {Path(arg).resolve() for arg in config.args} == {results.HERE}


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.section("measured")
        terminalreporter.write(report.terminal(rows))
    if path := config.stash.get(WRITTEN, None):
        terminalreporter.write_line(f"written to {path}")
