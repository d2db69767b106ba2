"""The Triton kernels and launches for a GPU that need not be there: what tests look at and sass.py and host_time.py
count and time; and what Triton makes of every kernel for GPUs of many kinds.

    python benchmarks/triton_offline.py                     docs/kernels.md's table: a line for each of TARGETS
    python benchmarks/triton_offline.py gfx942 [sm_75 ...]  the same of these, and below it a line for each kernel

Needs no GPU. Takes two to four minutes a target.
"""

import argparse
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import hsaid_kernels.fastfood.triton.fastfood_adjoint as adjoint
import hsaid_kernels.fastfood.triton.fastfood_adjoint_one_chunk as one_chunk
import hsaid_kernels.fastfood.triton.fastfood_forward as forward
import hsaid_kernels.fastfood.triton.hadamard_transform as hadamard
from hsaid_kernels.fastfood.plan import MAX_WIDTH
from hsaid_kernels.fastfood.triton import memory, ops, paley, tile
from hsaid_kernels.fastfood.triton.stream_values import stream_values_kernel

TARGETS = {
    "sm_75": "T4, RTX 20",
    "sm_80": "A100",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_120": "RTX 50",
    "gfx90a": "MI200",
    "gfx942": "MI300",
    "gfx950": "MI350",
    "gfx1100": "RX 7900",
    "gfx1201": "RX 9070",
}
FLOATS = "theta factors scratch zs sums carry totals dots dfactors dtheta x".split()
TABLES = "listed runs first_runs pieces places first_places bases grads items parts lines table".split()
TYPES = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(TABLES, "*i64")
TYPES |= {
    "columns": "i64",
    "total": "i64",
    "seed": "i64",
    "stream": "i64",
    "scale": "fp32",
    "words": ("i64",) * memory.WORDS,
}
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
        """n = 2^q; of the columns' kernel the rows' length, of the one that writes words none."""
        return self.constants.get("Q", self.constants.get("BIT", 0) + self.constants.get("M", 0))


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
        for code in codes:
            rows = dict(row_tiles=1, IN=code, OUT=code, FINISH=True, **shape)
            found.append(Kernel(f"hadamard_rows_kernel, {names[code]}", hadamard.hadamard_rows_kernel, rows, threads))
        for rademacher in (False, True):
            title = f"stream_values_kernel, {('gaussian', 'rademacher')[rademacher]}"
            of_stream = dict(PURPOSE=0, RADEMACHER=rademacher, **shape)
            found.append(Kernel(title, stream_values_kernel, of_stream, threads))
    for code in codes:  # of rows of 2^20 values
        last = dict(OUT=code, FINISH=True, BIT=14, M=6, T=12)
        found.append(Kernel(f"hadamard_columns_kernel, {names[code]}", hadamard.hadamard_columns_kernel, last, 64))
    for order in paley.ORDERS:
        of_order = dict(ORDER=order, PLUS=paley.plus_bits(order), SIZE=256)
        found.append(Kernel(f"paley_kernel, order {order}", paley.paley_kernel, of_order, 256))
    return [*found, Kernel("write_words", memory.write_words, {}, 32)]


def compiled(kernel: Kernel, backend: str = "cuda", arch: int | str = 90, warp_size: int = 32):
    names, constants = kernel.function.arg_names, kernel.constants
    if not kernel.listed:
        constants = constants | dict.fromkeys({"listed", "num_runs", "before", "after", "entries"} & set(names))  # None
    if "PREFETCH" in names:
        constants = constants | dict(PREFETCH=backend == "cuda")
    types = {name: TYPES.get(name, "i32") for name in names} | {"out": OUT_TYPES[constants.get("OUT", 0)]}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
    given = {(names.index(name),): value for name, value in constants.items()}
    options = dict(num_warps=max(1, kernel.threads // warp_size), enable_fp_fusion=False)
    if kernel.registers and backend == "cuda":
        options["maxnreg"] = kernel.registers
    source = ASTSource(kernel.function, signature, given, aligned)
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


def compiled_for(kernel: Kernel, target: str):
    """For "sm_90", or "gfx942" with its 64 lanes, and other names of this kind."""
    if target.startswith("sm_"):
        return compiled(kernel, "cuda", int(target.removeprefix("sm_")))
    return compiled(kernel, "hip", target, 64 if target.startswith("gfx9") else 32)


def inexact(built) -> set[str]:
    """What a kernel may not do, because its bits would be others: fused multiplications, subnormals taken for 0."""
    if "ptx" in built.asm:
        return set(re.findall(r"\bfma\.\w+|\bmad\.(?:rn\.)?f\w+|\w+\.ftz\b", built.asm["ptx"]))
    code = built.asm["amdgcn"]
    code = re.sub(r"v_fma\w+ .*0x[4c]f800000.*", "", code)  # times 2^32: of a division of 64-bit integers
    fused = re.findall(r"v_(?:pk_|dual_)?(?:fma|mac_f|mad_f|mad_mix)\w*", code)
    return {*fused, *re.findall(r"amdhsa_float_denorm_mode_32 [0-2]", code)}


class Facts(NamedTuple):
    """What a kernel takes."""

    registers: int  # of a thread, of AMD's both kinds
    accumulation: int  # those of the second kind
    scalar: int  # of a wave, on AMD
    stack: int  # bytes of a thread in memory
    spills: int  # instructions for them on NVIDIA, registers on AMD
    shared: int  # bytes
    lanes: int


def facts_of(built) -> Facts:
    if "cubin" in built.asm:
        registers, stack, code = sass.of_cubin(built.asm["cubin"])
        return Facts(registers, 0, 0, stack, sass.spills(code), built.metadata.shared, 32)
    said = {name: int(x) for name, x in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", built.asm["amdgcn"], re.MULTILINE)}
    spills = said["vgpr_spill_count"] + said["sgpr_spill_count"]
    of_kinds = said["vgpr_count"], said.get("agpr_count", 0), said["sgpr_count"]
    return Facts(*of_kinds, said["private_segment_fixed_size"], spills, built.metadata.shared, said["wavefront_size"])


MAIN = ("fastfood_forward_kernel, gaussian, float32", "adjoint_groups_kernel, gaussian, float32")


def tables(targets: list[str], each: bool) -> Iterator[str]:
    """Lines of Markdown."""
    columns = "of them accumulation | SGPR | stack, bytes | spills | shared memory, bytes |"
    details = []
    of_main = "registers, stack: forward, n = 2^14 | 2^10 | adjoint, 2^14 | 2^10"
    of_all = "kernels with a stack | stack at most, bytes | shared memory at most, bytes"
    yield f"| Triton {triton.__version__}, for | | lanes | kernels that compile | {of_main} | {of_all} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for target in targets:
        facts, all_kernels = {}, kernels()
        details += [
            "",
            f"| kernel, {target} | n | threads | registers | {columns}",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for kernel in all_kernels:
            try:
                built = compiled_for(kernel, target)
            except Exception as error:  # of any kind, from several compilers
                details.append(f"| {kernel.title} | 2^{kernel.q} | does not compile: {str(error).splitlines()[0]} |")
                continue
            if wrong := inexact(built):
                raise SystemExit(f"{target}, {kernel.title}: expected exact operations, got {sorted(wrong)}")
            facts[kernel.title, kernel.q] = found = facts_of(built)
            cells = [kernel.title, f"2^{kernel.q}", kernel.threads, *found[:-1]]
            details.append("| " + " | ".join(map(str, cells)) + " |")
        main_facts = [facts.get((title, q)) for title in MAIN for q in (14, 10)]
        cells = [target, TARGETS.get(target, ""), max((found.lanes for found in facts.values()), default="")]
        cells += [f"{len(facts)} of {len(all_kernels)}"]
        cells += [f"{found.registers}, {found.stack}" if found else "" for found in main_facts]
        stacks = [found.stack for found in facts.values() if found.stack]
        cells += [len(stacks), max(stacks, default=0), max((found.shared for found in facts.values()), default=0)]
        yield "| " + " | ".join(map(str, cells)) + " |"
    if each:
        yield from details


H200 = GPUTarget("cuda", 90, 32)


class FakeDevice:
    """Takes the place of Triton's driver for a GPU: kernels are compiled, and launches written down."""

    numbers = itertools.count()

    def __init__(self, target: GPUTarget):
        self.target = target
        self.number = next(self.numbers)  # another device each time, for which Triton has compiled nothing yet
        self.launches: list[tuple[str, tuple, int]] = []  # name, grid, number of the binary
        self.binaries: list[bytes] = []
        self.utils = self

    def get_current_target(self):
        return self.target

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
def fake_device(target: GPUTarget = H200) -> Iterator[FakeDevice]:
    """A fake device to which tensors on the CPU belong."""
    fake = FakeDevice(target)
    of_target = (ops._is_cuda, ops._options)  # what is remembered of the GPU that was there before
    for remembered in of_target:
        remembered.cache_clear()
    with (
        mock.patch.object(ops.arguments, "check_place", lambda tensor, what: None),
        mock.patch.object(ops, "_on", lambda device: torch.no_grad()),
    ):
        triton.runtime.driver.set_active(fake)
        try:
            yield fake
        finally:
            triton.runtime.driver.set_active(None)
            for remembered in of_target:
                remembered.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[], help="such as sm_75 or gfx942")
    options = parser.parse_args()
    for line in tables(options.targets or list(TARGETS), bool(options.targets)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
