"""A model's hierarchy: its tensors as paths through levels, which partitions cut into components.

A model's tensor names form a graph of nodes on four levels, and every tensor is a path through it:

    L1  block       L2  sublayer in the block      L3  module that owns the parameter      L4  parameter
    layer.0         attention                      query                                   weight

An optional fifth level, L5, is the attention head. There a tensor's path goes on to several ends: each head's rows of
query, key and value and its columns of attention's output weight are a *segment* with a path, and a factor, of its own
(attention.py says where they are). What belongs to no head stays one segment, without a node on L5.

A level is passed over (None) where a tensor has no node for it. A partition cuts the levels into components; a
multiplier stands for each distinct path within a component, and a tensor's factor combines its components' multipliers.
All levels in one component is SAID, a multiplier per tensor (Aghajanyan et al. 2020, arXiv 2012.13255); H-SAID is any
other cut.
paths.py has the rule by which a tensor's name becomes a path, for any model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.plan import Segment, whole
from hsaid_kernels.hierarchy.attention import find_attentions
from hsaid_kernels.hierarchy.graph import Graph
from hsaid_kernels.hierarchy.partition import Component, Partition, parse_partition
from hsaid_kernels.hierarchy.paths import HEADS, LEVELS, Path, paths_of, split_number


@dataclass(frozen=True, repr=False)
class Hierarchy:
    """A model's tensors as paths through its levels; made by `from_model`, printed as a tree by `str`.

    tensors       names, in the model's order; tied tensors are one, under the first of their names
    shapes        name -> shape
    segments      what has a path: every tensor whole, or with heads the parts of those that are divided among heads
    levels        names of the levels, outermost first
    paths         per segment, a node name or None for each of `levels`; distinct unless nodes are skipped or merged
    skip, merge   as given to `from_model`, in plain lists and dicts for a checkpoint's JSON
    """

    tensors: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    segments: tuple[Segment, ...]
    paths: tuple[Path, ...]
    skip: list[str] = field(default_factory=list)
    merge: dict[str, list[str]] = field(default_factory=dict)
    levels: tuple[str, ...] = LEVELS

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        skip: Iterable[str] = (),
        merge: Mapping[str, Iterable[str]] | None = None,
        heads: bool = False,
    ) -> Hierarchy:
        """The hierarchy of all of a model's parameters, on any device (meta too).

        skip   nodes that edges pass over: "attention" on every level that has it, "L2:attention" on that level only
        merge  new name -> the nodes treated as the same, {"mix": ["attention", "intermediate"]}, on every level that
               has all of them. The new name may be one of theirs, but no other node's.
        heads  adds the attention heads as level L5: "head.0", "head.1", ...; in grouped-query attention key and value
               have "group.0", ... for each of their heads, which serves several of the queries'.

        Segments that come to share a path share multipliers. skip and merge speak of the nodes as they are without any
        skip or merge. Raises TypeError for other types; ValueError for a model without parameters, for a node that
        does not exist, is named twice, or has no level in common with those it is merged with, and with heads for a
        model whose attention is not known (`attention.find_attentions`).
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(heads, bool):
            raise TypeError(f"heads must be True or False, got {heads!r}")
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if not shapes:
            raise ValueError(f"model must have parameters, got a {type(model).__name__} with none")
        lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        skipped = _strings("skip", "node names", skip)
        merge = merge or {}
        if not isinstance(merge, Mapping) or not all(isinstance(new, str) and new for new in merge):
            raise TypeError(f"merge must map new names to lists of node names, got {merge!r}")
        merged = {new: _strings(f"merge[{new!r}]", "node names", nodes) for new, nodes in merge.items()}
        segments = tuple(whole(name, shape) for name, shape in shapes.items())
        plain = cls(tuple(shapes), shapes, segments, paths_of(_unmasked(model), lists))
        if heads:
            plain = plain._with_heads(model)
        renamed = plain._renamed(skipped, merged)
        paths = tuple(tuple(renamed.get(key, key[1]) for key in zip(plain.levels, path)) for path in plain.paths)
        return replace(plain, paths=paths, skip=skipped, merge=merged)

    def nodes(self, level: str) -> tuple[str, ...]:
        """A level's distinct nodes, in order of first appearance."""
        if level not in self.levels:
            raise ValueError(f"level must be one of {', '.join(self.levels)}, got {level!r}")
        column = (path[self.levels.index(level)] for path in self.paths)
        return tuple(dict.fromkeys(node for node in column if node is not None))

    def select(self, names: Iterable[str], without: Collection[tuple[str, str]] = ()) -> Hierarchy:
        """The hierarchy of these tensors only, in the model's order; their paths stay those of the whole model.

        without  (tensor, label) of segments to leave out, as of heads that are pruned. A tensor may lose all of them.

        Raises ValueError for no name at all or a name that is no tensor's, TypeError if `names` is no list of strings.
        """
        chosen = set(_strings("names", "tensor names", names))
        unknown = sorted(chosen.difference(self.tensors))
        if unknown or not chosen:
            raise ValueError(f"names must be some of the {len(self.tensors)} tensors, got {unknown or 'none at all'}")
        shapes = {name: shape for name, shape in self.shapes.items() if name in chosen}
        kept = [
            (segment, path)
            for segment, path in zip(self.segments, self.paths)
            if segment.tensor in chosen and (segment.tensor, segment.label) not in without
        ]
        segments, paths = zip(*kept)
        return replace(self, tensors=tuple(shapes), shapes=shapes, segments=segments, paths=paths)

    def partition(self, spec: str, combine: str = "product") -> Partition:
        """Cuts the levels into components: "L1+L2|L3|L4", or "said", "hsaid-3", "did" (or "none": no multipliers).

        A level that is not named has no say. Raises TypeError if `spec` is no string; ValueError for an unknown or
        repeated level, an empty component, or a `combine` other than "product" and "sum".
        """
        if combine not in ("product", "sum"):
            raise ValueError(f"combine must be 'product' or 'sum', got {combine!r}")
        components, columns, first = [], [], 0
        for levels in parse_partition(spec, self.levels):
            cut = [tuple(path[self.levels.index(level)] for level in levels) for path in self.paths]
            paths = tuple(dict.fromkeys(path for path in cut if any(path)))
            number = dict(zip(paths, itertools.count(first)))
            components.append(Component(levels, paths))
            columns.append([number.get(path, -1) for path in cut])
            first += len(paths)
        index = torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(len(columns), len(self.paths))
        canonical = "|".join("+".join(component.levels) for component in components) or "did"
        return Partition(canonical, combine, tuple(components), index.T.contiguous())

    def to_dot(
        self,
        partition: Partition | str | None = None,
        *,
        fold: bool | None = None,
        multipliers: Tensor | Sequence[float] | None = None,
    ) -> str:
        """The Hasse diagram in Graphviz's language: levels from left to right, an edge to the nearest deeper node.

        partition     its components are in colour, and the edges between them dashed
        fold          numbered nodes that differ in nothing but the number become one; by default, unless there are
                      multipliers
        multipliers   trained ones of `partition` [m]: a node for each, in blue below 1 and in red above

        Raises ValueError for a partition of another hierarchy, and for multipliers that do not belong to it or are not
        finite; TypeError for another type of partition.
        """
        return Graph.of(self, partition, fold=fold, multipliers=multipliers).dot()

    def draw(
        self,
        path: str | os.PathLike[str],
        partition: Partition | str | None = None,
        *,
        fold: bool | None = None,
        multipliers: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Writes the picture of `to_dot` to a file whose name ends in .svg, .png, .html or .dot, all of it or nothing.

        Raises what `to_dot` raises; ValueError for another ending, OSError where the file cannot be written, and
        ImportError where pygraphviz is missing, which all but .dot needs.
        """
        Graph.of(self, partition, fold=fold, multipliers=multipliers).write(path)

    def __str__(self) -> str:
        weights = [segment.numel for segment in self.segments]
        nodes = ", ".join(f"{level} {len(self.nodes(level))}" for level in self.levels)
        what = "tensors" if HEADS not in self.levels else "segments"
        routes = [tuple(key for key in zip(self.levels, path) if key[1] is not None) for path in self.paths]
        tree = _tree(list(zip(routes, weights)))
        width = max((2 * depth + len(label) for depth, _, label, *_ in tree), default=0)
        parts = f" in {len(self.segments)} segments" if HEADS in self.levels else ""
        lines = [f"{len(self.tensors)} tensors{parts}, {sum(weights):,} weights; nodes: {nodes}"]
        lines.append(f"    {'':{width}} {what:>8}         weights")
        for depth, level, label, tensors, size, each in tree:
            lines.append(f"{level}  {'  ' * depth + label:{width}}  {tensors:7} {size:15,}{each}")
        return "\n".join(lines)

    def _with_heads(self, model: nn.Module) -> Hierarchy:
        """With L5, by which a tensor that is divided among heads has a segment and a path for each."""
        parts: dict[str, list[Segment]] = {}
        for attention in find_attentions(model):
            for tensor, divided in itertools.groupby(attention.segments(), key=lambda segment: segment.tensor):
                parts.setdefault(tensor, list(divided))  # once, also where two modules share it
        pairs = [
            (segment, (*path, segment.label or None))
            for own, path in zip(self.segments, self.paths)
            for segment in parts.get(own.tensor, [own])
        ]
        segments, paths = zip(*pairs)
        return replace(self, segments=segments, paths=paths, levels=(*self.levels, HEADS))

    def _renamed(self, skip: list[str], merge: dict[str, list[str]]) -> dict[tuple[str, str | None], str | None]:
        """(level, node) -> its new name, None where it is skipped."""
        nodes = {level: self.nodes(level) for level in self.levels}

        def find(argument: str, name: str) -> dict[str, str]:  # level -> node
            level, _, node = name.partition(":")
            wanted = {level: node} if level in nodes else dict.fromkeys(nodes, name)
            found = {level: node for level, node in wanted.items() if node in nodes[level]}
            if not found:
                known = "; ".join(f"{level}: {', '.join(nodes[level])}" for level in nodes)
                raise ValueError(f"{argument} must name nodes of the hierarchy ({known}), got {name!r}")
            return found

        renamed: dict[tuple[str, str | None], str | None] = {}
        wishes = [("skip", None, [name]) for name in skip] + [("merge", *item) for item in merge.items()]
        for argument, new, names in wishes:
            found = [find(argument, name) for name in names]
            shared = [level for level in nodes if found and all(level in levels for levels in found)]
            if not shared:
                raise ValueError(f"merge must name nodes that have a level in common, got {names} for {new!r}")
            for level, node in [(level, levels[level]) for level in shared for levels in found]:
                if (level, node) in renamed:
                    raise ValueError(f"{argument} names {level}:{node} again: skip and merge may name a node once only")
                if new in nodes[level] and new not in [levels[level] for levels in found]:
                    raise ValueError(f"merge must list {level}:{new} too, or use a new name: got {names} for {new!r}")
                renamed[level, node] = new
        return renamed


def _unmasked(model: nn.Module) -> tuple[str, ...]:
    """The parameters' names as they are without torch.nn.utils.prune, which makes "weight_orig" of what it masks."""
    buffers = dict(model.named_buffers())
    plain = {name: name.removesuffix("_orig") for name, _ in model.named_parameters()}
    return tuple(short if f"{short}_mask" in buffers else name for name, short in plain.items())


def _strings(argument: str, what: str, value: Iterable[str]) -> list[str]:
    # A string is an iterable of strings too, but never meant as one here.
    strings = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if strings is None or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{argument} must be a list of {what}, got {value!r}")
    return strings


def _tree(rows: list[tuple[tuple, int]], depth: int = 0) -> list[tuple]:
    """Per tensor (level and node of each step, weights) -> per line (depth, level, label, tensors, weights, suffix)."""
    branches: dict[tuple[str, str], list] = {}
    for (node, *rest), weights in filter(lambda row: row[0], rows):
        branches.setdefault(node, []).append((tuple(rest), weights))

    def looks(node: tuple[str, str]) -> tuple:  # equal for numbered neighbours that differ in nothing but the number
        below = branches[node]
        return node[0], split_number(node[1])[0], len(below), sum(size for _, size in below), _tree(below, depth + 1)

    lines = []
    for (level, _, tensors, weights, below), run in itertools.groupby(branches, key=looks):
        (_, first), *more = run
        label, each = (f"{first} … {more[-1][1]} (x{1 + len(more)})", " each") if more else (first, "")
        lines += [(depth, level, label, tensors, weights, each), *below]
    return lines
