"""Accelerate prepares an HSAID, accumulates its gradients, and saves and loads its state."""

from pathlib import Path

import pytest
import torch
from models import IDS, bert, same, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from hsaid_kernels import HSAID

accelerate = pytest.importorskip("accelerate")

ROWS = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": torch.tensor(i % 2)} for i in range(32)]


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps the precision of the first Accelerator for all of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """The loop of Accelerate's documentation, whose state is saved after half of it, and can be loaded there."""

    def __init__(self, directory: Path, load: bool = False, batch_size: int = 8, dropout: bool = True, **options):
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = HSAID(bert(), 60)  # the one line that is changed
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        self.before = snapshot(model.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
        loader = DataLoader(ROWS, batch_size=batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=12)
        self.model, optimizer, loader, schedule = self.accelerator.prepare(model, optimizer, loader, schedule)
        if load:
            self.accelerator.load_state(str(directory))
        self.losses: list[float] = []
        self.steps = 0
        for epoch in range(2 if load else 0, 4):
            for batch in loader:
                with self.accelerator.accumulate(self.model):
                    loss = self.model(**batch).loss
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                        self.steps += 1
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                self.losses.append(loss.item())
            if epoch == 1 and not load:
                self.accelerator.save_state(str(directory))
        self.rate = schedule.get_last_lr()
        self.hsaid = self.accelerator.unwrap_model(self.model)


def test_trains(tmp_path):
    run = Run(tmp_path)
    assert isinstance(run.hsaid, HSAID) and run.steps == len(run.losses) == 16
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert same(run.hsaid.model.state_dict(), run.before)
    batch = next(iter(DataLoader(ROWS, batch_size=8)))
    run.model.eval()
    assert torch.equal(run.model(**batch).logits, run.hsaid.merge()(**batch).logits)


def test_resuming_continues_bit_for_bit(tmp_path):
    """With the dropout that would have been drawn."""
    whole = Run(tmp_path)
    resumed = Run(tmp_path, load=True)
    assert resumed.losses == whole.losses[8:] and resumed.rate == whole.rate
    assert same(resumed.hsaid.state_dict(), whole.hsaid.state_dict()) and resumed.hsaid.theta.all()
    fresh = HSAID.from_pretrained(tmp_path, resumed.hsaid.unwrap())  # of the moment when it was saved
    assert fresh.theta.any() and not torch.equal(fresh.theta, whole.hsaid.theta)


def test_accumulating_gradients_is_a_larger_batch(tmp_path):
    large = Run(tmp_path, dropout=False)
    parts = Run(tmp_path, dropout=False, batch_size=4, gradient_accumulation_steps=2)
    assert parts.steps == large.steps == 16 and len(parts.losses) == 32
    assert torch.allclose(parts.hsaid.theta, large.hsaid.theta, atol=1e-4) and large.hsaid.theta.all()
    single = Run(tmp_path, dropout=False, batch_size=4)
    assert not torch.allclose(single.hsaid.theta, large.hsaid.theta, atol=1e-2)


def test_mixed_precision(tmp_path):
    exact = Run(tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    run = Run(tmp_path, mixed_precision="bf16")
    assert run.hsaid.theta.dtype == torch.float32 and not torch.equal(run.hsaid.theta, exact.hsaid.theta)
    assert run.losses[-1] < 0.7 * run.losses[0] and same(run.hsaid.model.state_dict(), run.before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_copy_of_what_is_prepared_runs_itself(precision):
    """With mixed precision Accelerate sets a forward of its own on the HSAID."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    hsaid = accelerator.prepare(HSAID(bert().eval(), 60))
    average = AveragedModel(hsaid)
    batch = next(iter(DataLoader(ROWS, batch_size=8)))
    with torch.no_grad():
        before = average(**batch).logits
        hsaid.theta.fill_(1.0)
        assert torch.equal(average(**batch).logits, before) and not torch.allclose(hsaid(**batch).logits, before)
        average.module.theta.fill_(1.0)
        assert torch.equal(average(**batch).logits, hsaid(**batch).logits)


def test_the_model_is_saved_alone(tmp_path):
    """`save_model` and `get_state_dict` have what is trained, and what `from_pretrained` reads."""
    run = Run(tmp_path / "state")
    run.accelerator.save_model(run.model, tmp_path / "model")
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 10_000
    torch.manual_seed(0)
    loaded = HSAID.from_pretrained(tmp_path / "model", bert())
    assert same(loaded.merge().state_dict(), run.hsaid.merge().state_dict())
    assert same(run.accelerator.get_state_dict(run.model), run.hsaid.state_dict())


# --- weights that Accelerate offloads


def offloaded(model: nn.Module, how: str, directory: Path) -> nn.Module:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, "cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, directory, "cpu")
    places = {name.rpartition(".")[0]: "cpu" for name, _ in model.named_parameters()}
    places |= {name: "disk" for name in places if ".layer.0." in name}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=directory)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("memory", ["step", "block"])
def test_an_offloaded_model_is_refused(tmp_path, how, memory):
    model = offloaded(bert(), how, tmp_path)
    with pytest.raises(ValueError, match=r"hooks of accelerate offload \(cpu_.* whole .* or name .* in exclude="):
        HSAID(model, 60, memory=memory)
    torch.manual_seed(0)
    assert torch.equal(model.eval()(IDS).logits, bert().eval()(IDS).logits)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloading_a_wrapped_model_is_refused(tmp_path, how):
    model = bert().eval()
    expected = model(IDS).logits
    hsaid = HSAID(model, 60)
    with torch.no_grad():
        hsaid.theta.fill_(1.0)
    with pytest.raises(RuntimeError, match="to keep its values, got a tensor on the meta device, .* of accelerate"):
        offloaded(model, how, tmp_path)
        hsaid(IDS)
    assert torch.equal(hsaid.unwrap()(IDS).logits, expected)


def test_offloading_an_hsaid_is_refused():
    hsaid = HSAID(bert().eval(), 60)
    with torch.no_grad():
        hsaid.theta.fill_(1.0)
    expected = hsaid(IDS).logits
    with pytest.raises(ValueError, match="theta: expected a tensor with values, .*remove_hook_from_module"):
        accelerate.cpu_offload(hsaid, "cpu")
        hsaid(IDS)
    accelerate.hooks.remove_hook_from_module(hsaid, recurse=True)
    assert torch.equal(hsaid(IDS).logits, expected)


@pytest.mark.parametrize("memory", ["step", "block"])
def test_what_is_left_out_may_be_offloaded(tmp_path, memory):
    """Gradients go through it, and theta's are the same bits as where it is in memory."""
    grads = []
    for place in (lambda model: model, lambda model: offloaded(model, "dispatch_model", tmp_path)):
        torch.manual_seed(0)
        hsaid = HSAID(place(bert(num_hidden_layers=2).eval()), 60, exclude=r"layer\.0", memory=memory)
        with torch.no_grad():
            hsaid.theta.fill_(1.0)
        for _ in range(2):
            hsaid(**next(iter(DataLoader(ROWS, batch_size=8)))).loss.backward()
        grads.append(hsaid.theta.grad)
    assert torch.equal(*grads) and grads[0].all()
