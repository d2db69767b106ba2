"""A thin front that calls CMake (CMakeLists.txt is the build definition); everything else stands in pyproject.toml.

HSAID_CUDA=0 or 1 decides whether the CUDA library is built; without it, it is built where nvcc is. HSAID_CPU=0 leaves
the CPU library out. With both 0 no compiler is needed: what is left is the Triton backend, for machines with a GPU.
CMAKE_ARGS has more options for CMake.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def wanted() -> list[str]:
    """The libraries to build."""
    choices = {name: os.environ.get(name, "") for name in ("HSAID_CPU", "HSAID_CUDA")}
    for name, choice in choices.items():
        if choice not in ("", "0", "1"):
            raise SystemExit(f"{name}: expected 0, 1 or nothing, got {choice!r}")
    nvcc = "1" if shutil.which("nvcc") else "0"
    wants = {"_cpu": choices["HSAID_CPU"] or "1", "_cuda": choices["HSAID_CUDA"] or nvcc}
    return [library for library, choice in wants.items() if choice == "1"]


class CMakeBuild(build_ext):
    """Builds all libraries in build/cmake and puts them into the package."""

    def run(self):
        build = ROOT / "build" / "cmake"
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "hsaid_kernels"
        libraries = wanted()
        for library in {"_cpu", "_cuda"} - set(libraries):
            (package / f"{library}.so").unlink(missing_ok=True)  # of an earlier build
        if not libraries:
            return
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # again every time: pip's build folders come and go
            f"-DHSAID_CPU={'ON' if '_cpu' in libraries else 'OFF'}",
            f"-DHSAID_CUDA={'ON' if '_cuda' in libraries else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build, "--target", *libraries], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)

    def get_outputs(self):
        package = Path(self.build_lib) / "hsaid_kernels"
        return [str(package / f"{library}.so") for library in wanted()]

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries hold torch's stable ABI and nothing of Python: one wheel for every Python on a platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("hsaid_kernels._cpu", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
