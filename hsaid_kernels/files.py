"""Reading regular files only, and replacing files atomically."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path


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
