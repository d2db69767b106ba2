"""Fused Fastfood projections for fine-tuning inside a small random subspace (DID, SAID and H-SAID)."""

from hsaid_kernels.checkpoint import last_checkpoint
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.module import HSAID
from hsaid_kernels.ops import available_backends, empty_cache, hadamard_transform
from hsaid_kernels.projection import Projection
from hsaid_kernels.version import __version__

__all__ = [
    "HSAID",
    "Hierarchy",
    "Projection",
    "__version__",
    "available_backends",
    "empty_cache",
    "hadamard_transform",
    "last_checkpoint",
]
