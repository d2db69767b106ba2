"""The hierarchy of a model's tensors and its partitions: which tensors share multipliers.

Uses only names, shapes and module structure, never the values of weights.
"""

from hsaid_kernels.hierarchy.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.partition import Component, Partition

__all__ = ["Component", "Hierarchy", "Partition"]
