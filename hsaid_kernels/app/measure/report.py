"""What a study says: a table, results.json, and a picture of the scores against d."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, cast

from hsaid_kernels.app.certificate import DELTA, Certificate
from hsaid_kernels.app.measure.bounds import best_dim, certificate, certificates
from hsaid_kernels.app.measure.estimate import Estimate, estimate
from hsaid_kernels.app.measure.runs import BASELINE, RATES, Design, rate
from hsaid_kernels.app.measure.schedule import Outcomes, Point, Schedule
from hsaid_kernels.files import replace_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 5  # seeds, fewer than which give too narrow an interval
NAMES = {
    "did": "DID",
    "said": "SAID",
    "lora": "LoRA",
    "vera": "VeRA",
    "unilora": "Uni-LoRA",
    "fourierft": "FourierFT",
    "bitfit": "BitFit",
    "gpart": "GPart",
}
OPTION_NAMES = {"all": "all chunks", "one": "one chunk"}


@dataclass(frozen=True)
class Measurement:
    """The results of a study, finished or not.

    Attributes:
        design: of the study.
        baseline: training all weights.
        curves: {method: its points by increasing d}, without those of which nothing is known yet. A point at which
            training diverged at every learning rate has no scores.
        compared: such a point for each method of PEFT.
        dimensions: {method: `Estimate`}, for methods with scores.
        chance: the score that needs no training.
        labels: {method: what it is called in table and picture}, for methods with a name of their own.
        made_with: the different versions of torch, devices and numbers of threads of the runs.
        runs: number of finished runs.
        seconds: of all finished runs together.
        left: about how many runs are still to come.
    """

    design: Design
    baseline: Point
    curves: Mapping[str, Sequence[Point]]
    compared: Sequence[Point]
    dimensions: Mapping[str, Estimate]
    chance: float
    labels: Mapping[str, str]
    made_with: Sequence[str]
    runs: int
    seconds: float
    left: int

    @classmethod
    def of(
        cls, design: Design, outcomes: Outcomes, chance: float, labels: Mapping[str, str] | None = None
    ) -> Measurement:
        """The results of a design's runs, as far as they have finished."""
        schedule = Schedule(design)
        baseline = schedule.baseline(outcomes)
        curves = {method: list(filter(_is_known, schedule.curve(method, outcomes))) for method in design.methods}
        scores = {method: {p.dim or 0: p.scores for p in points if p.scores} for method, points in curves.items()}
        dimensions = {
            method: estimate(curve, baseline.scores, design.threshold)
            for method, curve in scores.items()
            if curve and baseline.scores
        }
        compared = list(filter(_is_known, schedule.compared(outcomes)))
        missing, later = schedule.left(outcomes)
        seconds = sum(outcome.seconds for outcome in outcomes.values())
        made_with = sorted({outcome.made_with for outcome in outcomes.values()} - {""})
        left = len(missing) + later
        known = (design, baseline, curves, compared, dimensions, chance, labels or {})
        return cls(*known, made_with, len(outcomes), seconds, left)

    @property
    def label(self) -> str:
        """What the dimension is called: d90 for a threshold of 0.9."""
        return f"d{100 * self.design.threshold:g}"

    @property
    def points(self) -> list[Point]:
        """All points of which something is known: the baseline, the methods, the methods of PEFT."""
        known = [self.baseline] if self.baseline.scores else []
        return [*known, *(point for points in self.curves.values() for point in points), *self.compared]

    @property
    def certificates(self) -> dict[str, dict[int, dict[int, Certificate]]]:
        """{method: {d: {seed: what the run certifies}}}, of methods whose runs have training errors (`Scores`)."""
        found = {
            method: {point.dim or 0: its for point in points if (its := certificates(self.design, point))}
            for method, points in self.curves.items()
        }
        return {method: bounds for method, bounds in found.items() if bounds}

    def named(self, method: str) -> str:
        """What a method is called in table and picture."""
        if method in self.labels:
            return self.labels[method]
        if method == BASELINE:
            return "full fine-tuning"
        name, *words = method.split(":")
        if method in self.design.compare:
            return " ".join([NAMES.get(name, name), *(f"{int(word):,}" for word in words)])
        if name.startswith("hsaid-"):
            name = "H-SAID"
        elif "|" in name or "+" in name:
            name = f"H-SAID {name}"
        options = [f"n = {int(word):,}" if word.isdecimal() else OPTION_NAMES.get(word, word) for word in words]
        return ", ".join([NAMES.get(name, name), *options])

    def table(self) -> str:
        """Two tables in Markdown: the dimension of each method, and all points."""
        lines = []
        if self.left:
            lines += [f"About {self.left} runs are still to come: these are the results so far.", ""]
        if self.dimensions:
            goal = self.design.threshold * mean(self.baseline.scores.values())
            rows = [[self.named(method), str(found)] for method, found in self.dimensions.items()]
            over = f" (95% interval over {self.design.seeds} seeds)" if self.design.seeds > 1 else ""
            what = f"{self.label}{over}: {goal:.3f} is reached at"
            lines += [*_aligned([["method", what], *rows], ">0"), ""]
            if 1 < self.design.seeds < FEW:
                lines += [f"With {self.design.seeds} seeds the intervals are too narrow (docs/measuring.md).", ""]
        if len(self.made_with) > 1:
            lines += [f"Runs differ in more than method and seed: {'; '.join(self.made_with)}.", ""]
        at_end = [point for point in self.points if point.lr in (rate(RATES[0]), rate(RATES[-1]))]
        ends = [f"{self.named(point.method)} {point.dim or ''}".strip() for point in at_end]
        if ends:
            lines += [f"The best learning rate is at the end of those that are tried: {', '.join(ends)}.", ""]
        bounds = self.certificates
        for method, its in bounds.items():
            d = best_dim(its)
            each = its[d].values()
            lines += [
                f"{self.named(method)}: an error of at most {mean(c.bound for c in each):.4f} on new data at d = {d:,} "
                f"({mean(c.training_error for c in each):.4f} in training, {mean(c.bits for c in each):,.0f} bits), "
                f"with probability {1 - DELTA:g} (docs/certificates.md).",
                "",
            ]
        rows = [["method", "d", "test", "seeds", "validation", "lr", "s a run", *(["bound"] if bounds else [])]]
        for point in self.points:
            trained = trained_values(point)
            which = [self.named(point.method), "all" if point.method == BASELINE else f"{trained:,}" if trained else ""]
            scores = list(point.scores.values())
            if not scores:
                rows.append([*which, "diverges at every rate tried", *[""] * (len(rows[0]) - 3)])
                continue
            validation = mean(o.scores.validation for o in point.outcomes.values() if o.scores is not None)
            seconds = mean(outcome.seconds for outcome in point.outcomes.values())
            spread = " ".join(f"{score:.3f}" for score in scores)
            numbers = [f"{mean(scores):.3f}", spread, f"{validation:.3f}", f"{point.lr:g}", f"{seconds:.1f}"]
            certified = bounds.get(point.method, {}).get(point.dim or 0, {}).values()
            if bounds:
                numbers.append(f"{mean(c.bound for c in certified):.4f}" if certified else "")
            rows.append([*which, *numbers])
        return "\n".join([*lines, *_aligned(rows, ">1>2>4>5>6>7")])

    def to_json(self) -> dict[str, Any]:
        """Everything in a form for JSON. An end of an interval beyond the grid is null."""
        return {
            "design": self.design.to_json(),
            "chance": self.chance,
            "made_with": list(self.made_with),
            "runs": self.runs,
            "seconds": round(self.seconds, 1),
            "runs_left": self.left,
            "dimensions": {
                method: {
                    "threshold": self.design.threshold,
                    "answer": found.answer,
                    "d": _finite(found.d),
                    "interval": found.interval and list(map(_finite, found.interval)),
                    "grid": list(found.grid),
                }
                for method, found in self.dimensions.items()
            },
            "points": [
                {
                    "method": point.method,
                    "d": point.dim,
                    "trained": trained_values(point),
                    "lr": point.lr,
                    "runs": [
                        {
                            "seed": seed,
                            "test": outcome.scores.test,
                            "validation": outcome.scores.validation,
                            "seconds": outcome.seconds,
                            **_certified(certificate(self.design, outcome)),
                        }
                        for seed, outcome in sorted(point.outcomes.items())
                        if outcome.scores is not None
                    ],
                    "validation_by_lr": {
                        f"{lr:g}": None if outcome.scores is None else outcome.scores.validation
                        for lr, outcome in point.tried.items()
                    },
                }
                for point in self.points
            ],
        }

    def draw(self, path: str | Path, title: str = "", score: str = "test score") -> None:
        """Draws the scores against d into an image file (.png, .svg, .pdf), as `picture` does.

        Raises OSError if the file cannot be written, and as `picture`.
        """
        path = Path(path)
        replace_files({path: self.picture(path.suffix.lstrip("."), title, score)})

    def picture(self, kind: str, title: str = "", score: str = "test score") -> bytes:
        """The scores against d as an image of some kind ("png", "svg", "pdf").

        Each method is a line through the means over the seeds, with a band from the lowest seed to the highest, and its
        dimension marked where it is found.

        Raises ImportError if Matplotlib is not installed, ValueError for an unknown kind.
        """
        axes = _new_axes(kind, score, title)
        self._draw_levels(axes)
        for number, (method, points) in enumerate(self.curves.items()):
            if points := [point for point in points if point.scores]:
                self._draw_curve(axes, method, points, f"C{number}")
        methods: dict[str, list[Point]] = {}
        for point in self.compared:
            if point.scores:
                methods.setdefault(point.method.partition(":")[0], []).append(point)
        for points, marker in zip(methods.values(), itertools.cycle("sD^vPX*")):
            self._draw_compared(axes, sorted(points, key=lambda point: trained_values(point) or 0), marker)
        return _image(axes, kind)

    def bound_picture(self, kind: str, title: str = "") -> bytes:
        """The bounds on the error on new data against d, above the errors in training, as an image of some kind.

        Each method is a line through the means over the seeds, with a band from the lowest seed to the highest; a
        vertical line is at the d whose bound is best, by which one could choose d without any test data.

        Raises as `picture`, and ValueError if no run has a training error.
        """
        if not self.certificates:
            raise ValueError("study: expected runs with a training error (Scores, hsaid measure --bits), got none")
        axes = _new_axes(kind, f"error, bounds hold with probability {1 - DELTA:g}", title)
        for number, (method, bounds) in enumerate(self.certificates.items()):
            colour, d = f"C{number}", best_dim(bounds)
            each = [[its.bound for its in bounds[dim].values()] for dim in bounds]
            label = f"{self.named(method)}: bound {mean(its.bound for its in bounds[d].values()):.3f} at d = {d:,}"
            axes.plot(list(bounds), list(map(mean, each)), color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(
                list(bounds), list(map(min, each)), list(map(max, each)), color=colour, alpha=0.15, linewidth=0
            )
            errors = [mean(its.training_error for its in bounds[dim].values()) for dim in bounds]
            axes.plot(list(bounds), errors, color=colour, linestyle=":", marker=".", label="in training")
            axes.axvline(d, color=colour, linewidth=1, linestyle="--")
        axes.set_ylim(bottom=0)
        return _image(axes, kind)

    def _draw_levels(self, axes: Axes) -> None:
        if self.baseline.scores:
            scores = list(self.baseline.scores.values())
            axes.axhline(
                mean(scores), color="black", linewidth=1.2, label=f"{self.named(BASELINE)}: {mean(scores):.3f}"
            )
            axes.axhspan(min(scores), max(scores), color="black", alpha=0.08, linewidth=0)
            goal = self.design.threshold * mean(scores)
            share = f"{100 * self.design.threshold:g}% of it: {goal:.3f}"
            axes.axhline(goal, color="black", linewidth=1, linestyle="--", label=share)
        if self.chance > 0:
            axes.axhline(self.chance, color="0.6", linewidth=1, linestyle=":", label=f"no training: {self.chance:.3f}")

    def _draw_curve(self, axes: Axes, method: str, points: Sequence[Point], colour: str) -> None:
        dims = [point.dim or 0 for point in points]
        scores = [list(point.scores.values()) for point in points]
        found = self.dimensions.get(method)
        equals = "= " if found and found.answer == "found" else ""  # else it is "< 1,000" or "> 1,000"
        label = self.named(method) + (f": {self.label} {equals}{found}" if found else "")
        axes.plot(dims, list(map(mean, scores)), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        axes.fill_between(dims, list(map(min, scores)), list(map(max, scores)), color=colour, alpha=0.15, linewidth=0)
        if found and found.answer == "found":
            goal = self.design.threshold * mean(self.baseline.scores.values())
            axes.plot([found.d], [goal], color=colour, marker="|", markersize=16, markeredgewidth=2.5)

    def _draw_compared(self, axes: Axes, points: Sequence[Point], marker: str) -> None:
        """A method of PEFT: its points, joined where there are several sizes."""
        values, scores = [trained_values(p) or 0 for p in points], [list(p.scores.values()) for p in points]
        bars = [[mean(each) - min(each) for each in scores], [max(each) - mean(each) for each in scores]]
        method = points[0].method
        if len(points) == 1:
            label = f"{self.named(method)}: {values[0]:,} values"
        else:
            label = f"{self.named(method.partition(':')[0])}: up to {values[-1]:,} values"
        means = list(map(mean, scores))
        axes.errorbar(values, means, bars, fmt=f"{marker}:", color="0.25", markersize=5, linewidth=1, label=label)


def _new_axes(kind: str, score: str, title: str) -> Axes:
    """Raises ImportError if Matplotlib is not installed, ValueError for an unknown kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if kind not in canvas.get_supported_filetypes():
        raise ValueError(f"path: expected the ending .png, .svg or .pdf, got {kind!r}")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="trained values (intrinsic dimension d)", ylabel=score, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    return axes


def _image(axes: Axes, kind: str) -> bytes:
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    image = io.BytesIO()
    figure = cast("Figure", axes.figure)
    figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()


def _certified(found: Certificate | None) -> dict[str, float]:
    if found is None:
        return {}
    return {"training_error": found.training_error, "bits": round(found.bits, 1), "bound": found.bound}


def trained_values(point: Point) -> int | None:
    """The number of trained values of a point; None for all weights."""
    if point.dim is not None or point.method == BASELINE:
        return point.dim
    return next((o.scores.trained for o in point.outcomes.values() if o.scores is not None), None)


def _is_known(point: Point) -> bool:
    return bool(point.scores) or point.complete


def _finite(d: float) -> float | None:
    return round(d, 1) if 0 < d < math.inf else None


def _aligned(rows: Sequence[Sequence[str]], right: str) -> list[str]:
    """The rows of a Markdown table, of which the first is its head. `right` names the right-aligned columns."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    to_right = {int(column) for column in right.split(">") if column}
    lines = []
    for row in rows:
        cells = [text.rjust(w) if i in to_right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * (w - 1) + ":" if i in to_right else "-" * w for i, w in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return lines
