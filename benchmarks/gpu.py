"""The projection of all of mBERT on a CUDA device, against the speed of its memory and against the published algorithm.

    python benchmarks/gpu.py            measures, prints a table, writes benchmarks/results/<gpu>.json
    python benchmarks/gpu.py --small    runs every kernel once on small shapes: for compute-sanitizer

Both GPU backends where they are there, one after the other in the same rounds. Floors, timed in these too:
torch.add(W0, 1.0, out=W), which reads W0 and writes W once; and reading the gradients once, which is torch.sum or half
of the add, whichever is faster. Times are of CUDA events, medians over the rounds, launches on the host included.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import peers
import results
import shapes
import torch

import hsaid_kernels
from hsaid_kernels import hadamard_transform, ops
from hsaid_kernels.plan import Plan, Segment, whole

ROUNDS = 21
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = [name for name in ("cuda", "triton") if hsaid_kernels.available_backends()[name] is True]


def milliseconds(f: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(parts: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each part in each round, the parts one after the other."""
    for part in parts.values():
        for _ in range(3):
            part()
    torch.cuda.synchronize()
    times = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            times[name].append(milliseconds(part))
    return times


def random_values(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(plan.numel, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)


def gate() -> None:
    """No speed is reported of kernels that are wrong: their bits must be the CPU backend's."""
    small = {"a": (70, 768), "b": (768,), "c": (3, 7)}
    for diagonal in ("gaussian", "rademacher"):
        for dim in (1000, 16384):
            plan = Plan(small, dim, seed=1, diagonal=diagonal)
            theta, flat = torch.randn(dim), torch.randn(plan.numel)
            results = []
            for backend in ("cpu", *BACKENDS):
                device = "cpu" if backend == "cpu" else "cuda"
                on, tensors = (theta.to(device), plan.scales.to(device)), plan.views(flat.to(device))
                forward = ops.fastfood_forward(plan, *on, tensors, torch.float32, backend)
                results.append([t.cpu() for t in (forward, *ops.fastfood_adjoint(plan, *on, tensors, backend))])
                if not all(torch.equal(a, b) for a, b in zip(results[0], results[-1])):
                    raise SystemExit(f"gate: {backend} and CPU differ at d = {dim}, {diagonal}; no speed is reported")


def projection_rows(name: str, diagonal: str, dim: int) -> list[dict]:
    dtype = DTYPES[name]
    plan = Plan(shapes.mbert(), dim, diagonal=diagonal)
    flat = random_values(plan, dtype)
    out, tensors = torch.empty_like(flat), plan.views(flat)
    theta, factors = torch.randn(dim, device="cuda"), plan.scales.cuda()
    parts = {"floor": lambda: torch.add(flat, 1.0, out=out), "sum": lambda: flat.sum()}
    workspace = {}
    for backend in BACKENDS:
        arguments = plan, theta, factors, tensors
        parts[f"forward {backend}"] = lambda b=backend, a=arguments: ops.fastfood_forward(*a, dtype, b)
        parts[f"adjoint {backend}"] = lambda b=backend, a=arguments: ops.fastfood_adjoint(*a, b)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        parts[f"adjoint {backend}"]()
        workspace[backend] = torch.cuda.max_memory_allocated() - before
    times = measure(parts)
    floor, read = times["floor"], [min(s, f / 2) for s, f in zip(times["sum"], times["floor"])]
    bytes_moved = plan.numel * flat.element_size()
    rows = []
    for backend in BACKENDS:
        forward, adjoint = times[f"forward {backend}"], times[f"adjoint {backend}"]
        row = {
            "what": "projection",
            "backend": backend,
            "dtype": name,
            "diagonal": diagonal,
            "d": dim,
            "floor_ms": statistics.median(floor),
            "forward_ms": statistics.median(forward),
            "read_ms": statistics.median(read),
            "adjoint_ms": statistics.median(adjoint),
            "forward/floor": ratio(forward, floor),
            "adjoint/read": ratio(adjoint, read),
            "forward_GB/s": 2 * bytes_moved / statistics.median(forward) / 1e6,
            "adjoint_GB/s": bytes_moved / statistics.median(adjoint) / 1e6,
            "workspace_MB": workspace[backend] / 1e6,
        }
        if backend != BACKENDS[0]:  # asked of Triton: 1.6 and 2.0
            row[f"forward/{BACKENDS[0]}"] = ratio(forward, times[f"forward {BACKENDS[0]}"])
            row[f"adjoint/{BACKENDS[0]}"] = ratio(adjoint, times[f"adjoint {BACKENDS[0]}"])
        rows.append(row | {"all_ms": {"floor": floor, "read": read, "forward": forward, "adjoint": adjoint}})
    return rows


FIRST_CALL = """
import time, torch, shapes
from hsaid_kernels import ops
from hsaid_kernels.plan import Plan
plan = Plan(shapes.mbert(), {dim})
tensors = plan.views(torch.zeros(plan.numel, device="cuda"))
theta, factors = torch.ones({dim}, device="cuda"), plan.scales.cuda()
torch.cuda.synchronize()
start = time.perf_counter()
ops.fastfood_forward(plan, theta, factors, tensors, torch.float32, "{backend}")
ops.fastfood_adjoint(plan, theta, factors, tensors, "{backend}")
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call_rows(dim: int) -> list[dict]:
    """Seconds of a process's first forward and adjoint: for Triton with nothing compiled, then from its cache."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(results.HERE.parent)}
        for what, backend in [("cold", "triton"), ("cached", "triton"), ("loaded", "cuda")]:
            if backend in BACKENDS:
                command = [sys.executable, "-c", FIRST_CALL.format(dim=dim, backend=backend)]
                run = subprocess.run(
                    command, capture_output=True, text=True, check=True, cwd=results.HERE, env=environment
                )
                rows.append({"what": "first call on a GPU", "backend": backend, "d": dim, what: float(run.stdout)})
    return rows


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def published_row(transform: str, dim: int = 1000) -> dict:
    """The published algorithm over all tensors, forward only."""
    theta, factor = torch.randn(dim, device="cuda"), torch.ones(1, device="cuda")
    every = []
    for shape in shapes.mbert().values():
        numel = math.prod(shape)
        tensor = peers.Published(numel, dim, peers.TRANSFORMS[transform], "cuda")
        every.append((tensor, torch.randn(numel, device="cuda")))

    def forward():
        for tensor, base in every:
            tensor.forward(base, theta, factor)

    times = measure({"forward": forward}, rounds=3)["forward"]
    random = sum(tensor.random_bytes() for tensor, _ in every) / 1e6
    row = {"what": "published on a GPU", "transform": transform, "d": dim, "forward_ms": statistics.median(times)}
    return row | {"random_MB": random, "all_ms": times}


def hadamard_row(name: str, dim: int, backend: str) -> dict:
    x = torch.randn(2**27 // dim, dim, device="cuda").to(DTYPES[name])
    out = torch.empty_like(x)
    times = measure(
        {"floor": lambda: torch.add(x, 1.0, out=out), "transform": lambda: hadamard_transform(x, 1.0, backend)}
    )
    return {
        "what": "hadamard_transform on a GPU",
        "backend": backend,
        "dtype": name,
        "n": dim,
        "transform_ms": statistics.median(times["transform"]),
        "transform/floor": ratio(times["transform"], times["floor"]),
    }


def small(backend: str) -> None:
    """Every kernel: each kind of width, vectors and single elements, chunks, bands, both diagonals, all dtypes.

    Fewer of Triton's, whose compilation takes longer than the rest.
    """
    dtypes = list(DTYPES.values())[: 2 if backend == "triton" else 3]
    tensors = {"a": (3, 12000), "b": (1003,), "w": (70, 96)}
    bands = [whole("a", (3, 12000)), whole("b", (1003,)), Segment("w", 32, 70, 32, 96)]
    for dim, width in ((30, 32), (1000, 1024), (16384, 16384), (40, 32), (20000, 16384))[backend == "triton" :]:
        for diagonal in ("gaussian", "rademacher"):
            plan = Plan(tensors, dim, width=width, diagonal=diagonal, segments=bands)
            theta, factors = torch.randn(dim, device="cuda"), plan.scales.cuda()
            for dtype in dtypes:
                values = plan.views(random_values(plan, dtype))
                ops.fastfood_forward(plan, theta, factors, values, dtype, backend)
                ops.fastfood_forward(plan, theta, factors, [], dtype, backend)
                ops.fastfood_adjoint(plan, theta, factors, [None, *values[1:]], backend)
                ops.fastfood_adjoint(plan, theta, factors, values, backend)
    for dim in (5, 500, 4096, 30000, 65536):
        for dtype in dtypes:
            hadamard_transform(torch.randn(3, dim, device="cuda").to(dtype), 1.0, backend)
    namespace = torch.ops.hsaid_kernels_triton if backend == "triton" else torch.ops.hsaid_kernels
    namespace.stream_values(theta, 1, 2, 0, 3, 0, 256, False)
    torch.cuda.synchronize()


def machine() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return results.machine() | {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_GB": properties.total_memory / 1e9,
        "driver": results.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def all_rows() -> list[dict]:
    """Everything that is measured; SystemExit if a backend's bits are wrong."""
    gate()
    diagonals, dims = ("gaussian", "rademacher"), (1000, 16384)
    rows = [row for args in itertools.product(DTYPES, diagonals, dims) for row in projection_rows(*args)]
    torch.cuda.empty_cache()
    rows += [hadamard_row(*args) for args in itertools.product(DTYPES, (1024, 16384, 32768, 65536), BACKENDS)]
    torch.cuda.empty_cache()
    rows += [row for dim in dims for row in first_call_rows(dim)]
    ours = next(row["forward_ms"] for row in rows if row["what"] == "projection" and row["d"] == 1000)
    for transform in peers.TRANSFORMS:
        row = published_row(transform)
        rows.append(row | {"published/ours": row["forward_ms"] / ours})
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="run every kernel on small shapes and measure nothing")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    options = parser.parse_args()
    ops.choose_backend("auto", torch.device("cuda"))  # or a RuntimeError that says why not
    if options.small:
        for backend in BACKENDS:
            small(backend)
        return
    rows, about = all_rows(), machine()
    path = options.out / results.file_name(about["gpu"])
    results.save(path, about, rows)
    print(json.dumps(about, indent=1))
    for row in rows:
        cells = {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items() if key != "all_ms"}
        print("  ".join(f"{key} {value}" for key, value in cells.items()))
    print(f"written to {path.name} in {options.out.name}/")


if __name__ == "__main__":
    main()
