"""What `make gpu` does on a machine with an NVIDIA GPU and nvcc, a stage at a time; the next stage follows also where
one has failed.

    python benchmarks/stages.py        all of them; STAGES="1 2 3" chooses

    1  build for this GPU, or take libraries that are there and load; no other stage runs where the backend is missing
    2  the CUDA backend's tests: its bits against the CPU's, in several processes
    3  the CUDA backend's benchmarks
    4  Triton's tests and benchmarks
    5  the sanitizers over the CUDA kernels

Every step has a time limit. A log for each stage, and the benchmarks' rows as they come, go into $OUT (build/gpu-out by
default); copied to benchmarks/results/, rows get into the tables of `make report`. HSAID_BUILT=1 takes the libraries
that are in the package; HSAID_COMMIT says which commit this is where there is no repository. Ends with 1 if a step
failed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PROCESSES = 8  # that share the GPU in tests, at most
AVAILABLE = (
    "from hsaid_kernels import available_backends; reason = available_backends()['cuda']; print('cuda:', reason);"
    "raise SystemExit(reason is not True)"
)
SANITIZED = ("--error-exitcode", "1", "--print-limit", "5")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Step(NamedTuple):
    name: str
    seconds: int  # that it may take
    command: Sequence[str]


def pytest(backend: str) -> list[str]:
    processes = min(PROCESSES, os.cpu_count() or 1)
    options = f"-q -m gpu -n {processes} --durations=8 tests/fastfood/test_gpu.py --gpu-backend={backend}"
    return [sys.executable, "-m", "pytest", *options.split()]


def stages(out: Path) -> dict[str, list[Step]]:
    python = sys.executable
    configure = [*"cmake -S . -B build/gpu -G Ninja -DHSAID_CUDA=ON".split(), f"-DPython_EXECUTABLE={python}"]
    small = [python, "benchmarks/gpu.py", "--small"]
    gpu = [python, "benchmarks/gpu.py", "--out", str(out)]
    return {
        "1": [
            Step("configure", 60, [*configure, "-DHSAID_CUDA_ARCHITECTURES=native"]),
            Step("build", 240, ["cmake", "--build", "build/gpu", "--target", "_cpu", "_cuda"]),
            Step("install", 30, ["cmake", "--install", "build/gpu", "--prefix", str(ROOT / "hsaid_kernels")]),
            Step("available", 60, [python, "-c", AVAILABLE]),
        ],
        "2": [Step("tests", 120, pytest("cuda"))],
        "3": [Step("benchmarks", 180, gpu)],
        "4": [
            Step("triton-tests", 240, pytest("triton")),
            Step("triton-benchmarks", 180, [*gpu, "--backend", "triton"]),
        ],
        "5": [Step(tool, 180, ["compute-sanitizer", "--tool", tool, *SANITIZED, *small]) for tool in TOOLS],
    }


def run(step: Step, log: Path) -> str:
    """ "ok", or what went wrong; what the command prints goes into the log and, its last lines, to the terminal."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if "pytest" in step.command:  # whose processes share the cores
        environment["OMP_NUM_THREADS"] = "2"
    with log.open("a") as file:
        print(f"=== {step.name}: {' '.join(step.command)}", file=file, flush=True)
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return f"{step.command[0]} does not start: {error.strerror}"
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
            return f"not done after {step.seconds} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    took = f"{time.monotonic() - began:.0f} s"
    return f"ok, {took}" if code == 0 else f"failed with {code} after {took}"


def main() -> int:
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = stages(out)
    chosen = os.environ.get("STAGES", " ".join(every)).split()
    if unknown := [number for number in chosen if number not in every]:
        raise SystemExit(f"STAGES: expected some of {' '.join(every)}, got {unknown[0]!r}")
    if os.environ.get("HSAID_BUILT") == "1":
        every["1"] = every["1"][-1:]
    failed = []
    for number in chosen:
        log = out / f"{number}.log"
        log.unlink(missing_ok=True)
        for step in every[number]:
            print(f"[{number}] {step.name} ...", flush=True)
            outcome = run(step, log)
            lines = log.read_text(errors="replace").splitlines()
            shown = lines[-3:] if outcome.startswith("ok") else lines[-25:]
            print("\n".join(f"    {line}" for line in shown))
            print(f"[{number}] {step.name}: {outcome}", flush=True)
            if not outcome.startswith("ok"):
                failed.append(f"{number} {step.name}")
                if number == "1":
                    print("Without the CUDA backend there is nothing to test or measure.")
                    return 1
    print(f"Logs and rows are in {out.name}/." + (f" Failed: {', '.join(failed)}." if failed else " Nothing failed."))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
