"""`hsaid graph`: draws a model's hierarchy, or a checkpoint's trained multipliers on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from hsaid_kernels.app import trained
from hsaid_kernels.app.architecture import build_architecture
from hsaid_kernels.app.terminal import say, user_input
from hsaid_kernels.hierarchy import Hierarchy
from hsaid_kernels.hierarchy.graph import Graph
from hsaid_kernels.hierarchy.paths import EXPERTS, HEADS


def graph(arguments: argparse.Namespace) -> None:
    """Writes the diagram and prints how many tensors, paths, nodes and multipliers it has.

    Raises UsageError for invalid arguments.
    """
    with user_input():
        partition, multipliers = arguments.partition, None
        divided = {"heads": arguments.heads, "experts": arguments.experts}
        if trained.is_checkpoint(arguments.source, arguments.model, **divided):
            if partition is not None:
                raise ValueError(f"--partition: expected none, as a checkpoint has its own, got {partition!r}")
            hierarchy, partition, multipliers = trained.load_multipliers(Path(arguments.source), arguments.model)
        else:
            levels = {"heads": HEADS, "experts": EXPERTS}
            divided = {key: given or levels[key] in (partition or "") for key, given in divided.items()}
            hierarchy = Hierarchy.from_model(build_architecture(arguments.source), **divided)
        drawn = Graph.of(hierarchy, partition, fold=arguments.fold, multipliers=multipliers)
        drawn.write(arguments.out)
    counts = [f"{len(hierarchy.tensors)} tensors", f"{drawn.num_paths} paths", f"{len(drawn.nodes)} nodes"]
    if drawn.partition:
        counts.append(f"{drawn.partition.num_multipliers} multipliers")
    say("graph", f"{arguments.out}: {', '.join(counts)}")
