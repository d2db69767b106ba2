"""From tables and plots to pages: README's part, docs/benchmarks.md, docs/plots/. No number is typed by hand.

    python benchmarks/report.py                        of the full runs in benchmarks/results/, into README.md and docs/
    python benchmarks/report.py FILE --out FOLDER      of one file, for instance of a quick run, into a folder

`make report` and `make bench` call it so.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import plots
import results
from results import pick
from tables import HOW, WEIGHTS_7B, Row, Tables

ROOT = results.HERE.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class Section(NamedTuple):
    title: str
    table: str  # "": the section is left out
    text: str = ""
    pictures: tuple[str, ...] = ()


def sections(report: Tables) -> list[Section]:
    return [
        Section("mBERT, 201 tensors, 177,854,978 weights", report.headline(), pictures=("roofline",)),
        Section(
            "By d",
            report.by_d(),
            'mBERT in float32, chunks="all": of a theta longer than 16,384, each chunk draws normals of its own.',
            ("time_against_d",),
        ),
        Section(
            "A long theta",
            report.long_theta(),
            "mBERT in float32, one chunk a block, beside d = 16,384 in the same rounds; with all chunks, once.",
        ),
        Section("Other widths", report.by_width(), "Than the default, the next power of two and at least 256."),
        Section("By size", report.by_weights(), "d = 1,000.", ("time_against_weights",)),
        Section(
            "By threads",
            report.by_threads(),
            "One thread and all of them in the same rounds.",
        ),
        Section(
            "Where W0 lies",
            report.places(),
            "The slowest place of W0 (of W, of the gradients) within a page as a multiple of the fastest, in CPU\n"
            "time of one thread (benchmarks/places.py, docs/cpu.md).",
        ),
        Section(
            "A training step",
            report.steps(),
            "mBERT, 16 texts of 16 tokens, d = 1,000; peft's methods with their defaults on query and value. A CPU\n"
            "without instructions for bfloat16 (AVX-512 BF16, AMX) spends such a step in torch's matrix products.",
            ("step", "memory"),
        ),
        Section(
            "Embedding rows on demand",
            report.on_demand(),
            "Projection and adjoint of a step with 32 x 32 random tokens: only the blocks of the word embeddings that\n"
            "hold the tokens' rows are made, against all weights.",
        ),
        Section(
            "Other ways to the same end",
            report.peers(),
            "The published algorithm is written here from its definition, in plain torch with the exact gradient\n"
            '(benchmarks/peers.py), and runs on the same tensor as ours in the same rounds. "Scaled" times were not\n'
            "measured: they are the time of this tensor times the ratio of operations.",
        ),
        Section(
            "Once in a process",
            report.first_call(),
            "The first forward and adjoint, mBERT in float32, and the memory they take beyond what goes in and out;\n"
            "beside them later forwards, and filling as much memory as W takes that is new to the process, and again.",
        ),
        Section(
            "A study beside its runs",
            report.study(),
            "`measure` with runs that train nothing, one after the other, the study in SQLite.",
        ),
        Section(
            "The transform alone",
            report.transform(),
            "2^24 values in rows of n; n = 20,480 is order=20. The transform makes a new tensor, and so does the\n"
            "second floor.",
        ),
        Section(
            "The transform beside other packages",
            report.transform_beside(),
            "2^22 values in rows of n on one thread, into a new array and in place, in the same rounds. Ratios are of\n"
            "our time to theirs: below 1 ours is faster. Each result is first held against a float64 transform. A\n"
            "package that does not take such rows has no ratio.",
            ("transform_new", "transform_in_place"),
        ),
        Section(
            "On a GPU",
            report.gpu(),
            "mBERT. Device times of calls that wait in the queue, and what the host takes to queue one;\n"
            "`torch.add(W0, 1, out=W)` and reading the gradients once in the same rounds.",
        ),
        Section(
            "The adjoint by blocks of the model",
            report.gpu_blocks(),
            "In training the gradients of neighbouring blocks of the model, up to half the size of the largest block,\n"
            "are used as soon as backward leaves them: three calls for mBERT. A call for each block: fifteen.",
        ),
        Section(
            "A training step on the GPU",
            report.gpu_steps(),
            "mBERT under bfloat16 autocast, 32 texts of 128 tokens, d = 1,000, eager. The host sets the pace of such\n"
            "a step; the projection's time is that of its forward and of its adjoint calls, from the tables above\n"
            "(fifteen where three were not measured).",
        ),
        Section("The published algorithm on the GPU", report.gpu_published(), "mBERT in float32, d = 1,000."),
        Section("The transform alone on the GPU", report.gpu_transform(), "2^27 values in rows of n."),
        Section(
            "Seven billion weights: computed, not measured",
            report.seven_billion(),
            f"The rates of the largest run of each kind, times {WEIGHTS_7B:,} weights.",
        ),
    ]


def terminal(rows: list[Row]) -> str:
    """What a run prints."""
    shown = [section for section in sections(Tables({}, rows)) if section.table]
    return "\n".join("\n".join(filter(None, [s.title, s.text, s.table])) for s in shown)


INTRODUCTION = """
Times are medians; ratios are taken in each round, between two measurements that follow one another, and given as the
median with the 20th and the 80th percentile: the machines are shared, and a floor bound by memory moves less than
kernels bound by arithmetic. The floor of the forward is `torch.add(W0, 1, out=W)`, W0 read and W written once; that of
the adjoint `torch.sum` over the gradients. A speed that falls short of what is asked has a remark below its table.
"""


def pages(report: Tables, folder: Path, pictures: str) -> str:
    """docs/benchmarks.md for one machine; draws the pictures into the folder, which the page calls `pictures`."""
    drawn = plots.draw(report, folder)
    parts = [f"{report.machine()}\n{INTRODUCTION}"]
    for section in sections(report):
        if section.table:
            shown = [
                f"![{name.replace('_', ' ')}]({pictures}/{name}.png)\n" for name in section.pictures if name in drawn
            ]
            text = f"{section.text}\n\n" if section.text else ""
            parts.append("\n".join([f"### {section.title}\n\n{text}{section.table}", *shown]))
    return "\n".join(parts)


def summary(report: Tables) -> str:
    """README's part: float32, with the machine's best instruction set and with what older machines have."""
    rows = report.rows
    said = []
    published = pick(rows, what="published")
    if published:
        weights = max(row["weights"] for row in published)
        largest = [row for row in published if row["weights"] == weights]
        each = " and ".join(f"{row['/ours']:,.0f} times as long {HOW[row['transform']]}" for row in largest)
        said.append(
            f"The published algorithm, in plain torch with the exact gradient, takes {each}, forward and backward "
            f"of the same {weights:,} weights, and keeps {largest[0]['random_MB'] / 1e3:.1f} GB of random "
            "state for mBERT."
        )
    for row in pick(rows, what="normals", d=1000):
        said.append(f"Torch drawing as many normals takes {row['/ours']:.1f} times as long as the forward.")
    for row in pick(rows, what="step", method="H-SAID"):
        said.append(f"Of a training step (16 texts of 16 tokens) the projection is {100 * row['share']:.0f}%.")
    vectors = Tables(report.about, [row for row in rows if row.get("isa") != "portable"])
    return f"{report.machine()}\n\n{vectors.headline(('float32',))}\n{' '.join(said)}\n"


def gpu_summary(report: Tables) -> str:
    """README's sentence on a GPU: its own backend, theta of one chunk."""

    def span(dtype: str, name: str) -> str:
        found = [r[name] for r in pick(report.rows, what="projection", backend="cuda", dtype=dtype, d=(1000, 16384))]
        return f"{min(found):.2f} to {max(found):.2f}"

    return (
        f"On an {report.name()} the forward over all 201 tensors takes {span('float32', 'forward/floor')} times "
        f"`torch.add` in float32 and {span('bfloat16', 'forward/floor')} times in bfloat16, the adjoint "
        f"{span('float32', 'adjoint/read')} and {span('bfloat16', 'adjoint/read')} times reading the gradients once.\n"
    )


def replace_between(text: str, new: str) -> str:
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md: expected {BEGIN} and {END}, found not both")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + new + text[text.index(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="one file of results")
    parser.add_argument("--out", type=Path, help="the folder for its tables and plots")
    options = parser.parse_args()
    if bool(options.file) != bool(options.out):
        parser.error("expected both FILE and --out FOLDER, or neither")
    if options.file:
        page = options.out / "benchmarks.md"
        text = pages(Tables(*results.load(options.file)), options.out / "plots", "plots")
        page.write_text(f"# Benchmarks\n\n{text}")
        print(f"tables in {page}, plots in {options.out / 'plots'}")
        return
    files = [path for path in sorted(results.FOLDER.glob("*.json")) if not path.stem.endswith("-quick")]
    found = {path.stem: Tables(*results.load(path)) for path in files}
    on_cpu = [report for report in found.values() if report.isa]
    if not on_cpu:
        raise SystemExit(f"expected a full run in {results.FOLDER.name}/, found none: `make bench-full` makes one")
    text = "\n".join(
        f"## {report.name()}\n\n{pages(report, ROOT / 'docs' / 'plots' / stem, f'plots/{stem}')}"
        for stem, report in found.items()
    )
    intro = (
        "# Benchmarks\n\nMade by `make report` from the rows in benchmarks/results/, which `make bench-full` "
        "writes; no number here is typed by hand.\n\n"
    )
    (ROOT / "docs" / "benchmarks.md").write_text(intro + text)
    readme = ROOT / "README.md"
    on_gpu = [report for report in found.values() if not report.isa]
    said = [*map(summary, on_cpu), *map(gpu_summary, on_gpu)]
    readme.write_text(replace_between(readme.read_text(), "\n".join(said)))
    print("README.md, docs/benchmarks.md and docs/plots/ are of", ", ".join(path.name for path in files))


if __name__ == "__main__":
    main()
