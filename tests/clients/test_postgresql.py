"""A study in a real PostgreSQL server: shared by two commands at once, one of which is killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import measuring
import optuna
import pytest

pytest.importorskip("psycopg")

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def as_user(*command):
    """PostgreSQL does not run as root; Debian's package makes a user for it."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run([*prefix, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an empty database."""
    if not PROGRAMS:
        pytest.skip("needs PostgreSQL, in Debian the package postgresql")
    programs = PROGRAMS[-1].parent
    folder = Path("/tmp", f"hsaid-postgresql-{os.getpid()}")  # short, and readable for the server's user
    folder.mkdir()
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        data = folder / "data"
        as_user(programs / "initdb", "-D", data, "-A", "trust", "-U", "measure")
        options = f"-p {port} -k {folder} -h 127.0.0.1 -F"
        as_user(programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        try:
            yield f"postgresql://measure@127.0.0.1:{port}/postgres"
        finally:
            as_user(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def test_two_machines_share_a_study_and_one_dies(server, tmp_path):
    expected = measuring.table_of(measuring.start(tmp_path / "alone", 0, 1, "", machine=True))
    runs = sorted(line.split(" ", 1)[1] for line in (tmp_path / "alone" / "started").read_text().splitlines())
    first, second = (measuring.start(tmp_path / name, 0.3, 1, server, machine=True) for name in ("first", "second"))
    started = tmp_path / "first" / "started"
    for _ in range(1200):
        if started.exists() and len(started.read_text().splitlines()) >= 4:
            break
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert measuring.table_of(second) == expected
    trials = optuna.load_study(study_name="measure", storage=server).trials
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == len(runs) and states["RUNNING"] == 0 and states["FAIL"] >= 1
    complete = Counter(tuple(t.user_attrs["run"].values()) for t in trials if t.state.name == "COMPLETE")
    assert max(complete.values()) == 1
    third = measuring.start(tmp_path / "third", 0, 1, server, machine=True)
    assert measuring.table_of(third) == expected  # everything is done
    assert not (tmp_path / "third" / "started").exists()
