"""The intrinsic dimension of the two MNIST networks of Li et al. 2018 (arXiv 1804.08838), beside the published one:
784-200-200-10 (199,210 weights, published d90 750) and LeNet (44,426 weights, published d90 290).

The folder holds MNIST's four idx files, gzipped or not, as torchvision leaves them in MNIST/raw:

    python examples/measure_mnist.py data/MNIST/raw                         # both networks
    python examples/measure_mnist.py data/MNIST/raw --net lenet --workers 2 # after a kill -9, the same goes on
    python examples/measure_mnist.py data/MNIST/raw --dense 100 300         # and with a dense Gaussian matrix
    python examples/measure_mnist.py data/MNIST/raw --net lenet --bits 4    # and a bound (docs/certificates.md)
    python examples/measure_mnist.py data/MNIST/raw --net fc --method did did:rademacher --compare gpart:1000

The last compares bases: normal values, random signs, and GPart's partition of all weights (docs/method.md).
With --bits, all 60,000 images are trained on, and rates are chosen by the bound, which needs no other images.

Each network's table, results and picture go to a folder of its own in --out, those with the dense matrix to another.
With --threads 1, the first takes a quarter of an hour, and gets d90 = 376 and 196 (docs/measuring.md says why less).
`measure` takes any model and training function; what is special to this one is `Training`.
"""

import argparse
import gzip
import math
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hsaid_kernels.app.measure.compare import partitioned
from hsaid_kernels.certificates import Certificate
from hsaid_kernels.measure import Diverged, Run, Scores, certified, measure

BATCH = 128
TUNED = 2.0  # of the rate, divided by 2**bits, for a fourth of the epochs more, with theta on its levels
RATES = {"full": 0.01, "theta": 0.3}  # where the search for the best rate starts; theta's is for d = 1,000
PUBLISHED = {"fc": 750, "lenet": 290}
DIMS = {"fc": (50, 100, 200, 400, 750, 1500), "lenet": (50, 100, 200, 290, 600)}


def main(argv=None):
    args = parse(argv)
    load(args.folder, args.held_out)
    designs = {}
    for net in args.net:
        grid = args.dims or DIMS[net]
        methods = {"methods": args.method, "compare": args.compare}
        designs[net] = {**methods, "dims": grid, "seeds": args.seeds, "refine": args.refine}
        if args.dense is not None:
            # `measure` asks for "did" here, and `Training` answers with a dense matrix.
            dims = dense_dims(net, args.dense or grid, args.memory, all_must_fit=bool(args.dense))
            designs[f"{net}-dense"] = {"methods": ["did"], "dims": dims, "seeds": args.dense_seeds, "refine": 0}
    return {name: measured(args, name, design) for name, design in designs.items()}


def measured(args, name, design):
    """Measures one network, prints the table and returns the `Measurement`."""
    net, _, dense = name.partition("-")
    training = Training(args.folder, args.held_out, net, args.init, args.epochs, bool(dense), args.bits)
    _, labels = load(args.folder, args.held_out)["test"]
    title = f"MNIST, {net}" + (", with a dense Gaussian matrix" if dense else "")
    out = Path(args.out, name)
    found = measure(
        network(net, args.init, seed=0),
        training,
        rates=RATES,
        chance=labels.bincount().max().item() / len(labels),
        settings=training.settings,
        out=out,
        workers=args.workers,
        threads=args.threads,
        title=title,
        labels={"full": "all weights"} | ({"did": "dense Gaussian matrix"} if dense else {}),
        **design,
    )
    print(f"\n{title}: published {found.label} {PUBLISHED[net]}\n\n{found.table()}\n\n{out}", flush=True)
    return found


@dataclass(frozen=True)
class Training:
    """The training function. It is an object at the top level of a module, so that worker processes can have it."""

    folder: str
    held_out: int
    net: str
    init: str
    epochs: int
    dense: bool
    bits: int | None = None

    @property
    def settings(self):
        """What else determines the scores: `measure` refuses a study that was made with other settings."""
        data = load(self.folder, self.held_out)
        images = {
            name: f"{len(labels):,} ({zlib.crc32(images.numpy()):08x})" for name, (images, labels) in data.items()
        }
        training = {"net": self.net, "init": self.init, "epochs": self.epochs, "batch": BATCH, "dense": self.dense}
        bits = {"bits": self.bits} if self.bits else {}
        return training | {"images": images} | bits

    def __call__(self, run: Run) -> Scores:
        data = load(self.folder, self.held_out)
        model = network(self.net, self.init, run.seed)
        if run.method.startswith("gpart:"):
            names = [name for name, _ in model.named_parameters()]
            model = partitioned(model, names, int(run.method.removeprefix("gpart:")), run.seed)
        elif self.dense and run.dim is not None:
            model = DenseSubspace(model, run.dim, run.seed)
        else:
            model = run.wrap(model)  # the model itself for the baseline, else an HSAID
        train = data["train"]
        fit(model, *train, run.lr, self.epochs, run.seed)
        test = accuracy(model, *data["test"])
        if not self.bits:
            trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            return Scores(accuracy(model, *data["validation"]), test, trained)
        count = len(train[1])
        if run.dim is None:
            return Scores(accuracy(model, *train), test)
        fit(model, *train, run.lr * TUNED / 2**self.bits, max(1, self.epochs // 4), run.seed, self.bits)
        parts = certified(model, self.bits, lambda: round((1 - accuracy(model, *train)) * count), count)
        # Rates are chosen by the bound, of which the settings are a part that is the same for all.
        bound = Certificate(round(parts["train_error"] * count), count, parts["bits"]).bound
        return Scores(1 - bound, test, **parts)


def fit(model, images, labels, lr, epochs, seed, bits=None):
    """Trains; with `bits`, theta and the multipliers of an HSAID stay on levels."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    with model.rounded(optimizer, bits) if bits else nullcontext():
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=order).split(BATCH):
                loss = cross_entropy(model(images[batch]), labels[batch])
                if not loss.isfinite():
                    raise Diverged
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def network(net, init, seed):
    """A network of Li et al. They initialize it with He's normal weights and biases of zero: init="he"."""
    torch.manual_seed(seed)
    layers, first, widths = [nn.Flatten()], 784, (200, 200)
    if net == "lenet":
        pooled = nn.ReLU(), nn.MaxPool2d(2)
        layers = [nn.Conv2d(1, 6, 5), *pooled, nn.Conv2d(6, 16, 5), *pooled, nn.Flatten()]
        first, widths = 256, (120, 84)
    for width in widths:
        layers += [nn.Linear(first, width), nn.ReLU()]
        first = width
    model = nn.Sequential(*layers, nn.Linear(first, 10))
    if init == "he":
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            else:
                nn.init.zeros_(weight)
    return model


class DenseSubspace(nn.Module):
    """W0 + P theta with a stored matrix P of independent normal values, for comparison.

    It is scaled as ours with normalize="global": E |P theta|^2 = |theta|^2, and all weights move by about the same.
    """

    def __init__(self, model, dim, seed):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.theta = nn.Parameter(torch.zeros(dim))
        total = sum(weight.numel() for weight in model.parameters())
        generator = torch.Generator().manual_seed(seed + 10_000)  # not the numbers of W0
        self.register_buffer("basis", torch.randn(total, dim, generator=generator).div_(math.sqrt(total)))

    def forward(self, images):
        named = dict(self.model.named_parameters())
        parts = (self.basis @ self.theta).split([weight.numel() for weight in named.values()])
        tuned = {name: weight + part.view_as(weight) for (name, weight), part in zip(named.items(), parts)}
        return functional_call(self.model, tuned, (images,))


def dense_dims(net, dims, memory, all_must_fit):
    """Those d whose dense matrix in float32 takes at most `memory` GB."""
    total = sum(weight.numel() for weight in network(net, "torch", seed=0).parameters())
    fitting = [d for d in dims if 4e-9 * total * d <= memory]
    if not fitting or all_must_fit and fitting != dims:
        size = f"d = {max(dims):,}, with {4e-9 * total * max(dims):.1f} GB"
        raise SystemExit(f"--dense: expected d whose matrix takes at most {memory:g} GB (--memory), got {size}")
    return fitting


@torch.no_grad()
def accuracy(model, images, labels):
    predicted = [model(part).argmax(-1) for part in images.split(1000)]
    return (torch.cat(predicted) == labels).double().mean().item()


# --- data


@cache
def load(folder, held_out):
    """{part: (images, labels)}. Validation are the last `held_out` training images."""
    (images, labels), test = (read_part(Path(folder), part) for part in ("train", "t10k"))
    count = len(labels) - held_out
    if not 0 < count <= len(labels):
        raise SystemExit(f"--held-out: expected 1 to {len(labels) - 1:,} of the training images, got {held_out:,}")
    return {"train": (images[:count], labels[:count]), "validation": (images[count:], labels[count:]), "test": test}


def read_part(folder, part):
    """(images, labels): float32 from 0 to 1, [count, 1, 28, 28], and int64 [count]."""
    images, path = read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    if images.shape[1:] != (28, 28) or not len(images):
        raise SystemExit(f"{path}: expected images of 28 x 28 pixels, got {shown(images.shape)}")
    labels, path = read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(labels) != len(images):
        raise SystemExit(f"{path}: expected a label for each of {len(images):,} images, got {len(labels):,}")
    if labels.max() > 9:
        raise SystemExit(f"{path}: expected labels from 0 to 9, got {labels.max()}")
    return torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(labels).long()


def read_idx(folder, name, dims):
    """(array of bytes, path) of an idx file: 0, 0, 8 for bytes, number of dimensions, each dimension, the values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise SystemExit(f"{folder}: expected the file {name} or {name}.gz, got neither")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}: expected a file that can be read, got: {error}") from None
    begin = bytes([0, 0, 8, dims])
    start = 4 + 4 * dims
    if data[:4] != begin or len(data) < start:
        raise SystemExit(
            f"{path}: expected a {dims}-dimensional idx file of bytes, which begins with {begin.hex(' ')}, "
            f"got {data[:4].hex(' ') or 'nothing'} in {len(data):,} bytes"
        )
    shape = np.frombuffer(data, ">u4", dims, 4).astype(int)
    if len(data) - start != shape.prod():
        raise SystemExit(f"{path}: expected {shown(shape)} values as it says itself, got {len(data) - start:,}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy(), path


def shown(shape):
    return " x ".join(f"{size:,}" for size in shape)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., with or without .gz")
    add("--net", nargs="+", choices=list(DIMS), default=list(DIMS), help="(both)")
    add("--method", nargs="+", default=["did"], help="partitions: did, said, hsaid-3, ... (%(default)s)")
    add("--compare", nargs="+", default=[], metavar="gpart:D", help="GPart's partition into D groups (none)")
    add("--dims", nargs="+", type=int, metavar="D", help=f"the grid ({DIMS})")
    add("--seeds", type=int, default=3, metavar="N", help="(%(default)s)")
    add("--refine", type=int, default=1, metavar="N", help="d to add where the threshold is crossed (%(default)s)")
    add("--dense", nargs="*", type=int, metavar="D", help="also with a dense matrix, at these d (those of the grid)")
    add("--dense-seeds", type=int, default=1, metavar="N", help="a dense matrix is slow (%(default)s)")
    add("--memory", type=float, default=1.0, metavar="GB", help="for a dense matrix, at most (%(default)s)")
    add("--init", choices=("he", "torch"), default="he", help="as theirs, or torch's default (%(default)s)")
    add("--epochs", type=int, default=4, metavar="N", help="(%(default)s)")
    add("--held-out", type=int, default=10_000, metavar="N", help="training images to choose rates by (%(default)s)")
    add("--bits", type=int, metavar="N", help="of each value of theta: with it, the test error is bounded")
    add("--out", default="runs/measure_mnist", metavar="DIR", help="(%(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (%(default)s)")
    add("--threads", type=int, metavar="N", help="of each process (all, or an equal share)")
    args = parser.parse_args(argv)
    for method in args.compare:
        name, _, size = method.partition(":")
        if name != "gpart" or not size.isdecimal() or int(size) < 1 or args.bits:
            parser.error(f"--compare: expected gpart:D, without --bits, got {method}")
    if args.held_out < 1:
        parser.error(f"--held-out: expected 1 or more, got {args.held_out}")
    if args.bits:
        args.held_out = 0
    return args


if __name__ == "__main__":
    main()
