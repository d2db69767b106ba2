"""The pictures of docs/benchmarks.md, each from the rows of one run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from results import Run, pick

from hsaid_kernels.fastfood.plan import default_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"gaussian": "tab:blue", "rademacher": "tab:orange"}
PARTS = ("projection", "adjoint", "forward", "backward", "optimiser")


def draw(run: Run, folder: Path) -> set[str]:
    """Writes a PNG for each picture that the rows suffice for; their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 9})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set()
    for name, picture in PICTURES.items():
        figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
        if picture(run, axes):
            figure.savefig(folder / f"{name}.png", dpi=120)
            drawn.add(name)
        plt.close(figure)
    return drawn


def _default(run: Run, **columns: object) -> list[dict]:
    """Rows of the default instruction set, threads and width."""
    found = pick(run.rows, isa=run.isa, threads=run.threads, **columns)
    return [row for row in found if row["width"] == default_width(row["d"])]


def _line(axes: Axes, rows: list[dict], x: str, style: str, **how: object) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    axes.plot([row[x] for row in rows], [row["ms"] for row in rows], style, **how)
    axes.fill_between(
        [row[x] for row in rows], [row["ms_20"] for row in rows], [row["ms_80"] for row in rows], alpha=0.15, **how
    )


def time_against_d(run: Run, axes: Axes) -> bool:
    floors = []
    for diagonal, color in COLORS.items():
        for what, style in (("forward", "o-"), ("adjoint", "s--")):
            rows = _default(run, what=what, model="mBERT", dtype="float32", diagonal=diagonal)
            if len(rows) < 2:
                return False
            _line(axes, rows, "d", style, color=color)
            axes.lines[-1].set_label(f"{what}, {diagonal}")
            if what == "forward":
                floors += [row["floor_ms"] for row in rows]
    axes.axhline(statistics.median(floors), color="black", linestyle=":", label="floor: torch.add(W0, 1, out=W)")
    axes.set(xscale="log", xlabel="d, numbers in theta", ylabel="milliseconds", title="mBERT, float32: time against d")
    axes.set_ylim(bottom=0)
    if axes.get_xlim()[1] > 20000:
        axes.axvline(16384, color="gray", linewidth=0.8)
        axes.annotate(" in chunks of 16,384", (16384, 0), va="bottom", fontsize=9, color="gray")
    ticks = sorted({row["d"] for row in _default(run, what="forward", model="mBERT", dtype="float32")})
    axes.set_xticks([100, 1000, 10_000, 100_000][: 4 if ticks[-1] > 20000 else 3], minor=False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.legend()
    return True


def time_against_weights(run: Run, axes: Axes) -> bool:
    rows = _default(run, what="forward", dtype="float32", d=1000)
    if len({row["weights"] for row in rows}) < 2:
        return False
    for diagonal, color in COLORS.items():
        of_diagonal = [row for row in rows if row["diagonal"] == diagonal]
        _line(axes, of_diagonal, "weights", "o-", color=color)
        axes.lines[-1].set_label(f"forward, {diagonal}")
        adjoint = _default(run, what="adjoint", dtype="float32", d=1000, diagonal=diagonal)
        _line(axes, adjoint, "weights", "s--", color=color)
        axes.lines[-1].set_label(f"adjoint, {diagonal}")
    floors = sorted((row["weights"], row["floor_ms"]) for row in rows if row["diagonal"] == "gaussian")
    axes.plot(*zip(*floors), ":", color="black", label="floor: torch.add(W0, 1, out=W)")
    for row in rows:
        if not row["model"].startswith("10^") and row["diagonal"] == "gaussian":
            place = (row["weights"], row["floor_ms"])
            slanted = {"ha": "left", "va": "top", "rotation": -45, "rotation_mode": "anchor", "fontsize": 8}
            axes.annotate(row["model"], place, (2, -8), textcoords="offset points", **slanted)
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="milliseconds")
    axes.set_title("float32, d = 1,000: time against size")
    axes.legend()
    return True


def roofline(run: Run, axes: Axes) -> bool:
    """Rates against weights per byte: the slope is the memory's, the ceilings are the fastest runs of any size."""
    bytes_each = {("forward", "float32"): 8, ("forward", "bfloat16"): 4}
    bytes_each |= {("adjoint", "float32"): 4, ("adjoint", "bfloat16"): 2}
    points = [
        row | {"x": 1 / each}
        for (what, dtype), each in bytes_each.items()
        for row in _default(run, what=what, model="mBERT", dtype=dtype, d=(1000, 16384))
    ]
    forward = [row for row in points if row["what"] == "forward" and row["dtype"] == "float32"]
    if not forward:
        return False
    bandwidth = statistics.median(8e-6 * row["weights"] / row["floor_ms"] for row in forward)  # GB/s
    xs = [0.09, 0.75]
    axes.plot(xs, [bandwidth * x for x in xs], color="black", label=f"memory: {bandwidth:.0f} GB/s (torch.add)")
    for diagonal, color in COLORS.items():
        every = [row for what in ("forward", "adjoint") for row in _default(run, what=what, diagonal=diagonal)]
        fastest = max(row["weights"] / row["ms_20"] / 1e6 for row in every)
        axes.axhline(fastest, color=color, linestyle="--", label=f"arithmetic, {diagonal}: the fastest of all runs")
    markers = {("forward", 1000): "o", ("forward", 16384): "^", ("adjoint", 1000): "s", ("adjoint", 16384): "v"}
    seen = set()
    for row in points:
        kind, color = (row["what"], row["d"]), COLORS[row["diagonal"]]
        x = row["x"] * (0.97 if row["what"] == "forward" else 1.03)  # side by side where both move 4 bytes
        label = None if kind in seen else f"{row['what']}, d = {row['d']:,}"
        seen.add(kind)
        axes.plot(x, row["weights"] / row["ms"] / 1e6, markers[kind], color=color, markeredgecolor="black")
        axes.plot([], [], markers[kind], color="gray", label=label) if label else None
    places = {1 / 8: "forward float32", 1 / 4: "forward bfloat16,\nadjoint float32", 1 / 2: "adjoint bfloat16"}
    axes.set(
        xscale="log", yscale="log", xlim=xs, xlabel="weights per byte moved", ylabel="billions of weights a second"
    )
    axes.set_title("mBERT: rates and roofs")
    axes.set_xticks(list(places), [f"1/{1 / x:.0f}\n{name}" for x, name in places.items()])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    axes.legend(loc="upper left", ncols=2, fontsize=8)
    return True


def step(run: Run, axes: Axes) -> bool:
    rows = pick(run.rows, what="step")
    if not rows:
        return False
    left = [0.0] * len(rows)
    names = [f"{row['method']}: {row['trained']:,}" for row in rows]
    for part, color in zip(PARTS, ("tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:gray")):
        widths = [row.get(f"{part}_ms", 0.0) for row in rows]
        axes.barh(names, widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths)]
    end = 1.2 * max(total for total in left if total <= 5 * left[0])  # a bar of minutes would leave nothing to see
    for name, total in zip(names, left):
        inside = total <= end
        text = f" {total:,.0f}" if inside else f"cut off: {total:,.0f} "
        axes.annotate(text, (min(total, end), name), va="center", ha="left" if inside else "right", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds; behind the names: trained numbers", title="A training step on mBERT")
    axes.set_xlim(0, end)
    axes.legend(loc="upper center", bbox_to_anchor=(0.2, -0.15), ncols=len(PARTS), frameon=False)  # on no bar
    return True


def memory(run: Run, axes: Axes) -> bool:
    peaks = [(f"{row['method']}: peak of a step", row["peak_MB"], "tab:blue") for row in pick(run.rows, what="step")]
    kept = [
        (f"published: random state, d = {row['d']:,}", row["random_MB"], "tab:red")
        for row in pick(run.rows, what="published")[:1]
    ] + [
        (f"dense Gaussian: random state, d = {row['d']:,}", row["random_MB_mBERT"], "tab:red")
        for row in pick(run.rows, what="dense")[-1:]
    ]
    ours = [
        (f"ours: workspace, d = {row['d']:,}", max(row["forward_MB"], row["adjoint_MB"]), "tab:green")
        for row in pick(run.rows, what="first call")
    ]
    bars = [*ours, *peaks, *kept]
    if not bars:
        return False
    names, values, colors = zip(*bars)
    axes.barh(names, values, color=colors)
    for name, value in zip(names, values):
        axes.annotate(f" {value:,.0f}", (value, name), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="MB", title="Memory for mBERT")
    axes.set_xlim(1, 10 * max(values))
    return True


def _transforms(run: Run, axes: Axes, where: str) -> bool:
    rows = sorted(pick(run.rows, what="transform beside", where=where), key=lambda row: row["n"])
    if len({row["n"] for row in rows}) < 2:
        return False
    names = ["ours", *sorted({name for row in rows for name in row["packages"]})]
    colors = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red")
    for dtype, style in (("float32", "o-"), ("float64", "s--")):
        for name, color in zip(names, colors):
            column = "ms" if name == "ours" else f"{name}_ms"
            found = [row for row in rows if row["dtype"] == dtype and column in row]
            if found:
                label = f"{name}, {dtype}"
                axes.plot([row["n"] for row in found], [row[column] for row in found], style, color=color, label=label)
    axes.set_xscale("log", base=2)
    title = f"2^22 values on one thread, {'in place' if where == 'in place' else 'into a new array'}"
    axes.set(yscale="log", xlabel="n, values of a row", ylabel="milliseconds", title=title)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend above the lines
    axes.legend(ncols=3, fontsize=8, loc="upper left")
    return True


def transform_new(run: Run, axes: Axes) -> bool:
    return _transforms(run, axes, "new")


def transform_in_place(run: Run, axes: Axes) -> bool:
    return _transforms(run, axes, "in place")


DRAWN = (time_against_d, time_against_weights, roofline, step, memory, transform_new, transform_in_place)
PICTURES = {f.__name__: f for f in DRAWN}
