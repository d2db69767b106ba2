"""What the compiler made of the CUDA kernels: registers, stack, and instructions per value of the main loops' bodies.

    python benchmarks/sass.py [hsaid_kernels/_cuda.so] [--arch sm_90]

Needs no GPU, only `cuobjdump`: of the CUDA toolkit, or `pip install nvidia-cuda-cuobjdump`. Prints docs/kernels.md's
table. A body is the shortest way round the loop that reads and writes a whole tile in vectors of the given type, at
n = 2^14; on it every instruction is counted but NOP.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
VALUES = 64  # that a thread holds
BUTTERFLIES = 14
KINDS = ("n = 2^14", "n >= 256", "general")
KERNEL = re.compile(r"\d+([a-z_]+_kernel)(?:I(?:Lb([01])E)?(?:LNS\w*?4KindE([012])E)?)?")


class Instruction(NamedTuple):
    address: int
    op: str  # with its modifiers
    predicated: bool
    target: int | None  # of a branch


def cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or ():
            if tools := sorted(Path(folder).glob("*/bin/cuobjdump")):
                return str(tools[-1])
    raise SystemExit("cuobjdump: expected on the PATH or from `pip install nvidia-cuda-cuobjdump`, found neither")


def run(*arguments: object) -> str:
    return subprocess.run([cuobjdump(), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def resources(library: Path, arch: str) -> dict[str, tuple[int, int]]:
    """Mangled name -> (registers, bytes of stack)."""
    text = run("--dump-resource-usage", "--gpu-architecture", arch, library)
    found = re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def functions(library: Path, arch: str) -> dict[str, list[Instruction]]:
    found, current = {}, None
    for line in run("--dump-sass", "--gpu-architecture", arch, library).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = found.setdefault(match[1], [])
        elif current is not None and (
            match := re.match(r"\s*/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);", line)
        ):
            target = re.search(r"0x([0-9a-f]+)\s*$", match[4]) if match[3].startswith("BRA") else None
            predicate = (match[2] or "").strip() not in ("", "@PT")
            current.append(Instruction(int(match[1], 16), match[3], predicate, target and int(target[1], 16)))
    return found


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


def body(code: list[Instruction], adds: int, loads: str, stores: str | None) -> Counter | None:
    """The shortest way round a loop with so many additions, 16 vector loads of a kind and as many stores.

    Ways go forward in the code, but for the branch back to the loop's head.
    """
    blocks = blocks_of(code)
    features = {
        a: (count(b.ops, "FADD"), count(b.ops, "LDG.", loads), count(b.ops, "STG.", stores or "STG"))
        for a, b in blocks.items()
    }
    wanted = (adds, 16, 16 if stores else 0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=ROOT / "hsaid_kernels/_cuda.so")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    if not options.library.exists():
        parser.error(f"library: expected a built CUDA library, found no {options.library}")
    used = resources(options.library, options.arch)
    code = functions(options.library, options.arch)
    if not code:
        parser.error(f"arch: {options.library.name} has no code for {options.arch}")

    print(f"| kernel, {options.arch} | widths | registers | stack, bytes | spill instructions |")
    print("|---|---|---|---|---|")
    main_kernels = {}
    for name, instructions in sorted(code.items()):
        kernel, diagonal, kind = KERNEL.search(name).groups()
        title = kernel if kind is None else f"{kernel}, {('gaussian', 'rademacher')[int(diagonal)]}"
        if kind is None and diagonal is not None:
            kind = "2" if diagonal == "1" else "1"
        widths = KINDS[int(kind)] if kind is not None else ""
        spills = sum(i.op.split(".")[0] in ("STL", "LDL") for i in instructions)
        print(f"| {title} | {widths} | {used[name][0]} | {used[name][1]} | {spills} |")
        if kind == "0":
            main_kernels[kernel, diagonal] = instructions

    columns = "values in memory | instructions per value | FADD, FMUL | shared memory"
    print(f"\n| loop body, n = 2^14, {options.arch} | {columns} |")
    print("|---|---|---|---|---|")
    for (kernel, diagonal), instructions in main_kernels.items():
        normals = 3 if diagonal == "0" else 0
        for memory, vector in (("float32", ".128."), ("bfloat16", ".64.")):
            adds = VALUES * (BUTTERFLIES + normals + 1)
            ops = body(instructions, adds, vector, None if "groups" in kernel else vector)
            title = f"{kernel}, {('gaussian', 'rademacher')[int(diagonal)]}"
            if ops is None:
                print(f"| {title} | {memory} | no such loop | | |")
                continue
            per_value = [ops.total(), count(ops, "FADD") + count(ops, "FMUL"), count(ops, "LDS") + count(ops, "STS")]
            print(f"| {title} | {memory} | " + " | ".join(f"{n / VALUES:.2f}" for n in per_value) + " |")


if __name__ == "__main__":
    main()
