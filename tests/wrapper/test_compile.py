"""torch.compile takes an HSAID whole: one graph, the same from step to step."""

import copy
import gc
import operator
import threading

import pytest
import torch
import transformers
from models import BACKENDS, IDS, SIZES, bert, change, gradient, mlp, moved, relative, same, snapshot, tied_models
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hsaid_kernels import HSAID
from hsaid_kernels.fastfood.plan import Plan, find_plan

LABELS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


class Layer(nn.Module):
    """Not one of torch's own, such as nn.Linear: `compile()` leaves them as they are."""

    def __init__(self, size: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, size)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.t() + self.bias).tanh()


def step(module, optimizer, **batch) -> float:
    optimizer.zero_grad()
    loss = module(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def classifier():
    return bert(problem_type="single_label_classification")  # left open, the first call would set it


@pytest.mark.parametrize(
    "backend, partition, train_fully",
    [(BACKENDS[0], "L1+L2|L3|L4", "classifier"), (BACKENDS[0], "did", None), ("reference", "said", None)],
)
def test_one_graph_without_breaks_for_all_steps(backend, partition, train_fully):
    """aot_eager runs the same operations, so losses and weights are the same to the last bit."""
    hsaid = HSAID(classifier().eval(), 60, partition, train_fully=train_fully, backend=backend)
    other = copy.deepcopy(hsaid)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hsaid, backend=counter, fullgraph=True)
    runs = []
    for module, own in ((compiled, hsaid), (other, other)):
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.02)
        runs.append([step(module, optimizer, input_ids=IDS, labels=LABELS) for _ in range(5)])
    assert counter.frame_count == 1 and runs[0] == runs[1]
    for name, parameter in other.named_parameters():
        assert torch.equal(hsaid.get_parameter(name), parameter), name
    assert hsaid.theta.any()


def test_tied_weights():
    hsaid = moved(HSAID(tied_models()["gpt2"]().eval(), 80))
    compiled = torch.compile(hsaid, backend="aot_eager", fullgraph=True)
    gradients = []
    for module in (hsaid, compiled):
        hsaid.zero_grad()
        module(IDS).logits.square().sum().backward()
        gradients.append(hsaid.theta.grad)
    assert torch.allclose(*gradients, rtol=1e-4) and gradients[0].any()


@pytest.mark.parametrize("kind", ["shared module", "albert"])
def test_a_module_in_several_places(kind):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(4, 4)
            self.layers, self.head = nn.ModuleList([layer] * 3), nn.Linear(4, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    model, x = (Shared(), torch.randn(3, 4)) if kind == "shared module" else (tied_models()[kind]().eval(), IDS)
    before, objects = snapshot(model), list(model.parameters())
    hsaid = moved(HSAID(model, 80))
    compiled = torch.compile(hsaid, backend="aot_eager", fullgraph=True)
    for module in (hsaid, compiled, compiled):
        out = module(x)
        out = out if torch.is_tensor(out) else out.logits
        expected = hsaid.merge()(x)
        assert torch.equal(out, expected if torch.is_tensor(expected) else expected.logits)
    assert same(model.state_dict(), before) and all(map(operator.is_, model.parameters(), objects))


def test_a_graph_without_its_hsaid():
    def loss():
        return torch.compile(HSAID(mlp(), 24, seed=87), backend="aot_eager")(torch.ones(1, 4)).sum()

    kept = loss()
    gc.collect()
    with pytest.raises(RuntimeError, match="plan: expected one that is in use, got a compiled graph whose HSAID"):
        kept.backward()


def test_inductor_in_bfloat16_with_dropout():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 1))
    hsaid = HSAID(model, 20, dtype=torch.bfloat16).train()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(hsaid, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=0.05)
    x, losses = torch.randn(64, 4, dtype=torch.bfloat16), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (compiled(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert counter.frame_count == 1 and losses[-1] < losses[0]


def test_a_new_mode_is_one_more_graph():
    hsaid = moved(HSAID(classifier().train(), 60))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hsaid, backend=counter, fullgraph=True)
    compiled(IDS, labels=LABELS).loss.backward()
    hsaid.eval()
    for _ in range(2):
        with torch.no_grad():
            logits = compiled(IDS).logits
    assert counter.frame_count == 2 and torch.equal(logits, hsaid(IDS).logits)


def test_another_basis_is_another_graph():
    """Plans are constants of a graph: one of another seed must not be served by it."""
    model = mlp()
    x, results = torch.randn(3, 4), []
    for seed in (0, 1):
        hsaid = moved(HSAID(copy.deepcopy(model), 24, seed=seed))
        with torch.no_grad():
            results.append((torch.compile(hsaid, backend="aot_eager", fullgraph=True)(x), hsaid(x)))
    assert all(torch.equal(*pair) for pair in results) and not torch.equal(results[0][0], results[1][0])


def test_a_compiled_block_inside_runs_on_the_projected_weights():
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 2}, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config).eval()
    hsaid = moved(HSAID(model, 80))
    gradients = []
    for _ in range(2):
        hsaid.zero_grad()
        hsaid(IDS, labels=LABELS).loss.backward()
        gradients.append(hsaid.theta.grad)
        for layer in model.bert.encoder.layer:
            layer.compile(backend="aot_eager")
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6) and gradients[0].any()
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(hsaid(IDS).logits, hsaid.merge()(IDS).logits, atol=1e-6)


def test_ops_that_name_their_plan():
    plan = Plan({"a": (40, 3), "b": (7,)}, 50, 3)
    theta, factors = torch.randn(50), torch.rand(2)
    base = [torch.randn(shape) for shape in plan.shapes.values()]
    ops = torch.ops.hsaid_kernels
    torch.library.opcheck(ops.planned_forward, (theta, factors, base, plan.key, torch.float32, BACKENDS[0]))
    torch.library.opcheck(ops.planned_adjoint, (theta, factors, [base[0], None], plan.key, BACKENDS[0]))


def test_keys_of_plans():
    shapes = {"a": (40, 3), "b": (7,)}
    plan = Plan(shapes, 50, 3)
    changes = [dict(seed=4), dict(dim=49), dict(width=128), dict(diagonal="rademacher"), dict(normalize="global")]
    others = [Plan(**{"shapes": shapes, "dim": 50, "seed": 3, **change}) for change in changes]
    others += [Plan({"b": (7,), "a": (40, 3)}, 50, 3), Plan({"a": (3, 40), "b": (7,)}, 50, 3), plan.select(["a"])]
    assert len({plan.key, *(other.key for other in others)}) == 1 + len(others)
    assert Plan(shapes, 50, 3).key == plan.key
    copied = copy.deepcopy(plan)
    key = plan.key
    del plan
    assert find_plan(key) is copied


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_parts_run_on_the_weights_of_now(outside):
    torch.compiler.reset()
    hsaid, x = moved(HSAID(nn.Sequential(Layer(4, 6), Layer(6, 3)), 24)), torch.randn(2, 4)
    run, counter = hsaid.model if outside else hsaid, CompileCounterWithBackend("aot_eager")
    for part in hsaid.model:
        part.compile(backend=counter)
    for _ in range(3):
        with torch.no_grad():
            assert torch.allclose(run(x), hsaid.merge()(x), atol=1e-6)
        expected = gradient(hsaid, lambda: torch.func.functional_call(hsaid.model, hsaid.weights(), (x,)))
        assert relative(gradient(hsaid, lambda: run(x)), expected) < 1e-5
        change(hsaid)
    assert outside or counter.frame_count >= 2
    plain = hsaid.unwrap()
    assert torch.allclose(plain(x), nn.Sequential(*copy.deepcopy(plain))(x))


@pytest.mark.parametrize("part", ["model", "layer"])
def test_what_is_compiled_around_a_part_is_right_too(part):
    torch.compiler.reset()
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(2, 4)
    chosen = {"model": hsaid.model, "layer": hsaid.model[0]}[part]
    compiled = torch.compile(chosen, backend="aot_eager")
    for _ in range(3):
        merged = hsaid.merge()
        assert torch.allclose(compiled(x), (merged if part == "model" else merged[0])(x), atol=1e-6)
        assert gradient(hsaid, lambda: compiled(x)).any()
        change(hsaid)


def test_compiled_parts_in_several_threads():
    torch.compiler.reset()
    hsaid, x = moved(HSAID(mlp(), 24)), torch.randn(2, 4)
    for layer in (hsaid.model[0], hsaid.model[2]):
        layer.compile(backend="eager")
    expected, wrong, done = gradient(hsaid, lambda: hsaid(x)), [], threading.Event()

    def serve():
        with torch.no_grad():
            out = hsaid(x)
            while not done.is_set():
                if not torch.equal(hsaid(x), out):
                    wrong.append("served")

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(60):
        if relative(gradient(hsaid, lambda: hsaid(x)), expected) > 1e-6:
            wrong.append("gradient")
    done.set()
    server.join()
    assert not wrong
