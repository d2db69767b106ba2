"""Studies from beginning to end, in one and several processes, that are killed, resumed and shared."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measuring
import pytest
import torch
from helpers import mapping
from torch import nn

from hsaid_kernels.measure import Run, Scores, measure
from hsaid_kernels.training import build_classifier

PROGRAM = Path(measuring.__file__)


def started(out):
    return [line.split(" ", 1)[1] for line in (out / "started").read_text().splitlines()]


def wait_until(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing happened for a minute")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table of a study that nothing disturbed, and its runs."""
    out = tmp_path_factory.mktemp("undisturbed")
    return measuring.table_of(measuring.start(out, 0, 1)), sorted(started(out))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_resumed(tmp_path, undisturbed, workers):
    table, runs = undisturbed
    assert len(runs) == len(set(runs)) > 30
    process = measuring.start(tmp_path, 0.2, workers)
    wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 10, process)
    process.kill()  # SIGKILL: nothing is tidied up
    process.communicate()
    if workers > 1:  # its workers end by themselves
        pids = {int(line.split()[0]) for line in (tmp_path / "started").read_text().splitlines()}
        for _ in range(600):
            if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the workers go on")
    before = len(started(tmp_path))
    assert before < len(runs)
    assert measuring.table_of(measuring.start(tmp_path, 0, workers)) == table
    again = Counter(started(tmp_path))
    assert sorted(again) == runs  # nothing is lost
    assert sum(again.values()) - len(runs) <= workers  # only what was interrupted is done again
    assert measuring.trials(f"sqlite:///{tmp_path}/study.db")["COMPLETE"] == len(runs)


def test_a_killed_worker_does_not_end_the_others(tmp_path, undisturbed):
    table, runs = undisturbed
    process = measuring.start(tmp_path, 0.2, 2)
    wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 6, process)
    os.kill(int((tmp_path / "started").read_text().split()[0]), signal.SIGKILL)
    assert measuring.table_of(process) == table
    assert sorted(set(started(tmp_path))) == runs


def test_two_commands_share_a_study(tmp_path, undisturbed, storage):
    table, runs = undisturbed
    processes = [measuring.start(tmp_path, 0.05, 1, storage) for _ in range(2)]
    assert [measuring.table_of(process) for process in processes] == [table, table]
    assert sorted(started(tmp_path)) == runs  # each run once
    assert len({line.split()[0] for line in (tmp_path / "started").read_text().splitlines()}) == 2
    assert measuring.trials(storage)["COMPLETE"] == len(runs)


def test_an_error_in_a_worker_is_raised_here(tmp_path):
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            measure(measuring.MODEL, broken, out=tmp_path, workers=workers, methods=("did",), dims=(100,))
    assert measuring.trials(f"sqlite:///{tmp_path}/study.db")["COMPLETE"] == 0
    table = measure(measuring.MODEL, measuring.score, out=tmp_path, methods=("did",), dims=(100,), seeds=1).table()
    assert "DID" in table  # the study is as good as new


def broken(run):
    return 1 / 0


def test_what_cannot_be_sent_to_workers(tmp_path):
    with pytest.raises(ValueError, match="workers: expected 1, or a training function at the top level of a module"):
        measure(measuring.MODEL, lambda run: Scores(1, 1), out=tmp_path, workers=2)


def processes(run):
    """A training function with processes of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(measuring.score, [run])[0]


def test_a_training_function_may_have_processes(tmp_path):
    options = {"methods": ("did",), "dims": (100,), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    assert measure(measuring.MODEL, processes, out=tmp_path, workers=2, **options).runs == 6


@dataclass(frozen=True)
class Sharing:
    """A training function of two workers that measures, in a run of each at the same time, what they hold of W0.

    `source` is the model, or the directory that each loads it from.
    """

    out: Path
    source: nn.Module | str

    def __call__(self, run: Run) -> Scores:
        mine = self.out / f"{os.getpid()}.json"
        if run.dim is not None and not mine.exists():
            loaded = isinstance(self.source, nn.Module)
            model = self.source if loaded else build_classifier(self.source, ("a", "b"), run.seed, 16).model
            with run.wrap(model) as hsaid:
                sum(weight.sum() for weight in hsaid.weights().values()).backward()
                self.meet("trained")
                found = mapping(next(iter(hsaid.w0().values())))
                mine.write_text(json.dumps(found))
                self.meet("json")
        return Scores(0.9, 0.9)

    def meet(self, what: str) -> None:
        (self.out / f"{os.getpid()}.{what}").touch()
        for _ in range(1200):
            if len(list(self.out.glob(f"*.{what}"))) == 2:
                return
            time.sleep(0.05)
        raise AssertionError(f"the other worker has not {what} for a minute")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="smaps: expected Linux")
@pytest.mark.parametrize("where", ["file", "memory"])
def test_workers_share_w0(files, tmp_path, where):
    """Of a model that all of them load from its file, and of one that the training function holds."""
    source = nn.Sequential(nn.Linear(256, 256)) if where == "memory" else str(files / "model")
    before = [weight.clone() for weight in source.parameters()] if where == "memory" else []
    options = {"methods": ("did",), "dims": (100,), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    measure(measuring.MODEL, Sharing(tmp_path, source), out=tmp_path / "out", workers=2, **options)
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(found) == 2 and all(one["Rss"] > 0 and one["Anonymous"] == 0 for one in found)
    assert sum(one["Pss"] for one in found) < 1.05 * max(one["Rss"] for one in found)
    assert not before or all(map(torch.equal, before, source.parameters()))


def test_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import measuring\nfrom hsaid_kernels.measure import measure\n"
        f"measure(measuring.MODEL, measuring.score, out={str(tmp_path)!r}, workers=2, methods=('did',))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "call measure() under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


def test_another_name_has_a_directory_of_its_own(tmp_path):
    options = {"methods": ("did",), "dims": (100,), "seeds": 1, "refine": 0, "rates": measuring.RATES, "out": tmp_path}
    measure(measuring.MODEL, measuring.score, **options)
    before = (tmp_path / "results.json").read_bytes()
    assert (tmp_path / "study.db").exists()
    measure(measuring.MODEL, measuring.score, name="two", settings={"steps": 2}, **options)
    assert (tmp_path / "results.json").read_bytes() == before
    assert json.loads((tmp_path / "two" / "results.json").read_text())["settings"]["steps"] == 2
    assert not (tmp_path / "two" / "study.db").exists()  # both are in one


def reaching(top, run):
    return Scores(top, top) if run.dim is None else Scores(top / 2, top / 2)


@pytest.mark.parametrize(
    "top, chance, message",
    [
        (0.5, 0.5, "baseline: expected full fine-tuning to beat 0.500"),
        (0.85, 0.8, "threshold: expected a share of the baseline's 0.850 above the 0.800 that needs no training"),
        (-1.0, -10.0, "baseline: expected a test score above 0"),
        (float("nan"), 0.1, "baseline: expected full fine-tuning to learn, but it diverged"),
    ],
)
def test_a_baseline_of_which_no_share_can_be_told(tmp_path, top, chance, message):
    with pytest.raises(ValueError, match=message):
        measure(measuring.MODEL, partial(reaching, top), chance=chance, out=tmp_path, dims=(500,), methods=("did",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": {"theat": 3.0}}, "rates: expected a rate for some of full, theta, got one for 'theat'"),
        ({"rates": {"theta": 1e9}}, "rates: expected rates from 1e-7 to 1,000"),
        ({"methods": "did"}, "methods: expected a list of partitions, got the string 'did'"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"out": "what?x=1"}, "out: expected a path without [?], or a storage elsewhere"),
    ],
)
def test_arguments_that_cannot_be_right(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        measure(measuring.MODEL, measuring.score, **{"out": "out", **options})


def test_scores_that_are_none():
    with pytest.raises(TypeError, match="test: expected a number, got None"):
        Scores(1.0, None)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, undisturbed):
    if os.geteuid() != 0:
        pytest.skip("needs to mount a small file system, as root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", small], capture_output=True).returncode:
        pytest.skip("needs to mount a small file system, which is not allowed here")
    try:
        ballast = small / "ballast"
        process = measuring.start(tmp_path, 0.2, 1, f"sqlite:///{small}/study.db")
        wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 6, process)
        file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="space"):
            while True:
                os.write(file, bytes(4096))
        os.close(file)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "full" in text.splitlines()[-1], text
        ballast.unlink()
        assert measuring.table_of(measuring.start(tmp_path, 0, 1, f"sqlite:///{small}/study.db")) == undisturbed[0]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_methods_with_names_of_their_own(tmp_path):
    options = {"methods": ("did",), "dims": (50, 500), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    labels = {"full": "all weights", "did": "dense matrix"}
    found = measure(measuring.MODEL, measuring.score, out=tmp_path, labels=labels, **options)
    assert "| all weights " in found.table() and "dense matrix |" in found.table() and "DID" not in found.table()
    assert "interval" not in found.table()  # of one seed


def test_a_picture_of_any_kind(tmp_path):
    options = {"methods": ("did",), "dims": (50, 500), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    found = measure(measuring.MODEL, measuring.score, out=tmp_path, **options)
    found.draw(tmp_path / "picture.svg", title="A title")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    with pytest.raises(ValueError, match="path: expected the ending .png, .svg or .pdf, got 'txt'"):
        found.draw(tmp_path / "picture.txt")
    assert not (tmp_path / "picture.txt").exists()


def test_results_in_a_file(tmp_path):
    found = measure(measuring.MODEL, measuring.score, out=tmp_path, methods=("did",), dims=(50, 500), seeds=2, refine=0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == found.runs and results["dimensions"]["did"]["answer"] == "found"
    assert results["dimensions"]["did"]["d"] == pytest.approx(found.dimensions["did"].d, abs=0.1)
    assert (tmp_path / "table.md").read_text().strip() == found.table()
    assert (tmp_path / "dimension.png").read_bytes().startswith(b"\x89PNG")
