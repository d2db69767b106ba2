"""`Hierarchy`: a model's tensors as paths through levels of nodes.

The names of a model's tensors form a graph of nodes on four levels. Every tensor is a path through this graph:

    L1  block       L2  sublayer in the block      L3  module that owns the parameter      L4  parameter
    layer.0         attention                      query                                   weight

If a tensor has no node on a level, its path skips that level (None). paths.py contains the rules that derive a path
from a name, for any model.

An optional fifth level, L5, is the attention head. With it, a tensor that is divided among heads has one *segment* for
each head, with a separate path and factor: the head's rows of query, key and value, or its columns of the attention
output weight (attention.py). A tensor that belongs to no head stays a single segment without a node on L5.

Another one, L6, is the expert of a mixture (experts.py). With it, a tensor with the weights of all experts of a layer
has a segment for each expert, or two where it computes gate and up together; both have nodes of their own on L4.

A *partition* divides the levels into *components*. Each distinct path within a component has one *multiplier*, and the
*factor* of a segment combines the multipliers of its components. SAID is the partition with all levels in one
component: one multiplier for each tensor (Aghajanyan et al. 2020, arXiv 2012.13255). H-SAID is any other partition.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.plan import Segment, whole
from hsaid_kernels.hierarchy.attention import find_attentions, pieces_of
from hsaid_kernels.hierarchy.experts import find_experts
from hsaid_kernels.hierarchy.graph import Graph
from hsaid_kernels.hierarchy.layouts import LATEST
from hsaid_kernels.hierarchy.partition import Component, Partition, parse_partition
from hsaid_kernels.hierarchy.paths import EXPERTS, HEADS, LEVELS, Path, paths_of, split_number


@dataclass(frozen=True, repr=False)
class Hierarchy:
    """A model's tensors as paths through levels. `from_model` creates it; `str` prints it as a tree.

    tensors       names, in the model's order; tied tensors count once, under their first name
    shapes        {name: shape}
    segments      the parts with a path each: whole tensors or, with heads or experts, each one's part of a tensor
    levels        names of the levels, outermost first
    paths         for each segment a node name or None for each level; distinct unless nodes are skipped or merged
    skip, merge   the arguments of `from_model` as plain lists and dicts, which a checkpoint's JSON can store
    ranks         of segments whose multipliers are numbered in another order than their own, a number for each
    """

    tensors: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    segments: tuple[Segment, ...]
    paths: tuple[Path, ...]
    skip: list[str] = field(default_factory=list)
    merge: dict[str, list[str]] = field(default_factory=dict)
    levels: tuple[str, ...] = LEVELS
    ranks: tuple[int, ...] | None = None

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        skip: Iterable[str] = (),
        merge: Mapping[str, Iterable[str]] | None = None,
        heads: bool = False,
        experts: bool = False,
        layouts: int = LATEST,
        names: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    ) -> Hierarchy:
        """The hierarchy of all parameters of a model on any device (also "meta").

        skip   nodes that paths skip: "attention" means the node of this name on every level that has one,
               "L2:attention" only the node on level L2
        merge  {new name: [nodes to treat as the same node]}, such as {"mix": ["attention", "intermediate"]}; applies on
               every level that has all these nodes. The new name may be that of a merged node, but not of another node.
        heads  adds the attention heads as level L5: nodes "head.0", "head.1", ...; in grouped-query attention the parts
               of key and value are nodes "group.0", ..., one for each key-value head, which serves several query heads
        experts  adds the experts of mixtures as level L6: nodes "expert.0", ... ("mlp.expert.0", ... in a block with
               experts in several places). Gate and up of fused experts are two nodes on L4 ("gate_up_proj.gate"), and
               shared experts keep their name on L3 ("shared_experts.gate_proj").
        layouts  version of the layouts of heads: 1 divides as versions did that knew no other
        names  {"tensors": {old name: shape}, "pieces": {new name: [old names]}}: paths are those of the old names, and
               random streams too; a tensor of several pieces has a segment for each

        Segments whose paths become equal share multipliers. The nodes in `skip` and `merge` are those of the hierarchy
        before skipping and merging.

        Raises TypeError for arguments of other types. Raises ValueError for a model without parameters; for a node that
        does not exist, is named twice, or has no level in common with the nodes it is merged with; and with `heads` for
        a model whose attention heads cannot be found (`attention.find_attentions`), with `experts` for one without.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(heads, bool):
            raise TypeError(f"heads: expected True or False, got {heads!r}")
        if not isinstance(experts, bool):
            raise TypeError(f"experts: expected True or False, got {experts!r}")
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
        if names:
            plain = cls._with_names(model, shapes, names)
        else:
            plain = cls(tuple(shapes), shapes, segments, paths_of(_unmasked(model), lists))
        if heads:
            plain = plain._with_heads(model, layouts)
        if experts:
            plain = plain._with_experts(model)
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

        without  (tensor, label) of segments to leave out, such as those of pruned heads or experts; may be all of a
                 tensor's

        Raises ValueError if `names` is empty or contains an unknown name, TypeError if it is not a list of strings.
        """
        chosen = set(_strings("names", "tensor names", names))
        unknown = sorted(chosen.difference(self.tensors))
        if unknown or not chosen:
            raise ValueError(f"names: expected some of the {len(self.tensors)} tensors, got {unknown or 'none at all'}")
        shapes = {name: shape for name, shape in self.shapes.items() if name in chosen}
        kept = [
            (segment, path, rank)
            for segment, path, rank in zip(self.segments, self.paths, self.ranks or itertools.count())
            if segment.tensor in chosen
            and not any((segment.tensor, part) in without for part in segment.label.split("/"))
        ]
        segments, paths, ranks = zip(*kept)
        return replace(
            self,
            tensors=tuple(shapes),
            shapes=shapes,
            segments=segments,
            paths=paths,
            ranks=self.ranks and ranks,
        )

    def partition(self, spec: str, combine: str = "product") -> Partition:
        """Divides the levels into components.

        spec     components separated by "|", each with its levels joined by "+", such as "L1+L2|L3|L4"; or "said" (L1
                 to L4 in one component), "hsaid-3" ("L1+L2|L3|L4"), "did" or "none" (no multipliers). Levels that
                 are not named do not affect the factors.
        combine  "product" or "sum" of a segment's multipliers, see `Partition`

        Raises TypeError if `spec` is not a string; ValueError for an unknown or repeated level, an empty component, or
        another `combine`.
        """
        if combine not in ("product", "sum"):
            raise ValueError(f"combine: expected 'product' or 'sum', got {combine!r}")
        components, columns, first = [], [], 0
        order = (
            range(len(self.paths)) if self.ranks is None else sorted(range(len(self.paths)), key=self.ranks.__getitem__)
        )
        for levels in parse_partition(spec, self.levels):
            cut = [tuple(path[self.levels.index(level)] for level in levels) for path in self.paths]
            paths = tuple(dict.fromkeys(cut[row] for row in order if any(cut[row])))
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
        divided = self.levels != LEVELS
        what = "segments" if divided else "tensors"
        routes = [tuple(key for key in zip(self.levels, path) if key[1] is not None) for path in self.paths]
        tree = _tree(list(zip(routes, weights)))
        width = max((2 * depth + len(label) for depth, _, label, *_ in tree), default=0)
        parts = f" in {len(self.segments)} segments" if divided else ""
        lines = [f"{len(self.tensors)} tensors{parts}, {sum(weights):,} weights; nodes: {nodes}"]
        lines.append(f"    {'':{width}} {what:>8}         weights")
        for depth, level, label, tensors, size, each in tree:
            lines.append(f"{level}  {'  ' * depth + label:{width}}  {tensors:7} {size:15,}{each}")
        return "\n".join(lines)

    @classmethod
    def _with_names(
        cls,
        model: nn.Module,
        shapes: dict[str, tuple[int, ...]],
        names: Mapping[str, Mapping[str, Sequence[Any]]],
    ) -> Hierarchy:
        """The hierarchy of a model whose tensors had other names: see `from_model`."""
        place = {name: rank for rank, name in enumerate(names["tensors"])}
        segments, olds = [], []
        for name, shape in shapes.items():
            pieces = names["pieces"].get(name, [name])
            start = 0
            for old in pieces:
                numel = math.prod(shape if len(pieces) == 1 else names["tensors"][old])
                segments.append(Segment(name, start, 1, numel, numel, stream="" if old == name else old))
                olds.append(old)
                start += numel
        modules = dict(model.named_modules())
        numbered = {name[: found.start()] for name in olds for found in re.finditer(r"\.\d+(?=\.)", name)}
        lists = {name for name in numbered if isinstance(modules.get(name), (nn.ModuleList, type(None)))}
        ranks = tuple(place.get(old, len(place)) for old in olds)
        return cls(tuple(shapes), shapes, tuple(segments), paths_of(tuple(olds), lists), ranks=ranks)

    def _with_heads(self, model: nn.Module, layouts: int) -> Hierarchy:
        """This hierarchy with level L5: tensors that are divided among heads get a segment and path for each head."""
        parts: dict[str, list[Segment]] = {}
        for attention in find_attentions(model, layouts):
            for tensor, divided in itertools.groupby(attention.segments(), key=lambda segment: segment.tensor):
                parts.setdefault(tensor, list(divided))  # only once if two modules share the tensor
        self._check_whole(parts, "heads")
        triples = [
            (replace(segment, stream=own.stream), (*path, segment.label or None), rank)
            for own, path, rank in zip(self.segments, self.paths, self.ranks or itertools.count())
            for segment in parts.get(own.tensor, [own])
        ]
        return self._divided(triples, HEADS)

    def _divided(self, triples: list[tuple[Segment, Path, int]], level: str) -> Hierarchy:
        segments, paths, ranks = zip(*triples)
        return replace(self, segments=segments, paths=paths, ranks=self.ranks and ranks, levels=(*self.levels, level))

    def _check_whole(self, tensors: Collection[str], argument: str) -> None:
        """Raises ValueError if one of these tensors consists of several that were separate once."""
        count = Counter(segment.tensor for segment in self.segments if not segment.label)
        if several := next((tensor for tensor in tensors if count[tensor] > 1), None):
            raise ValueError(
                f"{argument}: expected False where tensors have been fused since, got {several!r} of pieces"
            )

    def _with_experts(self, model: nn.Module) -> Hierarchy:
        """This hierarchy with level L6: tensors of fused experts get segments and paths for each expert."""
        every = find_experts(model)
        if not every:
            raise ValueError(f"experts: expected True for a model with experts, got a {type(model).__name__} without")
        fused = {tensor: layer for layer in every for tensor in layer.fused}
        separate = {tensor: expert for layer in every for tensor, expert in layer.separate.items()}
        places: dict[str | None, set[str | None]] = {}  # sublayers with experts, by block
        for segment, path in zip(self.segments, self.paths):
            if segment.tensor in fused:
                places.setdefault(path[0], set()).add(path[1])
        self._check_whole(fused, "experts")
        triples: list[tuple[Segment, Path, int]] = []
        for segment, path, rank in zip(self.segments, self.paths, self.ranks or itertools.count()):
            block, sublayer, owner, parameter, *rest = path
            if segment.tensor in fused:
                several = f"{sublayer}." if len(places[block]) > 1 else ""
                for part, expert, half in fused[segment.tensor].split(segment, math.prod(self.shapes[segment.tensor])):
                    name = f"{parameter}.{half}" if half else parameter
                    node = f"{several}expert.{expert}"
                    part = replace(part, stream=segment.stream)
                    triples.append((part, (block, sublayer, owner, name, *rest, node), rank))
                continue
            shared = re.search(r"(?:^|\.)(shared_\w+)\.(\w+)\.\w+$", segment.tensor)
            if shared and shared[2] == owner and shared[1] not in (sublayer or ""):
                owner = f"{shared[1]}.{owner}"
            own = f"expert.{separate[segment.tensor]}" if segment.tensor in separate else None
            triples.append((segment, (block, sublayer, owner, parameter, *rest, own), rank))
        return self._divided(triples, EXPERTS)

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


def pruned_pieces(
    model: nn.Module, pruned: Mapping[str, Collection[int]], layouts: int = LATEST
) -> set[tuple[str, str]]:
    """(parameter, label) of the segments of pruned heads and experts, {module: [numbers]}, as `select` takes them."""
    experts = {layer.name: layer for layer in find_experts(model)} if pruned else {}
    heads = {name: numbers for name, numbers in pruned.items() if name not in experts}
    gone = [experts[name].pieces(numbers) for name, numbers in pruned.items() if name in experts]
    return pieces_of(model, heads, layouts).union(*gone)


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
