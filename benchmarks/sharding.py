"""Memory and communication of models in FSDP2's shards: computed from their shapes, and a check of the formulas.

    python benchmarks/sharding.py            # tables in Markdown for 7B, 70B and 405B: computed, no model is run
    python benchmarks/sharding.py --check    # two processes on the CPU train a small one: what they send and hold

fully_shard is applied to each layer, the embeddings, the head and the whole, and each gathers its parameters for
forward and again for backward, which recomputes the layers (activation checkpointing). The ways to train:

    hsaid   W0 in shards; theta, the multipliers and their optimizer on every rank; memory="block"
    lora    W0 in shards, and LoRA of rank 16 for every linear layer, in float32, with its gradients and AdamW
    full    float32 weights, gradients and AdamW in shards, gathered in bfloat16
    bf16    the same with all of these in bfloat16
"""

import argparse
import inspect
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from results import FOLDER, load, pick
from shapes import Shapes, llama
from torch.utils._python_dispatch import TorchDispatchMode

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan

GB = 1e9
D = 16384  # trained values
RANK = 16  # of LoRA
MEASURED = FOLDER / "nvidia-h100-80gb-hbm3.json"
FLOPS = 0.4 * 989e12  # of an H100 in bfloat16 at 40% of its peak
POWERS = [2**k for k in range(10)]
METHODS = {"hsaid": "H-SAID", "lora": f"LoRA r={RANK}", "full": "full, float32", "bf16": "full, bfloat16"}


@dataclass
class Model:
    """hidden sizes and counts as in config.json; the step of a rank has `tokens` tokens, of `nbytes` a value."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tokens: int = 4096
    nbytes: int = 2

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    def shapes(self) -> Shapes:
        return llama(self.vocabulary, self.hidden, self.inner, self.kv, self.layers)


# huggingface.co/meta-llama: Llama-2-7b-hf, Llama-3.1-70B, Llama-3.1-405B (as corrected to 8 heads for keys and values)
MODELS = {
    "7B": Model(4096, 32, 32, 32, 11008, 32000),
    "70B": Model(8192, 80, 64, 8, 28672, 128256),
    "405B": Model(16384, 126, 128, 8, 53248, 128256),
}
SMALL = Model(1024, 8, 16, 4, 2816, 8192, tokens=64, nbytes=4)  # of the check


def block(name: str) -> str:
    """What is gathered together with a tensor."""
    return ".".join(name.split(".")[:3]) if ".layers." in name else "norm" if ".norm." in name else name


class Step:
    """What a training step of a model holds and sends."""

    def __init__(self, model: Model, dim: int = D):
        self.model, self.dim = model, dim
        plan = Plan(model.shapes(), dim, normalize="global")
        names: dict[str, list[str]] = {}
        for name in plan.names:
            names.setdefault(block(name), []).append(name)
        self.blocks = [plan.select(own).numel for own in names.values()]  # in the order in which they run
        self.weights = sum(math.prod(shape) for shape in plan.shapes.values())
        linear = [shape for name, shape in plan.shapes.items() if ".layers." in name and len(shape) == 2]
        self.lora = RANK * sum(map(sum, linear))

    @property
    def gathered(self) -> float:
        """The block that runs, and the next one."""
        return max(a + b for a, b in zip(self.blocks, self.blocks[1:])) * self.model.nbytes

    @property
    def largest(self) -> float:
        """Weights of the largest block, or their gradients. Of the embeddings H-SAID makes the rows that it needs."""
        return max(self.blocks[1:]) * self.model.nbytes

    @property
    def trained(self) -> float:
        """theta and the multipliers with gradients and AdamW's moments."""
        return 16 * self.dim

    @property
    def activations(self) -> float:
        """The input of each layer, all of one layer or what the loss takes: logits, as float32, and their gradient."""
        m = self.model
        inside = (7 * m.hidden + 3 * m.kv + 4 * m.inner) * m.nbytes
        return m.tokens * (m.layers * m.hidden * m.nbytes + max(inside, m.vocabulary * (m.nbytes + 4 + 4)))

    def memory(self, method: str, ranks: int, workspace: float = 0.0) -> float:
        """Bytes on each rank at the peak."""
        b, lora_block = self.model.nbytes, self.lora / self.model.layers
        if method == "hsaid":
            own = self.weights * b / ranks + self.gathered + 2 * self.largest + self.trained + workspace
        elif method == "lora":
            own = (self.weights * b + self.lora * 16) / ranks + self.gathered + 4 * lora_block * b
        else:
            # The gradients of a block, and those of the one before, which are being averaged.
            state = 16 if method == "full" else 8
            own = self.weights * state / ranks + 2 * self.gathered
        return own + self.activations

    def sent(self, method: str, ranks: int) -> float:
        """Bytes that each rank sends in a step, and receives: in a ring, a part of all but its own share."""
        gather = self.weights * self.model.nbytes
        lora = self.lora * self.model.nbytes
        whole = {"hsaid": 2 * gather + 2 * 4 * self.dim, "lora": 2 * gather + 3 * lora}.get(method, 3 * gather)
        return whole * (ranks - 1) / ranks


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(ranks: tuple[int, ...]) -> str:
    steps = {name: Step(model) for name, model in MODELS.items()}
    about, measured = load(MEASURED)
    choice = {"what": "projection", "backend": "cuda", "dtype": "bfloat16", "diagonal": "gaussian", "d": D}
    (row,) = pick(measured, **choice)
    workspace, mbert = row["workspace_MB"] * 1e6, 177_854_978
    seconds = (2 * row["forward_ms"] + row["adjoint_ms"]) / 1e3 / mbert  # of a weight in a step, on every rank

    def gb(value: float) -> str:
        return f"{value / GB:,.1f}" if value < 100 * GB else f"{value / GB:,.0f}"

    def fits(value: float) -> str:
        return f"**{gb(value)}**" if value < 80 * GB else gb(value)

    rows = {
        name: [f"{s.weights:,}", *map(gb, (s.gathered, s.largest, s.largest, s.activations)), f"{s.trained / 1e9:.4f}"]
        for name, s in steps.items()
    }
    parts = ["weights", "two blocks of W0", "weights of one", "their gradients", "activations", "trained"]

    def needed(s: Step, n: int) -> list[float]:
        return [s.memory(method, n, workspace * (method == "hsaid")) for method in METHODS]

    memory = [
        [name, f"{n}", gb(s.weights * s.model.nbytes / n), *map(fits, needed(s, n))]
        for name, s in steps.items()
        for n in ranks
    ]
    fewest = [
        [name, *(f"{next(n for n in POWERS if needed(s, n)[i] < 80 * GB)}" for i in range(len(METHODS)))]
        for name, s in steps.items()
    ]
    sent = []
    for name, s in steps.items():
        compute, projection = 8 * s.weights * s.model.tokens / FLOPS, seconds * s.weights
        each = [gb(s.sent(method, ranks[-1])) for method in ("hsaid", "lora", "bf16")]
        sent.append([name, *each, f"{projection:.2f}", f"{compute:.2f}", f"{projection / compute:.0%}"])
    tokens = MODELS["7B"].tokens
    return "\n\n".join(
        [
            f"Computed: what H-SAID holds on each rank beside its shard of W0, in GB; {tokens:,} tokens on each rank.",
            table(["", *parts], [[name, *row] for name, row in rows.items()]),
            "Computed: all in all, in GB on each rank. Bold is what is less than 80 GB.",
            table(["", "GPUs", "its shard of W0", *METHODS.values()], memory),
            "Computed: the fewest GPUs of 80 GB, a power of two.",
            table(["", *METHODS.values()], fewest),
            f"Computed: GB that each of {ranks[-1]} ranks sends in a step; and seconds of the projection, at the rates "
            f"that were measured on an {about['gpu']}, and of the model, at 40% of its 989 TFLOP/s in bfloat16.",
            table(["", "H-SAID", METHODS["lora"], "full", "projection, s", "the model, s", "ratio"], sent),
        ]
    )


# --- the check

OPS = ("fastfood_forward", "fastfood_adjoint")


class Counted(TorchDispatchMode):
    """What this rank does in a step.

    sent  {collective: bytes that it sends}
    made  {op: weights that are projected, or whose gradients are}
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}
        self.made = dict.fromkeys(OPS, 0)

    def __enter__(self):
        self.ops = {name: getattr(ops, name) for name in self.made}
        for name, op in self.ops.items():
            setattr(ops, name, partial(self.project, name, op))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for name, op in self.ops.items():
            setattr(ops, name, op)

    def project(self, name, op, plan, *args, **kwargs):
        given = inspect.signature(op).bind(plan, *args, **kwargs).arguments
        listed = given.get("listed")
        self.made[name] += plan.numel if listed is None else len(listed) * given["span"] * plan.width
        return op(plan, *args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            if name == "allreduce_":
                nbytes = 2 * sum(tensor.nbytes for tensor in args[0])  # reduced, then gathered
            else:
                nbytes = {"_allgather_base_": args[0], "_reduce_scatter_base_": args[1]}[name].nbytes
            self.sent[name] = self.sent.get(name, 0) + nbytes * share
        return func(*args, **kwargs or {})


def resident(key: str) -> int:
    """VmRSS, bytes of this process in memory, or VmHWM, at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Bytes at the peak above what there was before."""
    found: dict[str, int] = {}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    yield found
    found["bytes"] = resident("VmHWM") - before


def train(rank: int, ranks: int, method: str, folder: str, model: Model) -> None:
    """Three steps; leaves what the last one sent."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{method}", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        use_cache=False,
    )
    with peak() as memory:
        with torch.device("meta"):
            network = LlamaForCausalLM(config)
        assert {name: tuple(p.shape) for name, p in network.named_parameters()} == model.shapes()
        inner = network.model
        for module in (inner.embed_tokens, *inner.layers, network.lm_head, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        network.to_empty(device="cpu")
        inner.rotary_emb.inv_freq.copy_(type(inner.rotary_emb)(config).inv_freq)
        torch.manual_seed(rank)
        for parameter in network.parameters():
            parameter.to_local().detach().normal_(std=0.02)
        getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()
        trained = network if method == "full" else HSAID(network, 1000, memory="block")
        trained.train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
        for counted in (nullcontext(), nullcontext(), Counted()):
            with counted:
                ids = torch.randint(model.vocabulary, (1, model.tokens))
                trained(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    found = {"sent": sum(counted.sent.values()), "peak": memory["bytes"]} | counted.made
    Path(folder, f"{method}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def check(ranks: int = 2, model: Model = SMALL, within: float = 0.15) -> str:
    """Raises AssertionError where the formulas do not hold, that of memory `within` this part."""
    # A thread for each process, and freed memory goes back at once.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    step, rows, sent = Step(model, 1000), [], {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment):
        for method in ("hsaid", "full"):
            torch.multiprocessing.spawn(train, (ranks, method, folder, model), ranks)
            found = [json.loads(Path(folder, f"{method}-{rank}.json").read_text()) for rank in range(ranks)]
            sent[method], peak = found[0]["sent"], max(rank["peak"] for rank in found)
            expected, memory = step.sent(method, ranks), step.memory(method, ranks)
            assert all(rank["sent"] == sent[method] for rank in found)
            assert math.isclose(sent[method], expected, rel_tol=1e-6), (sent, expected)
            assert math.isclose(peak, memory, rel_tol=within), (peak, memory)
            made = [f"{found[0][op] / step.weights:.2f}" for op in OPS]
            megabytes = [f"{value / 1e6:,.1f}" for value in (sent[method], expected, peak, memory)]
            rows.append([METHODS[method], *megabytes, *made])
    ratio = sent["hsaid"] / sent["full"]
    assert ratio <= 0.67, ratio
    head = ["", "sent, MB", "computed", "peak, MB", "computed", "projected / weights", "adjoint / weights"]
    title = (
        f"Measured: a Llama of {step.weights:,} weights in float32, {ranks} processes, gloo. Sent: {ratio:.4f} of full."
    )
    return f"{title}\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 8, 64, 512), metavar="N", help="GPUs")
    parser.add_argument("--check", action="store_true", help="train a small model in two processes")
    options = parser.parse_args()
    print(check() if options.check else tables(tuple(options.ranks)))


if __name__ == "__main__":
    main()
