"""Optuna's storages: their addresses, opening them, and waiting for one that does not answer."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

JOURNAL = "journal:"
PATIENCE = 60.0  # seconds for which a storage that does not answer is asked again
T = TypeVar("T")


class StorageError(OSError):
    """The storage cannot be reached, read or written."""


def shown(storage: str) -> str:
    """A storage's address without the password."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return re.sub(":[^:@]*@", ":***@", storage)


def sqlite(file: Path) -> str:
    """The address of an SQLite file. Raises ValueError for a path that such an address cannot hold."""
    if bad := sorted(set("?#%{}") & set(str(file))):
        raise ValueError(f"out: expected a path without {' '.join(bad)}, or a storage elsewhere, got {str(file)!r}")
    return f"sqlite:///{file}"


class _Lock(JournalFileSymlinkLock):
    """The lock that Optuna takes before it appends to a journal. Removes what a write that was cut off left there."""

    def __init__(self, file: Path):
        super().__init__(str(file))
        self._file = file

    def acquire(self) -> bool:
        taken = super().acquire()
        with self._file.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            while end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
                end -= 1
            file.truncate(end)
        return taken


def _journal(file: Path) -> BaseStorage:
    if file.exists() and file.stat().st_size:
        with file.open("rb") as content:
            first = content.readline(10_000)
        if not first.startswith(b"{") or b'"op_code"' not in first:
            raise OSError("not a journal of Optuna")
    return JournalStorage(JournalFileBackend(str(file), _Lock(file)))


def connect(storage: str, create: bool) -> BaseStorage:
    """Opens a storage. With `create`, makes its file or tables if they are not there.

    Raises what Optuna, SQLAlchemy and the system raise.
    """
    try:
        url = None if storage.startswith(JOURNAL) else make_url(storage)
    except ValueError as error:  # such as a port that is no number
        raise OSError(f"not an address: {error}") from error
    file = storage.removeprefix(JOURNAL) if url is None else url.get_backend_name() == "sqlite" and url.database
    if file:
        if not create and not Path(file).exists():
            raise FileNotFoundError("no such file")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if url is None:
        return _journal(Path(str(file)).absolute())  # Optuna's lock needs the whole path
    connect: dict[str, Any] = {}
    if file:
        connect = {"timeout": PATIENCE}  # seconds to wait while another process writes
    elif url.get_driver_name() in ("psycopg", "psycopg2"):  # in seconds, but the last in milliseconds
        connect = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "tcp_user_timeout": 60_000}
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


def patiently(action: Callable[[], T], patience: float = PATIENCE) -> T:
    """Repeats an action on the storage for up to so many seconds while the storage does not answer.

    Raises StorageError if it then still does not, or if its disk is full, and UpdateFinishedTrialError.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return action()
        except UpdateFinishedTrialError:  # a RuntimeError
            raise
        # A journal whose lock was taken away raises RuntimeError.
        except (StorageInternalError, SQLAlchemyError, OSError, RuntimeError) as error:
            if time.monotonic() > until or _is_full(error):
                raise StorageError(f"storage: expected to read and write the study, got: {reason(error)}") from error
            time.sleep(1.0)


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "full" in reason(error)


def reason(error: BaseException) -> str:
    """The first line of what the database or the system says."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "orig", None) or error).strip()
    return text.split("\n")[0] if text else type(error).__name__
