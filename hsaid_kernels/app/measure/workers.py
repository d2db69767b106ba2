"""Workers: processes that take runs of a study, one after another, until none is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import mean

import torch

from hsaid_kernels.app.measure.runs import Diverged, Run, Scores
from hsaid_kernels.app.measure.schedule import Outcomes, Schedule
from hsaid_kernels.app.measure.study import Study

INTERRUPTED = 130  # the exit code of a worker after Ctrl-C
POLL = 0.5  # seconds between looks at the study while all runs are being worked on by others

Train = Callable[[Run], Scores]
Report = Callable[[Outcomes, str], None]  # the finished runs, and a text about the latest


class BaselineError(ValueError):
    """Training all weights does not reach a score from which a dimension could be told."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know.

    Attributes:
        train: the training function.
        schedule: of the study.
        storage, name: of the study.
        directory: under which a run may save its checkpoint.
        chance: the score that the baseline must beat, such as that of always predicting the most frequent label.
        threads: number of CPU threads of each worker; None means torch's own choice, or its share for several workers.
    """

    train: Train
    schedule: Schedule
    storage: str
    name: str
    directory: Path
    chance: float
    threads: int | None


def check_baseline(job: Job, outcomes: Outcomes) -> None:
    """Raises BaselineError if the baseline is complete, and its mean test score or the goal is within `chance`."""
    baseline = job.schedule.baseline(outcomes)
    if not baseline.complete:
        return
    if not baseline.scores:
        raise BaselineError("baseline: expected full fine-tuning to learn, but it diverged at every learning rate")
    score, share = mean(baseline.scores.values()), job.schedule.design.threshold
    if score <= 0:
        raise BaselineError(
            f"baseline: expected a test score above 0, of which a share can be reached, got {score:.3f}"
        )
    if score <= job.chance:
        raise BaselineError(
            f"baseline: expected full fine-tuning to beat {job.chance:.3f}, which needs no training, got {score:.3f}"
        )
    if share * score <= job.chance:
        raise BaselineError(
            f"threshold: expected a share of the baseline's {score:.3f} above the {job.chance:.3f} that needs no "
            f"training, got {share:g}, which is {share * score:.3f}"
        )


def work(job: Job, report: Report, parent: int | None = None) -> None:
    """Takes runs of the study until all have finished, here or in other processes.

    Calls `report` whenever runs have finished. If `parent` is given, ends with that process. Raises BaselineError, and
    whatever the training function raises.
    """
    study = Study(job.storage, job.name, None)
    latest, known = "", -1
    while parent is None or os.getppid() == parent:
        outcomes, running = study.read()
        check_baseline(job, outcomes)
        if len(outcomes) > known:
            known = len(outcomes)
            report(outcomes, latest)
        missing, _ = job.schedule.left(outcomes)
        if not missing:
            return
        free = next((run for run in missing if run not in running), None)
        if free is None:
            time.sleep(POLL)
            continue
        scores = _take(study, free, job, parent)
        latest = "" if scores is None else f"{free}: {scores.test:.3f}"


def _take(study: Study, run: Run, job: Job, parent: int | None) -> Scores | None:
    """Claims a run, trains, stores the scores and returns them; None if another worker has the run."""
    claim = study.claim(run)
    if claim is None:
        return None
    began = time.monotonic()
    directory = job.directory / _folder(run)
    try:
        with claim.beating(parent):
            try:
                scores = job.train(replace(run, directory=directory))
            except Diverged:
                scores = Scores(float("nan"), float("nan"))
            if not isinstance(scores, Scores):
                raise TypeError(f"train: expected a function that returns Scores, got {type(scores).__name__}")
            if run.dim is None and run.method in job.schedule.design.compare and scores.finite and not scores.trained:
                raise ValueError(f"train: expected Scores with `trained`, the number of values {run.method} trains")
            where = {"directory": str(directory.absolute())} if directory.exists() else {}
            where |= {"machine": platform.node(), "made_with": _made_with()}
            counted = claim.finish(scores, time.monotonic() - began, where)
    except BaseException as error:
        with contextlib.suppress(Exception):  # the storage may be the reason
            claim.fail(f"{type(error).__name__}: {error}"[:500])
        raise
    return scores if counted else None


def _made_with() -> str:
    """What may change the last digits of a run, and so its score."""
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, CPU, threads: {torch.get_num_threads()}"


def _folder(run: Run) -> str:
    """A file name for a run, such as "hsaid-3 d=1000 lr=0.1 seed=0"."""
    return "".join(c if c.isalnum() or c in " .=+-_" else "_" for c in str(run))


def work_in_processes(job: Job, workers: int, report: Report) -> None:
    """Does what `work` does in several processes; this one only watches.

    A worker that is killed does not end the others. Tensors that the training function holds, such as a model's, get
    into shared memory, and are not copied for each worker. Raises what a worker raises, RuntimeError if none is left,
    ValueError if the training function cannot be sent to another process.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[tuple[SpawnProcess, Connection]] = []
    study, known = Study(job.storage, job.name, None), -1
    try:
        for _ in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            # Not daemons: these could not have processes of their own, as for a DataLoader.
            process = context.Process(target=_worker, args=(job, os.getpid(), sender), daemon=False)
            with _without_interrupts():
                try:
                    process.start()
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise ValueError(
                        "workers: expected 1, or a training function at the top level of a module, got "
                        f"{workers}: {error}"
                    ) from error
            sender.close()
            processes.append((process, receiver))
        while True:
            alive = [process.is_alive() for process, _ in processes]  # before reading, so that nothing is overlooked
            for _, receiver in processes:
                with contextlib.suppress(EOFError):
                    while receiver.poll():
                        failure, text = receiver.recv()
                        raise failure from RuntimeError(f"in a worker:\n{text}")
            outcomes, _ = study.read()
            if len(outcomes) > known:
                known = len(outcomes)
                check_baseline(job, outcomes)
                report(outcomes, "")
                if not job.schedule.left(outcomes)[0]:
                    break
            codes = [process.exitcode for process, _ in processes]
            if INTERRUPTED in codes:  # Ctrl-C reaches everybody, but a library here may have swallowed it
                raise KeyboardInterrupt
            if not any(alive):
                if any(code == 1 for code in codes):
                    raise RuntimeError(
                        "workers: expected processes that can import the training function, but none started: call "
                        "measure() under `if __name__ == '__main__':` in a script, or use workers=1"
                    )
                raise RuntimeError(f"all {workers} workers were killed (out of memory?): exit codes {codes}")
            time.sleep(POLL)
    finally:
        for process, _ in processes:
            process.terminate()
        for process, receiver in processes:
            process.join()
            receiver.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is ignored meanwhile, and in processes that are started, until `_worker` wants it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(job: Job, parent: int, sender: Connection) -> None:
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    try:
        work(job, lambda *_: None, parent)
    except BaseException as error:
        if interrupted:  # whatever a library has made of it
            sys.exit(INTERRUPTED)
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        sender.send((error, text))
        sys.exit(1)
