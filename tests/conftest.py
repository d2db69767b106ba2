"""Fixtures of several test files: every backend and every instruction set at hand."""

import os

import pytest
import torch
from helpers import ISAS, cpu_isa, threads

from hsaid_kernels import available_backends

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpretedFunction

    of_triton = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        """Twice as fast: for what our kernels call, triton.language would be patched again as their launch did it."""
        ours = self.fn.__module__.startswith("hsaid_kernels")
        return self.rewrite()(*args, **kwargs) if ours else of_triton(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def pytest_addoption(parser):
    parser.addoption("--gpu-backend", choices=("cuda", "triton"), help="in tests/fastfood/test_gpu.py, this one only")


NO_CPU = pytest.param("none", marks=pytest.mark.skip(reason=f"cpu: {available_backends()['cpu']}"))


@pytest.fixture(params=ISAS or [NO_CPU])
def isa(request):
    """The compiled CPU kernels for one instruction set after the other."""
    with cpu_isa(request.param):
        yield request.param


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS)] + ([] if ISAS else [NO_CPU]))
def backend(request):
    """The name of a backend: the reference, then the CPU kernels for one instruction set after the other."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    with cpu_isa(isa):
        yield name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For many small calls: on a busy machine, waiting for a second thread takes longer than they do."""
    with threads(1):
        yield
