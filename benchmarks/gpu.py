"""The projection of all of mBERT on a GPU, against the speed of its memory and against the published algorithm.

    python benchmarks/gpu.py                     measures the CUDA backend, prints and writes rows as they come
    python benchmarks/gpu.py --backend triton    measures Triton, with CUDA beside it in the same rounds
    python benchmarks/gpu.py --small             runs every kernel once on small shapes: for compute-sanitizer

Two times for each operation. Device time is that of CUDA events around a call that the host has queued behind a kernel
that only waits, so that the device never waits for the host; host time is what the host takes to queue the call. The
floors are timed in the same rounds: torch.add(W0, 1.0, out=W), which reads W0 and writes W once; and reading the
gradients once, which is torch.sum or half of the add, whichever is faster. Medians over the rounds.

`make gpu` calls this, a stage at a time (benchmarks/stages.py).
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
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import peers
import results
import shapes
import torch

from hsaid_kernels import HSAID, hadamard_transform
from hsaid_kernels.app import training
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan, Segment, whole
from hsaid_kernels.fastfood.projection import Part
from hsaid_kernels.wrapper.weights.launches import joined

ROUNDS = 21
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIAGONALS = ("gaussian", "rademacher")
DELAY_CYCLES = 4_000_000  # of the kernel that a call is queued behind: about two milliseconds


class Times(NamedTuple):
    """Milliseconds in each round."""

    device: list[float]
    host: list[float]


def timed(f: Callable[[], object], cycles: int) -> tuple[float, float] | None:
    """(device, host) milliseconds of a call queued behind a delay; None where the delay was over too soon."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    began = time.perf_counter()
    kept = f()  # freed after the end is recorded: freeing is not part of the call
    host = time.perf_counter() - began
    end.record()
    waited = not start.query()
    end.synchronize()
    del kept
    return (start.elapsed_time(end), host * 1e3) if waited else None


def measure(parts: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Times]:
    """The times of each part in each round, the parts one after the other."""
    for part in parts.values():
        for _ in range(3):
            part()
    torch.cuda.synchronize()
    times = {name: Times([], []) for name in parts}
    cycles = dict.fromkeys(parts, DELAY_CYCLES)
    for _ in range(rounds):
        for name, part in parts.items():
            while (both := timed(part, cycles[name])) is None:
                cycles[name] *= 2
                if cycles[name] > 2**10 * DELAY_CYCLES:
                    raise RuntimeError(f"{name}: expected the host to queue a call within two seconds")
            times[name].device.append(both[0])
            times[name].host.append(both[1])
    return times


def random_values(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(plan.numel, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)


def gate(backends: tuple[str, ...]) -> None:
    """No speed is reported of kernels that are wrong: their bits must be the CPU backend's."""
    small = {"a": (70, 768), "b": (768,), "c": (3, 7)}
    for diagonal, dim in itertools.product(DIAGONALS, (1000, 16384, 20000)):
        plan = Plan(small, dim, seed=1, diagonal=diagonal)
        theta, flat = torch.randn(dim), torch.randn(plan.numel)
        found = []
        for backend in ("cpu", *backends):
            device = "cpu" if backend == "cpu" else "cuda"
            on, tensors = (theta.to(device), plan.scales.to(device)), plan.views(flat.to(device))
            forward = ops.fastfood_forward(plan, *on, tensors, torch.float32, backend)
            found.append([t.cpu() for t in (forward, *ops.fastfood_adjoint(plan, *on, tensors, backend))])
            if not all(torch.equal(a, b) for a, b in zip(found[0], found[-1])):
                raise SystemExit(f"gate: {backend} and CPU differ at d = {dim}, {diagonal}; no speed is reported")


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def card() -> dict[str, float]:
    """What the card says of itself, just now."""
    asked = {"sm_MHz": "clocks.sm", "memory_MHz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
    answer = results.output("nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader,nounits")
    try:
        return dict(zip(asked, map(float, answer.splitlines()[0].split(","))))
    except (IndexError, ValueError):
        return {}


def projection_rows(backends: tuple[str, ...], name: str, diagonal: str, dim: int) -> list[dict]:
    """Forward and adjoint over all tensors; of several backends, the later ones are compared with the first."""
    dtype = DTYPES[name]
    plan = Plan(shapes.mbert(), dim, diagonal=diagonal)
    flat = random_values(plan, dtype)
    out, tensors = torch.empty_like(flat), plan.views(flat)
    theta, factors = torch.randn(dim, device="cuda"), plan.scales.cuda()
    parts = {"floor": lambda: torch.add(flat, 1.0, out=out), "sum": lambda: flat.sum()}
    workspace = {}
    for backend in backends:
        arguments = plan, theta, factors, tensors
        parts[f"forward {backend}"] = lambda b=backend, a=arguments: ops.fastfood_forward(*a, dtype, b)
        parts[f"adjoint {backend}"] = lambda b=backend, a=arguments: ops.fastfood_adjoint(*a, b)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        parts[f"adjoint {backend}"]()
        workspace[backend] = torch.cuda.max_memory_allocated() - before
    times = measure(parts)
    floor = times["floor"].device
    read = [min(s, f / 2) for s, f in zip(times["sum"].device, floor)]
    bytes_moved = plan.numel * flat.element_size()
    rows = []
    for backend in backends:
        forward, adjoint = times[f"forward {backend}"], times[f"adjoint {backend}"]
        row = {
            "what": "projection",
            "backend": backend,
            "dtype": name,
            "diagonal": diagonal,
            "d": dim,
            "floor_ms": statistics.median(floor),
            "forward_ms": statistics.median(forward.device),
            "read_ms": statistics.median(read),
            "adjoint_ms": statistics.median(adjoint.device),
            "forward/floor": ratio(forward.device, floor),
            "adjoint/read": ratio(adjoint.device, read),
            "forward_host_ms": statistics.median(forward.host),
            "adjoint_host_ms": statistics.median(adjoint.host),
            "forward_GB/s": 2 * bytes_moved / statistics.median(forward.device) / 1e6,
            "adjoint_GB/s": bytes_moved / statistics.median(adjoint.device) / 1e6,
            "workspace_MB": workspace[backend] / 1e6,
        }
        if backend != backends[0]:  # asked of Triton: 1.6 and 2.0
            row[f"forward/{backends[0]}"] = ratio(forward.device, times[f"forward {backends[0]}"].device)
            row[f"adjoint/{backends[0]}"] = ratio(adjoint.device, times[f"adjoint {backends[0]}"].device)
        every = {"floor": floor, "read": read, "forward": forward.device, "adjoint": adjoint.device}
        rows.append(row | {"all_ms": every})
    return rows


def blocks() -> dict[str, list[str]]:
    """mBERT's tensors by the block of the model that they belong to."""
    found: dict[str, list[str]] = {}
    for name in shapes.mbert():
        steps = name.removeprefix("bert.").split(".")
        found.setdefault(".".join(steps[:3]) if steps[0] == "encoder" else steps[0], []).append(name)
    return found


def blockwise_row(backend: str, name: str, diagonal: str, dim: int) -> dict:
    """The adjoint calls of a training step, and one for each block of the model, against one over everything."""
    dtype = DTYPES[name]
    plan = Plan(shapes.mbert(), dim, diagonal=diagonal)
    theta, factors = torch.randn(dim, device="cuda"), plan.scales.cuda()
    tensors = plan.views(random_values(plan, dtype))
    by_name = dict(zip(plan.names, tensors))

    def call_for(names: list[str]) -> tuple:
        part = Part(plan, names)
        return part.plan, theta, factors[part.rows_on(theta.device)], [by_name[n] for n in part.plan.names], backend

    calls = [call_for(names) for names in blocks().values()]
    together = [call_for(names) for names in joined(blocks().values(), plan.shapes)]  # as HSAID does
    layer = calls[1]
    parts = {
        "one": lambda: ops.fastfood_adjoint(plan, theta, factors, tensors, backend),
        "joined": lambda: [ops.fastfood_adjoint(*call) for call in together],
        "blocks": lambda: [ops.fastfood_adjoint(*call) for call in calls],
        "layer": lambda: ops.fastfood_adjoint(*layer),
    }
    times = measure(parts)
    return {
        "what": "adjoint by blocks",
        "backend": backend,
        "dtype": name,
        "diagonal": diagonal,
        "d": dim,
        "calls": len(calls),
        "joined_calls": len(together),
        "layer_run_blocks": layer[0].run_blocks,
        **{f"{part}_ms": statistics.median(times[part].device) for part in parts},
        **{f"{part}_host_ms": statistics.median(times[part].host) for part in parts},
        "blocks/one": ratio(times["blocks"].device, times["one"].device),
        "joined/one": ratio(times["joined"].device, times["one"].device),
    }


OURS = ("fastfood", "adjoint")  # in the names of our kernels


def busy(events: Iterable) -> float:
    """Milliseconds in which at least one kernel runs: one that waits for the kernel in front of it counts once."""
    end, total = 0.0, 0.0
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e3


def step_row(backend: str, diagonal: str, dtype: torch.dtype | None, texts: int = 32, tokens: int = 128) -> dict:
    """A training step of mBERT under bfloat16 autocast; the share of the projection's kernels by torch's profiler."""
    model = training.build_mbert(0).cuda()
    batch = {
        "input_ids": torch.randint(model.config.vocab_size, (texts, tokens), device="cuda"),
        "labels": torch.arange(texts, device="cuda") % 2,
    }

    def stepper(module: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3, fused=True)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = module(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def peak(step: Callable[[], None]) -> float:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e9

    full = stepper(model)
    full_peak = peak(full)
    full_ms = [seconds_of(full) * 1e3 for _ in range(8)]
    del full
    model.zero_grad(set_to_none=True)
    step = stepper(HSAID(model, 1000, diagonal=diagonal, dtype=dtype, backend=backend))
    own_peak = peak(step)
    own_ms = [seconds_of(step) * 1e3 for _ in range(8)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = busy(e for e in kernels if any(word in e.name for word in OURS)) / 4
    every = busy(kernels) / 4
    return {
        "what": "training step on a GPU",
        "backend": backend,
        "diagonal": diagonal,
        "weights": str(dtype or torch.float32).removeprefix("torch."),
        "texts": texts,
        "tokens": tokens,
        "step_ms": statistics.median(own_ms),
        "full_step_ms": statistics.median(full_ms),
        "kernels_ms": every,
        "projection_ms": ours,
        "projection/kernels": ours / every,
        "projection/step": ours / statistics.median(own_ms),
        "peak_GB": own_peak,
        "full_peak_GB": full_peak,
    }


def seconds_of(f: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - began


FIRST_CALL = """
import time, torch, shapes
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
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


def first_call_row(what: str, backend: str, dim: int, environment: dict[str, str]) -> dict:
    """Seconds of a process's first forward and adjoint."""
    command = [sys.executable, "-c", FIRST_CALL.format(dim=dim, backend=backend)]
    environment = os.environ | environment | {"PYTHONPATH": str(results.HERE.parent)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=results.HERE, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return {"what": "first call on a GPU", "backend": backend, "d": dim, what: float(run.stdout)}


def published_row(transform: str, dim: int = 1000) -> dict:
    """The published algorithm over all tensors, forward only; its thousands of launches wait for the host."""
    theta, factor = torch.randn(dim, device="cuda"), torch.ones(1, device="cuda")
    every = []
    for shape in shapes.mbert().values():
        numel = math.prod(shape)
        tensor = peers.Published(numel, dim, peers.TRANSFORMS[transform], "cuda")
        every.append((tensor, torch.randn(numel, device="cuda")))

    def forward() -> None:
        for tensor, base in every:
            tensor.forward(base, theta, factor)

    forward()
    times = [seconds_of(forward) * 1e3 for _ in range(3)]
    random = sum(tensor.random_bytes() for tensor, _ in every) / 1e6
    row = {"what": "published on a GPU", "transform": transform, "d": dim, "forward_ms": statistics.median(times)}
    return row | {"random_MB": random, "all_ms": times}


def hadamard_row(backend: str, name: str, dim: int) -> dict:
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
        "transform_ms": statistics.median(times["transform"].device),
        "transform/floor": ratio(times["transform"].device, times["floor"].device),
    }


def small(backend: str) -> None:
    """Every kernel: each kind of width, vectors and single elements, chunks, bands, both diagonals, all dtypes.

    Fewer of Triton's, whose compilation takes longer than the rest.
    """
    dtypes = list(DTYPES.values())[: 2 if backend == "triton" else 3]
    tensors = {"a": (3, 12000), "b": (1003,), "w": (70, 96)}
    bands = [whole("a", (3, 12000)), whole("b", (1003,)), Segment("w", 32, 70, 32, 96)]
    for dim, width in ((30, 32), (1000, 1024), (16384, 16384), (40, 32), (20000, 16384), (500, 512))[
        backend == "triton" :
    ]:
        for diagonal in ("gaussian", "rademacher"):
            plan = Plan(tensors, dim, width=width, diagonal=diagonal, segments=bands)
            theta, factors = torch.randn(dim, device="cuda"), plan.scales.cuda()
            for dtype in dtypes:
                values = plan.views(random_values(plan, dtype))
                ops.fastfood_forward(plan, theta, factors, values, dtype, backend)
                ops.fastfood_forward(plan, theta, factors, [], dtype, backend)
                ops.fastfood_adjoint(plan, theta, factors, [None, *values[1:]], backend)
                ops.fastfood_adjoint(plan, theta, factors, values, backend)
    plan = Plan({"many tiles": (300, 16384)}, 16384)  # more than a device has places: some come from the pool
    theta, factors = torch.randn(16384, device="cuda"), plan.scales.cuda()
    for dtype in dtypes[:2]:
        ops.fastfood_forward(plan, theta, factors, plan.views(random_values(plan, dtype)), dtype, backend)
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


def measurements(backend: str) -> Iterator[tuple[Callable[..., dict | list[dict]], tuple]]:
    """(function, arguments) of every row, what was never run and what matters most first."""
    backends = ("cuda",) if backend == "cuda" else ("cuda", "triton")
    if ops.available_backends()["cuda"] is not True:
        backends = (backend,)
    for dim, name, diagonal in itertools.product((16384, 1000, 20000), ("float32", "bfloat16"), DIAGONALS):
        yield projection_rows, (backends, name, diagonal, dim)
    for name, diagonal in itertools.product(("float32", "bfloat16"), DIAGONALS):
        yield blockwise_row, (backend, name, diagonal, 1000)
    for diagonal, dtype in itertools.product(DIAGONALS, (None, torch.bfloat16)):
        yield step_row, (backend, diagonal, dtype)
    for name, dim in itertools.product(("float32", "bfloat16"), (1024, 16384, 32768, 65536, 2**20)):
        yield hadamard_row, (backend, name, dim)
    with tempfile.TemporaryDirectory() as cache:  # of Triton: at first there is nothing compiled in it
        for what in ("cold", "cached") if backend == "triton" else ("loaded",):
            yield first_call_row, (what, backend, 16384, {"TRITON_CACHE_DIR": cache})
    if backend == "cuda":
        for transform in peers.TRANSFORMS:
            yield published_row, (transform,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--small", action="store_true", help="run every kernel on small shapes and measure nothing")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    options = parser.parse_args()
    ops.choose_backend(options.backend, torch.device("cuda"))  # or a RuntimeError that says why not
    if options.small:
        small(options.backend)
        return
    gate((options.backend,))
    about, rows, failed = machine(), [], []
    print(json.dumps(about, indent=1))
    path = options.out / results.file_name(about["gpu"], *(["triton"] if options.backend == "triton" else []))
    for function, arguments in measurements(options.backend):
        try:
            made = function(*arguments)
        except Exception:  # whatever it was, the other rows are worth having
            traceback.print_exc()
            failed.append(f"{function.__name__}{arguments}")
            torch.cuda.synchronize()  # or the device is lost, and there is no going on
            continue
        finally:
            torch.cuda.empty_cache()
        for row in made if isinstance(made, list) else [made]:
            rows.append(row | card())
            cells = {key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items() if key != "all_ms"}
            print("  ".join(f"{key} {value}" for key, value in cells.items()), flush=True)
        results.save(path, about, rows)
    print(f"{len(rows)} rows in {path.name}")
    if failed:
        raise SystemExit("no row from " + "; ".join(failed))


if __name__ == "__main__":
    main()
