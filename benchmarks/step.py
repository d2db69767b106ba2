"""One way of training mBERT in a process of its own: prints as JSON the seconds of each part of its steps and the
memory at the peak.

    python benchmarks/step.py hsaid|block|tables|held|mixed|bfloat16|full|unilora|vera|lora [--steps 6]

`block` is H-SAID whose weights live while their block runs; `tables` makes all rows of the embeddings; `held` holds the
gradients of all weights until backward ends, as one node in the graph would; `mixed` has weights in bfloat16 over W0 in
float32, `bfloat16` both in bfloat16. `full` is ordinary fine-tuning of all weights by AdamW; UniLoRA, VeRA and LoRA are
peft's, with its defaults (LoRA: r = 1), on query and value. All take the same batches, 16 texts of 16 tokens. The first
step is not counted.
"""

import argparse
import functools
import json
import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.app import data, training
from hsaid_kernels.wrapper.weights import launches

CPU = torch.device("cpu")
OURS = ("hsaid", "block", "tables", "held", "mixed", "bfloat16")
OTHERS = ("full", "unilora", "vera", "lora")


def wrapped(method: str) -> HSAID:
    model = training.build_mbert(0)
    if method == "bfloat16":
        model.to(torch.bfloat16)
    if method == "tables":
        launches.SMALLEST_TABLE = 2**62
    memory = "block" if method == "block" else "step"
    hsaid = HSAID(model, 1000, dtype=torch.bfloat16 if method == "mixed" else None, memory=memory)
    if method == "held":
        maker = hsaid._source.maker
        maker.parts, maker._launches = [[name for part in maker.parts for name in part]], (None, [])
    return hsaid


def adapted(method: str) -> nn.Module:
    model = training.build_mbert(0)
    if method == "full":
        return model
    import peft

    kind = {"unilora": peft.UniLoraConfig, "vera": peft.VeraConfig, "lora": functools.partial(peft.LoraConfig, r=1)}
    return peft.get_peft_model(model, kind[method](target_modules=["query", "value"]))


def plain_steps(model: nn.Module, batches: Iterator[training.Batch]) -> Iterator[dict[str, float]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for batch in batches:
        times = [time.perf_counter()]
        loss = model(**batch).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        nn.utils.clip_grad_norm_(trained, training.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        yield dict(zip(("forward", "backward", "optimiser"), (b - a for a, b in zip(times, times[1:]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=OURS + OTHERS)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    examples = data.load_cldr().train
    batches = training.hashed_batches(examples, CPU)
    if options.method in OURS:
        model = wrapped(options.method)
        taken = training.training_steps(model, batches, steps=options.steps + 1, lr=0.02)
        steps = (step.seconds for step in taken)
    else:
        model = adapted(options.method).train(False)
        steps = plain_steps(model, batches)
    next(steps)
    parts = [Counter(next(steps)) for _ in range(options.steps)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({"steps": parts, "trained": trained, "peak_bytes": training.peak_memory(CPU)}))


if __name__ == "__main__":
    main()
