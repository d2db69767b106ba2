"""Draws the Hasse diagram of a hierarchy with Graphviz: levels as columns, a partition or multipliers in colour.

There is one node for each (level, name), and an edge from each node of a tensor's path to the next one. Edges cross
levels that the path skips. With multipliers, a node represents the path of its component up to this level ("layer.0",
"attention"). Every multiplier then has a separate node: the one where its path ends.
"""

from __future__ import annotations

import html
import itertools
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from hsaid_kernels.fastfood.plan import Segment
from hsaid_kernels.files import replace_files
from hsaid_kernels.hierarchy.partition import Partition
from hsaid_kernels.hierarchy.paths import split_number

FORMATS = (".svg", ".png", ".dot", ".html")
MEANINGS = {"L1": "block", "L2": "sublayer", "L3": "module", "L4": "parameter", "L5": "head", "L6": "expert"}
# Of components: from Paul Tol's "light" scheme, on which dark text is legible.
COLORS = ("#77AADD", "#EEDD88", "#FFAABB", "#44BB99", "#BBCC33")
BELOW, ABOVE = (67, 147, 195), (214, 96, 77)  # of multipliers below and above 1; a multiplier of 1 is white
SCALE = (-1.0, -0.5, 0.0, 0.5, 1.0)
STYLE = """\
  graph [rankdir=LR, ranksep=0.9, nodesep=0.1, bgcolor=white, pad=0.15, labelloc=t, labeljust=l]
  graph [fontname="Helvetica,Arial,sans-serif", fontsize=13]
  node [fontname="Helvetica,Arial,sans-serif", fontsize=13, shape=box, style="rounded,filled", fillcolor=white]
  node [color="#777777", height=0.3, margin="0.12,0.04"]
  edge [color="#333333", arrowhead=none, tailport=e, headport=w]
"""
CUT = ', style=dashed, color="#999999"'
GAP = "<TR><TD HEIGHT='10'></TD></TR>"
# Runs in a separate process, so that output or a crash of Graphviz and its font library does not reach this process.
LAYOUT = """
import sys, pygraphviz
graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
sys.stdout.buffer.write(graph.draw(format=sys.argv[1], prog="dot"))
graph.close()
"""
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<body style="background: white">
{svg}
</body>
</html>
"""

Names = tuple[str, ...]  # the names of one step of a path: several if nodes are folded into one
_Key = tuple[str, tuple[Names | None, ...]]  # level and route of a node (`Node.route`)


class Drawn(Protocol):
    """The interface of `Hierarchy` that this module uses. (hierarchy.py imports this module, not the reverse.)"""

    @property
    def tensors(self) -> tuple[str, ...]: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...
    @property
    def paths(self) -> tuple[tuple[str | None, ...], ...]: ...
    @property
    def levels(self) -> tuple[str, ...]: ...
    def nodes(self, level: str) -> tuple[str, ...]: ...
    def partition(self, spec: str, combine: str = "product") -> Partition: ...


@dataclass(frozen=True)
class Node:
    """A node of the diagram.

    level      its level
    route      with multipliers, the names on the component's levels up to this one, None for a skipped level; without,
               the name on this level only
    component  index of its component; None if the partition does not name the level
    label      the last name of the route; all names, as in "layer.0 head.3", if the component's levels are not adjacent
    tensors    number of tensors whose path contains the node
    value      value of the multiplier whose path ends here, or None
    """

    level: str
    route: tuple[Names | None, ...]
    component: int | None
    label: str
    tensors: int
    value: float | None

    def __str__(self) -> str:
        """An identifier that is unique in the graph, such as "L2:layer.0/attention"."""
        names = ("" if names is None else names[0] for names in self.route)
        return f"{self.level}:" + "/".join(name.replace("\\", r"\\").replace("/", r"\/") for name in names)


@dataclass(frozen=True)
class Graph:
    """The diagram: nodes, in the model's order on each level, and edges as pairs of indices of nodes."""

    hierarchy: Drawn
    partition: Partition | None
    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        hierarchy: Drawn,
        partition: Partition | str | None = None,
        *,
        fold: bool | None = None,
        multipliers: Tensor | Sequence[float] | None = None,
    ) -> Graph:
        """The diagram of a hierarchy. Arguments and exceptions are those of `Hierarchy.to_dot`."""
        if isinstance(partition, str):
            partition = hierarchy.partition(partition)
        _check_partition(hierarchy, partition)
        trained = multipliers is not None
        values = [] if multipliers is None else _values(partition, multipliers)
        components = partition.components if partition else ()
        component_of = {level: number for number, part in enumerate(components) for level in part.levels}

        rows, levels = _rows(hierarchy), hierarchy.levels
        index = partition.multiplier_index.tolist() if partition and trained else [[]] * len(rows)
        folded: dict[tuple[str, str], Names] = {}
        if not trained if fold is None else fold:
            own = [(hierarchy.shapes[name], *(values[i] for i in row if i >= 0)) for (_, name), row in zip(rows, index)]
            folded = _fold(hierarchy, own)

        tensors: dict[_Key, set[str]] = defaultdict(set)
        ends: dict[_Key, float] = {}
        edges: dict[tuple[_Key, _Key], None] = {}
        for (path, tensor), row in zip(rows, index):
            steps = [folded.get((level, name), (name,)) if name else None for level, name in zip(levels, path)]
            keys: list[_Key] = []
            last: dict[int, _Key] = {}
            for at in (at for at, step in enumerate(steps) if step):
                component = component_of.get(levels[at]) if trained else None
                inside = (levels[at],) if component is None else components[component].levels
                keys.append(
                    (levels[at], tuple(step for level, step in zip(levels[: at + 1], steps) if level in inside))
                )
                if component is not None:
                    last[component] = keys[-1]
                tensors[keys[-1]].add(tensor)
            edges |= dict.fromkeys(itertools.pairwise(keys))
            ends |= {key: values[row[component]] for component, key in last.items()}

        apart = {number for number, part in enumerate(components) if "".join(part.levels) not in "".join(levels)}
        nodes = []
        for (level, route), passing in tensors.items():
            component = component_of.get(level)
            shown = [_name(names) for names in route if names]
            label = " ".join(shown if component in apart else shown[-1:])
            nodes.append(Node(level, route, component, label, len(passing), ends.get((level, route))))
        number = {key: position for position, key in enumerate(tensors)}
        return cls(hierarchy, partition, tuple(nodes), tuple((number[tail], number[head]) for tail, head in edges))

    @property
    def num_paths(self) -> int:
        """The number of distinct paths. Equals the number of segments unless nodes are skipped or merged."""
        return len(set(self.hierarchy.paths))

    def is_cut(self, edge: tuple[int, int]) -> bool:
        """Whether the two nodes of an edge are not in the same component."""
        tail, head = (self.nodes[end].component for end in edge)
        return tail != head

    def dot(self) -> str:
        """The diagram in Graphviz's DOT language."""
        levels, components = self.hierarchy.levels, self.partition.components if self.partition else ()
        largest = max((abs(node.value - 1) for node in self.nodes if node.value is not None), default=None)
        colored = zip(COLORS, components if largest is None else ())  # with multipliers, colours show their values
        fill = {level: color for color, component in colored for level in component.levels}
        names = [_quoted(str(node)) for node in self.nodes]

        lines = ["digraph {", f"{STYLE}  label=<{self._title(largest)}>"]
        for level in levels:
            label, color = f"<B>{level}</B> {MEANINGS.get(level, '')}", fill.get(level, "white")
            lines.append(
                f'  {_quoted(level)} [label=<{label}>, fillcolor="{color}", style=filled, penwidth=0, tooltip=" "]'
            )
        for name, node in zip(names, self.nodes):
            lines.append(f"  {name} [{_look(node, fill.get(node.level, 'white'), largest)}]")
        for edge in self.edges:
            tail, head = (names[end] for end in edge)
            tooltip = _quoted(" -> ".join(str(self.nodes[end]) for end in edge), label=True)
            lines.append(f"  {tail} -> {head} [tooltip={tooltip}{CUT if self.is_cut(edge) else ''}]")
        # Invisible edges arrange the levels as columns and keep the nodes of each level in the model's order.
        lines.append(f"  {' -> '.join(map(_quoted, levels))} [style=invis, weight=1000]")
        for level in levels:
            column = [_quoted(level), *(name for name, node in zip(names, self.nodes) if node.level == level)]
            lines.append(f"  {{ rank=same edge [style=invis] {' -> '.join(column)} }}")
        return "\n".join([*lines, "}", ""])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the diagram to a file. Arguments and exceptions are those of `Hierarchy.draw`."""
        suffix = Path(path).suffix.lower()
        if suffix not in FORMATS:
            known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            raise ValueError(f"path: expected a name that ends in {known}, got {os.fspath(path)!r}")
        data = self.dot().encode()
        if suffix != ".dot":
            data = _laid_out(data, "png" if suffix == ".png" else "svg")
        if suffix == ".html":
            svg = data.decode()
            data = PAGE.format(title=self._summary(), svg=svg[svg.index("<svg") :]).encode()
        try:
            replace_files({Path(path): data})
        except OSError as error:
            reason = error.strerror or str(error)
            raise type(error)(
                f"path: expected a file that can be written, got {os.fspath(path)!r}: {reason}"
            ) from error

    def _summary(self) -> str:
        weights = sum(math.prod(self.hierarchy.shapes[name]) for name in self.hierarchy.tensors)
        return f"{len(self.hierarchy.tensors)} tensors, {self.num_paths} paths, {weights:,} weights"

    def _title(self, largest: float | None) -> str:
        """The title as an HTML-like label of Graphviz: totals and a legend of the colours.

        `largest` is the largest |multiplier - 1|, or None without multipliers.
        """
        rows = [[("white", f"<B>{self._summary()}</B>")]]
        if self.partition:
            colors = COLORS if largest is None else itertools.repeat("white")
            cells = [(color, str(component)) for color, component in zip(colors, self.partition.components)]
            rows.append([*cells, ("white", f"→ {self.partition.num_multipliers} multipliers")])
        if any(map(self.is_cut, self.edges)):
            rows[-1].append(("white", "dashed: cut"))
        if largest is not None:
            rows.append([(_diverging(part), _number(1 + part * largest, largest)) for part in SCALE])
        return "<TABLE BORDER='0' CELLSPACING='0' CELLPADDING='0'>" + "".join(map(_legend, rows)) + GAP + "</TABLE>"


def _rows(hierarchy: Drawn) -> list[tuple[tuple[str | None, ...], str]]:
    """(path, tensor) of each segment, in the order of the rows of a partition's multiplier_index."""
    return [(path, segment.tensor) for path, segment in zip(hierarchy.paths, hierarchy.segments)]


def _check_partition(hierarchy: Drawn, partition: Partition | None) -> None:
    if partition is None:
        return
    if not isinstance(partition, Partition):
        raise TypeError(f"partition: expected a Partition or a string like 'L1+L2|L3|L4', got {partition!r}")
    own = hierarchy.partition(partition.spec, partition.combine)
    if own.components != partition.components or not own.multiplier_index.equal(partition.multiplier_index):
        raise ValueError(f"partition: expected one of this hierarchy's, got another's: {partition}")


def _values(partition: Partition | None, multipliers: Tensor | Sequence[float]) -> list[float]:
    if partition is None:
        raise ValueError("partition: expected the one that the multipliers belong to, got None")
    if not isinstance(multipliers, (Tensor, Sequence)) or (isinstance(multipliers, Tensor) and multipliers.dim() != 1):
        raise TypeError(f"multipliers: expected {partition.num_multipliers} numbers, got {multipliers!r}")
    values = multipliers.tolist() if isinstance(multipliers, Tensor) else list(multipliers)
    if len(values) != partition.num_multipliers or not all(map(math.isfinite, values)):
        wrong = [value for value in values if not math.isfinite(value)]
        got = f"one that is {wrong[0]}" if wrong else len(values)
        raise ValueError(f"multipliers: expected {partition.num_multipliers} finite numbers, got {got}")
    return values


def _fold(hierarchy: Drawn, own: Sequence[tuple]) -> dict[tuple[str, str], Names]:
    """{(level, name): all names that share its node}: neighbouring nodes that differ only in their number.

    own   for each segment, what must be equal in addition to the rest of its path
    """
    folded: dict[tuple[str, str], Names] = {}
    for at, level in enumerate(hierarchy.levels):
        through: dict[str | None, Counter[tuple[tuple[str | None, ...], tuple]]] = defaultdict(Counter)
        for (path, _), what in zip(_rows(hierarchy), own):
            through[path[at]][path[:at] + path[at + 1 :], what] += 1

        looks = {name: (split_number(name)[0], frozenset(through[name].items())) for name in hierarchy.nodes(level)}
        for _, run in itertools.groupby(looks, key=looks.get):
            names = tuple(run)
            folded |= dict.fromkeys(((level, name) for name in names), names)
    return folded


def _name(names: Names) -> str:
    """ "layer.0", or for folded nodes "layer.0 … layer.11  × 12"."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}  × {len(names)}"


def _look(node: Node, color: str, largest: float | None) -> str:
    """A node's attributes in DOT. `color` is the colour of its component, `largest` is as in `_title`."""
    label, route = node.label, " ".join(_name(names) for names in node.route if names)
    tooltip = f"{node.level} {route}: {node.tensors} tensor{'s' * (node.tensors > 1)}"
    if largest is None:
        return f'label={_quoted(label, label=True)}, tooltip={_quoted(tooltip, label=True)}, fillcolor="{color}"'
    fill = "white"
    if node.value is not None:
        number = _number(node.value, largest)
        label, tooltip = f"{label}  {number}", f"{tooltip}, multiplier {number}"
        fill = _diverging((node.value - 1) / largest if largest else 0.0)
    return f'label={_quoted(label, label=True)}, tooltip={_quoted(tooltip, label=True)}, fillcolor="{fill}"'


def _legend(cells: Sequence[tuple[str, str]]) -> str:
    row = "".join(f"<TD ALIGN='LEFT' BGCOLOR='{color}'>{text}</TD>" for color, text in cells)
    table = f"<TABLE ALIGN='LEFT' BORDER='0' CELLSPACING='0' CELLPADDING='5'><TR>{row}</TR></TABLE>"
    return f"<TR><TD ALIGN='LEFT'>{table}</TD></TR>"


def _diverging(part: float) -> str:
    """The colour for a number from -1 (blue) through 0 (white) to 1 (red)."""
    end = BELOW if part < 0 else ABOVE
    return "#" + "".join(f"{round(255 + abs(part) * (channel - 255)):02X}" for channel in end)


def _number(value: float, largest: float) -> str:
    """Formats a multiplier with at least three decimals, and enough to show two significant digits of `largest`."""
    return f"{value:.{max(3, 1 - math.floor(math.log10(largest))) if largest else 3}f}"


def _quoted(text: str, label: bool = False) -> str:
    """A quoted DOT string. In labels, "&", "<" and ">" are escaped, because Graphviz interprets HTML entities there."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text).replace("\\", "\\\\")
    text = text.replace('"', r"\"")
    return f'"{html.escape(text, quote=False) if label else text}"'


def _laid_out(dot: bytes, form: str) -> bytes:
    try:
        import pygraphviz  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'pygraphviz lays graphs out, and is not installed: pip install "hsaid_kernels[graph]"'
        ) from error
    run = subprocess.run([sys.executable, "-c", LAYOUT, form], input=dot, capture_output=True)
    if run.returncode or not run.stdout:
        raise RuntimeError(f"Graphviz could not lay the graph out: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout
