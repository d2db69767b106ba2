"""Runs the C++ tests of csrc/core and csrc/cpu, which `make test` builds; HSAID_CORE_TEST names another executable."""

import os
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


def executable() -> Path | None:
    if named := os.environ.get("HSAID_CORE_TEST"):
        return Path(named)
    return next((path for path in (BUILD / "cmake/test_core", BUILD / "test_core") if path.exists()), None)


def test_core():
    path = executable()
    if path is None:
        pytest.skip("build/cmake/test_core is not built: `make test` builds it")
    run = subprocess.run([path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("passed: 0 checks failed\n")
