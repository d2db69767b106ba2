"""Limits and choices for the arguments of a projection. Does not import torch, so that `hsaid --help` is fast."""

MIN_WIDTH, MAX_WIDTH = 32, 16384
MAX_DIM = 2**24
DIAGONALS = ("gaussian", "rademacher")
NORMALIZATIONS = ("tensor", "global")
CHUNKS = ("all", "one")
