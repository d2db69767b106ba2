"""Training functions that train nothing, whose scores are known, for the tests of `hsaid_kernels.measure`.

python tests/measuring.py OUT [SECONDS] [WORKERS] [STORAGE]    measures with them, each run taking SECONDS
"""

import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
from torch import nn

from hsaid_kernels.app.measure import study
from hsaid_kernels.measure import Diverged, Measurement, Run, Scores, measure

MODEL = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
RATES = {"full": 1e-3, "theta": 0.1}


def score(run: Run) -> Scores:
    """The score of a run: 0.9 for the baseline, and 0.9 d / (d + 30) in a subspace, with some noise."""
    if run.lr > 3:
        raise Diverged
    noise = random.Random(str(run))
    best = RATES["full"] if run.dim is None else RATES["theta"] * math.sqrt(1000 / run.dim)
    top = 0.9 if run.dim is None else 0.9 * run.dim / (run.dim + 30)
    value = top - 0.05 * abs(math.log(run.lr / best))
    return Scores(value, value + noise.gauss(0, 0.005))


def slowly(run: Run) -> Scores:
    """As `score`, in SECONDS seconds. Writes a line to OUT/started for each start."""
    out, seconds = sys.argv[1], float(sys.argv[2])
    with Path(out, "started").open("a") as file:
        file.write(f"{os.getpid()} {run}\n")
    time.sleep(seconds)
    return score(run)


def start(out, seconds, workers, storage="", machine=False) -> subprocess.Popen:
    """Starts this program; with `machine` as if on a machine of the name of `out`."""
    environment = os.environ | ({"MEASURING_MACHINE": Path(out).name} if machine else {})
    arguments = [sys.executable, __file__, out, str(seconds), str(workers), storage]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def table_of(process) -> list[list[str]]:
    """The rows that a process of `start` prints in the end; those of the second table without the seconds of a run."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return [row[:-2] if len(row) > 4 else row for row in rows]


def trials(storage):
    """Optuna's own view of the study: {state: how many trials}."""
    if storage.startswith("journal:"):
        backend = optuna.storages.journal.JournalFileBackend(storage.removeprefix("journal:"))
        storage = optuna.storages.JournalStorage(backend)
    return Counter(trial.state.name for trial in optuna.load_study(study_name="measure", storage=storage).trials)


def main(out: str, seconds: str = "0", workers: str = "1", storage: str = "") -> Measurement:
    Path(out).mkdir(parents=True, exist_ok=True)
    # As if this were another machine, whose processes nobody sees here.
    if machine := os.environ.get("MEASURING_MACHINE"):
        study._machine = lambda: machine
        study.STALE, study.BEAT = 3.0, 0.5
    options = {"methods": ("did", "hsaid-3"), "dims": (50, 200, 1000), "seeds": 2, "refine": 1, "rates": RATES}
    return measure(MODEL, slowly, out=out, storage=storage or None, workers=int(workers), **options)


if __name__ == "__main__":
    print(main(*sys.argv[1:]).table())
