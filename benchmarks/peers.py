"""What else makes or would make such a projection, written here from its definition: to be measured beside ours. And
other packages' Walsh-Hadamard transforms, where they are installed.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hsaid_kernels import hadamard_transform
from hsaid_kernels.fastfood import reference

# --- the published algorithm (Aghajanyan, Zettlemoyer, Gupta 2020, arXiv 2012.13255): each tensor padded to
# LL = 2^ceil(log2 D), H G Pi H B over LL, cut to D, divided by sqrt(LL sum G^2) sqrt(D / LL)


def butterflies(x: Tensor) -> Tensor:
    """H x by its log2 stages, a few launches each."""
    size, h = len(x), 1
    while h < size:
        x = x.view(-1, 2, h)
        x = torch.cat((x[:, :1] + x[:, 1:], x[:, :1] - x[:, 1:]), 1)
        h *= 2
    return x.flatten()


def butterflies_by_matmul(x: Tensor) -> Tensor:
    """The same with one launch a stage."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=x.device)
    size, h = len(x), 1
    while h < size:
        x = torch.matmul(matrix, x.view(-1, 2, h))
        h *= 2
    return x.flatten()


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "butterflies": butterflies,
    "matmul": butterflies_by_matmul,
    "hadamard_transform": hadamard_transform,
}


class Published:
    """One tensor of `numel` weights; what is random is drawn once and kept. The gradient is autograd's, exact."""

    def __init__(self, numel: int, dim: int, transform: Callable[[Tensor], Tensor], device: str = "cpu"):
        self.numel, self.dim, self.transform = numel, dim, transform
        self.size = size = 1 << (numel - 1).bit_length()
        self.signs = torch.randint(0, 2, (size,), device=device, dtype=torch.float32) * 2 - 1
        self.permutation = torch.randperm(size, device=device)
        self.g = torch.randn(size, device=device)
        self.scale = 1 / math.sqrt(size * float(self.g.square().sum()) * numel / size)

    def random_bytes(self) -> int:
        return sum(t.nbytes for t in (self.signs, self.permutation, self.g))

    def forward(self, base: Tensor, theta: Tensor, factor: Tensor) -> Tensor:
        """base [numel] + factor * P theta [dim], cut where the tensor is shorter than theta."""
        padded = torch.nn.functional.pad(theta[: self.size], (0, max(self.size - self.dim, 0)))
        x = self.transform(self.g * self.transform(self.signs * padded)[self.permutation])
        return base + factor * (x[: self.numel] * self.scale)


def published_work(numel: int) -> float:
    """Operations of the published algorithm on a tensor, up to a constant: by it times are scaled to other tensors."""
    bits = max((numel - 1).bit_length(), 1)
    return 2.0**bits * bits


# --- GPart (arXiv 2605.14841): each weight belongs to one of d groups by a hash of its number, and moves by
# theta[group] / sqrt(size of the group). Nothing random is kept: groups are made anew by eager operations.


def gpart_groups(first: int, count: int, seed: int, dim: int) -> Tensor:
    """int64 [count]: SplitMix64 of seed + number, modulo dim. The sign bit is left out of it."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # as unsigned numbers
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = torch.arange(first, first + count) + (seed - 0x61C8864680B583EB)
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return ((x ^ shifted(x, 31)) & 0x7FFFFFFFFFFFFFFF) % dim


class GPart(torch.autograd.Function):
    """W0 + theta[groups] / norms of one tensor."""

    @staticmethod
    def forward(ctx, theta: Tensor, base: Tensor, norms: Tensor, first: int, seed: int):
        ctx.norms, ctx.first, ctx.seed, ctx.count = norms, first, seed, base.numel()
        groups = gpart_groups(first, base.numel(), seed, len(theta))
        return base + (theta / norms)[groups].view_as(base)

    @staticmethod
    def backward(ctx, grad: Tensor):
        groups = gpart_groups(ctx.first, ctx.count, ctx.seed, len(ctx.norms))
        return torch.zeros_like(ctx.norms).scatter_add_(0, groups, grad.flatten()) / ctx.norms, None, None, None, None


# --- other packages' H x along the rows of x [rows, n], on one thread (`pip install pybind11`, then
# `USE_CUDA=0 pip install --no-build-isolation '.[peers]'`)


class Transform(NamedTuple):
    """How a package is called; `in_place` row by row where it takes one, and None where that takes seconds."""

    new: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], object] | None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    normalized: bool = False


def fht_cpu() -> Transform:
    from fht_cpu import fht

    return Transform(
        lambda x: torch.from_numpy(fht(x.numpy(), inplace=False, num_threads=1)),
        lambda x: fht(x.numpy(), num_threads=1),
    )


def ffht_unofficial() -> Transform:
    from ffht import fht, fht_

    return Transform(lambda x: torch.from_numpy(fht(x.numpy(), 1)), lambda x: fht_(x.numpy(), 1))


def pyfwht() -> Transform:
    """Takes float32 row by row only, and then computes in float64."""
    from pyfwht import Backend, fwht, transform

    return Transform(
        lambda x: torch.from_numpy(fwht(x.numpy(), backend=Backend.CPU)),
        lambda x: [transform(row, backend=Backend.CPU) for row in x.numpy()],
        (torch.float64,),
    )


def others_hadamard_transform() -> Transform:
    """In place it takes one row at a time, for which it needs seconds."""
    from hadamard_transform import hadamard_transform

    return Transform(hadamard_transform, None, normalized=True)


PACKAGES = {  # name: (module, how it is called)
    "fht-cpu": ("fht_cpu", fht_cpu),
    "ffht-unofficial": ("ffht", ffht_unofficial),
    "hadamard-transform": ("hadamard_transform", others_hadamard_transform),
    "pyfwht": ("pyfwht", pyfwht),
}


def installed_transforms(dtype: torch.dtype) -> dict[str, Transform]:
    """Those that take this dtype, by the names of their packages."""
    found = {name: called() for name, (module, called) in PACKAGES.items() if importlib.util.find_spec(module)}
    return {name: transform for name, transform in found.items() if dtype in transform.dtypes}


def error_of(y: Tensor, x: Tensor, normalized: bool = False) -> float:
    """The largest error of y = H x, in units of what rounding may come to: above 1 it is wrong.

    x is [rows, n] in float32 or float64. A stage is orthogonal but for its rounding to the dtype: q stages, and a
    division by sqrt(n) if normalized, err by (q + 1) u |H x| at most.
    """
    q = (x.shape[-1] - 1).bit_length()
    scale = x.shape[-1] ** 0.5 if normalized else 1.0
    exact = reference.hadamard_transform(x.double())
    bound = (q + 1) * torch.finfo(x.dtype).eps / 2 * exact.norm(dim=-1, keepdim=True)
    if y.dtype != x.dtype or y.shape != x.shape:
        return math.inf
    error = float(((y.double() * scale - exact).abs() / bound).max())
    return math.inf if math.isnan(error) else error
