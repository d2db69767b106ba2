"""An HSAID in the training loop of timm, with its optimizers, schedules, averages, checkpoints and BatchNorm."""

import copy
from pathlib import Path

import pytest
import torch
from models import same
from torch import Tensor, nn

from hsaid_kernels import HSAID

timm = pytest.importorskip("timm")
losses = pytest.importorskip("timm.loss")
factories = pytest.importorskip("timm.optim")
schedules = pytest.importorskip("timm.scheduler")
utils = pytest.importorskip("timm.utils")

generator = torch.Generator().manual_seed(0)
LABELS = torch.arange(32) % 2
IMAGES = torch.randn(32, 3, 32, 32, generator=generator) * 0.5 + (LABELS.float() - 0.5).view(-1, 1, 1, 1)
LOADER = [(IMAGES[i : i + 8], LABELS[i : i + 8]) for i in range(0, 32, 8)]


def net(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=2)


def wrapped(name: str = "test_resnet", **options) -> HSAID:
    return HSAID(net(name), 120, **options)  # the one line that is changed


class Run:
    """What timm's train.py does in an epoch, without its data sets and logs."""

    def __init__(self, model: nn.Module, average: nn.Module | None = None, **optimizer):
        self.model, self.average = model, average
        self.optimizer = factories.create_optimizer_v2(model, **(dict(opt="adamw", lr=0.05) | optimizer))
        self.schedule, self.epochs = schedules.create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=3, min_lr=1e-3, updates_per_epoch=len(LOADER)
        )
        self.scaler = utils.NativeScaler("cpu")
        self.criterion = losses.LabelSmoothingCrossEntropy(0.1)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def train(self, epochs: range = range(3)) -> "Run":
        for epoch in epochs:
            self.model.train()
            for index, (images, labels) in enumerate(LOADER):
                loss = self.criterion(self.model(images), labels)
                parameters = timm.models.model_parameters(self.model, exclude_head=False)
                self.scaler(loss, self.optimizer, clip_grad=1.0, clip_mode="norm", parameters=parameters)
                self.optimizer.zero_grad()
                updates = epoch * len(LOADER) + index + 1
                if self.average is not None:
                    self.average.update(self.model, **self.step(updates))
                self.schedule.step_update(updates)
                self.losses.append(loss.item())
                self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.schedule.step(epoch + 1)
        return self

    def step(self, updates: int) -> dict[str, int]:
        return {"step": updates} if isinstance(self.average, utils.ModelEmaV3) else {}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize("options", [{}, {"train_fully": "fc"}])
def test_trains(options):
    hsaid = wrapped(**options)
    before, first = parameters(hsaid.model), statistics(hsaid.model)
    run = Run(hsaid).train()
    assert run.losses[-1] < 0.8 * run.losses[0] and run.rates[-1] < 0.5 * run.rates[0]
    assert hsaid.theta.all() and same(parameters(hsaid.model), before)
    assert hsaid.model.get_buffer("conv1.1.num_batches_tracked") == 12 != first["conv1.1.num_batches_tracked"]
    merged = hsaid.merge()
    assert type(merged) is type(net()) and torch.equal(outputs(hsaid), outputs(merged))
    assert same(statistics(merged), statistics(hsaid.model))


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_other_architectures_train(name):
    hsaid = wrapped(name)
    before = parameters(hsaid.model)
    run = Run(hsaid, lr=0.02).train()
    assert min(run.losses[-4:]) < 0.98 * run.losses[0] and same(parameters(hsaid.model), before)
    assert torch.equal(outputs(hsaid), outputs(hsaid.merge())) and not torch.equal(outputs(hsaid), outputs(net(name)))


@pytest.mark.parametrize("opt", ["sgd", "lamb", "lookahead_radam", "adafactor", "lion", "muon"])
def test_its_optimizers_decay_no_multiplier(opt):
    """timm's factory decays no vectors, which theta and the multipliers are. A step of any of them moves both."""
    hsaid = wrapped()
    run = Run(hsaid, opt=opt, lr=1e-2, weight_decay=0.5)
    decayed = [p for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not decayed and held == {id(hsaid.theta), id(hsaid.multipliers)}
    run.train(range(1))
    assert hsaid.theta.any() and not torch.equal(hsaid.multipliers, torch.ones_like(hsaid.multipliers))


def test_its_optimizers_take_our_groups():
    hsaid = wrapped(train_fully="fc")
    groups = hsaid.parameter_groups(lr_theta=0.05, lr_multipliers=0.01, lr_full=0.02, weight_decay=0.1)
    optimizer = factories.create_optimizer_v2(groups, opt="adamw", lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01, 0.02]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]


AVERAGES = {"V2": lambda model: utils.ModelEmaV2(model, decay=0.5), "V3": lambda m: utils.ModelEmaV3(m, decay=0.5)}


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_moving_average_of_what_is_trained(kind):
    """theta and the multipliers of the average follow those of the model; its W0 is the model's."""
    hsaid = wrapped()
    average, before = AVERAGES[kind](hsaid), parameters(hsaid.model)
    Run(hsaid, average).train()
    gap = (average.module.theta - hsaid.theta).norm() / hsaid.theta.norm()
    assert 0 < gap < 0.2 and same(parameters(average.module.model), before)
    assert torch.equal(outputs(average), outputs(average.module.merge()))
    assert not average.module.training and not torch.equal(outputs(average), outputs(hsaid))


@pytest.mark.parametrize("kind", AVERAGES)
def test_one_update_of_the_average_by_hand(kind):
    hsaid = wrapped()
    average = AVERAGES[kind](hsaid)
    Run(hsaid).train(range(1))
    average.update(hsaid)
    assert torch.allclose(average.module.theta, 0.5 * hsaid.theta, atol=1e-7) and hsaid.theta.all()
    assert torch.allclose(average.module.multipliers, 0.5 + 0.5 * hsaid.multipliers, atol=1e-7)
    average.set(hsaid)
    assert torch.equal(average.module.theta, hsaid.theta)


@pytest.mark.parametrize("kind", AVERAGES)
def test_the_average_of_the_statistics(kind):
    """BatchNorm's statistics are averaged as those of the plain model are, which timm writes by way of state_dict()."""
    hsaid, plain = wrapped(), net()
    averages = AVERAGES[kind](hsaid), AVERAGES[kind](plain)
    for model in (hsaid, plain):
        Run(model).train(range(1))
    plain.load_state_dict(statistics(hsaid.model), strict=False)
    for average, model in zip(averages, (hsaid, plain), strict=True):
        average.update(model)
    got, expected = statistics(averages[0].module.model), statistics(averages[1].module)
    assert expected["conv1.1.running_mean"].any() and same(got, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    """timm's own, by torch.utils.checkpoint: in backward the blocks are run again, on the same weights."""
    found, ran = [], []
    for checkpointing in (False, True):
        hsaid = wrapped("test_vit")
        hsaid.model.blocks[0].register_forward_pre_hook(lambda *_, which=checkpointing: ran.append(which))
        with torch.no_grad():
            hsaid.theta.normal_(generator=torch.Generator().manual_seed(1))
        hsaid.train().set_grad_checkpointing(checkpointing)
        nn.functional.cross_entropy(hsaid(IMAGES[:4].repeat(1, 1, 5, 5)), LABELS[:4]).backward()
        found.append((hsaid.theta.grad, hsaid.multipliers.grad))
    assert ran == [False, True, True]
    for one, other in zip(*found, strict=True):
        assert one.any() and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_trains_with_batch_norm():
    hsaid, plain = wrapped(), wrapped()
    hsaid.set_grad_checkpointing()
    before = parameters(hsaid.model)
    runs = Run(hsaid).train(range(1)), Run(plain).train(range(1))
    assert hsaid.model.grad_checkpointing and not plain.model.grad_checkpointing
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-3) and same(parameters(hsaid.model), before)


def saver(run: Run, directory: Path) -> "utils.CheckpointSaver":
    return utils.CheckpointSaver(
        run.model, run.optimizer, model_ema=run.average, amp_scaler=run.scaler, checkpoint_dir=str(directory)
    )


def test_resuming_continues_bit_for_bit(tmp_path):
    """By timm's own CheckpointSaver and resume_checkpoint, with the statistics of BatchNorm."""
    whole = Run(wrapped()).train(range(1))
    saver(whole, tmp_path).save_checkpoint(0, metric=1.0)
    kept = statistics(whole.model.model)
    whole.train(range(1, 3))

    resumed = Run(wrapped())
    path = str(tmp_path / "last.pth.tar")
    assert timm.models.resume_checkpoint(resumed.model, path, resumed.optimizer, resumed.scaler, log_info=False) == 1
    assert same(statistics(resumed.model.model), kept) and kept["conv1.1.running_mean"].any()
    resumed.schedule.step(1)
    resumed.train(range(1, 3))
    assert resumed.losses == whole.losses[4:]
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert torch.equal(outputs(resumed.model), outputs(whole.model))


def test_the_averages_checkpoint(tmp_path):
    hsaid = wrapped()
    run = Run(hsaid, utils.ModelEmaV3(hsaid, decay=0.5)).train(range(1))
    saver(run, tmp_path).save_checkpoint(0, metric=1.0)
    other = wrapped()
    timm.models.load_checkpoint(other, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert torch.equal(other.theta, run.average.module.theta) and not torch.equal(other.theta, hsaid.theta)
    assert torch.equal(outputs(other), outputs(run.average))


def test_our_checkpoint_has_the_statistics(tmp_path):
    hsaid = wrapped()
    Run(hsaid).train(range(1))
    hsaid.save_pretrained(tmp_path)
    loaded = HSAID.from_pretrained(tmp_path, net())
    assert same(statistics(loaded.model), statistics(hsaid.model))
    assert torch.equal(outputs(loaded), outputs(hsaid)) and not torch.equal(outputs(loaded), outputs(net()))


def test_unwrapping_gives_the_first_statistics_back():
    model = net()
    before = copy.deepcopy(model.state_dict())
    hsaid = HSAID(model, 120)
    Run(hsaid).train(range(1))
    assert not same(statistics(model), statistics(net()))
    assert hsaid.unwrap() is model and same(model.state_dict(), before)


def test_its_methods_run_on_the_projected_weights():
    hsaid = wrapped()
    Run(hsaid).train(range(1))
    merged = hsaid.merge()
    for model in (hsaid, merged):
        model.eval()
    features = hsaid.forward_features(IMAGES)
    assert torch.equal(features, merged.forward_features(IMAGES))
    assert torch.equal(hsaid.forward_head(features), hsaid(IMAGES)) and hsaid.num_features == merged.num_features
    taken, others = (model.forward_intermediates(IMAGES, intermediates_only=True) for model in (hsaid, merged))
    assert all(map(torch.equal, taken, others)) and len(taken) == len(others) > 1
