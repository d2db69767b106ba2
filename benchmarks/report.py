"""From rows to tables and plots: README's table, docs/benchmarks.md, docs/plots/. No number is typed by hand.

    python benchmarks/report.py                        of the full runs in benchmarks/results/, into README.md and docs/
    python benchmarks/report.py FILE --out FOLDER      of one file, for instance of a quick run, into a folder

`make report` and `make bench` call it so.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import plots
import results
from results import pick

from hsaid_kernels.fastfood.plan import default_width

ROOT = results.HERE.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "portable": "none"}
HOW = {  # the published algorithm transforms
    "butterflies": "with its stages in torch operations",
    "matmul": "with a matrix product a stage",
    "hadamard_transform": "with our `hadamard_transform` over the whole tensor",
}
WEIGHTS_7B = 6_738_415_616  # LlamaForCausalLM of Llama 2 7B
Row = dict


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def ratio(row: Row, name: str) -> str:
    """Median, and from the 20th to the 80th percentile."""
    return f"{row[name]:.2f} ({row[f'{name}_20']:.2f} to {row[f'{name}_80']:.2f})"


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its columns of one width, numbers to the right; "" without lines."""
    if not lines:
        return ""
    cells = [[x if isinstance(x, str) else number(x) for x in line] for line in lines]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    right = [all(re.match(r"[\d.,]+", line[i]) or not line[i] for line in cells) for i in range(len(header))]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)]
    padded = [
        [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(line, widths, right)] for line in [header, rule, *cells]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


KEY = ("model", "isa", "dtype", "diagonal", "d", "width", "threads")


def pairs(rows: Iterable[Row], **columns: object) -> list[tuple[Row, Row | None]]:
    """A forward and the adjoint of the same case."""
    rows = list(rows)
    adjoints = {tuple(row[k] for k in KEY): row for row in pick(rows, what="adjoint", **columns)}
    return [(row, adjoints.get(tuple(row[k] for k in KEY))) for row in pick(rows, what="forward", **columns)]


def projection_table(found: Sequence[tuple[Row, Row | None]], *first: tuple[str, Callable[[Row], object]]) -> str:
    header = [
        *(name for name, _ in first),
        "floor, ms",
        "forward, ms",
        "GB/s",
        "/ floor",
        "sum, ms",
        "adjoint, ms",
        "GB/s",
        "/ sum",
    ]
    lines = []
    for forward, adjoint in found:
        line = [f(forward) for _, f in first]
        line += [forward["floor_ms"], forward["ms"], forward["GB/s"], ratio(forward, "/floor")]
        if adjoint:
            line += [adjoint["floor_ms"], adjoint["ms"], adjoint["GB/s"], ratio(adjoint, "/floor")]
        lines.append(line + [""] * (len(header) - len(line)))
    return table(header, lines)


def has_default_width(row: Row) -> bool:
    return row["width"] == default_width(row["d"])


def isa(row: Row) -> str:
    return ISAS.get(row["isa"], row["isa"])


COLUMNS: dict[str, tuple[str, Callable[[Row], object]]] = {
    "isa": ("instruction set", isa),
    "dtype": ("weights in", lambda row: row["dtype"]),
    "diagonal": ("diagonal", lambda row: row["diagonal"]),
    "d": ("d", lambda row: f"{row['d']:,}"),
    "width": ("n", lambda row: f"{row['width']:,}"),
    "model": ("model", lambda row: row["model"]),
    "weights": ("weights", lambda row: f"{row['weights']:,}"),
}


class Report(results.Run):
    """A run as tables."""

    def __init__(self, about: dict, rows: list[Row]):
        super().__init__(about, rows)
        self.default = dict(model="mBERT", threads=self.threads)

    def columns(self, found: Sequence[tuple[Row, Row | None]], *names: str) -> str:
        return projection_table(found, *(COLUMNS[name] for name in names))

    def remarks(self, *what: str) -> str:
        """What is to be said below a table of speeds that fall short of what is asked."""
        said = [f"- Remark: {row['remark']}\n" for row in pick(self.rows, what=what) if "remark" in row]
        return "\n" + "".join(said) if said else ""

    def headline(self, dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> str:
        found = pairs(self.rows, d=(1000, 16384), dtype=dtypes, **self.default)
        found = [pair for pair in found if has_default_width(pair[0])]
        order = list(ISAS)
        found.sort(key=lambda pair: (order.index(pair[0]["isa"]), dtypes.index(pair[0]["dtype"])))
        return self.columns(found, "isa", "dtype", "diagonal", "d")

    def by_d(self) -> str:
        found = pairs(self.rows, dtype="float32", isa=self.isa, **self.default)
        found = [pair for pair in found if has_default_width(pair[0])]
        return self.columns(sorted(found, key=lambda p: (p[0]["diagonal"], p[0]["d"])), "diagonal", "d", "width")

    def by_width(self) -> str:
        found = pairs(self.rows, dtype="float32", isa=self.isa, **self.default)
        several = {pair[0]["d"] for pair in found if not has_default_width(pair[0])}
        found = [pair for pair in found if pair[0]["d"] in several]
        return self.columns(
            sorted(found, key=lambda p: (p[0]["diagonal"], p[0]["d"], p[0]["width"])), "diagonal", "d", "width"
        )

    def by_weights(self) -> str:
        found = pairs(self.rows, isa=self.isa, d=1000, threads=self.threads)
        found = [pair for pair in found if has_default_width(pair[0])]
        found.sort(key=lambda p: (p[0]["dtype"] != "float32", p[0]["diagonal"], p[0]["weights"]))
        return self.columns([p for p in found if p[0]["dtype"] != "float16"], "dtype", "diagonal", "model", "weights")

    def by_threads(self) -> str:
        lines = []
        for row in pick(self.rows, what=("forward", "adjoint"), model="mBERT", threads=1):
            if "all_threads_ms" in row:
                of_floor = row["floor_ms"] / row["floor_all_threads_ms"]
                times = [row["ms"], row["all_threads_ms"], ratio(row, "/all_threads"), of_floor]
                lines.append([row["what"], row["diagonal"], f"{row['d']:,}", *times])
        return table(
            ["", "diagonal", "d", "1 thread, ms", f"{self.threads} threads, ms", "speed-up", "of the floor"], lines
        )

    def places(self) -> str:
        """A line for each instruction set, part and diagonal, a column for each n: the slowest place / the fastest."""
        found: dict[tuple, dict[int, str]] = {}
        for row in pick(self.rows, what="place"):
            # Rows of older files have one place only, and the time of all threads.
            key = (
                row.get("isa", self.isa),
                row.get("part", "forward, a line behind W"),
                row.get("diagonal", "rademacher"),
            )
            found.setdefault(key, {})[row["width"]] = f"{row['/elsewhere']:.2f}"
        widths = sorted({width for line in found.values() for width in line})
        lines = [
            [ISAS.get(isa, isa), part, diagonal, *(line.get(width, "") for width in widths)]
            for (isa, part, diagonal), line in found.items()
        ]
        header = ["instruction set", "", "diagonal", *(f"n = {width:,}" for width in widths)]
        return table(header, lines) + self.remarks("place")

    def long_theta(self) -> str:
        lines = [
            [part, row["diagonal"], f"{row['d']:,}", row["floor_ms"], row["16384_ms"], row["ms"]]
            + [ratio(row, "/16384"), row["all_ms"], f"{row['all_times']:.1f}"]
            for part in ("forward", "adjoint")
            for row in sorted(pick(self.rows, what=f"long {part}"), key=lambda row: (row["diagonal"], row["d"]))
        ]
        header = ["", "diagonal", "d", "floor, ms", "d = 16,384, ms", "ms", "/ d = 16,384", "all chunks, ms", "times"]
        return table(header, lines) + self.remarks("long forward", "long adjoint")

    def transform(self) -> str:
        lines = [
            [row["dtype"], f"{row['n']:,}", row["floor_ms"], row["new_ms"], row["ms"], ratio(row, "/new")]
            + [row.get("in_place_ms", "")]
            for row in pick(self.rows, what="hadamard_transform")
        ]
        header = [
            "values in",
            "n",
            "floor, ms",
            "floor with a new tensor, ms",
            "transform, ms",
            "/ new",
            "in place, ms",
        ]
        return table(header, lines)

    def first_call(self) -> str:
        lines = []
        for row in pick(self.rows, what="first call"):
            times = [row["plan_ms"], row["forward_ms"]]
            times += [row["later_ms"], row["/later"], row["new_ms"], row["again_ms"]] if "later_ms" in row else [""] * 4
            lines.append([f"{row['d']:,}", *times, row["adjoint_ms"], row["forward_MB"], row["adjoint_MB"]])
        header = ["d", "plan, ms", "forward, ms", "later, ms", "/ later", "new memory filled, ms", "again, ms"]
        header += ["adjoint, ms", "forward, MB beyond W0 and W", "adjoint, MB"]
        return table(header, lines) + self.remarks("first call")

    def steps(self) -> str:
        lines = []
        for row in pick(self.rows, what="step"):
            parts = [row.get(f"{part}_ms", "") for part in ("projection", "adjoint", "forward", "backward")]
            share = f"{100 * row['share']:.1f}%" if "share" in row else ""
            lines.append(
                [row["method"], f"{row['trained']:,}", row["ms"], *parts, row["optimiser_ms"], share, row["peak_MB"]]
            )
        header = ["method", "trained numbers", "step, ms", "projection", "adjoint", "forward", "backward", "optimiser"]
        return table([*header, "projection's share", "memory at the peak, MB"], lines)

    def on_demand(self) -> str:
        lines = [
            [row["model"], row["diagonal"], f"{row['d']:,}", row["ms"], row["whole_ms"], ratio(row, "/whole")]
            for row in pick(self.rows, what="rows")
        ]
        return table(["model", "diagonal", "d", "rows on demand, ms", "all weights, ms", "ratio"], lines)

    def study(self) -> str:
        lines = [[f"{row['runs']:,}", row["ms"], row["ms_20"], row["ms_80"]] for row in pick(self.rows, what="study")]
        return table(["runs", "ms a run", "20th percentile", "80th"], lines) + self.remarks("study")

    def peers(self) -> str:
        lines = []
        for row in pick(self.rows, what="published"):
            what = f"published algorithm {HOW[row['transform']]}, forward and backward of `{row['tensor']}`"
            measured = [what, f"{row['weights']:,}", row["ms"], row["ours_ms"], row["/ours"]]
            lines.append([*measured, f"{row['scaled_ms'] / 1e3:,.0f} s for mBERT (scaled)", row["random_MB"]])
        for row in pick(self.rows, what="normals"):
            what = f"torch drawing as many normals, against our forward at d = {row['d']:,}"
            lines.append([what, f"{row['weights']:,}", row["ms"], row["ours_ms"], row["/ours"], "", ""])
        for row in pick(self.rows, what="gpart"):
            what = f"GPart's formula in torch, groups made anew, d = {row['d']:,}, forward and backward"
            lines.append([what, f"{row['weights']:,}", row["ms"], row["ours_ms"], row["/ours"], "", ""])
        for row in pick(self.rows, what="dense"):
            what = f"dense Gaussian matrix, d = {row['d']:,}, forward and backward"
            kept = f"{row['random_MB']:,.0f}; mBERT: {row['random_MB_mBERT']:,.0f}"
            lines.append([what, f"{row['weights']:,}", row["ms"], row["ours_ms"], row["/ours"], "", kept])
        header = ["what", "weights", "ms", "ours, ms", "times ours", "all of mBERT", "random state kept, MB"]
        return table(header, lines)

    def transform_beside(self) -> str:
        rows = pick(self.rows, what="transform beside")
        names = sorted({name for row in rows for name in row["packages"]})
        versions = {name: version for row in rows for name, version in row["packages"].items()}

        def of(row: Row, name: str) -> str:
            return (
                "wrong, not timed"
                if name in row["wrong"]
                else ratio(row, f"/{name}")
                if name in row["packages"]
                else ""
            )

        lines = [
            [row["where"], row["dtype"], f"{row['n']:,}", row["ms"], *(of(row, name) for name in names)]
            for row in sorted(rows, key=lambda row: (row["where"] != "new", row["dtype"], row["n"]))
        ]
        header = ["into", "values in", "n", "ours, ms", *(f"/ {name} {versions[name]}" for name in names)]
        return table(header, lines) + self.remarks("transform beside")

    def seven_billion(self) -> str:
        """Computed from the largest measured run of each kind."""
        lines = []
        for dtype in ("float32", "bfloat16"):
            for diagonal in ("gaussian", "rademacher"):
                found = pairs(self.rows, dtype=dtype, diagonal=diagonal, isa=self.isa, d=1000, threads=self.threads)
                if found:
                    forward, adjoint = max(found, key=lambda pair: pair[0]["weights"])
                    scale = WEIGHTS_7B / forward["weights"] / 1e3
                    size = WEIGHTS_7B * (4 if dtype == "float32" else 2) / 1e9
                    floor = forward["floor_ms"] * scale
                    times = [floor, forward["ms"] * scale, adjoint["ms"] * scale if adjoint else ""]
                    lines.append([dtype, diagonal, forward["model"], *times, size])
        header = ["weights in", "diagonal", "rate measured on", "floor, s", "forward, s", "adjoint, s"]
        return table([*header, "W0 and W, GB each"], lines)

    def gpu(self) -> str:
        header = ["backend", "weights in", "diagonal", "d", "floor, us", "forward, us", "/ floor", "host, us"]
        lines = [
            [row["backend"], row["dtype"], row["diagonal"], f"{row['d']:,}", 1e3 * row["floor_ms"]]
            + [1e3 * row["forward_ms"], row["forward/floor"], 1e3 * row["forward_host_ms"], 1e3 * row["read_ms"]]
            + [1e3 * row["adjoint_ms"], row["adjoint/read"], 1e3 * row["adjoint_host_ms"], row["workspace_MB"]]
            for row in pick(self.rows, what="projection")
        ]
        return table([*header, "read, us", "adjoint, us", "/ read", "host, us", "workspace, MB"], lines)

    def gpu_blocks(self) -> str:
        header = [
            "backend",
            "gradients in",
            "diagonal",
            "d",
            "one call, us",
            "as HSAID, us",
            "/ one",
            "fifteen, us",
            "/ one",
        ]
        lines = [
            [row["backend"], row["dtype"], row["diagonal"], f"{row['d']:,}", 1e3 * row["one_ms"]]
            + ([1e3 * row["joined_ms"], row["joined/one"]] if "joined_ms" in row else ["", ""])
            + [1e3 * row["blocks_ms"], row["blocks/one"], 1e3 * row["layer_ms"], str(row["layer_run_blocks"])]
            for row in pick(self.rows, what="adjoint by blocks")
        ]
        return table([*header, "a layer, us", "blocks a run"], lines)

    def gpu_steps(self) -> str:
        """The projection's time is that of the tables above, for the same weights and d = 1,000."""
        lines = []
        for row in pick(self.rows, what="training step on a GPU"):
            case = dict(backend=row["backend"], diagonal=row["diagonal"], d=1000)
            forward = pick(self.rows, what="projection", dtype=row["weights"], **case)
            adjoint = pick(self.rows, what="adjoint by blocks", dtype=row["weights"], **case)
            if forward and adjoint:
                ours = forward[0]["forward_ms"] + adjoint[0].get("joined_ms", adjoint[0]["blocks_ms"])
                lines.append(
                    [row["backend"], row["weights"], row["diagonal"], row["full_step_ms"], row["step_ms"], ours]
                    + [f"{100 * ours / row['step_ms']:.1f}%", row["full_peak_GB"], row["peak_GB"]]
                )
        header = ["backend", "weights in", "diagonal", "full fine-tuning, ms", "H-SAID, ms", "projection, ms", "share"]
        return table([*header, "full, GB at the peak", "H-SAID, GB"], lines)

    def gpu_published(self) -> str:
        ours = pick(self.rows, what="projection", dtype="float32", diagonal="gaussian", d=1000)
        lines = [
            [f"forward, {HOW[row['transform']]}", row["forward_ms"], row["forward_ms"] / ours[0]["forward_ms"]]
            + [f"{row['random_MB']:,.0f}"]
            for row in pick(self.rows, what="published on a GPU")
            if ours
        ]
        return table(["the published algorithm", "ms", "times ours", "random state kept, MB"], lines)

    def gpu_transform(self) -> str:
        lines = [
            [row["backend"], row["dtype"], f"{row['n']:,}", row["transform_ms"], row["transform/floor"]]
            for row in pick(self.rows, what="hadamard_transform on a GPU")
        ]
        return table(["backend", "dtype", "n", "ms", "/ torch.add"], lines)

    def name(self) -> str:
        return self.about["cpu" if self.isa else "gpu"]

    def machine(self) -> str:
        about = self.about
        changed = " with changes" if about["changed_since"] else ""
        where = self.name() + (f", {self.threads} threads of {about['cores']} cores" if self.isa else "")
        return (
            f"{where}; torch {about['torch']}, Python {about['python']}; commit {about['commit'][:10]}{changed}, "
            f"{about.get('date', '')[:10]}."
        )


class Section(NamedTuple):
    title: str
    table: str  # "": the section is left out
    text: str = ""
    pictures: tuple[str, ...] = ()


def sections(report: Report) -> list[Section]:
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
            "2^24 values in rows of n. The transform makes a new tensor, and so does the second floor.",
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
    shown = [section for section in sections(Report({}, rows)) if section.table]
    return "\n".join("\n".join(filter(None, [s.title, s.text, s.table])) for s in shown)


INTRODUCTION = """
Times are medians; ratios are taken in each round, between two measurements that follow one another, and given as the
median with the 20th and the 80th percentile: the machines are shared, and a floor bound by memory moves less than
kernels bound by arithmetic. The floor of the forward is `torch.add(W0, 1, out=W)`, W0 read and W written once; that of
the adjoint `torch.sum` over the gradients. A speed that falls short of what is asked has a remark below its table.
"""


def pages(report: Report, folder: Path, pictures: str) -> str:
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


def summary(report: Report) -> str:
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
    vectors = Report(report.about, [row for row in rows if row.get("isa") != "portable"])
    return f"{report.machine()}\n\n{vectors.headline(('float32',))}\n{' '.join(said)}\n"


def gpu_summary(report: Report) -> str:
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
        text = pages(Report(*results.load(options.file)), options.out / "plots", "plots")
        page.write_text(f"# Benchmarks\n\n{text}")
        print(f"tables in {page}, plots in {options.out / 'plots'}")
        return
    files = [path for path in sorted(results.FOLDER.glob("*.json")) if not path.stem.endswith("-quick")]
    found = {path.stem: Report(*results.load(path)) for path in files}
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
