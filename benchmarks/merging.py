"""What `hsaid merge` takes beside `cp` of the file, for random weights of mBERT: `python benchmarks/merging.py [N]`.

Each of N rounds runs `hsaid merge` and then `cp`, in processes of their own; the files are in the page cache. Time is
that of the process without importing its modules and tearing them down, memory the peak beyond them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CODE = """
import sys, time
from transformers import BertForSequenceClassification, GenerationConfig
import hsaid_kernels.app.command_merge
from hsaid_kernels.app.cli import main
peak = lambda: [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]
held = peak()
begin = time.perf_counter()
assert main(sys.argv[1:]) == 0
print(time.perf_counter() - begin, held, peak())
"""


def make(folder: Path) -> None:
    """mBERT's architecture with random weights in folder/base, and a checkpoint in folder/task."""
    from hsaid_kernels import HSAID
    from hsaid_kernels.app.training import build_mbert

    model = build_mbert(0)
    model.save_pretrained(folder / "base")
    hsaid = HSAID(model, 1000)
    torch.nn.init.normal_(hsaid.theta)
    hsaid.save_pretrained(folder / "task")


def merge(folder: Path) -> tuple[float, float]:
    """(seconds, MB) of `hsaid merge` in a process of its own, both beyond what its modules take."""
    arguments = ["merge", folder / "task", "--model", folder / "base", "-o", folder / "out"]
    command = [sys.executable, "-W", "ignore", "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, held, peak = map(float, done.stdout.splitlines()[-1].split())
    return taken, (peak - held) / 1024


def copy(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    begin = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    return time.perf_counter() - begin


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        weights = folder / "base" / "model.safetensors"
        ratios, beyond = [], []
        for number in range(rounds + 1):
            (folder / "out" / "model.safetensors").unlink(missing_ok=True)
            merged, megabytes = merge(folder)
            copied = copy(weights, folder / "copy.safetensors")
            print(f"merge {merged:.2f} s, {megabytes:.0f} MB; cp {copied:.2f} s")
            if number:  # the first one warms up
                ratios.append(merged / copied)
                beyond.append(megabytes)
        low, *_, high = statistics.quantiles(ratios, n=5)
        middle = statistics.median(ratios)
        size = weights.stat().st_size
        print(f"merge / cp of {size:,} bytes: {middle:.2f} ({low:.2f} to {high:.2f}), {max(beyond):.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
