"""From a tensor's name to its path through the levels of the hierarchy.

The levels are L1, the block; L2, the sublayer in the block; L3, the module that owns the parameter; L4, the parameter
(hierarchy.py). The following rules derive a path from a name, for any model. They use only the names of parameters and
modules and which modules are an nn.ModuleList.

1.  A name is split at its dots into steps. A number does not form a step; it belongs to the name before it, so
    "layer.0" is one step.
2.  L1 is the item of the outermost nn.ModuleList on the path. Modules that contain such items ("bert", "bert.encoder")
    are containers. If there is no list on the path, L1 is the first step that is not a container ("pooler", or "net.0"
    of a Sequential), or the container itself if it owns the parameter. A parameter of the root module has no L1.
    Containers are omitted from the name of the L1 node, except those needed to distinguish one list or module from
    another ("encoder.block.0", "decoder.block.0").
3.  L4 is the parameter's name. L3 is the step that owns it, unless that is the block. L2 is the first step below the
    block, unless that is the L3 step. Steps in between (BERT's `self` and inner `output`) are skipped.
4.  If the L2 step is an item of a list, its name is what distinguishes it from the other items. If every item has
    exactly one child that no other item has, this is the child's name (T5's "layer.0" is called SelfAttention, in
    encoder and decoder); otherwise it is the list's name and the number. The only item of a list that is an only child
    distinguishes nothing and is skipped (ALBERT's "albert_layers.0").
5.  If several tensors still have the same path, L2 becomes everything between block and owner ("mlp.experts.0"). This
    applies to every tensor whose name continues after its block with the same module or list. As a result there are
    always as many paths as tensors.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

LEVELS = ("L1", "L2", "L3", "L4")
HEADS = "L5"
EXPERTS = "L6"

Path = tuple[str | None, ...]


def paths_of(names: tuple[str, ...], lists: set[str]) -> tuple[Path, ...]:
    """A path for each tensor, by the rules in this module's docstring.

    names  names of the tensors
    lists  names of the model's nn.ModuleList modules
    """
    children = defaultdict(set)  # module -> its submodules and parameters that are on some tensor's path
    for prefix in itertools.chain(*map(_prefixes, names)):
        parent, _, child = prefix.rpartition(".")
        children[parent].add(child)
    owners = [name.rpartition(".")[0] for name in names]
    chains = [_prefixes(owner) for owner in owners]  # the modules on each tensor's path
    items = {next((module for module in chain if module.rpartition(".")[0] in lists), "") for chain in chains}
    containers = set(itertools.chain(*(_prefixes(item)[:-1] for item in items)))
    blocks = [_block(chain, items, containers) for chain in chains]
    short = _short_names(blocks)
    steps = [re.findall(r"[^.]+(?:\.\d+(?=\.|$))*", owner[len(block) :]) for owner, block in zip(owners, blocks)]
    in_full: set[str] = set()
    while True:
        paths = []
        for name, block, (*between, owner) in zip(names, blocks, [under or [None] for under in steps]):
            if between and split_number(between[0])[0] in in_full:
                sublayer: str | None = ".".join(between)
            else:
                labels = (_label(block, between[: end + 1], children) for end in range(len(between)))
                sublayer = next(filter(None, labels), None)
            paths.append((short[block] or None, sublayer, owner, name.rpartition(".")[2]))
        count = Counter(paths)
        clashing = {split_number(under[0])[0] for under, path in zip(steps, paths) if count[path] > 1}
        if not clashing:
            return tuple(paths)
        # Terminates: tensors whose L2 is written in full have distinct paths, so every clash adds a new name.
        in_full |= clashing


def _prefixes(name: str) -> list[str]:
    """All prefixes of a dotted name: for "a.b.c", ["a", "a.b", "a.b.c"]."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format)) if name else []


def split_number(name: str) -> tuple[str, str]:
    """Splits off the number at the end of a name: "encoder.layer.0" -> ("encoder.layer", ".0")."""
    stem = re.sub(r"((^|\.)\d+)+$", "", name)
    return stem, name[len(stem) :]


def _block(chain: list[str], items: set[str], containers: set[str]) -> str:
    """The block (L1) among the modules `chain` on a tensor's path; "" for a parameter of the root module."""
    for module, deeper in itertools.zip_longest(chain, chain[1:], fillvalue=""):
        if module in items or (module not in containers and not deeper.rpartition(".")[2].isdigit()):
            return module
    return chain[-1] if chain else ""


def _short_names(blocks: Iterable[str]) -> dict[str, str]:
    """{block: short name}: the shortest suffix of the block's name that no other block's name ends with.

    Numbers at the end of names are ignored in this comparison and added back afterwards.
    """
    stems = {split_number(block)[0]: "" for block in blocks}
    for stem in stems:
        parts = stem.split(".")
        ends = [".".join(parts[first:]) for first in reversed(range(len(parts)))]
        others = [f".{other}" for other in stems if other != stem]
        stems[stem] = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), stem)
    return {block: stems[split_number(block)[0]] + split_number(block)[1] for block in blocks}


def _label(block: str, steps: list[str], children: Mapping[str, set[str]]) -> str | None:
    """The L2 name of the last of these `steps` below the block (rule 4); None if it is skipped."""
    parent, _, number = ".".join([block, *steps]).rpartition(".")
    siblings = children[parent]
    if not number.isdigit():
        return steps[-1]
    if len(siblings) == 1:
        return None if len(children[parent.rpartition(".")[0]]) == 1 else steps[-1]
    count = Counter(child for item in siblings for child in children[f"{parent}.{item}"])
    own = {item: [child for child in children[f"{parent}.{item}"] if count[child] == 1] for item in siblings}
    return own[number][0] if all(len(only) == 1 for only in own.values()) else steps[-1]
