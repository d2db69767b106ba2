"""python glibc.py COMPILER FOLDER: makes stand-ins for libraries of glibc before 2.34 in FOLDER; prints their paths.

Threads, dlopen and shared memory were then in libraries of their own. Linked where they are in libc, a static library
that uses them (the CUDA runtime) asks every system for pthread_create of glibc 2.34. Before libc on the linker's
command line, a stand-in gives it pthread_create as libpthread.so.0 always had it, which newer systems have too.
"""

import re
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 28)  # as in manylinux_2_28
LIBRARIES = {"libpthread.so.0": r"pthread_|sem_", "libdl.so.2": r"dl", "librt.so.1": r"shm_|mq_|timer_"}


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.removeprefix("GLIBC_").split(".")))


def main(compiler: str, folder: Path) -> None:
    def output(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    libc = output(compiler, "-print-file-name=libc.so.6").strip()
    symbols = re.findall(r" (\w+)(@@?)(GLIBC_[\d.]+)$", output("nm", "-D", "--defined-only", libc), re.MULTILINE)
    newer = {name for name, at, version in symbols if at == "@@" and number(version) > OLDEST}
    older = {}  # the newest version of each that is old enough
    for name, at, version in sorted(symbols, key=lambda symbol: number(symbol[2])):
        if at == "@" and name in newer and number(version) <= OLDEST:
            older[name] = version
    folder.mkdir(parents=True, exist_ok=True)
    for library, pattern in LIBRARIES.items():
        has = {name: version for name, version in older.items() if re.match(pattern, name)}
        if not has:
            continue  # this system's glibc is old enough
        source, script = folder / f"{library}.s", folder / f"{library}.map"
        source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in has))
        versions = {version: [name for name in has if has[name] == version] for version in has.values()}
        script.write_text("".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in versions.items()))
        options = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        output(compiler, *options, str(source), "-o", str(folder / library))
        print(folder / library)


main(sys.argv[1], Path(sys.argv[2]))
