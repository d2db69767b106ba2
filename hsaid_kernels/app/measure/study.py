"""A study in an Optuna storage: its settings, the runs that have finished, and who is working on which run.

Each run is a trial. A worker claims a run by adding a trial in the state RUNNING that carries the run; if two add one
for the same run, the lower trial number counts, and the other worker withdraws. While a run lasts, the worker's thread
keeps changing the trial's "heartbeat". A trial whose worker has died, or whose heartbeat has stood still for a minute,
is marked as failed by whoever notices it, and the run is free again. A trial that is marked as failed cannot complete,
so no run counts twice. Optuna's own heartbeats are not used because its journal storage has none.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from hsaid_kernels.app.measure.runs import Design, Outcome, Run, Scores
from hsaid_kernels.fastfood.limits import MAX_DIM

JOURNAL = "journal:"
BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without a heartbeat after which a worker counts as dead
PATIENCE = 60.0  # seconds for which a storage that does not answer is asked again
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_T = TypeVar("_T")


class StorageError(OSError):
    """The storage cannot be reached, read or written."""


class SettingsError(ValueError):
    """A study of this name was made with other settings."""


def shown(storage: str) -> str:
    """A storage's address without the password."""
    return make_url(storage).render_as_string(hide_password=True) if "://" in storage else storage


def _connect(storage: str, create: bool) -> BaseStorage:
    journal = storage.startswith(JOURNAL)
    url = None if journal else make_url(storage)
    file = storage.removeprefix(JOURNAL) if url is None else url.get_backend_name() == "sqlite" and url.database
    if file:
        if not create and not Path(file).exists():
            raise FileNotFoundError("no such file")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if url is None:
        return JournalStorage(JournalFileBackend(str(file)))
    connect: dict[str, Any] = {}
    if file:
        connect = {"timeout": PATIENCE}  # seconds to wait while another process writes
    elif url.get_backend_name() in ("postgresql", "mysql", "mariadb"):
        connect = {"connect_timeout": 10}
    for attempt in range(10):
        try:
            database = RDBStorage(storage, {"pool_pre_ping": True, "connect_args": connect})
        except SQLAlchemyError as error:
            # Optuna does not lock the database while it makes its tables: another process may be making them, too.
            made_by_another = isinstance(error, IntegrityError | ProgrammingError) or "already exists" in str(error)
            if not made_by_another or attempt == 9:
                raise
            time.sleep(0.2)
        else:
            break
    return optuna.storages.get_storage(database)


class Study:
    """The study `name` in `storage`.

    Args:
        storage: a SQLAlchemy URL ("sqlite:///runs/measure/study.db", "postgresql://...") or "journal:" and a file.
        name: the study's name.
        settings: everything but the design that determines the scores of a run, as JSON. None means those of the
            study, which must exist.

    Raises StorageError if the storage does not answer, SettingsError if the study has other settings, ValueError for an
    address that is none, and if there is no such study.
    """

    def __init__(self, storage: str, name: str, settings: Mapping[str, Any] | None):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.name = storage, name
        try:
            self._storage = _connect(storage, create=settings is not None)
            self._id = self._open(settings)
        except (StorageInternalError, SQLAlchemyError, OSError, ImportError) as error:
            raise StorageError(
                f"storage: expected a database or file that can be opened, got {shown(storage)!r}: {_reason(error)}"
            ) from error
        self._beats: dict[int, tuple[Any, float]] = {}  # trial id -> (its heartbeat, when it was first seen)

    def _open(self, settings: Mapping[str, Any] | None) -> int:
        if settings is not None:
            with contextlib.suppress(DuplicatedStudyError):
                study = self._storage.create_new_study([StudyDirection.MAXIMIZE], self.name)
                self._storage.set_study_user_attr(study, "settings", settings)
        try:
            study = self._storage.get_study_id_from_name(self.name)
        except KeyError:
            raise ValueError(f"study: expected one in {shown(self.storage)!r}, got {self.name!r}") from None
        for _ in range(50):  # another worker may be just about to write them
            if "settings" in (attributes := self._storage.get_study_user_attrs(study)):
                break
            time.sleep(0.1)
        else:
            raise ValueError(f"study: expected one that `measure` made, got {self.name!r} in {shown(self.storage)!r}")
        self.settings: dict[str, Any] = attributes["settings"]
        if settings is not None and (differences := _differences(self.settings, settings)):
            raise SettingsError(
                f"study: {self.name!r} in {shown(self.storage)!r} was made with other settings: "
                f"{'; '.join(differences)}. Choose another name or directory for these."
            )
        return study

    @property
    def design(self) -> Design:
        """The design with which the study was last worked on. Raises ValueError if there is none yet."""
        attributes = _patiently(lambda: self._storage.get_study_user_attrs(self._id))
        if "design" not in attributes:
            raise ValueError(f"study: expected one that was worked on, got {self.name!r} without a design")
        return Design.from_json(attributes["design"])

    @design.setter
    def design(self, design: Design) -> None:
        self.note("design", design.to_json())

    def note(self, key: str, value: Any) -> None:
        """Stores a value of the study, such as the options of the command line, as JSON."""
        _patiently(lambda: self._storage.set_study_user_attr(self._id, key, value))

    def noted(self, key: str) -> Any:
        """A value that `note` stored, or None."""
        return _patiently(lambda: self._storage.get_study_user_attrs(self._id)).get(key)

    def read(self) -> tuple[dict[Run, Outcome], set[Run]]:
        """Returns (the finished runs, the runs that are being worked on).

        Trials whose worker has died are marked as failed, and their runs are in neither.
        """
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
        trial_id = _patiently(lambda: self._storage.create_new_trial(self._id, template))
        claim = Claim(self, trial_id)
        for trial in self._trials():  # in the order of their numbers
            if _run_of(trial) == run and (trial.state in _FINISHED or trial.state == TrialState.RUNNING):
                if trial._trial_id == trial_id:
                    return claim
                if not self._is_dead(trial):
                    break
        claim.fail("another worker was faster")
        return None

    def _trials(self) -> list[FrozenTrial]:
        trials = _patiently(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
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

    def _set(self, trial_id: int, key: str, value: Any) -> None:
        _patiently(lambda: self._storage.set_trial_user_attr(trial_id, key, value))

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None = None, **attributes: Any) -> bool:
        """Ends a trial. False if it has ended already, for example because another worker took this one for dead."""
        try:
            for key, value in attributes.items():
                self._set(trial_id, key, value)
            _patiently(lambda: self._storage.set_trial_state_values(trial_id, state, values))
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
                        self._study._set(self._id, "heartbeat", count)
                    except UpdateFinishedTrialError:  # another worker took this one for dead
                        return
                    except StorageError:  # it may answer again, at the latest when the run has ended
                        pass

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def finish(self, scores: Scores, seconds: float, where: Mapping[str, str]) -> bool:
        """Stores what came of the run. False if another worker has taken over the run; then it does not count."""
        known = {"seconds": round(seconds, 3), **where}
        if not scores.finite:
            return self._study._end(self._id, TrialState.PRUNED, scores=known)
        known |= {name: float(value) for name, value in asdict(scores).items() if value is not None}
        return self._study._end(self._id, TrialState.COMPLETE, [float(scores.validation)], scores=known)

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
        trained = known.get("trained")
        scores = Scores(known["validation"], known["test"], None if trained is None else int(trained))
    return Outcome(run, scores, known["seconds"])


def _machine() -> str:
    """Names a set of processes whose numbers mean the same: a host since it was started, or a container on it."""
    parts = [platform.node()]
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


def _patiently(action: Callable[[], _T]) -> _T:
    """Repeats an action on the storage for up to PATIENCE seconds while the storage does not answer."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except (StorageInternalError, SQLAlchemyError, OSError) as error:
            if time.monotonic() > until or "full" in _reason(error):
                raise StorageError(f"storage: expected to read and write the study, got: {_reason(error)}") from error
            time.sleep(1.0)


def _reason(error: BaseException) -> str:
    """The first line of what the database or the system says."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip()
    return text.split("\n")[0] if text else type(error).__name__


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
