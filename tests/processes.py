"""Starts a test's file as a script in two processes that find each other over gloo; processes that import nothing."""

import multiprocessing
import os
import socket
import subprocess
import sys

from helpers import ENVIRONMENT


def in_two_processes(script: str, *arguments: str) -> None:
    """Runs `script` with RANK 0 and 1 under Accelerate's variables. Fails with what they said if one does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Not the folder of torchvision, which breaks the import of transformers (clients/conftest.py).
    paths = [path for path in ENVIRONMENT["PYTHONPATH"].split(os.pathsep) if not path.endswith("build/clients")]
    shared = (
        ENVIRONMENT
        | dict(PYTHONPATH=os.pathsep.join(paths))
        | dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", ACCELERATE_USE_CPU="1")
    )
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


def forked(function, *arguments) -> None:
    """Calls a function in a process of its own, for its memory: one that begins with all that this one has imported."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def leave() -> None:
    """Ends such a process at once: gloo's threads sometimes end one with an error that is on its way out."""
    sys.stdout.flush()
    os._exit(0)
