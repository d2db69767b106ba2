"""What the compilers made of the kernels: registers, stack, and instructions per value of the main loops' bodies.

    python benchmarks/sass.py [hsaid_kernels/_cuda.so] [--arch sm_90]     the CUDA kernels
    python benchmarks/sass.py --triton [--arch sm_90]                     the Triton kernels, compiled for this

Needs no GPU, only `cuobjdump`: of the CUDA toolkit, of Triton, or `pip install nvidia-cuda-cuobjdump`. Prints
docs/kernels.md's tables. A body is the shortest way round the loop that reads and writes a whole tile in vectors of the
given type; on it every instruction is counted but NOP.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
VALUES = 64  # that a thread holds
BUTTERFLIES = 14
KINDS = ("n = 2^14", "n = 2^14, chunks", "n = 1024", "n >= 256", "general", "n = 2^14, one chunk", "general, one chunk")
KERNEL = re.compile(r"\d+([a-z_]+_kernel)(?:I(?:Lb([01])E)?(?:LNS\w*?4KindE([0-6])E)?(?:Lb([01])E)?)?")
TRANSFORM = re.compile(r"hadamard_kernelI(f|NS_4bf16E|NS_4fp16E)LNS\w*?4PassE([0-3])ELi(\d+)E")
PASSES = ("whole", "first", "middle", "last")
TYPES = {"f": "float32", "NS_4bf16E": "bfloat16", "NS_4fp16E": "float16"}


class Instruction(NamedTuple):
    address: int
    op: str  # with its modifiers
    predicated: bool
    target: int | None  # of a branch


def cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    for package, pattern in (("nvidia", "*/bin/cuobjdump"), ("triton", "backends/nvidia/bin/cuobjdump")):
        if spec := importlib.util.find_spec(package):
            for folder in spec.submodule_search_locations or ():
                if tools := sorted(Path(folder).glob(pattern)):
                    return str(tools[-1])
    raise SystemExit("cuobjdump: expected on the PATH, from `pip install nvidia-cuda-cuobjdump` or triton, found none")


def run(*arguments: object) -> str:
    return subprocess.run([cuobjdump(), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def resources(*library: object) -> dict[str, tuple[int, int]]:
    """Mangled name -> (registers, bytes of stack), of cuobjdump's arguments for a library."""
    text = run("--dump-resource-usage", *library)
    found = re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def functions(*library: object) -> dict[str, list[Instruction]]:
    found, current = {}, None
    for line in run("--dump-sass", *library).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = found.setdefault(match[1], [])
        elif current is not None and (
            match := re.match(r"\s*/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);", line)
        ):
            target = re.search(r"0x([0-9a-f]+)\s*$", match[4]) if match[3].startswith("BRA") else None
            predicate = (match[2] or "").strip() not in ("", "@PT")
            current.append(Instruction(int(match[1], 16), match[3], predicate, target and int(target[1], 16)))
    return found


def of_cubin(binary: bytes) -> tuple[int, int, list[Instruction]]:
    """Registers, bytes of stack and code of the only kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        ((registers, stack),) = resources(file.name).values()
        (code,) = functions(file.name).values()
    return registers, stack, code


class Block(NamedTuple):
    ops: Counter
    length: int  # without NOP
    next: tuple[int, ...]  # addresses of the blocks that follow


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by address."""
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    starts |= {b.address for a, b in zip(code, code[1:]) if a.target is not None or a.op in ("EXIT", "RET", "BRX")}
    targets = {i.target for i in code}
    # A branch through a table may lead to every block that nothing else leads to.
    tabled = tuple(
        b.address
        for a, b in zip(code, code[1:])
        if (a.op == "BRX" or (a.op == "BRA" and not a.predicated)) and b.address not in targets
    )
    blocks, at = {}, 0
    while at < len(code):
        end = at + 1
        while end < len(code) and code[end].address not in starts:
            end += 1
        part, last = code[at:end], code[end - 1]
        following = [last.target] if last.target is not None else []
        if last.op == "BRX":
            following = [address for address in tabled if address > last.address]
        falls_through = last.predicated or (last.target is None and last.op not in ("EXIT", "RET", "BRX"))
        if last.op.startswith("BRA.DIV"):  # what warps that came apart do: never
            following, falls_through = [], True
        if falls_through and end < len(code):
            following.append(code[end].address)
        ops = Counter(i.op for i in part if i.op != "NOP")
        blocks[part[0].address] = Block(ops, sum(ops.values()), tuple(following))
        at = end
    return blocks


def count(ops: Counter, *prefixes: str) -> int:
    return sum(n for op, n in ops.items() if all(part in f"{op}." for part in prefixes))


def body(code: list[Instruction], adds: int, loads: str, stores: str | None, vectors: int = 16) -> Counter | None:
    """The shortest way round a loop with so many additions, `vectors` vector loads of a kind and 16 stores.

    Ways go forward in the code, but for the branch back to the loop's head.
    """
    blocks = blocks_of(code)
    features = {
        a: (
            count(b.ops, "FADD") + count(b.ops, "FFMA"),
            count(b.ops, "LDG.", loads),
            count(b.ops, "STG.", stores or "STG"),
        )
        for a, b in blocks.items()
    }
    wanted = (adds, vectors, 16 if stores else 0)
    best = None
    for tail, block in blocks.items():
        for head in (n for n in block.next if n <= tail):
            inside = [a for a in sorted(blocks) if head <= a <= tail]
            if any(sum(features[a][i] for a in inside) < wanted[i] for i in range(3)):
                continue
            # At each block the shortest ways to its end, by what they have of what is wanted.
            ways = {a: {} for a in inside}
            ways[head][0, 0, 0] = Counter()
            for at in inside:
                done = {}
                for have, ops in ways[at].items():
                    now = tuple(min(h + f, w) for h, f, w in zip(have, features[at], wanted))
                    keep(done, now, ops + blocks[at].ops)
                ways[at] = done
                for following in blocks[at].next:
                    if at < following <= tail:
                        for have, ops in done.items():
                            keep(ways[following], have, ops)
            whole = ways[tail].get(wanted)
            if whole is not None and (best is None or whole.total() < best.total()):
                best = whole
    return best


def keep(ways: dict[tuple, Counter], have: tuple, ops: Counter) -> None:
    if have not in ways or ops.total() < ways[have].total():
        ways[have] = ops


def spills(code: list[Instruction]) -> int:
    return sum(i.op.split(".")[0] in ("STL", "LDL") for i in code)


def body_cells(ops: Counter | None) -> str:
    if ops is None:
        return "no such loop | | | |"
    shared = count(ops, "LDS") + count(ops, "STS")
    arithmetic = count(ops, "FADD") + count(ops, "FMUL") + count(ops, "FFMA")
    per_value = [ops.total(), arithmetic, shared, count(ops, "LDG.")]
    return " | ".join(f"{n / VALUES:.2f}" for n in per_value) + " |"


COLUMNS = "values in memory | instructions per value | FADD, FMUL, FFMA | shared memory | loads"
VECTORS = {"float32": ".128.", "bfloat16": ".64."}
# Pass, bits of a tile, stages. n = 2^11, 2^13, 2^14 and 2^15 in one pass; then both passes for n = 2^17, 2^20 and 2^25.
TRANSFORM_BODIES = (
    *((0, 11, 11), (0, 13, 13), (0, 14, 14), (0, 15, 15)),
    *((1, 11, 9), (3, 11, 8), (1, 13, 10), (3, 13, 10), (1, 15, 13), (3, 15, 12)),
)


def cuda_tables(library: Path, arch: str) -> None:
    used = resources("--gpu-architecture", arch, library)
    code = functions("--gpu-architecture", arch, library)
    if not code:
        raise SystemExit(f"arch: {library.name} has no code for {arch}")

    print(f"| kernel, {arch} | widths | registers | stack, bytes | spill instructions |")
    print("|---|---|---|---|---|")
    main_kernels, transforms = {}, {}
    for name, instructions in sorted(code.items()):
        if match := TRANSFORM.search(name):
            transforms[int(match[2]), int(match[3]), TYPES[match[1]]] = name
            continue
        kernel, diagonal, kind, listed = KERNEL.search(name).groups()
        title = kernel if diagonal is None else f"{kernel}, {('gaussian', 'rademacher')[int(diagonal)]}"
        title += ", listed" if listed == "1" else ""
        widths = KINDS[int(kind)] if kind is not None else ""
        print(f"| {title} | {widths} | {used[name][0]} | {used[name][1]} | {spills(instructions)} |")
        if kind in ("0", "5") and diagonal is not None and listed != "1":
            main_kernels[kernel, diagonal, kind == "5"] = instructions
    for kind, tile in sorted({key[:2] for key in transforms}):  # the most that any type takes
        names = [name for key, name in transforms.items() if key[:2] == (kind, tile)]
        most = [max(column) for column in zip(*((*used[name], spills(code[name])) for name in names), strict=True)]
        print(f"| hadamard_kernel, {PASSES[kind]} | tile of 2^{tile} | {' | '.join(map(str, most))} |")

    print(f"\n| loop body, n = 2^14, {arch} | {COLUMNS} |")
    print("|---|---|---|---|---|---|")
    for (kernel, diagonal, one_chunk), instructions in main_kernels.items():
        for memory, vector in VECTORS.items():
            sums = 2 if kernel.startswith("one_chunk") else 1  # with one chunk a gradient's products with z, too
            adds = VALUES * (BUTTERFLIES + (3 if diagonal == "0" else 0) + sums)
            vectors = 32 if one_chunk and memory == "float32" else 16  # those of z, in float32, too
            ops = body(instructions, adds, vector, None if "groups" in kernel else vector, vectors)
            title = f"{kernel}, {('gaussian', 'rademacher')[int(diagonal)]}"
            title += ", one chunk" if one_chunk and sums == 1 else ""
            print(f"| {title} | {memory} | {body_cells(ops)}")

    print(f"\n| loop body of hadamard_kernel, {arch} | {COLUMNS} |")
    print("|---|---|---|---|---|---|")
    for kind, tile, stages in TRANSFORM_BODIES:
        for memory, vector in VECTORS.items():
            vectors = [vector if kind in ends else ".128." for ends in ((0, 1), (0, 3))]
            ops = body(code[transforms[kind, tile, memory]], VALUES * stages, *vectors)
            print(f"| {PASSES[kind]}, {stages} stages, tile of 2^{tile} | {memory} | {body_cells(ops)}")


def triton_tables(arch: str) -> None:
    import triton
    import triton_offline

    rows, bodies = [], []
    for kernel in triton_offline.kernels():
        built = triton_offline.compiled_for(kernel, arch)
        registers, stack, code = of_cubin(built.asm["cubin"])
        cells = [kernel.title, f"2^{kernel.q}", kernel.threads, registers, stack, spills(code), built.metadata.shared]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        diagonal = kernel.constants.get("RADEMACHER")
        if diagonal is not None:
            title, _, memory = kernel.title.rpartition(", ")
            adds = VALUES * (kernel.q + (0 if diagonal else 3) + 1)
            ops = body(code, adds, VECTORS[memory], None if "groups" in title else VECTORS[memory])
            bodies.append(f"| {title} | 2^{kernel.q} | {memory} | {body_cells(ops)}")
    print(f"| kernel, Triton {triton.__version__}, {arch} | n | threads | registers | stack | spills | shared memory |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")
    print(f"\n| loop body, {arch} | n | {COLUMNS} |")
    print("|---|---|---|---|---|---|---|", *bodies, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=ROOT / "hsaid_kernels/_cuda.so")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels, not a library's")
    options = parser.parse_args()
    if options.triton:
        triton_tables(options.arch)
        return
    if not options.library.exists():
        parser.error(f"library: expected a built CUDA library, found no {options.library}")
    cuda_tables(options.library, options.arch)


if __name__ == "__main__":
    main()
