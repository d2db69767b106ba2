"""Backward through weights that are used several times, and through parts that it recomputes."""

import functools

import pytest
import torch
from models import gradient, mlp, moved, relative
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hsaid_kernels import HSAID


class Checkpointed(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.first, self.rest = (
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)),
        )

    def forward(self, x):
        x = self.first(x)
        if self.how == "plain":
            return self.rest(x)
        if self.how == "sequential":
            return checkpoint_sequential(self.rest, 2, x, use_reentrant=False)
        return checkpoint(self.rest, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "saved tensors", "sequential"])
def test_a_model_that_checkpoints_itself(how):
    hsaid, x = moved(HSAID(Checkpointed("plain"), 60)), torch.randn(8, 8)
    expected = gradient(hsaid, lambda: hsaid(x))
    hsaid.how = how
    for run in (hsaid, hsaid.model):
        assert relative(gradient(hsaid, lambda run=run: run(x)), expected) < 1e-6
    loss = hsaid(x).sum()
    hsaid.theta.data.add_(1)  # which torch does not count
    with pytest.raises(
        RuntimeError, match=r"theta has been changed in place|expected the task and the theta of forward"
    ):
        loss.backward()


def test_several_backwards_of_one_theta():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(3, 4)
    once = gradient(hsaid, lambda: hsaid.model(x))
    hsaid.zero_grad()
    losses = [hsaid.model(x).square().mean() for _ in range(2)] + [hsaid(x).square().mean()]
    for loss in losses:
        loss.backward()
    assert relative(torch.cat([p.grad.flatten() for p in hsaid.parameters()]), 3 * once) < 1e-6
    loss = hsaid(x).square().mean()
    with torch.no_grad():
        hsaid.multipliers.add_(1)
    with pytest.raises(RuntimeError, match="the multipliers have been changed in place between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("how", ["reentrant", "saved tensors"])
def test_calls_of_the_hsaid_and_of_its_model_may_alternate(how):
    hsaid, x = HSAID(Checkpointed(how), 60), torch.randn(8, 8)
    optimizer = torch.optim.SGD(hsaid.parameters(), lr=0.1)
    for run in (hsaid, hsaid.model, hsaid.model.rest, hsaid):
        before = hsaid.theta.detach().clone()
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(hsaid.theta, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["set_task", "unwrap"])
def test_backward_of_another_task_is_refused_where_it_recomputes(between, reentrant):
    hsaid, x = moved(HSAID(Checkpointed("reentrant" if reentrant else "saved tensors"), 60)), torch.randn(8, 8)
    hsaid.add_task("b")
    loss = hsaid(x).sum()
    hsaid.set_task("b") if between == "set_task" else hsaid.unwrap()
    reason = r"backward\(\): expected " + ("the task" if between == "set_task" else r"a call before unwrap\(\)")
    with pytest.raises(RuntimeError, match=reason):
        loss.backward()
    if between == "set_task":
        for task in hsaid.tasks:  # without recomputation, tasks may share a backward pass
            hsaid.how = "plain"
            hsaid.set_task(task)
            loss = loss + hsaid(x).sum() if task == "b" else hsaid(x).sum()
        loss.backward()
        assert hsaid.theta.grad.any()


@pytest.mark.parametrize("saved", [torch.ops.aten.addmm.default, torch.ops.aten.tanh.default, None])
def test_selective_activation_checkpointing(saved):
    policy = torch.utils.checkpoint.CheckpointPolicy
    save = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts,
        lambda ctx, op, *args, **kwargs: policy.MUST_SAVE if saved in (None, op) else policy.PREFER_RECOMPUTE,
    )
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(3, 4)
    expected = gradient(hsaid, lambda: hsaid(x))
    for run in (hsaid, hsaid.model):
        out = lambda run=run: checkpoint(run, x, use_reentrant=False, context_fn=save)  # noqa: E731
        assert relative(gradient(hsaid, out), expected) < 1e-6


def test_derivatives_that_there_are_not_are_refused():
    hsaid, x = moved(HSAID(mlp(), 24)), torch.ones(1, 4)
    theta = hsaid.theta.detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta, torch.ones_like(theta))
        with pytest.raises(RuntimeError, match="theta: expected a tensor without a tangent"):
            torch.func.functional_call(hsaid, {"theta": dual}, (x,))
    with pytest.raises(
        RuntimeError, match="theta: expected an ordinary tensor, got one inside a transform of torch.func"
    ):
        torch.func.grad(lambda t: torch.func.functional_call(hsaid, {"theta": t}, (x,)).sum())(theta)
    other = {name: nn.Parameter(torch.ones_like(w0)) for name, w0 in hsaid.w0().items()}
    with pytest.raises(RuntimeError, match="got another nn.Parameter in its place"):
        torch.func.functional_call(hsaid.model, other, (x,))
    for export in (torch.jit.trace, torch.export.export):
        with pytest.raises(Exception, match=r"trace or export hsaid.merge\(\)"):
            export(hsaid, (x,))
    assert torch.equal(hsaid(x), hsaid.merge()(x))
