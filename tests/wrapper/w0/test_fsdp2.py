"""Models that FSDP2 has sharded, in two and three processes over gloo: as one process to rounding, and little is sent.

Run as a script, this file is one of the processes.
"""

import collections
import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ENVIRONMENT
from models import bert, moved, relative
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper.checkpoint.files import read_config
from hsaid_kernels.wrapper.weights import launches

# Neither 3 divides 50 rows of words, nor 16 positions, nor 20 columns; 2 labels are fewer than 3 ranks.
SIZES = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3)
D, STEPS = 90, 3
SECONDS = 300


def model() -> nn.Module:
    torch.manual_seed(0)
    return bert(**SIZES).eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    return [(torch.randint(50, (12, 7)), torch.randint(2, (12,))) for _ in range(STEPS)]


def train(hsaid: HSAID, rows: slice, accumulate: bool = False, autocast: bool = False) -> list[float]:
    optimizer, losses = torch.optim.SGD(hsaid.parameters(), lr=0.5, momentum=0.9), []
    for ids, labels in batches():
        ids, labels = ids[rows], labels[rows]
        halves = [slice(0, None, 2), slice(1, None, 2)] if accumulate else [slice(None)]
        total = 0.0
        for half in halves:
            with torch.autocast("cpu", enabled=autocast):
                loss = hsaid(ids[half], labels=labels[half]).loss / len(halves)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


# --- in the processes


def sharded(kind: str = "layers") -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole, world = model(), dist.get_world_size()
    hybrid = dict(mesh_shape=(world, 1), mesh_dim_names=("replicate", "shard"))
    options = dict(mesh=init_device_mesh("cpu", **hybrid if kind == "hybrid" else dict(mesh_shape=(world,))))
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if kind != "root":
        for layer in whole.bert.encoder.layer:
            fully_shard(layer, **options)
    fully_shard(whole, **options)
    return whole


def wrapped(kind: str = "layers", **options) -> HSAID:
    return HSAID(sharded(kind), D, memory="block", **options)


class Sent:
    """Counts values that this one of two ranks sends, by the kind of the collective."""

    # An all-gather sends the rank's shard, a reduce-scatter the half of all gradients that are the other rank's. The
    # names are those of torch 2.13 and before.
    NAMES = {
        "gather": ("all_gather_single", "all_gather_into_tensor"),
        "scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
        "reduce": ("all_reduce",),
    }

    def __init__(self):
        self.values: dict[str, float] = collections.Counter()
        for kind, names in self.NAMES.items():
            for name in filter(lambda name: hasattr(dist, name), names):
                setattr(dist, name, self._counted(kind, getattr(dist, name)))

    def _counted(self, kind, collective):
        def call(*args, **kwargs):
            sizes = [value.numel() for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.values[kind] += max(sizes) / 2 if kind == "scatter" else min(sizes)
            return collective(*args, **kwargs)

        return call


def run_training(rank: int, world: int, folder: str, kind: str) -> dict:
    options = dict(train_fully="classifier") if kind == "layers" else {}
    hsaid = wrapped("layers" if kind in ("accumulated", "checkpointed", "autocast") else kind, **options)
    if kind == "checkpointed":
        hsaid.model.activation_checkpointing_enable()
        hsaid.train()
        for module in hsaid.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    losses = train(hsaid, slice(rank, None, world), kind == "accumulated", kind == "autocast")
    assert all(parameter.grad is None for parameter in hsaid.model.parameters())
    with torch.no_grad():
        logits = hsaid.eval()(batches()[0][0]).logits
        weights = {name: weight.clone() for name, weight in hsaid.weights().items()}
    if rank == 0:
        hsaid.save_pretrained(f"{folder}/checkpoint")
    trained = {name: p.detach() for name, p in hsaid.named_parameters()}
    return {"losses": losses, "trained": trained, "logits": logits, "weights": weights}


def run_resharded(rank: int, world: int, folder: str, kind: str) -> dict:
    """Loads a checkpoint of another number of ranks."""
    hsaid = HSAID.from_pretrained(f"{folder}/checkpoint", sharded(kind), memory="block")
    with torch.no_grad():
        return {"logits": hsaid(batches()[0][0]).logits, "weights": dict(hsaid.weights())}


def run_counting(rank: int, world: int, folder: str, kind: str) -> dict:
    counts = {}
    for what in ("full", "hsaid"):
        trained = sharded() if what == "full" else wrapped()
        trained.train()
        (ids, labels), *_ = batches()
        trained(ids, labels=labels).loss.backward()  # lazy initialization
        sent = Sent()
        trained(ids, labels=labels).loss.backward()
        counts[what] = dict(sent.values)
    return counts


def run_refusals(rank: int, world: int, folder: str, kind: str) -> dict:
    def refusal(function) -> str:
        try:
            function()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    (ids, labels), *_ = batches()
    said = {}
    said["step"] = refusal(lambda: HSAID(sharded(), D))
    said["seed"] = refusal(lambda: HSAID(sharded(), D, seed=rank, memory="block")(ids))
    hsaid = wrapped()
    said["merge"] = refusal(hsaid.merge)
    with torch.no_grad():
        if rank == 1:
            hsaid.theta.add_(1.0)
    said["theta"] = refusal(lambda: hsaid(ids))
    hsaid = wrapped()
    hsaid(ids)
    hsaid.add_task("other")
    hsaid.set_task("other")
    with torch.no_grad():
        hsaid.multipliers.add_(float(rank))
    said["task"] = refusal(lambda: hsaid(ids))
    hybrid = wrapped("hybrid", seed=rank)
    said["hybrid"] = refusal(lambda: hybrid(ids))
    hsaid = wrapped()
    train(hsaid, slice(None))
    with torch.no_grad():
        hsaid.model.bert.encoder.layer[1].output.dense._parameters["weight"].mul_(2.0)
    said["w0"] = refusal(lambda: hsaid(ids))
    said["changed"] = refusal(lambda: setattr(hsaid.model.bert, "extra", nn.Linear(2, 2)))
    hsaid = wrapped()
    if rank == 0:  # alone, as for a log
        said["read"] = refusal(lambda: hsaid.model.classifier.weight.norm())
        said["dtype"] = refusal(lambda: hsaid.model.classifier.weight.dtype)
    loss = hsaid(ids, labels=labels).loss
    plain = hsaid.unwrap()
    said["late"] = refusal(loss.backward)
    said["left"] = str(
        [any("_hsaid" in vars(m) for m in plain.modules()), all(p.requires_grad for p in plain.parameters())]
    )
    hsaid = HSAID(plain, D, memory="block")
    with hsaid.unwrapped() as plain:
        said["unwrapped"] = refusal(lambda: plain(ids, labels=labels).loss.backward())
    said["wrapped again"] = refusal(lambda: hsaid(ids, labels=labels).loss.backward())
    return said


def run_elsewhere(rank: int, world: int, folder: str, kind: str) -> dict:
    """Gradients where the HSAID itself is not called, and after a change of the task; saving after unwrapped()."""
    (ids, labels), *_ = batches()
    ids, labels = ids[rank::world], labels[rank::world]
    hsaid = wrapped(train_fully="classifier")
    found = {}
    for what, run in {
        "model": lambda: hsaid.model(ids, labels=labels).loss,
        "part": lambda: hsaid.model.bert(ids).pooler_output.square().mean(),
        "task": lambda: hsaid(ids, labels=labels).loss,
    }.items():
        if what == "task":
            hsaid.add_task("other")
            hsaid.set_task("other")
        run().backward()
        found[what] = {name: p.grad.clone() for name, p in hsaid.named_parameters() if p.grad is not None}
        with torch.no_grad():  # and the weights of now, outside of calls too
            before = hsaid.model.bert(ids).pooler_output
            hsaid.theta.sub_(hsaid.theta.grad, alpha=10.0)
            assert not torch.equal(hsaid.model.bert(ids).pooler_output, before)
        hsaid.zero_grad()
    attachment, looks = hsaid._source.attachment, []
    verified = attachment.verified
    attachment.verified = lambda: (looks.append(1), verified())[1]
    hsaid(ids, labels=labels).loss.backward()
    del attachment.verified
    assert (
        len(looks) == 1 and len(hsaid._source.maker.parts) > 3
    )  # a step looks at the whole model once, not for every block
    hsaid.zero_grad()
    loss = hsaid(ids, labels=labels).loss
    hsaid.model.tag = nn.Identity()  # the tree is looked at again, in backward
    loss.backward()
    with hsaid.unwrapped():
        pass
    if rank == 0:
        hsaid.save_pretrained(f"{folder}/after")
    return found


def run_dying(rank: int, world: int, folder: str, kind: str) -> dict:
    hsaid = wrapped()
    hsaid.save_pretrained(f"{folder}/before", is_main_process=rank == 0)
    (ids, labels), *_ = batches()
    for step in range(3):
        if rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        hsaid(ids, labels=labels).loss.backward()
    return {}


RUNS = {
    "training": run_training,
    "resharded": run_resharded,
    "counting": run_counting,
    "refusals": run_refusals,
    "elsewhere": run_elsewhere,
    "dying": run_dying,
}


def main(rank: str, world: str, port: str, folder: str, *runs: str) -> None:
    launches.SMALLEST_TABLE = 1
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://localhost:{port}",
        rank=int(rank),
        world_size=int(world),
        timeout=datetime.timedelta(seconds=20),
    )
    for run in runs:
        what, _, kind = run.partition("-")
        found = RUNS[what](int(rank), int(world), f"{folder}/{run}", kind)
        torch.save(found, f"{folder}/{run}/{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes end a process with an error that is on its way out


# --- the tests


def start(world: int, folder: Path, *runs: str) -> list[subprocess.Popen]:
    """Processes that do `runs` one after the other, "what-kind", each in a folder of its name."""
    for run in runs:
        (folder / run).mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    return [
        subprocess.Popen([sys.executable, __file__, str(rank), str(world), str(port), str(folder), *runs], **pipes)
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


def results(folder: Path, world: int = 2) -> list[dict]:
    """What the ranks of a run have left in its folder."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two processes have done all that is not about their number, or their end."""
    folder = tmp_path_factory.mktemp("two")
    trained = [f"training-{kind}" for kind, world in KINDS if world == 2] + ["training-mixed", "training-autocast"]
    finish(start(2, folder, *trained, "refusals-layers", "elsewhere-layers", "counting-layers"))
    return folder


@pytest.fixture(scope="module")
def three(two) -> Path:
    """As `two`, in three processes, which also load what two have saved."""
    shutil.copytree(two / "training-layers" / "checkpoint", two / "three" / "resharded-layers" / "checkpoint")
    finish(start(3, two / "three", "training-layers", "resharded-layers"))
    return two / "three"


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(launches, "SMALLEST_TABLE", 1)


KINDS = [("layers", 2), ("layers", 3), ("root", 2), ("hybrid", 2), ("accumulated", 2), ("checkpointed", 2)]


@pytest.mark.parametrize("kind, world", KINDS)
def test_trains_as_one_process(kind, world, request):
    one = HSAID(model(), D, **(dict(train_fully="classifier") if kind == "layers" else {}))
    losses = train(one, slice(None))
    with torch.no_grad():
        logits = one(batches()[0][0]).logits
    folder = request.getfixturevalue("two" if world == 2 else "three") / f"training-{kind}"
    ranks = results(folder, world)
    mean = [sum(of_step) / world for of_step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert mean == pytest.approx(losses, rel=1e-5)
    for rank in ranks:
        for name, value in rank["trained"].items():
            assert torch.equal(value, ranks[0]["trained"][name]), name
            assert relative(value, dict(one.named_parameters())[name]) <= 1e-4, name
        assert relative(rank["logits"], logits) <= 1e-4
        assert all(map(torch.equal, rank["weights"].values(), ranks[0]["weights"].values()))
    files = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert files == ["hsaid.safetensors", "hsaid_config.json"]
    loaded = HSAID.from_pretrained(folder / "checkpoint", model())
    assert read_config(folder / "checkpoint")["w0_checks"] == loaded.w0_checks()  # or loading would warn
    with torch.no_grad():
        weights = loaded.weights()
        assert all(torch.equal(weights[name], value) for name, value in ranks[0]["weights"].items())
        assert torch.equal(loaded(batches()[0][0]).logits, ranks[0]["logits"])
        (table,) = loaded.padding_rows
        assert torch.equal(ranks[0]["weights"][table][0], loaded.w0()[table][0])


def test_a_checkpoint_of_two_ranks_loads_into_three(two, three):
    saved, *_ = results(two / "training-layers")
    for rank in results(three / "resharded-layers", 3):
        assert all(torch.equal(saved["weights"][name], value) for name, value in rank["weights"].items())
        assert torch.equal(rank["logits"], saved["logits"])


@pytest.mark.parametrize("kind", ["mixed", "autocast"])
def test_lower_precision(kind, two):
    """As an unsharded bfloat16 model, or one under autocast, whose steps are rounded at other places."""
    one = HSAID(model().bfloat16() if kind == "mixed" else model(), D)
    losses = train(one, slice(None), autocast=kind == "autocast")
    ranks = results(two / f"training-{kind}")
    mean = [sum(of_step) / 2 for of_step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert mean == pytest.approx(losses, rel=2e-2)
    assert all(torch.equal(value, ranks[0]["trained"][name]) for name, value in ranks[1]["trained"].items())


def test_only_what_is_trained_is_reduced(two):
    """FSDP2 gathers twice and reduces gradients of all weights once; with HSAID it only gathers."""
    for counts in results(two / "counting-layers"):
        full, hsaid = counts["full"], counts["hsaid"]
        assert full["scatter"] > 0 and "scatter" not in hsaid
        assert 0 < hsaid["gather"] <= full["gather"] and hsaid["reduce"] <= D
        assert sum(hsaid.values()) / sum(full.values()) <= 0.67


def test_what_is_refused(two):
    expected = {
        "step": 'ValueError: memory: expected "block" for a model that FSDP2 (fully_shard) has sharded',
        "seed": "ValueError: seed: expected the same on all ranks, got 0 on rank 0, 1 on rank 1",
        "merge": "RuntimeError: merge(): expected a whole model, got one that FSDP2 has sharded",
        "theta": "ValueError: theta: expected the same values on all ranks, got others on rank 1",
        "task": "ValueError: theta: expected the same values on all ranks, got others on rank 1",
        "hybrid": "ValueError: seed: expected the same on all ranks, got 0 on rank 0, 1 on rank 1",
        "w0": "RuntimeError: model: expected W0 to stay as it is while the model is sharded, got "
        "'bert.encoder.layer.1.output.dense.weight' changed",
        "changed": "ValueError: model: expected 'extra'",
        "late": "RuntimeError: backward(): expected a call before unwrap()",
        "left": "[False, True]",
        "unwrapped": "none",
        "wrapped again": "none",
    }
    first, second = results(two / "refusals-layers")
    alone = (
        "RuntimeError: model: expected weights in shards to be read while the model runs, got a read of 'classifier.we"
    )
    assert first.pop("read").startswith(alone) and first.pop("dtype").startswith(alone)
    assert second.keys() == first.keys()
    for said in (first, second):
        for what, message in expected.items():
            assert said[what].startswith(message), (what, said[what])


def test_gradients_are_averaged_wherever_the_model_is_run(two):
    ranks = results(two / "elsewhere-layers")
    for what, gradients in ranks[0].items():
        assert gradients["theta"].any() and len(gradients) >= (2 if what == "part" else 4)
        assert all(torch.equal(value, ranks[1][what][name]) for name, value in gradients.items()), what
    assert (two / "elsewhere-layers" / "after" / "hsaid.safetensors").exists()


def test_a_rank_that_dies_ends_the_others(tmp_path):
    survivor, dead = start(2, tmp_path, "dying-layers")
    said, _ = survivor.communicate(timeout=SECONDS)
    dead.communicate(timeout=SECONDS)
    assert dead.returncode == -signal.SIGKILL and survivor.returncode not in (0, None)
    assert "Error" in said
    assert HSAID.from_pretrained(tmp_path / "dying-layers" / "before", model()).theta.isfinite().all()
    assert [path.name for path in (tmp_path / "dying-layers").iterdir()] == ["before"]


def test_tensors_of_another_kind_are_refused():
    class Partitioned(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight.ds_id = 0

    with pytest.raises(TypeError, match="'weight', which DeepSpeed's ZeRO-3 has partitioned"):
        HSAID(Partitioned(), 12)
    moved(HSAID(model(), D, memory="block"))  # which needs no processes


if __name__ == "__main__":
    main(*sys.argv[1:])
