"""Reading regular files only, and replacing files atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

UNFINISHED = ".unfinished"  # the folder of new files in a directory, see `replaced_folder`


def read_file(path: Path) -> bytes:
    """The contents of a file. Raises OSError if it cannot be read or is not a regular file.

    Reading a pipe, for example, could block forever.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_bytes()


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Writes files, {path: contents}. Each is replaced atomically, in the given order.

    All contents are first written to temporary files and flushed to disk. If that raises OSError, no file is replaced
    and the temporary files are deleted.
    """
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in files}
    try:
        for path, data in files.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(directory: Path, last: str, stale: str) -> Iterator[Path]:
    """A context manager that yields a folder for new files, which at its end replace those of `directory`.

    If anything is raised inside of it, `directory` stays as it was, or is not created. What a killed process has left
    is deleted by the next one. While files are being replaced there is none called `last`, so that nobody takes some
    old and some new ones for a whole. Files are not flushed to disk, which would take longer than writing them.

    Args:
        directory: created if needed.
        last: the name of a new file, without which the others are of no use.
        stale: a pattern of names, such as "*.bin": old files with such a name are deleted.

    Raises OSError if the directory cannot be written to, or another process is doing so.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    folder = directory / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            try:
                _empty(folder)
                yield folder
                _replace(directory, folder, last, stale)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it has files now
                path.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which ends with the process. Raises OSError if another process holds it."""
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OSError(errno.EBUSY, "another process is writing to it") from None
    try:
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(directory: Path, folder: Path, last: str, stale: str) -> None:
    new = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    (directory / last).unlink(missing_ok=True)
    for path in directory.glob(stale):
        path.unlink()
    for path in sorted(new, key=lambda path: (path == Path(last), path)):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, directory / path)
