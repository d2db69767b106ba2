"""Runs the C++ tests of csrc/core and csrc/cpu, which `make test` builds; HSAID_CORE_TEST names another executable."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build"


def executable() -> Path | None:
    if named := os.environ.get("HSAID_CORE_TEST"):
        return Path(named)
    return next((path for path in (BUILD / "cmake/test_core", BUILD / "test_core") if path.exists()), None)


@pytest.fixture
def path() -> Path:
    found = executable()
    if found is None:
        pytest.skip("build/cmake/test_core is not built: `make test` builds it")
    return found


def test_core(path):
    run = subprocess.run([path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("passed: 0 checks failed\n")


def test_instruction_sets_share_no_code(path):
    """The linker would keep one copy for all of what two of them define: slow at best, illegal at worst."""
    objects = sorted(path.parent.glob("CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files beside the executable, or no nm to read them")
    for compiled in objects:
        symbols = subprocess.run(["nm", "--demangle", compiled], capture_output=True, text=True, check=True).stdout
        assert re.findall(r" [WVu] (?!DW\.ref)(.*)", symbols) == [], compiled
