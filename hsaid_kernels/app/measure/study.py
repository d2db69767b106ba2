"""A study in an Optuna storage: its settings, the runs that have finished, and who is working on which run.

Each run is a trial. A worker claims a run by adding a trial in the state RUNNING that carries the run; if two add one
for the same run, the lower trial number counts, and the other worker withdraws. While a run lasts, the worker's thread
keeps changing the trial's "heartbeat". A trial whose worker has died, or whose heartbeat has stood still for a minute,
is marked as failed by whoever notices it, and the run is free again. Of a run's finished trials only the first counts.
Optuna's own heartbeats are not used because its journal storage has none.

Trial states: COMPLETE has scores, PRUNED diverged, FAIL was interrupted, raised an error, or was withdrawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from hsaid_kernels.app.measure.runs import Design, Outcome, Run, Scores
from hsaid_kernels.app.measure.storage import PATIENCE, StorageError, connect, patiently, reason, shown
from hsaid_kernels.fastfood.limits import MAX_DIM

BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without a heartbeat after which a worker counts as dead
LONG_PATIENCE = 1800.0  # in place of PATIENCE, to store what came of a run
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class SettingsError(ValueError):
    """A study of this name was made with other settings."""


class Study:
    """The study `name` in `storage`.

    Args:
        storage: a SQLAlchemy URL ("sqlite:///runs/measure/study.db", "postgresql://...") or "journal:" and a file.
        name: the study's name.
        settings: everything but the design that determines the scores of a run, as JSON. None means those of the
            study, which must exist.

    Raises StorageError if the storage does not answer, SettingsError if the study has other settings, ValueError if
    there is no such study, TypeError for settings that are not JSON.
    """

    def __init__(self, storage: str, name: str, settings: Mapping[str, Any] | None):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.name = storage, name
        try:
            json.dumps(settings)
        except (TypeError, ValueError) as error:
            raise TypeError(f"settings: expected values that JSON has, got {error}") from None
        try:
            self._storage = connect(storage, create=settings is not None)
            self._id = self._open(settings)
        except SettingsError:
            raise
        except (StorageInternalError, SQLAlchemyError, OSError, ImportError, UnicodeError) as error:
            raise StorageError(
                f"storage: expected a database or file that can be opened, got {shown(storage)!r}: {reason(error)}"
            ) from error
        self._beats: dict[int, tuple[Any, float]] = {}  # trial id -> (its heartbeat, when it was first seen)
        self._last_read = time.monotonic()

    def _open(self, settings: Mapping[str, Any] | None) -> int:
        if settings is not None:
            with contextlib.suppress(DuplicatedStudyError):
                self._storage.create_new_study([StudyDirection.MAXIMIZE], self.name)
        try:
            study = self._storage.get_study_id_from_name(self.name)
        except KeyError:
            raise ValueError(f"study: expected one in {shown(self.storage)!r}, got {self.name!r}") from None
        attributes = self._storage.get_study_user_attrs(study)
        if "settings" not in attributes and settings is not None and not self._storage.get_all_trials(study):
            self._storage.set_study_user_attr(study, "settings", settings)  # a new one, or one whose maker was killed
            attributes = self._storage.get_study_user_attrs(study)
        if "settings" not in attributes:
            raise ValueError(f"study: expected one that `measure` made, got {self.name!r} in {shown(self.storage)!r}")
        self.settings: dict[str, Any] = attributes["settings"]
        if settings is not None and (differences := _differences(self.settings, settings)):
            raise SettingsError(
                f"study: {self.name!r} in {shown(self.storage)!r} was made with other settings: "
                f"{'; '.join(differences)}. Choose another name for these."
            )
        return study

    @property
    def design(self) -> Design:
        """The design with which the study was last worked on. Raises ValueError if there is none yet."""
        attributes = patiently(lambda: self._storage.get_study_user_attrs(self._id))
        if "design" not in attributes:
            raise ValueError(f"study: expected one that was worked on, got {self.name!r} without a design")
        return Design.from_json(attributes["design"])

    @design.setter
    def design(self, design: Design) -> None:
        self.note("design", design.to_json())

    def note(self, key: str, value: Any) -> None:
        """Stores a value of the study, such as the options of the command line, as JSON."""
        patiently(lambda: self._storage.set_study_user_attr(self._id, key, value))

    def noted(self, key: str) -> Any:
        """A value that `note` stored, or None."""
        return patiently(lambda: self._storage.get_study_user_attrs(self._id)).get(key)

    def read(self) -> tuple[dict[Run, Outcome], set[Run]]:
        """Returns (the finished runs, the runs that are being worked on).

        Trials whose worker has died are marked as failed, and their runs are in neither.
        """
        now = time.monotonic()
        if now - self._last_read > STALE / 3:  # whether hearts were still during so long a silence, nobody knows
            self._beats.clear()
        self._last_read = now
        outcomes: dict[Run, Outcome] = {}
        running: set[Run] = set()
        for trial in self._trials():
            run = _run_of(trial)
            if trial.state in _FINISHED and run not in outcomes:
                outcomes[run] = _outcome_of(run, trial)
            elif trial.state == TrialState.RUNNING:
                if self._is_dead(trial):
                    self._end(trial._trial_id, TrialState.FAIL, reason="its worker died")
                else:
                    running.add(run)
        return outcomes, running - outcomes.keys()

    def claim(self, run: Run) -> Claim | None:
        """Starts work on a run. None if another worker was faster."""
        token = secrets.token_hex(8)
        attributes = {"run": {"method": run.method, "d": run.dim, "lr": run.lr, "seed": run.seed}, "method": run.method}
        worker = {"worker": [_machine(), os.getpid()], "token": token, "heartbeat": 0}
        parameters: dict[str, Any] = {"lr": run.lr, "seed": run.seed} | ({} if run.dim is None else {"d": run.dim})
        template = create_trial(
            state=TrialState.RUNNING,
            params=parameters,
            distributions={name: _DISTRIBUTIONS[name] for name in parameters},
            user_attrs=attributes | worker,
        )
        patiently(lambda: self._storage.create_new_trial(self._id, template))
        # In the order of their numbers. If the answer of the storage was lost, several are ours.
        trials = [trial for trial in self._trials() if _run_of(trial) == run]
        open_trials = [t for t in trials if t.state in _FINISHED or t.state == TrialState.RUNNING]
        first = next(t for t in open_trials if t.user_attrs["token"] == token or not self._is_dead(t))
        for trial in open_trials:
            if trial is not first and trial.user_attrs["token"] == token:
                self._end(trial._trial_id, TrialState.FAIL, reason="another worker was faster")
        return Claim(self, first._trial_id) if first.user_attrs["token"] == token else None

    def _trials(self) -> list[FrozenTrial]:
        trials = patiently(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
        return sorted((trial for trial in trials if "run" in trial.user_attrs), key=lambda trial: trial.number)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial has died, on this machine, or has not been heard for STALE seconds."""
        machine, process = trial.user_attrs["worker"]
        if machine == _machine() and not _is_alive(process):
            return True
        beat, now = trial.user_attrs.get("heartbeat"), time.monotonic()
        last, since = self._beats.get(trial._trial_id, (None, now))
        if beat != last:
            since = now
        self._beats[trial._trial_id] = beat, since
        return now - since > STALE

    def _end(
        self,
        trial_id: int,
        state: TrialState,
        values: list[float] | None = None,
        patience: float = PATIENCE,
        **attributes: Any,
    ) -> bool:
        """Ends a trial. False if it has ended already, for example because another worker took this one for dead."""
        try:
            for key, value in attributes.items():
                patiently(partial(self._storage.set_trial_user_attr, trial_id, key, value), patience)
            patiently(lambda: self._storage.set_trial_state_values(trial_id, state, values), patience)
        except UpdateFinishedTrialError:
            return False
        return True


class Claim:
    """A run that this worker works on."""

    def __init__(self, study: Study, trial_id: int):
        self._study, self._id = study, trial_id

    @contextlib.contextmanager
    def beating(self, parent: int | None = None) -> Iterator[None]:
        """A context manager in which the trial's heartbeat goes on.

        If `parent` is given and is no longer this process's parent, the process ends at once: a worker whose command
        was killed should not go on unseen.
        """
        stop = threading.Event()

        def beat() -> None:
            count, last = 0, time.monotonic()
            while not stop.wait(0.5):
                if parent is not None and os.getppid() != parent:
                    os._exit(1)
                if time.monotonic() - last >= BEAT:
                    count, last = count + 1, time.monotonic()
                    try:
                        self._study._storage.set_trial_user_attr(self._id, "heartbeat", count)
                    except UpdateFinishedTrialError:  # another worker took this one for dead
                        return
                    except Exception:  # the storage may answer again, at the latest when the run has ended
                        pass

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)  # it may be waiting for the storage

    def finish(self, scores: Scores, seconds: float, where: Mapping[str, str]) -> bool:
        """Stores what came of the run. False if another worker has taken over the run; then it does not count.

        `where` says on which machine, with what, and with which checkpoint.
        """
        known = {"seconds": round(seconds, 3), **where}
        if not scores.finite:
            return self._study._end(self._id, TrialState.PRUNED, None, LONG_PATIENCE, scores=known)
        known |= {name: float(value) for name, value in asdict(scores).items() if value is not None}
        return self._study._end(self._id, TrialState.COMPLETE, [scores.validation], LONG_PATIENCE, scores=known)

    def fail(self, reason: str) -> None:
        """Gives the run up: it is free for any worker."""
        self._study._end(self._id, TrialState.FAIL, reason=reason)


_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-7, 1e3, log=True),
    "d": IntDistribution(1, MAX_DIM, log=True),
    "seed": IntDistribution(0, 2**31 - 1),
}


def _run_of(trial: FrozenTrial) -> Run:
    run = trial.user_attrs["run"]
    return Run(run["method"], run["d"], run["lr"], run["seed"])


def _outcome_of(run: Run, trial: FrozenTrial) -> Outcome:
    known, scores = trial.user_attrs["scores"], None
    if trial.state == TrialState.COMPLETE:
        counts = {key: None if known.get(key) is None else int(known[key]) for key in ("trained", "examples")}
        rest = {key: known.get(key) for key in ("train_error", "bits")}
        scores = Scores(known["validation"], known["test"], **counts, **rest)
    return Outcome(run, scores, known["seconds"], known.get("made_with", ""))


def _machine() -> str:
    """Names a set of processes whose numbers mean the same: a host since it was started, or a container on it."""
    parts = [platform.node(), str(uuid.getnode())]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere this signal is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
