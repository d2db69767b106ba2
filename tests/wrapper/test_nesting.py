"""What may be around what: HSAID inside parallel wrappers and outside of nothing but the plain model."""

import pytest
import torch
import torch.distributed as dist
from models import bert, mlp, moved
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hsaid_kernels import HSAID


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, DataParallel])
def test_parallel_wrappers_inside_are_refused(wrap, one_rank):
    message = f"model: expected a plain module, got one in {wrap.__name__}"
    with pytest.raises(TypeError, match=message):
        HSAID(wrap(mlp()), 24)
    with pytest.raises(TypeError, match=message):
        HSAID(nn.Sequential(wrap(mlp())), 24)


def test_sharded_parameters_need_blocks(one_rank):
    model, mesh = mlp(), dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match='memory: expected "block" for a model that FSDP2'):
        HSAID(model, 24)
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    fully_shard(hsaid.model[0], mesh=mesh)
    for run in (lambda: hsaid(x), lambda: hsaid.model[2].weight):
        with pytest.raises(ValueError, match='memory: expected "block" for a model that FSDP2'):
            run()
    with pytest.raises(RuntimeError, match="got another nn.Parameter in its place"):  # the gathered one
        hsaid.model(x)
    model = mlp()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="got '0.weight', a DTensor that no module of the model gathers"):
        HSAID(model, 24, memory="block")
    two = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("shard", "tensor"))
    model = mlp()
    parallelize_module(model, two["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=two["shard"])
    with pytest.raises(TypeError, match="that FSDP2 .* alone has sharded, got '0.weight' with placements"):
        HSAID(model, 24, memory="block")


def test_a_compiled_model_is_the_plain_one(tmp_path):
    model = bert().eval()
    hsaid = moved(HSAID(torch.compile(model), 60))
    assert hsaid.model is model and all("_orig_mod" not in name for name in hsaid.plan.names)
    hsaid.save_pretrained(tmp_path)
    for again in (model, torch.compile(model)):
        del hsaid
        hsaid = HSAID.from_pretrained(tmp_path, again)
        assert hsaid.model is model and hsaid.theta.any()


@pytest.mark.parametrize("change", [lambda a, b: (a + b) / 2, lambda a, _: a.half(), lambda a, _: a.bfloat16()])
def test_state_dicts_after_arithmetic(change):
    hsaid = moved(HSAID(mlp(), 24))
    state = hsaid.state_dict()
    changed = {key: change(value, value) for key, value in state.items()}
    theta = hsaid.theta.detach().clone()
    with torch.no_grad():
        hsaid.theta.zero_()
    hsaid.load_state_dict(changed)
    assert torch.allclose(hsaid.theta, theta, atol=1e-2, rtol=1e-2)


def test_a_configuration_that_arithmetic_destroyed():
    hsaid = HSAID(mlp(), 24)
    for wrong in (torch.rand(40), torch.full((40,), 300.0), torch.full((40,), float("nan")), torch.zeros(0)):
        with pytest.raises(RuntimeError, match="state_dict: expected"):
            hsaid.load_state_dict(hsaid.state_dict() | {"_extra_state": wrong})
