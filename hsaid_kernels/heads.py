"""Attention heads: their slices, pruning, importance and removal (docs/heads.md)."""

from hsaid_kernels.hierarchy.layouts import register_attention
from hsaid_kernels.wrapper.head_check import Checked, check
from hsaid_kernels.wrapper.heads import (
    HeadSlice,
    HeadStructured,
    head_slices,
    prune_heads,
    pruned_heads,
    remove,
    remove_heads,
    undivided,
)
from hsaid_kernels.wrapper.importance import head_importance

__all__ = [
    "Checked",
    "HeadSlice",
    "HeadStructured",
    "check",
    "head_importance",
    "head_slices",
    "prune_heads",
    "pruned_heads",
    "remove",
    "register_attention",
    "remove_heads",
    "undivided",
]
