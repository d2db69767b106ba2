"""A thin front that calls CMake (CMakeLists.txt is the build definition); everything else stands in pyproject.toml.

HSAID_CUDA=0 or 1 decides whether the CUDA library is built; without it, it is built where nvcc is.
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


def wants_cuda() -> bool:
    choice = os.environ.get("HSAID_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"HSAID_CUDA: expected 0, 1 or nothing, got {choice!r}")
    return shutil.which("nvcc") is not None if choice == "" else choice == "1"


class CMakeBuild(build_ext):
    """Builds all libraries in build/cmake and puts them into the package."""

    def run(self):
        build = ROOT / "build" / "cmake"
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "hsaid_kernels"
        cuda = wants_cuda()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # again every time: pip's build folders come and go
            f"-DHSAID_CUDA={'ON' if cuda else 'OFF'}",
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        targets = ["_cpu", "_cuda"] if cuda else ["_cpu"]
        subprocess.run(["cmake", "--build", build, "--target", *targets], check=True)
        if not cuda:
            (package / "_cuda.so").unlink(missing_ok=True)  # of an earlier build
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)

    def get_outputs(self):
        package = Path(self.build_lib) / "hsaid_kernels"
        return [str(package / f"{name}.so") for name in (["_cpu", "_cuda"] if wants_cuda() else ["_cpu"])]

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
