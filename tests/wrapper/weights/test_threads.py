"""Each thread has its task, and a call runs on the theta of its beginning, whatever other threads do."""

import asyncio
import copy
import pickle
import sys
import threading

import pytest
import torch
from models import mlp, moved, normed, same
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsaid_kernels import HSAID

X = torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture
def often():
    """Threads that take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def two_tasks(**options) -> HSAID:
    hsaid = moved(HSAID(mlp(), 24, task="a", **options))
    hsaid.add_task("b")
    with hsaid.use_task("b"):
        moved(hsaid)
    return hsaid


def expected_of(hsaid: HSAID) -> dict:
    found = {}
    for task in hsaid.tasks:
        with hsaid.use_task(task), torch.no_grad():
            found[task] = hsaid(X)
    return found


def run(*functions) -> list:
    """What functions return that run at the same time, each in a thread."""
    found = [None] * len(functions)

    def call(number, function):
        try:
            found[number] = function()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=one) for one in enumerate(functions)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return found


@pytest.mark.parametrize("how", ["set_task", "use_task"])
@pytest.mark.parametrize("memory", ["step", "block"])
def test_threads_serve_tasks_at_the_same_time(often, how, memory):
    hsaid = two_tasks(memory=memory)
    expected = expected_of(hsaid)

    def serve(task):
        wrong = 0
        for number in range(200):
            if how == "set_task":
                hsaid.set_task(task)
                with torch.set_grad_enabled(number % 2 == 0):
                    wrong += not torch.equal(hsaid(X), expected[task])
            else:
                with hsaid.use_task(task), torch.no_grad():
                    wrong += not (torch.equal(hsaid(X), expected[task]) and torch.equal(hsaid.model(X), expected[task]))
        return wrong

    assert run(lambda: serve("a"), lambda: serve("b"), lambda: serve("a")) == [0, 0, 0]


def test_threads_train_tasks_at_the_same_time(often):
    alone, together = two_tasks(), None
    together = copy.deepcopy(alone)

    def train(hsaid, task):
        with hsaid.use_task(task):
            optimizer = torch.optim.SGD(hsaid.parameters(), 0.1)
            for _ in range(30):
                optimizer.zero_grad()
                hsaid(X).square().mean().backward()
                optimizer.step()
            return torch.cat([p.detach().flatten() for p in hsaid.parameters()])

    expected = [train(alone, task) for task in "ab"]
    found = run(*(lambda task=task: train(together, task) for task in "ab"))
    assert all(map(torch.equal, found, expected))


def test_what_belongs_to_the_task_of_a_thread(tmp_path):
    hsaid = two_tasks(train_fully="2.bias")
    of_a = {name: parameter.detach().clone() for name, parameter in hsaid.named_parameters()}
    assert hsaid.task == "a" and hsaid.theta is dict(hsaid.named_parameters())["theta"]

    def elsewhere():
        assert hsaid.task == "a"  # of a thread that has set none, the one that was set last
        with hsaid.use_task("b"):
            own = dict(hsaid.named_parameters())
            assert hsaid.task == "b" and own["theta"] is hsaid.theta is not hsaid._parameters["theta"]
            assert hsaid.full["2.bias"] is own["full/2/bias"]
            assert torch.equal(hsaid.state_dict()["theta"], hsaid.theta)
            hsaid.save_pretrained(tmp_path)
            with pytest.raises(
                RuntimeError, match="theta: expected it to be set while the task of this thread, 'b', is"
            ):
                hsaid.theta = nn.Parameter(torch.zeros(24))
            with pytest.raises(
                RuntimeError, match="state_dict: expected it to be loaded while the task of this thread"
            ):
                hsaid.load_state_dict(hsaid.state_dict())
            with pytest.raises(ValueError, match="expected a task that is not set, got 'b'"):
                hsaid.remove_task("b")
            with hsaid.use_task("a"):
                assert hsaid.task == "a"
            assert hsaid.task == "b"
            return hsaid.weights()

    (weights,) = run(elsewhere)
    assert not isinstance(weights, Exception), weights
    assert hsaid.task == "a" and same({n: p.detach() for n, p in hsaid.named_parameters()}, of_a)
    loaded = HSAID.from_pretrained(tmp_path, hsaid.unwrap())
    assert loaded.task == "b" and same(loaded.weights(), {name: w.detach() for name, w in weights.items()})


def test_the_thread_that_sets_a_task_keeps_it():
    hsaid = two_tasks()
    hsaid.set_task("a")
    run(lambda: hsaid.set_task("b"))
    assert hsaid.task == "a" and run(lambda: hsaid.task) == ["b"]
    with pytest.raises(ValueError, match="expected a task that is not set, got 'b'"):
        hsaid.remove_task("b")  # which is another thread's
    hsaid.set_task("a")
    hsaid.remove_task("b")
    assert hsaid.tasks == ("a",)


def test_buffers_are_of_one_task():
    hsaid = HSAID(normed(), 40, task="a")
    hsaid.add_task("b")
    x = torch.randn(4, 8)
    with hsaid.use_task("b"):
        hsaid.eval()(x)  # no task has changed them yet
    hsaid.train()(x)
    with (
        hsaid.use_task("b"),
        pytest.raises(RuntimeError, match="task: expected 'b' to be set for all threads, because"),
    ):
        hsaid(x)
    with (
        hsaid.use_task("b"),
        pytest.raises(RuntimeError, match="task: expected 'b' to be set for all threads, because"),
    ):
        hsaid.state_dict()
    hsaid.set_task("b")
    assert hsaid(x).shape == (4, 2)


def test_buffers_are_of_one_task_of_coroutines_too():
    """Which set tasks one after the other in one thread; and of a thread that sets what another has set already."""
    hsaid, x = HSAID(normed(), 40, task="a"), torch.randn(4, 8)
    hsaid.add_task("b")
    refused = pytest.raises(RuntimeError, match="task: expected 'a' to be set for all threads, because")

    async def first(ready, done):
        hsaid.set_task("a")
        hsaid.train()(x)
        ready.set()
        await done.wait()
        with refused:
            hsaid(x)

    async def second(ready, done):
        await ready.wait()
        hsaid.set_task("b")
        done.set()

    async def both():
        ready, done = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(ready, done), second(ready, done))

    asyncio.run(both())
    hsaid.set_task("a")
    run(lambda: [hsaid.set_task(task) for task in ("a", "b")])
    with refused:
        hsaid(x)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"torch.compile: expected one task in all threads"):
        torch.compile(hsaid, backend="eager", fullgraph=True)(x)


def test_tasks_are_not_changed_inside_a_call():
    hsaid = two_tasks()
    for change in (hsaid.set_task, lambda task: hsaid.use_task(task).__enter__()):
        handle = hsaid.model[0].register_forward_hook(lambda *_, change=change: change("b"))
        with pytest.raises(RuntimeError, match=r"_task\(\): expected to be called between calls of the HSAID"):
            hsaid(X)
        handle.remove()
    assert hsaid.task == "a" and torch.equal(hsaid(X), hsaid.merge()(X))


@pytest.mark.parametrize("memory", ["step", "block"])
def test_one_call_one_theta(memory):
    """Another thread steps while a forward runs, which keeps its theta to the end; the next call has the new one."""
    hsaid = moved(HSAID(mlp(), 24, memory=memory))
    before, merged = hsaid(X).detach(), hsaid.merge()

    def step(*_):
        run(lambda: torch.no_grad()(hsaid.theta.add_)(1.0))

    handle = hsaid.model[0].register_forward_hook(step)
    with torch.no_grad():
        assert torch.equal(hsaid(X), before) and torch.equal(merged(X), before)
    out = hsaid(X)
    handle.remove()
    with pytest.raises(RuntimeError, match="theta has been changed in place between forward and backward"):
        out.sum().backward()
    assert torch.equal(hsaid(X), hsaid.merge()(X)) and not torch.equal(hsaid(X), before)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_graph_has_one_task(fullgraph):
    hsaid = moved(HSAID(mlp(), 24, task="a"))
    hsaid.add_task("b")
    compiled, of_a = torch.compile(hsaid, backend="eager", fullgraph=fullgraph), hsaid(X)
    assert torch.allclose(compiled(X), of_a)
    with hsaid.use_task("b"):
        if fullgraph:
            with pytest.raises(Exception, match="torch.compile: expected one task in all threads"):
                compiled(X)
        else:  # runs uncompiled
            assert torch.allclose(compiled(X), hsaid(X)) and not torch.allclose(hsaid(X), of_a)


def test_threads_that_recompute(often):
    """Each thread's backward recomputes on the theta of its own forward, whatever others have read in between."""
    hsaid = two_tasks()
    model = hsaid.model
    model[0].register_forward_hook(lambda *_: None)

    def train(task, run, rounds=20):
        with hsaid.use_task(task):
            for _ in range(rounds):
                checkpoint(run, X.clone().requires_grad_(), use_reentrant=task == "a").square().mean().backward()
            return hsaid.theta.grad / rounds

    found = run(lambda: train("a", hsaid), lambda: train("b", hsaid))
    assert not any(isinstance(one, Exception) for one in found), found
    hsaid.zero_grad()
    for task, one in zip("ab", found):
        with hsaid.use_task(task):
            hsaid.zero_grad()
            hsaid(X).square().mean().backward()
            assert torch.allclose(hsaid.theta.grad, one, rtol=1e-4)
    with hsaid.use_task("b"):
        loss = checkpoint(hsaid, X, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match=r"backward\(\): expected the task and the theta of forward"):
        loss.backward()


def test_backward_in_a_thread_that_knows_no_task():
    """As on a device, whose backward runs in a thread of torch's."""
    hsaid = two_tasks()
    with hsaid.use_task("b"):
        hsaid(X).square().mean().backward()
        expected = hsaid.theta.grad.clone()
        for reentrant in (False, True):
            hsaid.zero_grad()
            part = checkpoint(hsaid.model[:2], X.clone().requires_grad_(), use_reentrant=reentrant)
            loss = (part @ hsaid.model[2].weight.T + hsaid.model[2].bias).square().mean()
            (found,) = run(loss.backward)
            if reentrant:
                assert "expected 'b', the task of forward, to be set for all threads, got 'a'" in str(found)
                continue
            assert found is None and torch.allclose(hsaid.theta.grad, expected)
    hsaid.set_task("b")
    hsaid.zero_grad()
    loss = hsaid.model[2](checkpoint(hsaid.model[:2], X.clone().requires_grad_(), use_reentrant=True)).square().mean()
    assert run(loss.backward) == [None] and torch.allclose(hsaid.theta.grad, expected)


def test_one_thread_serves_while_another_trains_what_it_recomputes(often):
    hsaid = two_tasks()
    expected, done = expected_of(hsaid), []

    def train():
        with hsaid.use_task("b"):
            for _ in range(50):
                checkpoint(hsaid, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
        done.append(True)

    def serve():
        with hsaid.use_task("a"), torch.no_grad():
            while not done:
                assert torch.equal(hsaid(X), expected["a"])

    def either():
        try:
            train()
        finally:
            done.append(True)

    assert run(either, serve) == [None, None]


def test_threads_of_a_forward_are_not_taken_for_another_task():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, x):
            found = run(*(lambda part=part: part(x) for part in self.parts))
            failed = [one for one in found if isinstance(one, Exception)]
            if failed:
                raise failed[0]
            return sum(found)

    hsaid = moved(HSAID(Parallel(), 24, task="a"))
    hsaid.add_task("b")
    assert torch.equal(hsaid(X), hsaid.merge()(X))
    with hsaid.use_task("b"), pytest.raises(RuntimeError, match="task: expected one in all threads, or one that each"):
        hsaid(X)
    hsaid.set_task("b")
    assert torch.equal(hsaid(X), hsaid.merge()(X))


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps, lambda hsaid: copy.deepcopy(hsaid.model)])
def test_copies_are_of_the_task_that_was_set(way):
    hsaid = two_tasks()
    with hsaid.use_task("b"):
        with pytest.raises(
            RuntimeError, match="copy: expected the task of this thread, 'b', to be the one that was set"
        ):
            way(hsaid)
        assert torch.equal(hsaid.merge()(X), hsaid(X)) and torch.equal(
            copy.deepcopy(hsaid.model[0])(X), hsaid.model[0](X)
        )
    way(hsaid)


def test_a_theta_that_is_given_belongs_to_the_task_that_was_set():
    hsaid = two_tasks()
    given = {"theta": torch.zeros_like(hsaid.theta)}
    assert not torch.equal(torch.func.functional_call(hsaid, given, (X,)), hsaid(X))
    with hsaid.use_task("b"), pytest.raises(RuntimeError, match="theta: expected to be given to the task that was set"):
        torch.func.functional_call(hsaid, given, (X,))


def test_unwrapping_needs_no_task(tmp_path):
    hsaid = two_tasks()
    with hsaid.use_task("b"):
        run(lambda: hsaid.remove_task("b"))
        with pytest.raises(RuntimeError, match="task: expected 'b', which this thread set, to be there still"):
            hsaid(X)
        assert type(hsaid.unwrap()[0]) is nn.Linear
    hsaid.save_pretrained(tmp_path)
    assert HSAID.from_pretrained(tmp_path, hsaid.model).task == "a"


def test_coroutines_have_tasks_of_their_own():
    hsaid = two_tasks()
    expected = expected_of(hsaid)

    async def serve(task):
        with hsaid.use_task(task):
            for _ in range(3):
                await asyncio.sleep(0)
                assert hsaid.task == task and torch.equal(hsaid(X), expected[task])

    async def both():
        await asyncio.gather(serve("a"), serve("b"), serve("a"))

    asyncio.run(both())
    assert hsaid.task == "a"

    def stream(task):
        with hsaid.use_task(task):
            yield hsaid(X)
            yield hsaid(X)

    streams = stream("b"), stream("a")
    next(streams[0]), next(streams[1])
    with pytest.raises(RuntimeError, match=r"use_task\(\): expected 'b' to be the current task until the end, got 'a'"):
        [list(one) for one in streams]


def test_merged_weights_are_of_one_task():
    hsaid = two_tasks()
    expected = expected_of(hsaid)
    with hsaid.use_task("b"), torch.no_grad():
        hsaid.merge(inplace=True)
        assert torch.equal(hsaid(X), expected["b"]) and torch.equal(hsaid.model(X), expected["b"])
    for read in (lambda: hsaid(X), lambda: hsaid.model(X), hsaid.weights):
        with pytest.raises(RuntimeError, match=r"task: expected 'b', whose weights merge\(inplace=True\) has put into"):
            read()
    hsaid.unmerge()
    assert torch.equal(hsaid(X), expected["a"])


def test_what_other_threads_set_does_not_reach_into_a_call():
    hsaid = two_tasks(train_fully="2.bias")
    with hsaid.use_task("b"), torch.no_grad():
        hsaid.full["2.bias"].add_(1.0)
    expected = expected_of(hsaid)
    handle = hsaid.model[0].register_forward_hook(lambda *_: run(lambda: hsaid.set_task("b")) and None)
    with torch.no_grad():
        assert torch.equal(hsaid(X), expected["a"])
    handle.remove()
    hsaid = HSAID(normed().eval(), 40, task="a")
    hsaid.add_task("b")
    hsaid.train()(torch.randn(4, 8))
    failed = []
    handle = hsaid.model[0].register_forward_hook(lambda *_: failed.extend(run(lambda: hsaid.set_task("b"))))
    hsaid.eval()(torch.randn(4, 8))
    assert "set_task(): expected no other thread inside a call" in str(failed[0]) and hsaid.task == "a"


def test_a_call_that_backward_recomputes_in_another_thread():
    hsaid = two_tasks()
    with hsaid.use_task("b"):
        for reentrant in (True, False):
            loss = checkpoint(hsaid, X.clone().requires_grad_(), use_reentrant=reentrant).square().mean()
            (found,) = run(loss.backward)
            assert "the task of forward, to be set for all threads" in str(found) if reentrant else found is None
        assert hsaid.theta.grad is not None
    assert hsaid.theta.grad is None
    with hsaid.use_task("b"):  # another task may be evaluated in between
        loss = hsaid.model[2](checkpoint(hsaid.model[:2], X.clone().requires_grad_(), use_reentrant=False)).sum()
        with hsaid.use_task("a"), torch.no_grad():
            hsaid(X)
        loss.backward()
