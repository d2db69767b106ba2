"""Two processes over gloo: only what is trained is reduced, both ranks stay the same, ranks that differ are named.

Run as a script, this file is one of the two processes.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import bert
from processes import in_two_processes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hsaid_kernels import HSAID

KINDS = {"hsaid": dict(train_fully="classifier"), "did": dict(partition="did")}
DIFFERENT = {  # on each rank something else; what must be said
    "seed": (
        lambda rank: HSAID(bert(), 60, seed=rank),
        "seed: expected the same on all ranks, got 0 on rank 0, 1 on rank 1",
    ),
    "task": (
        lambda rank: HSAID(bert(), 60, task="ab"[rank]),
        "task: expected the same on all ranks, got 'a' on rank 0, 'b' on rank 1",
    ),
    "W0": (
        lambda rank: (torch.manual_seed(rank), HSAID(bert(), 60))[1],
        "model: expected the same W0 on all ranks, but 'bert.embeddings.word_embeddings.weight' on rank 1 is not",
    ),
}


def fresh(kind: str) -> HSAID:
    torch.manual_seed(0)
    return HSAID(bert().eval(), 60, **KINDS[kind])


def train(model: torch.nn.Module, rows: slice) -> list[float]:
    torch.manual_seed(1)
    ids, labels = torch.randint(50, (8, 6)), torch.arange(8) % 3 % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_in_parallel(kind: str, rank: int) -> dict:
    hsaid, reduced = fresh(kind), []
    ddp = DistributedDataParallel(hsaid)

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    losses = train(ddp, slice(rank, None, 2))
    tensors = {name: p.detach() for name, p in hsaid.named_parameters()}
    with torch.no_grad():
        return {"trained": tensors, "weights": hsaid.weights(), "losses": losses, "reduced": reduced}


class Normed(torch.nn.Module):
    """An HSAID with BatchNorm inside a larger module, as in a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hsaid = HSAID(
            torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)), 24
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hsaid(x)


def statistics(around: bool, rank: int) -> dict:
    """Each rank sees other values; DistributedDataParallel broadcasts rank 0's buffers before every forward pass."""
    module = Normed()
    ddp = DistributedDataParallel(module if around else module.hsaid)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)) + rank
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    ddp.eval()
    own = module.hsaid.model[1].running_mean.clone()
    ddp(x)
    return {"own": own, "after": module.hsaid.model[1].running_mean.clone(), "theta": module.hsaid.theta.detach()}


def two_tasks(rank: int) -> HSAID:
    hsaid = HSAID(bert(), 60, task="a")
    hsaid.add_task("b")
    return hsaid


def refusal(make, rank: int, compiled: bool = False, then=lambda rank, hsaid: None) -> str:
    hsaid = make(rank)
    ddp = DistributedDataParallel(torch.compile(hsaid, backend="aot_eager") if compiled else hsaid)
    then(rank, hsaid)
    if rank == 0 and not compiled:
        with torch.no_grad():  # a rank may evaluate alone
            ddp(torch.ones(1, 4, dtype=torch.long))
    try:
        ddp(torch.ones(1, 4, dtype=torch.long))
    except Exception as error:  # torch.compile has an exception of its own around ours
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    out = tmp_path_factory.mktemp("ranks")
    in_two_processes(__file__, str(out))
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process_with_the_doubled_batch(ranks, kind):
    first, second = (found[kind] for found in ranks)
    for what in ("trained", "weights"):
        for name, tensor in first[what].items():
            assert torch.equal(tensor, second[what][name]), name
    alone = fresh(kind)
    losses = train(alone, slice(None))
    assert first["trained"]["theta"].all() and first["losses"] != second["losses"]
    for name, parameter in alone.named_parameters():
        assert torch.allclose(first["trained"][name], parameter, atol=1e-5), name
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_is_reduced(ranks, kind):
    trained = sum(p.numel() for p in fresh(kind).parameters())
    assert trained == 60 + (2 * 16 + 2) * (kind == "hsaid")
    assert all(found[kind]["reduced"] == [trained] * 4 for found in ranks)


@pytest.mark.parametrize("around", [False, True])
def test_buffers_are_broadcast(ranks, around):
    first, second = (found[f"statistics {around}"] for found in ranks)
    assert not torch.equal(first["own"], second["own"]) and torch.equal(first["theta"], second["theta"])
    assert torch.equal(second["after"], first["own"]) and torch.equal(first["after"], first["own"])
    assert first["theta"].all()


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_named_at_the_first_step(ranks, what):
    assert all(found[what].startswith(DIFFERENT[what][1]) for found in ranks), ranks[0][what]


def test_a_task_that_one_rank_sets_later_is_named_on_both(ranks):
    """And neither waits for the other, which has been refused by itself."""
    assert all(found["later"].startswith(DIFFERENT["task"][1]) for found in ranks), ranks[0]["later"]


def test_ranks_that_differ_are_named_under_compilation_too(ranks):
    assert all(DIFFERENT["seed"][1] in found["compiled"] for found in ranks), ranks[0]["compiled"]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {kind: train_in_parallel(kind, rank) for kind in KINDS}
    found |= {what: refusal(make, rank) for what, (make, _) in DIFFERENT.items()}
    found |= {f"statistics {around}": statistics(around, rank) for around in (False, True)}
    found["later"] = refusal(two_tasks, rank, then=lambda rank, hsaid: hsaid.set_task("ab"[rank]))
    found["compiled"] = refusal(DIFFERENT["seed"][0], rank, compiled=True)
    torch.save(found, Path(sys.argv[1], f"{rank}.pt"))
    dist.destroy_process_group()
