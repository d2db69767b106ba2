"""Runs the C++ tests that `make test` builds; HSAID_CORE_TEST names another executable for that of core and cpu."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"


def built(name: str) -> Path:
    found = next((path for path in (BUILD / "cmake" / name, BUILD / name) if path.exists()), None)
    if found is None:
        pytest.skip(f"build/cmake/{name} is not built: `make test` builds it")
    return found


@pytest.fixture
def path() -> Path:
    named = os.environ.get("HSAID_CORE_TEST")
    return Path(named) if named else built("test_core")


def passes(run: subprocess.Popen) -> None:
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert out.endswith("passed: 0 checks failed\n")


def started(*command: str | Path) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_core(path):
    passes(started(path))


def test_cuda_kernels_on_an_emulated_device():
    """The quick ones under sanitizers, too, at the same time: each takes one core for a minute or more."""
    runs = [started(built("test_cuda")), started(built("test_cuda_sanitized"), "quick")]
    try:
        for run in runs:
            passes(run)
    finally:
        for run in runs:
            run.kill()


def test_instruction_sets_share_no_code(path):
    """The linker would keep one copy for all of what two of them define: slow at best, illegal at worst."""
    objects = sorted(path.parent.glob("CMakeFiles/kernels_*.dir/**/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files beside the executable, or no nm to read them")
    for compiled in objects:
        symbols = subprocess.run(["nm", "--demangle", compiled], capture_output=True, text=True, check=True).stdout
        assert re.findall(r" [WVu] (?!DW\.ref)(.*)", symbols) == [], compiled
