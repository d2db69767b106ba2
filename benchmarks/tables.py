"""From the rows of a run to tables."""

import re
from collections.abc import Callable, Iterable, Sequence

import results
from results import pick

from hsaid_kernels.fastfood.plan import default_width

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


class Tables(results.Run):
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
