"""What a basis is worth: test accuracy in random subspaces of the same d, drawn in different ways, on MNIST.

    python benchmarks/bases.py data/MNIST/raw --dims 1000 20000 --seeds 3

The folder holds MNIST's four idx files, as for examples/measure_mnist.py, whose network of 199,210 weights is trained
for three epochs by each basis: theta as one chunk or as the sum of several ("all"), one chunk a block at several widths
("one"), random signs in place of normal values, and a partition of the weights by a hash, as in GPart (arXiv
2605.14841). With the first seed, each basis and d is trained at several learning rates, of which the best on held-out
images is taken for the others. Prints a table in Markdown.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from measure_mnist import accuracy, fit, load, network

from hsaid_kernels import HSAID
from hsaid_kernels.app.measure.compare import OfGroups, splitmix64

EPOCHS, HELD_OUT = 3, 10_000
RATES = (0.3, 1.0, 3.0)  # times sqrt(1000 / d) / 3
BASES = {
    "all chunks": dict(chunks="all"),
    "all chunks, rademacher": dict(chunks="all", diagonal="rademacher"),
    "one chunk, n = 16,384": dict(chunks="one", width=16384),
    "one chunk, n = 1,024": dict(chunks="one", width=1024),
    "one chunk, n = 1,024, rademacher": dict(chunks="one", width=1024, diagonal="rademacher"),
    "one chunk, n = 256": dict(chunks="one", width=256),
    "partition": None,
}


def partitioned(model, dim, seed):
    """The model, of which all weights are divided into `dim` groups, each of which moves together."""
    weights = list(model.named_parameters())
    counts = [weight.numel() for _, weight in weights]
    groups = torch.from_numpy((splitmix64(seed, sum(counts)) % dim).astype("int64"))
    norms, theta = groups.bincount(minlength=dim).clamp(min=1).sqrt().float(), torch.nn.Parameter(torch.zeros(dim))
    for (name, weight), own in zip(weights, groups.split(counts), strict=True):
        weight.requires_grad_(False)
        module, _, last = name.rpartition(".")
        adds = OfGroups(theta, norms, own.view(weight.shape))
        parametrize.register_parametrization(model.get_submodule(module), last, adds)
    return model


def scores(folder, basis, dim, lr, seed):
    """(validation, test) accuracy of a run."""
    data, model = load(folder, HELD_OUT), network("fc", "he", seed)
    if BASES[basis] is None:
        model = partitioned(model, dim, seed)
    else:
        model = HSAID(model, dim, "did", seed, **BASES[basis])
    fit(model, *data["train"], lr, EPOCHS, seed)
    return accuracy(model, *data["validation"]), accuracy(model, *data["test"])


def applies(basis, dim):
    """Whether a basis is another than those before it: with a single chunk there is nothing to choose."""
    options = BASES[basis] or {}
    return "width" not in options or dim > options["width"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--dims", nargs="+", type=int, default=[1000, 5000, 20_000, 100_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"| d | basis | rate | test accuracy, mean of {args.seeds} seeds | of each |\n|---:|---|---:|---:|---|")
    for dim in args.dims:
        for basis in filter(lambda basis: applies(basis, dim), BASES):
            rates = [factor * math.sqrt(1000 / dim) / 3 for factor in RATES]
            first = {lr: scores(args.folder, basis, dim, lr, 0) for lr in rates}
            best = max(rates, key=lambda lr: first[lr][0])
            tests = [first[best][1], *(scores(args.folder, basis, dim, best, s)[1] for s in range(1, args.seeds))]
            each = " ".join(f"{test:.4f}" for test in tests)
            print(f"| {dim:,} | {basis} | {best:.3g} | {sum(tests) / len(tests):.4f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
