"""What a projection may be: known without torch, which `hsaid --help` does not wait for."""

MIN_WIDTH, MAX_WIDTH = 32, 16384
MAX_DIM = 2**20
DIAGONALS = ("gaussian", "rademacher")
NORMALIZATIONS = ("tensor", "global")
