"""What runs around a wrapped model and could only train theta wrongly, or keep old weights, is refused."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from models import mlp, moved
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hsaid_kernels import HSAID

X = torch.ones(2, 4)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "trace",
    [
        lambda model: torch.jit.trace(model, (X,)),
        lambda model: torch.export.export(model, (X,)),
        lambda model: make_fx(model)(X),
        lambda model: torch.jit.trace(model[0], (X,)),
    ],
)
def test_traces_of_the_model_are_refused(trace, grad):
    hsaid = moved(HSAID(mlp(), 24))
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception, match=r"trace or export hsaid.merge\(\)"):
            trace(hsaid.model)
        with torch.no_grad():
            trace(hsaid.merge())
    assert torch.equal(hsaid(X), hsaid.merge()(X)) and torch.equal(hsaid.model(X), hsaid(X))


def test_ddp_around_a_part_is_refused(one_rank):
    hsaid = moved(HSAID(mlp(), 24))
    part = nn.Sequential(hsaid.model, nn.Linear(3, 2))
    ddp = DistributedDataParallel(part)
    with pytest.raises(RuntimeError, match="expected DistributedDataParallel around the HSAID, or a module that holds"):
        ddp(X)
    with torch.no_grad():  # nothing is trained
        assert torch.equal(ddp(X), part(X))

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.hsaid, self.head = hsaid, nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.hsaid.model(x))

    ddp = DistributedDataParallel(Holds())
    ddp(X).sum().backward()
    assert hsaid.theta.grad.any()


def test_stages_of_a_pipeline_are_refused(one_rank):
    hsaid = moved(HSAID(mlp(), 24))
    for part, refused in ((hsaid.model[:], True), (hsaid, False)):
        stage = PipelineStage(part, 0, 1, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 1, loss_fn=nn.functional.mse_loss)
        if refused:
            with pytest.raises(RuntimeError, match="got a part of hsaid.model as a stage of a pipeline"):
                schedule.step(X, target=torch.zeros(2, 3), losses=[])
        else:
            schedule.step(X, target=torch.zeros(2, 3), losses=[])
            assert hsaid.theta.grad.any()


def test_ddp_has_the_parameters_of_the_task_that_is_called(one_rank):
    hsaid = moved(HSAID(mlp(), 24, task="a"))
    hsaid.add_task("b")
    ddp = DistributedDataParallel(hsaid)
    ddp(X).sum().backward()
    with hsaid.use_task("b"), pytest.raises(RuntimeError, match="task: expected the one whose parameters Distributed"):
        ddp(X)
    hsaid.set_task("b")
    with pytest.raises(RuntimeError, match="got 'b', whose gradients would not be averaged"):
        ddp(X)
    with torch.no_grad():
        assert torch.equal(ddp(X), hsaid(X))


def test_what_is_not_trained_may_be_anywhere(one_rank):
    """A frozen HSAID as a part of another model's loss."""
    hsaid = moved(HSAID(mlp(), 24)).requires_grad_(False)
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), hsaid.model))
    ddp(X).sum().backward()
    assert ddp.module[0].weight.grad.any() and hsaid.theta.grad is None


def test_ddp_that_is_gone_reduces_nothing(one_rank):
    hsaid = moved(HSAID(mlp(), 24))
    ddp = DistributedDataParallel(hsaid)
    ddp(X).sum().backward()
    del ddp
    for _ in range(3):
        hsaid.model(X).sum().backward()
        hsaid(X).sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_module_that_another_model_runs_too_is_said_once(grad):
    shared = nn.Linear(4, 6)
    teacher = nn.Sequential(shared, nn.Linear(6, 2))
    hsaid = moved(HSAID(nn.Sequential(shared, nn.Linear(6, 3)), 24, "did"))
    with torch.set_grad_enabled(grad):
        with pytest.warns(
            UserWarning, match="'0.weight' is a weight of the wrapped model, and a Sequential that"
        ) as said:
            teacher(X)
        assert [one.filename for one in said] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            teacher(X)
    with hsaid.unwrapped(), warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher(X)


class Outer(nn.Module):
    def __init__(self, hsaid, held):
        super().__init__()
        self.part = hsaid.model[0]
        if held:
            self.hsaid = hsaid

    def forward(self, x):
        return self.part(x)


def test_what_runs_the_model_or_holds_the_hsaid_is_not_said():
    hsaid = HSAID(mlp(), 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (hsaid, hsaid.model, nn.Sequential(hsaid, nn.Tanh()), nn.Sequential(hsaid.model, nn.Tanh())):
            model(X)
        hsaid.model[:2](X), hsaid.model[0](X), Outer(hsaid, held=True)(X), copy.deepcopy(hsaid.model[0])(X)
        hsaid.model[0].weight.sum(), nn.Sequential(nn.Tanh())(hsaid.model[0].weight)
    with pytest.warns(UserWarning, match="an? Outer that neither is a part of it nor"):
        Outer(hsaid, held=False)(X)


@pytest.mark.parametrize("inside", [True, False])
def test_ddp_and_torch_compile(inside, one_rank):
    hsaid = moved(HSAID(mlp(), 24))
    compiled = torch.compile(hsaid, backend="aot_eager")
    ddp = (
        DistributedDataParallel(compiled) if inside else torch.compile(DistributedDataParallel(hsaid), backend="eager")
    )
    for _ in range(3):
        ddp(X).sum().backward()
        hsaid.zero_grad()


class Either(nn.Module):
    def __init__(self, hsaid):
        super().__init__()
        self.hsaid, self.call = hsaid, True

    def forward(self, x):
        return self.hsaid(x) if self.call else self.hsaid.model(x)


@pytest.mark.parametrize("way", [True, False])
def test_ddp_around_a_module_that_runs_the_model_itself(way, one_rank):
    hsaid = moved(HSAID(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)), 24))
    seen, inner = [], hsaid.model[2]
    if way:
        hsaid.model[2].forward = lambda x: checkpoint(
            lambda x: nn.functional.linear(x, inner.weight, inner.bias), x, use_reentrant=True
        )
    ddp = DistributedDataParallel(Either(hsaid))
    hsaid.theta.register_post_accumulate_grad_hook(lambda theta: seen.append(1))
    for step in range(4):
        ddp.module.call = step % 2 == 0
        ddp(X).sum().backward()
        hsaid.weights()["0.weight"].square().sum().backward()  # a penalty of its own
        assert len(seen) == 2 * (step + 1)


def test_distributed_data_parallel_keeps_nothing_alive(one_rank):
    """torch holds hooks of parameters where the garbage collector does not look."""

    def train():
        hsaid = HSAID(mlp(), 24, train_fully="2.bias")
        DistributedDataParallel(hsaid)(X).sum().backward()
        return [weakref.ref(held) for held in (hsaid.theta, *hsaid.full.values(), hsaid._tasks, hsaid.model)]

    kept = [ref for _ in range(2) for ref in train()]
    gc.collect()
    assert [ref() for ref in kept] == [None] * 8


def test_what_distributed_data_parallel_has_done_ends_with_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    hsaid = HSAID(mlp(), 24)
    around = DistributedDataParallel(hsaid)
    around(X).sum().backward()
    assert hsaid._source.around.reduced_once.reduces
    dist.destroy_process_group()
    for _ in range(2):  # without an optimizer's step in between
        hsaid(X).sum().backward()
    assert not hsaid._source.around.reduced_once.reduces and around is not None
