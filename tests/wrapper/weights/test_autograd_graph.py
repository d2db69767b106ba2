"""theta gets its gradient once in a backward pass, however many backward passes run inside of it."""

import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import gradient, moved, relative
from processes import in_two_processes
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hsaid_kernels import HSAID


class Reversible(torch.autograd.Function):
    """A layer that is run again in backward, by itself, as those of reversible networks are."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), grad)
        return x.grad, None


class Kept(torch.autograd.Function):
    """A layer whose graph is made in forward, and whose weights nobody reads in backward."""

    @staticmethod
    def forward(ctx, x, layer):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = layer(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        torch.autograd.backward(ctx.y, grad)
        return ctx.x.grad, None


def again(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


WAYS = {
    "some": lambda net, x: net.d(again(net.c, again(net.b, net.a(x).tanh()).tanh()).tanh()),
    "nested": lambda net, x: net.d(again(lambda x: net.c(again(net.b, x).tanh()), net.a(x).tanh()).tanh()),
    "all": lambda net, x: again(
        net.d, again(net.c, again(net.b, again(net.a, x.requires_grad_()).tanh()).tanh()).tanh()
    ),
    "reversible": lambda net, x: net.d(Reversible.apply(Reversible.apply(net.a(x).tanh(), net.b).tanh(), net.c).tanh()),
    "kept": lambda net, x: net.d(Kept.apply(Kept.apply(net.a(x).tanh(), net.b).tanh(), net.c).tanh()),
    "plain": lambda net, x: net.d(net.c(net.b(net.a(x).tanh()).tanh()).tanh()),
}


class Net(nn.Module):
    def __init__(self, way: str = "plain"):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return WAYS[self.way](self, x)


X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("partition", ["L1", "said"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "kept"])
def test_hooks_on_theta_run_once(way, partition, memory):
    hsaid = moved(HSAID(Net(way), 60, partition, memory=memory))
    run = lambda: hsaid(X.clone())  # noqa: E731
    hsaid.way = "plain"
    expected = gradient(hsaid, run)
    hsaid.way = way
    assert relative(gradient(hsaid, run), expected) < 1e-6
    counted, clipped = [], hsaid.theta.register_hook(lambda grad: grad * 0.01 / grad.norm())
    hsaid.theta.register_post_accumulate_grad_hook(lambda theta: counted.append(theta.grad.norm()))
    for _ in range(2):
        gradient(hsaid, run)
        assert hsaid.theta.grad.norm().item() == pytest.approx(0.01) and len(counted) == 1
        counted.clear()
    clipped.remove()
    hsaid.zero_grad()
    for _ in range(2):  # gradients of several passes add up
        run().square().mean().backward()
    assert relative(torch.cat([p.grad.flatten() for p in hsaid.parameters()]), 2 * expected) < 1e-6


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("on the way")


@pytest.mark.parametrize("call", [True, False])
@pytest.mark.parametrize("way", ["some", "all"])
def test_a_pass_that_fails_leaves_nothing_behind(way, call):
    """Even where the model is run past the HSAID, which would begin anew."""
    hsaid = moved(HSAID(Net(way), 60, "said"))
    run = (lambda: hsaid(X.clone())) if call else (lambda: hsaid.model(X.clone()))
    expected = gradient(hsaid, run)
    handle = hsaid.model.b.register_forward_hook(lambda module, args, out: Fails.apply(out))
    with pytest.raises(ArithmeticError):
        gradient(hsaid, run)
    handle.remove()
    assert relative(gradient(hsaid, run), expected) < 1e-6


@pytest.mark.parametrize("way", ["some", "all", "reversible"])
def test_nothing_is_kept_alive(way):
    hsaid = moved(HSAID(Net(way), 60, "did"))
    hsaid(X.clone()).sum().backward()
    made, model = weakref.ref(hsaid._source._cache), weakref.ref(hsaid.model)
    hsaid._source.drop_cache()
    gc.collect()
    assert made() is None
    del hsaid
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("hooked", [True, False])
def test_what_a_pass_that_fails_has_collected_is_gone(hooked):
    """Two losses of one forward: the first pass fails after it has recomputed, the second recomputes nothing."""
    hsaid = moved(HSAID(Net("some"), 60, "said"))
    if hooked:
        hsaid.theta.register_hook(lambda grad: grad)
    kept = {}
    hsaid.model.a.register_forward_hook(lambda module, args, out: kept.update(hidden=out))
    out = hsaid(X.clone())
    first, second = out.sum() + Fails.apply(kept["hidden"]).sum(), kept["hidden"].square().mean()
    (expected,) = torch.autograd.grad(second, hsaid.theta, retain_graph=True)
    with pytest.raises(ArithmeticError):
        first.backward(retain_graph=True)
    hsaid.zero_grad()
    second.backward()
    assert torch.equal(hsaid.theta.grad, expected)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("way", ["some", "reversible", "plain"])
def test_threads_that_train_at_the_same_time(way, memory, hooked):
    """Each with forward and backward of its own; gradients of all add up."""
    hsaid = moved(HSAID(Net(way), 60, "said", memory=memory))
    expected = gradient(hsaid, lambda: hsaid(X.clone()))
    if hooked:
        hsaid.theta.register_hook(lambda grad: grad)
    hsaid.zero_grad()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    run = lambda: [hsaid(X.clone()).square().mean().backward() for _ in range(20)]  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    sys.setswitchinterval(before)
    assert relative(torch.cat([p.grad.flatten() for p in hsaid.parameters()]), 60 * expected) < 1e-5


class OfItsOwn(torch.autograd.Function):
    """A checkpoint that differentiates what it runs again by torch.autograd.grad, for its parameters too."""

    @staticmethod
    def forward(ctx, layer, x, *parameters):
        ctx.layer, ctx.x, ctx.parameters = layer, x, parameters
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            out = ctx.layer(x)
        return None, *torch.autograd.grad(out, (x, *ctx.parameters), grad, allow_unused=True)


def test_gradients_that_backward_asks_for():
    hsaid = moved(HSAID(Net(), 60, "said"))
    expected = gradient(hsaid, lambda: hsaid(X))
    for run in (hsaid, hsaid.model):
        own = lambda run=run: OfItsOwn.apply(run, X.requires_grad_(), *hsaid.parameters())  # noqa: E731
        assert relative(gradient(hsaid, own), expected) < 1e-6
    hsaid.theta.register_hook(lambda grad: grad)
    assert relative(gradient(hsaid, lambda: OfItsOwn.apply(hsaid, X, *hsaid.parameters())), expected) < 1e-6
    hsaid.zero_grad()
    with pytest.warns(
        UserWarning, match=r"torch.autograd.grad\(\) was meant to differentiate them by theta: it does not"
    ):
        OfItsOwn.apply(hsaid.model, X, *hsaid.parameters()).sum().backward()
    assert hsaid.theta.grad is None
    X.requires_grad_(False)


@pytest.mark.parametrize("hooked", [True, False])
def test_weights_that_are_read_in_backward(hooked):
    """Kept by a hook and differentiated later, logged, or used by another step inside of a hook."""
    hsaid, kept = moved(HSAID(Net("some"), 60, "said")), []
    penalty = lambda: (hsaid.model.b.weight.square().sum(), hsaid.zero_grad())[0]  # noqa: E731
    (expected,) = torch.autograd.grad(penalty(), hsaid.theta)
    if hooked:
        hsaid.theta.register_hook(lambda grad: grad)

    def keep(module, *_):
        with torch.enable_grad():
            kept.append(module.weight.square().sum())

    handle = hsaid.model.b.register_full_backward_hook(keep)
    hsaid(X.clone()).square().mean().backward()
    handle.remove()
    hsaid.zero_grad()
    kept[0].backward()
    assert relative(hsaid.theta.grad, expected) < 1e-6


def test_a_step_inside_of_a_hook():
    hsaid, found = moved(HSAID(Net("all"), 60, "said")), []
    expected = gradient(hsaid, lambda: hsaid(2 * X))[:-8]

    def again_with_twice(theta):
        if not found:
            found.append(None)
            before, theta.grad = theta.grad, None
            with torch.enable_grad():
                hsaid(2 * X).square().mean().backward()
            found[0], theta.grad = theta.grad, before

    hsaid.theta.register_post_accumulate_grad_hook(again_with_twice)
    hsaid.zero_grad()
    hsaid(X.clone()).square().mean().backward()
    assert relative(found[0], expected) < 1e-6


@pytest.mark.parametrize("run", [lambda hsaid: hsaid(X.clone()), lambda hsaid: hsaid.model(X.clone())])
@pytest.mark.parametrize("around", [True, False])
def test_checkpoints_in_checkpoints(around, run):
    """A reentrant one around one that is not, or around one whose outer part reads no weight itself."""
    hsaid = moved(HSAID(Net(), 60, "said"))
    net, seen = hsaid.model, []
    inner = lambda x: checkpoint(net.c, x, use_reentrant=not around)  # noqa: E731
    net.forward = lambda x: net.d(again(inner, again(inner, net.a(x).tanh()).tanh()).tanh())
    plain = lambda x: net.d(net.c(net.c(net.a(x).tanh()).tanh()).tanh())  # noqa: E731
    expected = gradient(hsaid, lambda: plain(X))
    hsaid.theta.register_hook(lambda grad: seen.append(1))
    for _ in range(2):
        seen.clear()
        assert relative(gradient(hsaid, lambda: run(hsaid)), expected) < 1e-6 and len(seen) == 1


def test_a_hook_runs_once_where_layers_before_the_head_are_recomputed():
    hsaid = moved(HSAID(Net("plain"), 60, "said"))
    expected = gradient(hsaid, lambda: hsaid(X))
    head = lambda net, x: net.d(again(net.c, again(net.b, again(net.a, x.requires_grad_()).tanh()).tanh()).tanh())  # noqa: E731
    seen = []
    hsaid.theta.register_hook(lambda grad: seen.append(1))
    hsaid.model.forward = lambda x: head(hsaid.model, x)
    assert relative(gradient(hsaid, lambda: hsaid(X.clone())), expected) < 1e-6 and len(seen) == 1
    gradient(hsaid, lambda: hsaid(X.clone()) + hsaid(X.clone()))
    assert len(seen) == 2  # two forwards in one loss


def test_gradients_of_theta_itself():
    hsaid = moved(HSAID(Net(), 60, "said"))
    loss = hsaid(X).square().mean()
    expected = gradient(hsaid, lambda: hsaid(X))
    for graph in (False, True):
        found = torch.autograd.grad(loss, list(hsaid.parameters()), retain_graph=True, create_graph=graph)
        assert relative(torch.cat(found), expected) < 1e-6
    (only,) = torch.autograd.grad(loss, hsaid.multipliers, retain_graph=True)
    assert torch.equal(only, found[1])
    hsaid.theta.requires_grad_(False)
    hsaid.zero_grad()
    hsaid(X).square().mean().backward()
    assert hsaid.theta.grad is None and relative(hsaid.multipliers.grad, only) < 1e-6


@pytest.mark.parametrize("batch", [dict(is_grads_batched=True), None])
def test_batches_of_gradients_are_refused_in_words(batch):
    hsaid = moved(HSAID(Net(), 60, "did"))
    out = hsaid(X).sum(0)
    with pytest.raises(RuntimeError, match=r"backward\(\): expected one gradient at a time, got a batch of them"):
        if batch:
            torch.autograd.grad(out, hsaid.theta, torch.eye(3), **batch)
        else:
            torch.func.vmap(lambda v: torch.autograd.grad(out, hsaid.theta, v, retain_graph=True)[0])(torch.eye(3))


def in_parallel(rank: int) -> dict:
    """Four steps of each way, in DistributedDataParallel: theta and multipliers, or what was said."""
    found = {}
    for memory in ("step", "block"):
        for way in WAYS:
            for name, options in {"": {}, " static": dict(static_graph=True)}.items():
                hsaid = HSAID(Net(way), 60, "said", memory=memory)
                ddp = DistributedDataParallel(hsaid, **options)
                hooked = []
                hsaid.theta.register_hook(lambda grad, hooked=hooked: hooked.append(1))
                try:
                    train(ddp, X[rank::2], Y[rank::2])
                    own = torch.cat([p.detach().flatten() for p in hsaid.parameters()])
                    found[f"{memory} {way}{name}"] = own, len(hooked)
                except RuntimeError as error:
                    found[f"{memory} {way}{name}"] = str(error)
    return found


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model(x.clone()), y).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    out = tmp_path_factory.mktemp("ranks")
    in_two_processes(__file__, str(out))
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("static", ["", " static"])
@pytest.mark.parametrize("memory", ["step", "block"])
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_are_one_process(ranks, way, memory, static):
    first, second = (found[f"{memory} {way}{static}"] for found in ranks)
    if way == "kept" and not static:  # which nothing tells of beforehand
        for said in (first, second):
            assert "theta: expected its gradient once in a step" in said and "use_reentrant=False" in said
            assert "static_graph=True" in said
        return
    alone = HSAID(Net(), 60, "said", memory=memory)
    train(alone, X, Y)
    own = torch.cat([p.detach().flatten() for p in alone.parameters()])
    assert torch.equal(first[0], second[0]) and torch.allclose(first[0], own, atol=1e-6) and alone.theta.all()
    assert static or first[1] == second[1] == 4


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(in_parallel(rank), Path(sys.argv[1], f"{rank}.pt"))
    dist.destroy_process_group()
