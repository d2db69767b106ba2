"""From a tensor's name to its path through the levels of the hierarchy.

How a tensor's name becomes a path, for any model (only names, shapes and module structure are looked at):

1.  A number is no name of its own and stays with the name before it: "layer.0" is one step.
2.  L1 is the item of the outermost nn.ModuleList on the path. Modules above such items ("bert", "bert.encoder") are
    containers. Without a list L1 is the first step that is no container ("pooler", or "net.0" of a Sequential), or the
    container itself where that owns the parameter; a parameter of the root has no L1. Containers are left out of the
    name, save for the few that tell one list or module from another ("encoder.block.0", "decoder.block.0").
3.  L4 is the parameter's name. L3 is the step that owns it, unless that is the block. L2 is the first step under the
    block, unless that is the L3 step. What lies between (BERT's `self` and inner `output`) is passed over.
4.  An L2 step that is an item of a list is called by what tells it from the other items: by the one child that only it
    has, if every item has just one such child (T5's "layer.0" is SelfAttention, in encoder and decoder), else by list
    and number. An only item of an only child tells nothing apart and is passed over (ALBERT's "albert_layers.0").
5.  Where tensors still share a path, L2 is all that lies between block and owner, as in the name ("mlp.experts.0"), for
    every tensor whose name goes on after its block with the same module or list. So there are always as many paths as
    tensors.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

LEVELS = ("L1", "L2", "L3", "L4")
HEADS = "L5"

Path = tuple[str | None, ...]


def paths_of(names: tuple[str, ...], lists: set[str]) -> tuple[Path, ...]:
    """Names of the tensors and of the model's module lists -> a path per tensor, by the rule at the top of the file."""
    children = defaultdict(set)  # module -> its modules and parameters, as far as on some tensor's path
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
        in_full |= clashing  # grows every time: paths in full are distinct, so one that clashes was not in full yet


def _prefixes(name: str) -> list[str]:
    """Of "a.b.c": "a", "a.b", "a.b.c"."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format)) if name else []


def split_number(name: str) -> tuple[str, str]:
    """Of "encoder.layer.0": "encoder.layer", ".0"."""
    stem = re.sub(r"((^|\.)\d+)+$", "", name)
    return stem, name[len(stem) :]


def _block(chain: list[str], items: set[str], containers: set[str]) -> str:
    """The block among the modules on a tensor's path; "" for the root."""
    for module, deeper in itertools.zip_longest(chain, chain[1:], fillvalue=""):
        if module in items or (module not in containers and not deeper.rpartition(".")[2].isdigit()):
            return module
    return chain[-1] if chain else ""


def _short_names(blocks: Iterable[str]) -> dict[str, str]:
    """Block -> the shortest end of its name, less the number, that no other block's name ends in; with the number."""
    stems = {split_number(block)[0]: "" for block in blocks}
    for stem in stems:
        parts = stem.split(".")
        ends = [".".join(parts[first:]) for first in reversed(range(len(parts)))]
        others = [f".{other}" for other in stems if other != stem]
        stems[stem] = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), stem)
    return {block: stems[split_number(block)[0]] + split_number(block)[1] for block in blocks}


def _label(block: str, steps: list[str], children: Mapping[str, set[str]]) -> str | None:
    """What the last of these steps under the block is called on L2; None where it is passed over."""
    parent, _, number = ".".join([block, *steps]).rpartition(".")
    siblings = children[parent]
    if not number.isdigit():
        return steps[-1]
    if len(siblings) == 1:
        return None if len(children[parent.rpartition(".")[0]]) == 1 else steps[-1]
    count = Counter(child for item in siblings for child in children[f"{parent}.{item}"])
    own = {item: [child for child in children[f"{parent}.{item}"] if count[child] == 1] for item in siblings}
    return own[number][0] if all(len(only) == 1 for only in own.values()) else steps[-1]
