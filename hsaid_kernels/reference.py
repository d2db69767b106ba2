"""The reference implementation in plain PyTorch, against which all backends are tested (fastfood/reference.py)."""

from hsaid_kernels.fastfood.reference import (
    adjoint,
    forward,
    gaussian,
    hadamard_transform,
    permutation,
    philox,
    rademacher,
    walsh_hadamard,
)

__all__ = [
    "adjoint",
    "forward",
    "gaussian",
    "hadamard_transform",
    "permutation",
    "philox",
    "rademacher",
    "walsh_hadamard",
]
