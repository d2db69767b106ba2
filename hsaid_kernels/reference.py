"""The definition in plain torch, which judges every backend (fastfood/reference.py)."""

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
