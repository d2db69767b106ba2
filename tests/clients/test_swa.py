"""torch.optim.swa_utils averages what is trained of an HSAID, and makes the BatchNorm statistics of the average."""

import pytest
import torch
from models import same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from hsaid_kernels import HSAID

generator = torch.Generator().manual_seed(0)
LABELS = torch.arange(48) % 2
ROWS = torch.randn(48, 3, 6, 6, generator=generator) + LABELS.float().view(-1, 1, 1, 1)
LOADER = [(ROWS[i : i + 8], LABELS[i : i + 8]) for i in range(0, 48, 8)]


def net() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))


class Run:
    """The loop of torch's documentation: four epochs, of which the last three are averaged."""

    def __init__(self, model: nn.Module, **options):
        self.model, self.averaged = model, AveragedModel(model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        constant = SWALR(optimizer, swa_lr=0.02, anneal_epochs=1)
        self.losses: list[float] = []
        self.seen: list[list[Tensor]] = []  # the trained values after each averaged epoch
        self.rates: list[float] = []
        for epoch in range(4):
            for inputs, labels in LOADER:
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                self.losses.append(loss.item())
            if epoch > 0:
                self.averaged.update_parameters(model)
                self.seen.append([parameter.detach().clone() for parameter in model.parameters()])
                constant.step()
            else:
                schedule.step()
            self.rates.append(optimizer.param_groups[0]["lr"])

    def loss(self, model: nn.Module) -> float:
        with torch.no_grad():
            return cross_entropy(model.eval()(ROWS), LABELS).item()


def wrapped(**options) -> HSAID:
    return HSAID(net(), 80, **options)  # the one line that is changed


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"train_fully": "7"}])
def test_averages_what_is_trained(options):
    hsaid = wrapped(**options)
    before = parameters(hsaid.model)
    run = Run(hsaid)
    assert sum(run.losses[-6:]) < 0.5 * sum(run.losses[:6]) and run.rates[-1] == 0.02 != run.rates[0]
    assert same(parameters(hsaid.model), before)
    average = run.averaged.module
    for values, got in zip(zip(*run.seen, strict=True), average.parameters(), strict=True):
        assert torch.allclose(torch.stack(values).mean(0), got, atol=1e-6) and not torch.equal(values[-1], got)
    assert same(parameters(average.model), before) and average.model is not hsaid.model
    assert len(list(average.parameters())) == (4 if options else 2)


def test_the_statistics_of_the_average():
    """`update_bn` runs the average on its own projected weights, as it runs an ordinary model with these."""
    run = Run(wrapped())
    merged = run.averaged.module.merge()
    mine = {name: buffer.clone() for name, buffer in run.model.model.named_buffers()}
    update_bn(LOADER, run.averaged)
    update_bn(LOADER, merged)
    got = dict(run.averaged.module.model.named_buffers())
    assert same(got, dict(merged.named_buffers())) and got["1.num_batches_tracked"] == 6
    assert not torch.equal(got["1.running_mean"], mine["1.running_mean"])
    assert same(dict(run.model.model.named_buffers()), mine)
    assert torch.equal(run.averaged.eval()(ROWS), merged.eval()(ROWS))
    assert run.loss(run.averaged) == run.loss(run.averaged.module.merge()) < run.losses[0]


def test_a_moving_average_with_buffers():
    hsaid = wrapped()
    run = Run(hsaid, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for index, got in enumerate(run.averaged.module.parameters()):
        first, second, third = (values[index] for values in run.seen)
        assert torch.allclose(got, 0.25 * first + 0.25 * second + 0.5 * third, atol=1e-6)
    means = [dict(model.named_buffers())["1.running_mean"] for model in (run.averaged.module.model, hsaid.model)]
    assert means[0].any() and not torch.equal(*means)
    assert torch.equal(run.averaged.eval()(ROWS), run.averaged.module.merge().eval()(ROWS))


def test_the_average_is_saved_and_loaded(tmp_path):
    run = Run(wrapped())
    update_bn(LOADER, run.averaged)
    torch.save(run.averaged.state_dict(), tmp_path / "average.pt")
    other = AveragedModel(wrapped())
    other.load_state_dict(torch.load(tmp_path / "average.pt"))
    assert other.n_averaged == 3 and torch.equal(other.eval()(ROWS), run.averaged.eval()(ROWS))
    run.averaged.module.save_pretrained(tmp_path / "checkpoint")
    again = HSAID.from_pretrained(tmp_path / "checkpoint", net()).eval()
    assert torch.equal(again(ROWS), run.averaged(ROWS)) and not torch.equal(again(ROWS), run.model.eval()(ROWS))
