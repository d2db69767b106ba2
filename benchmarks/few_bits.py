"""theta and the multipliers in few bits: accuracy and bytes, rounded after training or tuned on their levels; bounds.

    python benchmarks/few_bits.py cldr --out build/few_bits.json             # half an hour of a core
    python benchmarks/few_bits.py mnist --data data/MNIST/raw --out build/few_bits.json
    python benchmarks/few_bits.py table --out build/few_bits.json            # that of docs/certificates.md

The embedded task is that of `hsaid train` with MiniLM, at its default settings; MNIST is LeNet in DID's subspace, as in
examples/measure_mnist.py. What has been measured is in the file, and is not measured again.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch

from hsaid_kernels import HSAID
from hsaid_kernels.app.architecture import FALLBACK
from hsaid_kernels.app.defaults import BATCH_SIZE, LEARNING_RATE, MAX_LENGTH, STEPS, TUNED_RATE, TUNED_STEPS
from hsaid_kernels.app.training import build_classifier, evaluate, training_batches, training_steps
from hsaid_kernels.certificates import Certificate
from hsaid_kernels.data import load_cldr
from hsaid_kernels.wrapper.checkpoint.coding import coded_bits
from hsaid_kernels.wrapper.checkpoint.packing import pack, unpack
from hsaid_kernels.wrapper.levels import fit_levels

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import measure_mnist as mnist

BITS = (8, 6, 5, 4, 3, 2)
TUNED = (4, 3, 2)  # the widths at which rounding costs something
DIMS = (1000, 300, 5000)
EPOCHS, RATE = 4, 0.1  # of MNIST


class Cldr:
    """The embedded task."""

    name = "embedded task"

    def __init__(self, dim: int, seed: int, folder: str):
        self.dataset, self.seed = load_cldr(seed=seed), seed
        self.run = {"model": FALLBACK, "seed": seed, "labels": self.dataset.labels, "max_length": MAX_LENGTH}
        self.classifier = build_classifier(FALLBACK, self.dataset.labels, seed, MAX_LENGTH)
        self.model = self.classifier.model = HSAID(self.classifier.model, dim, seed=seed)

    def train(self, bits: int | None = None) -> None:
        batches = training_batches(self.classifier, self.dataset.train, BATCH_SIZE, self.seed)
        steps, lr = (
            (STEPS, LEARNING_RATE)
            if bits is None
            else (round(STEPS * TUNED_STEPS), LEARNING_RATE * TUNED_RATE / 2**bits)
        )
        for _ in training_steps(self.model, batches, steps=steps, lr=lr, seed=self.seed, bits=bits):
            pass

    def accuracy(self) -> float:
        return evaluate(self.classifier, self.dataset.test).accuracy

    def errors(self) -> tuple[int, int]:
        n = len(self.dataset.train)
        return round(n * (1 - evaluate(self.classifier, self.dataset.train).accuracy)), n


class Mnist:
    """LeNet, trained on the first 50,000 images."""

    name, run = "MNIST", None

    def __init__(self, dim: int, seed: int, folder: str):
        self.data, self.seed = mnist.load(folder, 10_000), seed
        self.model = HSAID(mnist.network("lenet", "he", seed), dim, "did", seed)

    def train(self, bits: int | None = None) -> None:
        epochs, lr = (EPOCHS, RATE) if bits is None else (1, RATE * TUNED_RATE / 2**bits)
        mnist.fit(self.model, *self.data["train"], lr, epochs, self.seed, bits)

    def accuracy(self) -> float:
        return mnist.accuracy(self.model, *self.data["test"])

    def errors(self) -> tuple[int, int]:
        n = len(self.data["train"][1])
        return round(n * (1 - mnist.accuracy(self.model, *self.data["train"]))), n


def measure(task: type[Cldr] | type[Mnist], dim: int, seed: int, folder: str) -> list[dict]:
    """A row for float32, and for each width one that is rounded and one that is tuned."""
    one = task(dim, seed, folder)
    one.train()
    hsaid, about = one.model, {"task": one.name, "d": dim, "seed": seed}
    trained = [parameter.detach().clone() for parameter in hsaid.parameters()]
    rows = [{**about, "bits": 32, "how": "", "accuracy": one.accuracy(), "bytes": 4 * dim}]
    for bits in BITS:
        for how in ("rounded", "tuned") if bits in TUNED else ("rounded",):
            with torch.no_grad():
                for parameter, value in zip(hsaid.parameters(), trained, strict=True):
                    parameter.copy_(value)
            if how == "tuned":
                one.train(bits)
            data = pack(*hsaid._checkpoint(), bits, run=one.run)
            values = unpack(data).values
            with torch.no_grad():
                for name, parameter in hsaid.named_parameters():
                    assert how == "rounded" or parameter.equal(values[name]), name
                    parameter.copy_(values[name])
            theta = coded_bits(fit_levels(hsaid.theta, bits).numbers(hsaid.theta.detach()).numpy(), bits) / 8
            rows.append({**about, "bits": bits, "how": how, "accuracy": one.accuracy(), "bytes": len(data)})
            rows[-1]["theta"] = round(theta, 1)
            if how == "tuned" and bits == min(TUNED):
                rows[-1]["bound"] = Certificate(*one.errors(), sum(unpack(data).bits.values())).bound
    return rows


def table(rows: list[dict]) -> str:
    """Mean accuracy over the seeds (those of each in brackets), and mean bytes."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["task"], row["d"], row["bits"], row["how"]].append(row)
    columns = ["task", "d", "bits", "rounded", "tuned", "bytes of the file", "of theta", "bound"]
    lines = [f"| {' | '.join(columns)} |", "|---|--:|--:|---|---|--:|--:|---|"]
    for name, dim, bits, how in cells:
        if how == "tuned":
            continue
        found = [sorted(cells.get((name, dim, bits, kind), ()), key=lambda row: row["seed"]) for kind in (how, "tuned")]
        shown = [_accuracies([row["accuracy"] for row in kind]) for kind in found]
        last = found[1] or found[0]
        theta = f"{mean(row['theta'] for row in last):,.0f}" if bits < 32 else f"{4 * dim:,}"
        size = f"{mean(row['bytes'] for row in last):,.0f}" if bits < 32 else ""
        bound = _accuracies([row["bound"] for row in found[1] if "bound" in row])
        lines.append(f"| {name} | {dim:,} | {bits} | {shown[0]} | {shown[1]} | {size} | {theta} | {bound} |")
    return "\n".join(lines)


def _accuracies(found: list[float]) -> str:
    each = " ".join(f"{accuracy:.3f}" for accuracy in found)
    return f"{mean(found):.3f} ({each})" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cldr", "mnist", "table"))
    parser.add_argument("--out", type=Path, default=Path("build/few_bits.json"), help="(%(default)s)")
    parser.add_argument("--data", default="data/MNIST/raw", help="folder with MNIST's four idx files (%(default)s)")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="D", help=f"{DIMS}")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(%(default)s)")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.what != "table":
        task = {"cldr": Cldr, "mnist": Mnist}[arguments.what]
        for dim in arguments.dims:
            for seed in range(arguments.seeds):
                if any((row["task"], row["d"], row["seed"]) == (task.name, dim, seed) for row in rows):
                    continue
                rows += measure(task, dim, seed, arguments.data)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(rows, indent=1))
                print(f"{task.name}, d = {dim:,}, seed {seed}", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
