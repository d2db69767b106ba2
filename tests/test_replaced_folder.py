"""`replaced_folder`: all new files or none, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ENVIRONMENT

from hsaid_kernels.files import UNFINISHED, replaced_folder


def files(directory) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def write(directory, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


OLD = {"last": "old", "a.bin": "old", "c.bin": "old", "mine": "old", "deep/a": "old"}
NEW = {"last": "new", "a.bin": "new", "b.bin": "new", "deep/a": "new"}


def test_files_are_replaced(tmp_path):
    write(tmp_path, OLD)
    with replaced_folder(tmp_path, "last", "*.bin") as folder:
        write(folder, NEW)
        assert {name: files(tmp_path)[name] for name in OLD} == OLD
    assert files(tmp_path) == NEW | {"mine": "old"}
    assert not (tmp_path / UNFINISHED).exists()


def test_after_an_error_nothing_has_changed(tmp_path):
    write(tmp_path, OLD)
    with pytest.raises(KeyError), replaced_folder(tmp_path, "last", "*.bin") as folder:
        write(folder, NEW)
        raise KeyError
    assert files(tmp_path) == OLD and not (tmp_path / UNFINISHED).exists()
    with pytest.raises(KeyError), replaced_folder(tmp_path / "x" / "y", "last", "*.bin") as folder:
        write(folder, NEW)
        raise KeyError
    assert not (tmp_path / "x").exists()


def test_an_error_while_files_are_replaced(tmp_path, monkeypatch):
    """Nobody takes some old and some new ones for a whole: `last` is not there."""
    write(tmp_path, OLD)
    right, done = os.replace, []

    def refuse(source, target):
        if done:
            raise PermissionError
        done.append(right(source, target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError), replaced_folder(tmp_path, "last", "*.bin") as folder:
        write(folder, NEW)
    assert "last" not in files(tmp_path)


HOLDING = """
import sys, time
from pathlib import Path
from hsaid_kernels.files import replaced_folder
with replaced_folder(Path(sys.argv[1]), "last", "*.bin") as folder:
    (folder / "half").write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_and_two_at_once(tmp_path):
    """The second one is refused; what a killed one has left is gone when the next one has finished."""
    write(tmp_path, OLD)
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == "here\n"
        refused = pytest.raises(OSError, match="another process is writing to it")
        with refused, replaced_folder(tmp_path, "last", "*.bin"):
            pass
        assert (tmp_path / UNFINISHED / "half").exists()
        process.send_signal(signal.SIGKILL)
    kept = {name: text for name, text in files(tmp_path).items() if not name.startswith(UNFINISHED)}
    assert kept == OLD
    for _ in range(100):
        try:
            with replaced_folder(tmp_path, "last", "*.bin") as folder:
                assert not list(folder.iterdir())
                write(folder, NEW)
            break
        except OSError:  # the system has not closed the killed one's files yet
            time.sleep(0.05)
    assert files(tmp_path) == NEW | {"mine": "old"} and not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize("place", ["file", "file/deep"])
def test_where_no_directory_can_be(place, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError), replaced_folder(tmp_path / place, "last", "*.bin"):
        pass
    assert files(tmp_path) == {"file": "x"}
