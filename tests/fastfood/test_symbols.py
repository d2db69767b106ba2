"""That the compiled libraries load into every torch that pyproject.toml allows, shown without a GPU and without them.

torch loads a library with local scope: each symbol must be in a library that it names as needed itself. The CUDA
library used to leave one of torch's out, and loaded nowhere where there is a GPU.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from stable_abi import OLDEST, TORCH_CPU, TORCH_CUDA

import hsaid_kernels

PACKAGE = Path(hsaid_kernels.__file__).parent
# Which of the needed libraries brings what; libtorch.so needs libtorch_cuda.so wherever torch has CUDA.
BRINGS = {"libtorch_cpu.so": TORCH_CPU, "libtorch_cuda.so": TORCH_CUDA, "libtorch.so": TORCH_CPU | TORCH_CUDA}


def faults(needed: Iterable[str], undefined: Iterable[str]) -> list[str]:
    """What keeps a library with these needed libraries and undefined symbols (as `nm` prints them) from loading."""
    needed = set(needed)
    brought = frozenset().union(*(BRINGS.get(name, ()) for name in needed))
    found = [
        f"{symbol} is in no library that it needs ({', '.join(sorted(needed))}) as of torch {OLDEST}"
        for symbol in undefined
        if "@" not in symbol and symbol not in brought
    ]
    # Errors are exceptions, which pass through torch: with a C++ runtime of the library's own they end the process.
    return found + [f"it does not need {name}" for name in ("libstdc++.so.6", "libgcc_s.so.1") if name not in needed]


def faults_of(library: Path) -> list[str]:
    if missing := [tool for tool in ("nm", "readelf") if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed: it is part of binutils")

    def output(*command: str) -> str:
        return subprocess.run([*command, library], check=True, capture_output=True, text=True).stdout

    undefined = re.findall(r"^ +U (\S+)$", output("nm", "--dynamic", "--undefined-only"), re.MULTILINE)
    assert undefined, "nm finds nothing"
    return faults(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", "--wide")), undefined)


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_every_symbol_is_in_a_library_that_is_needed(name):
    library = PACKAGE / f"{name}.so"
    if not library.exists():
        pytest.skip(f"{name}.so is not built here" + (": there is no nvcc" if name == "_cuda" else ""))
    assert faults_of(library) == []


def test_what_is_missing_is_found():
    runtime = ["libstdc++.so.6", "libgcc_s.so.1", "libtorch_cpu.so"]
    symbols = ["aoti_torch_get_dim", "aoti_torch_get_current_cuda_stream", "_Unwind_Resume@GCC_3.0"]
    assert faults([*runtime, "libtorch.so"], symbols) == []
    assert "aoti_torch_get_current_cuda_stream is in no library" in faults(runtime, symbols)[0]
    assert "torch_of_2_13 is in no library" in faults([*runtime, "libtorch.so"], [*symbols, "torch_of_2_13"])[0]
    assert faults(runtime[1:], symbols[:1]) == ["it does not need libstdc++.so.6"]
