"""Names: a model's tensors as paths through its levels, and which of them share multipliers. Knows no values."""

from hsaid_kernels.hierarchy.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.partition import Component, Partition

__all__ = ["Component", "Hierarchy", "Partition"]
