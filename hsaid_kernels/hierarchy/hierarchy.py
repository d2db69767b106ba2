"""`Hierarchy`: a model's tensors as paths through levels of nodes.

The names of a model's tensors form a graph of nodes on four levels. Every tensor is a path through this graph:

    L1  block       L2  sublayer in the block      L3  module that owns the parameter      L4  parameter
    layer.0         attention                      query                                   weight

If a tensor has no node on a level, its path skips that level (None). paths.py contains the rules that derive a path
from a name, for any model.

An optional fifth level, L5, is the attention head. With it, a tensor that is divided among heads has one *segment* for
each head, with a separate path and factor: the head's rows of query, key and value, or its columns of the attention
output weight (attention.py). A tensor that belongs to no head stays a single segment without a node on L5.

A *partition* divides the levels into *components*. Each distinct path within a component has one *multiplier*, and the
*factor* of a segment combines the multipliers of its components. SAID is the partition with all levels in one
component: one multiplier for each tensor (Aghajanyan et al. 2020, arXiv 2012.13255). H-SAID is any other partition.
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
    """A model's tensors as paths through levels. `from_model` creates it; `str` prints it as a tree.

    tensors       names, in the model's order; tied tensors count once, under their first name
    shapes        {name: shape}
    segments      the parts with a path each: whole tensors or, with heads, each head's part of a divided tensor
    levels        names of the levels, outermost first
    paths         for each segment a node name or None for each level; distinct unless nodes are skipped or merged
    skip, merge   the arguments of `from_model` as plain lists and dicts, which a checkpoint's JSON can store
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
        """The hierarchy of all parameters of a model on any device (also "meta").

        skip   nodes that paths skip: "attention" means the node of this name on every level that has one,
               "L2:attention" only the node on level L2
        merge  {new name: [nodes to treat as the same node]}, such as {"mix": ["attention", "intermediate"]}; applies on
               every level that has all these nodes. The new name may be that of a merged node, but not of another node.
        heads  adds the attention heads as level L5: nodes "head.0", "head.1", ...; in grouped-query attention the parts
               of key and value are nodes "group.0", ..., one for each key-value head, which serves several query heads

        Segments whose paths become equal share multipliers. The nodes in `skip` and `merge` are those of the hierarchy
        before skipping and merging.

        Raises TypeError for arguments of other types. Raises ValueError for a model without parameters; for a node that
        does not exist, is named twice, or has no level in common with the nodes it is merged with; and with `heads` for
        a model whose attention heads cannot be found (`attention.find_attentions`).
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(heads, bool):
            raise TypeError(f"heads: expected True or False, got {heads!r}")
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if not shapes:
            raise ValueError(f"model: expected at least one parameter, got a {type(model).__name__} without any")
        lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        skipped = _strings("skip", "node names", skip)
        merge = merge or {}
        if not isinstance(merge, Mapping) or not all(isinstance(new, str) and new for new in merge):
            raise TypeError(f"merge: expected new names with lists of node names, got {merge!r}")
        merged = {new: _strings(f"merge[{new!r}]", "node names", nodes) for new, nodes in merge.items()}
        segments = tuple(whole(name, shape) for name, shape in shapes.items())
        plain = cls(tuple(shapes), shapes, segments, paths_of(_unmasked(model), lists))
        if heads:
            plain = plain._with_heads(model)
        renamed = plain._renamed(skipped, merged)
        paths = tuple(tuple(renamed.get(key, key[1]) for key in zip(plain.levels, path)) for path in plain.paths)
        return replace(plain, paths=paths, skip=skipped, merge=merged)

    def nodes(self, level: str) -> tuple[str, ...]:
        """The distinct nodes on a level, in order of first appearance. Raises ValueError for an unknown level."""
        if level not in self.levels:
            raise ValueError(f"level: expected one of {', '.join(self.levels)}, got {level!r}")
        column = (path[self.levels.index(level)] for path in self.paths)
        return tuple(dict.fromkeys(node for node in column if node is not None))

    def select(self, names: Iterable[str], without: Collection[tuple[str, str]] = ()) -> Hierarchy:
        """The hierarchy of the tensors `names` only, in the model's order, with the paths of the whole model.

        without  (tensor, label) of segments to leave out, such as those of pruned heads; may be all of a tensor's

        Raises ValueError if `names` is empty or contains an unknown name, TypeError if it is not a list of strings.
        """
        chosen = set(_strings("names", "tensor names", names))
        unknown = sorted(chosen.difference(self.tensors))
        if unknown or not chosen:
            raise ValueError(f"names: expected some of the {len(self.tensors)} tensors, got {unknown or 'none at all'}")
        shapes = {name: shape for name, shape in self.shapes.items() if name in chosen}
        kept = [
            (segment, path)
            for segment, path in zip(self.segments, self.paths)
            if segment.tensor in chosen and (segment.tensor, segment.label) not in without
        ]
        segments, paths = zip(*kept)
        return replace(self, tensors=tuple(shapes), shapes=shapes, segments=segments, paths=paths)

    def partition(self, spec: str, combine: str = "product") -> Partition:
        """Divides the levels into components.

        spec     components separated by "|", each with its levels joined by "+", such as "L1+L2|L3|L4"; or "said" (all
                 four levels in one component), "hsaid-3" ("L1+L2|L3|L4"), "did" or "none" (no multipliers). Levels that
                 are not named do not affect the factors.
        combine  "product" or "sum" of a segment's multipliers, see `Partition`

        Raises TypeError if `spec` is not a string; ValueError for an unknown or repeated level, an empty component, or
        another `combine`.
        """
        if combine not in ("product", "sum"):
            raise ValueError(f"combine: expected 'product' or 'sum', got {combine!r}")
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
        """The Hasse diagram in Graphviz's DOT language: levels from left to right, edges to the next deeper node.

        partition     colours its components and draws edges between components dashed
        fold          whether to draw numbered nodes that differ only in their number as one node. None means True
                      without and False with multipliers.
        multipliers   trained multipliers of `partition`, [m]: draws a node for each, blue below 1 and red above 1

        Raises ValueError for a partition of another hierarchy, and for multipliers whose number does not fit the
        partition or that are not finite; TypeError for another type of partition or multipliers.
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
        """Writes the diagram of `to_dot` to a file. The name's ending selects the format: .svg, .png, .html or .dot.

        The file is written atomically. Raises what `to_dot` raises; ValueError for another ending; OSError if the file
        cannot be written; ImportError if pygraphviz is not installed, which all formats except .dot need; RuntimeError
        if Graphviz fails.
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
        """This hierarchy with level L5: tensors that are divided among heads get a segment and path for each head."""
        parts: dict[str, list[Segment]] = {}
        for attention in find_attentions(model):
            for tensor, divided in itertools.groupby(attention.segments(), key=lambda segment: segment.tensor):
                parts.setdefault(tensor, list(divided))  # only once if two modules share the tensor
        pairs = [
            (segment, (*path, segment.label or None))
            for own, path in zip(self.segments, self.paths)
            for segment in parts.get(own.tensor, [own])
        ]
        segments, paths = zip(*pairs)
        return replace(self, segments=segments, paths=paths, levels=(*self.levels, HEADS))

    def _renamed(self, skip: list[str], merge: dict[str, list[str]]) -> dict[tuple[str, str | None], str | None]:
        """{(level, node): new name, or None if the node is skipped} for all nodes in `skip` and `merge`."""
        nodes = {level: self.nodes(level) for level in self.levels}

        def find(argument: str, name: str) -> dict[str, str]:  # level -> node
            level, _, node = name.partition(":")
            wanted = {level: node} if level in nodes else dict.fromkeys(nodes, name)
            found = {level: node for level, node in wanted.items() if node in nodes[level]}
            if not found:
                known = "; ".join(f"{level}: {', '.join(nodes[level])}" for level in nodes)
                raise ValueError(f"{argument}: expected nodes of the hierarchy ({known}), got {name!r}")
            return found

        renamed: dict[tuple[str, str | None], str | None] = {}
        wishes = [("skip", None, [name]) for name in skip] + [("merge", *item) for item in merge.items()]
        for argument, new, names in wishes:
            found = [find(argument, name) for name in names]
            shared = [level for level in nodes if found and all(level in levels for levels in found)]
            if not shared:
                raise ValueError(f"merge: expected nodes that have a level in common, got {names} for {new!r}")
            for level, node in [(level, levels[level]) for level in shared for levels in found]:
                if (level, node) in renamed:
                    raise ValueError(
                        f"{argument}: expected each node at most once in skip and merge, got {level}:{node} again"
                    )
                if new in nodes[level] and new not in [levels[level] for levels in found]:
                    raise ValueError(
                        f"merge: expected {level}:{new} among the nodes, or another name, got {names} for {new!r}"
                    )
                renamed[level, node] = new
        return renamed


def _unmasked(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters without the suffix "_orig" that torch.nn.utils.prune adds to masked ones."""
    buffers = dict(model.named_buffers())
    plain = {name: name.removesuffix("_orig") for name, _ in model.named_parameters()}
    return tuple(short if f"{short}_mask" in buffers else name for name, short in plain.items())


def _strings(argument: str, what: str, value: Iterable[str]) -> list[str]:
    # A string is also an iterable of strings, but passing one here is always a mistake.
    strings = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if strings is None or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{argument}: expected a list of {what}, got {value!r}")
    return strings


def _tree(rows: list[tuple[tuple, int]], depth: int = 0) -> list[tuple]:
    """The lines of the printed tree, as tuples (depth, level, label, tensors, weights, suffix).

    rows  for each segment ((level, node) of each step of its path, number of weights)
    """
    branches: dict[tuple[str, str], list] = {}
    for (node, *rest), weights in filter(lambda row: row[0], rows):
        branches.setdefault(node, []).append((tuple(rest), weights))

    def looks(node: tuple[str, str]) -> tuple:  # equal for numbered neighbours that differ only in their number
        below = branches[node]
        return node[0], split_number(node[1])[0], len(below), sum(size for _, size in below), _tree(below, depth + 1)

    lines = []
    for (level, _, tensors, weights, below), run in itertools.groupby(branches, key=looks):
        (_, first), *more = run
        label, each = (f"{first} … {more[-1][1]} (x{1 + len(more)})", " each") if more else (first, "")
        lines += [(depth, level, label, tensors, weights, each), *below]
    return lines
