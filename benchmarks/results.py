"""Rows of measurements as data: what a row says of the machine, of the spread, and where it is kept.

A file of results is {"machine": {...}, "rows": [{"what": ..., ...}, ...]}; everything that repeats a row stands in it.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import hsaid_kernels

HERE = Path(__file__).parent
FOLDER = HERE / "results"


def quantile(values: Sequence[float], part: float) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(part))


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20th and the 80th percentile."""
    return {name: statistics.median(values), f"{name}_20": quantile(values, 0.2), f"{name}_80": quantile(values, 0.8)}


def remark(what: str, value: float, asked: float) -> dict[str, str]:
    """A column for the row of a speed that is not below what is asked of it; no column for one that is."""
    return {} if value < asked else {"remark": f"{what}: {value:.3g}, expected below {asked:g}"}


def pick(rows: Iterable[dict], **columns: object) -> list[dict]:
    """The rows that have these values; a tuple of them means any."""
    return [
        row
        for row in rows
        if all(row.get(k) in v if isinstance(v, tuple) else row.get(k) == v for k, v in columns.items())
    ]


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name: Linux's own, with family and model of AMD's, whose name may say neither; or Python's."""
    try:
        said = dict(
            re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", Path("/proc/cpuinfo").read_text(), re.M)
        )
        if "model name" not in said:
            return platform.machine()
        amd = said["model name"].startswith("AMD")
        return said["model name"] + (f", family {said['cpu family']}, model {said['model']}" if amd else "")
    except OSError:
        return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """Hardware, versions, commit."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "hsaid_kernels": hsaid_kernels.__version__,
        "commit": os.environ.get("HSAID_COMMIT") or output("git", "rev-parse", "HEAD"),
        "changed_since": output("git", "status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def file_name(*parts: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-") + ".json"


def save(path: Path, about: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(" " + json.dumps(row) for row in rows)
    path.write_text(f'{{"machine": {json.dumps(about, indent=1)},\n"rows": [\n{lines}\n]}}\n')


def load(path: Path) -> tuple[dict, list[dict]]:
    held = json.loads(path.read_text())
    return held["machine"], held["rows"]


class Run:
    """The rows of one machine's run: how many threads and which instruction set it had, where the CPU was measured."""

    def __init__(self, about: dict, rows: list[dict]):
        self.about, self.rows = about, rows
        projections = pick(rows, what="forward")
        self.threads = max((row["threads"] for row in projections), default=1)
        self.isa = projections[0]["isa"] if projections else None
