"""The Triton kernels and launches for a GPU that need not be there: what tests look at and sass.py and host_time.py
count and time.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import hsaid_kernels.fastfood.triton.fastfood_adjoint as adjoint
import hsaid_kernels.fastfood.triton.fastfood_adjoint_one_chunk as one_chunk
import hsaid_kernels.fastfood.triton.fastfood_forward as forward
import hsaid_kernels.fastfood.triton.hadamard_transform as hadamard
from hsaid_kernels.fastfood.plan import MAX_WIDTH
from hsaid_kernels.fastfood.triton import memory, ops, tile

FLOATS = "theta factors scratch zs sums carry totals dots dfactors dtheta x".split()
TABLES = "listed runs first_runs pieces places first_places bases grads items parts lines table".split()
TYPES = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(TABLES, "*i64") | {"seed": "i64", "scale": "fp32"}
OUT_TYPES = ("*fp32", "*bf16", "*fp16")


class Kernel(NamedTuple):
    """A kernel as hsaid_kernels/fastfood/triton/ops.py launches it."""

    title: str
    function: triton.JITFunction
    constants: dict
    threads: int
    registers: int | None = None  # at most, on NVIDIA
    listed: bool = False  # for listed tiles

    @property
    def q(self) -> int:
        return self.constants["Q"]


def kernels(qs: tuple[int, ...] = (14, 10), codes: tuple[int, ...] = (0, 1)) -> list[Kernel]:
    """For blocks of 2^q values, and weights or gradients in the dtypes with these codes."""
    found = []
    names = {code: str(dtype).removeprefix("torch.") for dtype, code in memory.CODES.items()}
    for q in qs:
        shape = dict(Q=q, T=tile.tile_bits(q))
        threads, small, runs = tile.threads(q), dict(Q=q, SIZE=256), MAX_WIDTH >> q
        for rademacher in (False, True):
            diagonal = ("gaussian", "rademacher")[rademacher]
            for code in codes:
                kind, what = f"{diagonal}, {names[code]}", dict(RADEMACHER=rademacher, **shape)
                constants = dict(OUT=code, BASES=1 << code, **what)
                for title, more in (("", dict(ONE_CHUNK=False, chunks=1)), ("one chunk, ", dict(ONE_CHUNK=True))):
                    title = f"fastfood_forward_kernel, {title}{kind}"
                    found.append(Kernel(title, forward.fastfood_forward_kernel, constants | more, threads, 128))
                of_groups = dict(GRADS=1 << code, RUNS=runs, **what)
                found.append(
                    Kernel(f"adjoint_groups_kernel, {kind}", adjoint.adjoint_groups_kernel, of_groups, threads)
                )
                found.append(
                    Kernel(f"adjoint_lists_kernel, {kind}", one_chunk.adjoint_lists_kernel, of_groups, threads)
                )
        found.append(Kernel("forward_z_kernel", forward.forward_z_kernel, shape, threads, 128))
        shared = dict(pieces=None, **shape)
        found.append(Kernel("forward_z_kernel, one chunk", forward.forward_z_kernel, shared, threads, 128))
        found.append(Kernel("adjoint_sums_kernel", adjoint.adjoint_sums_kernel, dict(RUNS=runs, **small), 128))
        found.append(Kernel("adjoint_segments_kernel", adjoint.adjoint_segments_kernel, shape, threads, 128))
        found.append(Kernel("adjoint_gradients_kernel", adjoint.adjoint_gradients_kernel, small, 128))
        of_lists = dict(RUNS=runs, SIZE=256, **shape)
        found.append(Kernel("adjoint_lists_sums_kernel", one_chunk.adjoint_lists_sums_kernel, of_lists, 128))
        found.append(Kernel("adjoint_chunks_kernel", one_chunk.adjoint_chunks_kernel, shape, threads, 128))
        of_segments = dict(RUNS=runs, Q=q)
        found.append(Kernel("adjoint_factors_kernel", one_chunk.adjoint_factors_kernel, of_segments, 128))
        rows = dict(row_tiles=1, IN=0, OUT=0, FINISH=True, **shape)
        found.append(Kernel("hadamard_rows_kernel, float32", hadamard.hadamard_rows_kernel, rows, threads))
    return found


def compiled(kernel: Kernel, backend: str = "cuda", arch: int | str = 90, warp_size: int = 32):
    names, constants = kernel.function.arg_names, kernel.constants
    if not kernel.listed:
        constants = constants | dict.fromkeys({"listed", "num_runs", "before", "after", "entries"} & set(names))  # None
    if "PREFETCH" in names:
        constants = constants | dict(PREFETCH=backend == "cuda")
    types = {name: TYPES.get(name, "i32") for name in names} | {"out": OUT_TYPES[constants.get("OUT", 0)]}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    given = {(names.index(name),): value for name, value in constants.items()}
    options = dict(num_warps=max(1, kernel.threads // warp_size), enable_fp_fusion=False)
    if kernel.registers and backend == "cuda":
        options["maxnreg"] = kernel.registers
    source = ASTSource(kernel.function, signature, given, aligned)
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


class FakeDevice:
    """Takes the place of Triton's driver for an H200: kernels are compiled, and launches written down."""

    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)  # another device each time, for which Triton has compiled nothing yet
        self.launches: list[tuple[str, tuple, int]] = []  # name, grid, number of the binary
        self.binaries: list[bytes] = []
        self.utils = self

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name, binary, shared, device):
        self.binaries.append(binary)
        return self, (name, len(self.binaries) - 1), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, *arguments):
            self.launches.append((function[0], (x, y, z), function[1]))

        return launch


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """A fake device to which tensors on the CPU belong."""
    fake = FakeDevice()
    with mock.patch.multiple(ops, _check_place=lambda tensor, what: None, _on=lambda device: torch.no_grad()):
        triton.runtime.driver.set_active(fake)
        try:
            yield fake
        finally:
            triton.runtime.driver.set_active(None)
