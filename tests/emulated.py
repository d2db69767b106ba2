"""The CUDA backend on the CPU: the ops of csrc/torch/cuda_ops.cpp, and all below them, over the emulated device.

HSAID_EMULATED_CAPABILITY is the device's compute capability, 8.0 if not set; one of 7.5 has 64 KB of shared memory.
"""

import os
from pathlib import Path

import torch

from hsaid_kernels.fastfood import ops

LIBRARY = Path(__file__).parent.parent / "build" / "cmake" / "_emulated.so"
NAMESPACE = "hsaid_kernels_emulated"


def emulate_cuda() -> None:
    """For the rest of the process, backend "cuda" takes tensors on the CPU and runs them over the emulated device."""
    ops._define(NAMESPACE)
    torch.ops.load_library(LIBRARY)
    ops._NAMESPACES["cuda"] = NAMESPACE
    ops._DEVICE_TYPES["cuda"] = "cpu"
    ops._AVAILABLE["cuda"] = True
    ops._capability = _capability


def _capability(device: torch.device) -> tuple[int, ...]:
    return tuple(map(int, os.environ.get("HSAID_EMULATED_CAPABILITY", "8.0").split(".")))
