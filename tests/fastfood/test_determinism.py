"""What docs/determinism.md says of the projection and no other test does: the same bits, or the same to rounding."""

import pytest
import torch
from helpers import ISAS, assert_same_bits, relative_error, sequence
from torch import Tensor

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import rows_of

FASTEST = "cpu" if ISAS else "reference"
SHAPES = {"a": (40, 128), "b": (768,), "c": (3, 7)}


def leaves_of(plan: Plan) -> list[Tensor]:
    """theta and the factors, to differentiate by."""
    return [value.clone().requires_grad_() for value in (sequence(plan.dim), torch.linspace(0.5, 2, len(plan.pieces)))]


def test_inductor_changes_no_bit():
    """The two ops are opaque to it, and what is around them is a product for each factor."""
    projection = Projection(Plan(SHAPES, 200, 7, width=64), backend=FASTEST)
    base = [sequence(torch.Size(shape).numel(), 29).view(shape) for shape in SHAPES.values()]
    grads, found = [2 * tensor.flip(0) for tensor in base], []
    for run in (projection.weights, torch.compile(projection.weights, fullgraph=True)):
        leaves = leaves_of(projection.plan)
        weights = run(*leaves, base)
        torch.autograd.backward(weights, grads)
        found.append([*weights, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*found, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_float32_rounded_once(dtype, backend):
    """Forward at the end, W0 in either dtype; in the adjoint nothing but the gradients that come in is in 16 bits."""
    plan = Plan(SHAPES, 200, 7, width=64)
    theta, base = sequence(200), [sequence(torch.Size(s).numel(), 29).view(s) for s in SHAPES.values()]
    for of_base in (base, [tensor.to(dtype) for tensor in base]):
        exact = ops.fastfood_forward(plan, theta, plan.scales, [t.float() for t in of_base], torch.float32, backend)
        assert_same_bits(ops.fastfood_forward(plan, theta, plan.scales, of_base, dtype, backend), exact.to(dtype))
    grads = [tensor.to(dtype) for tensor in base]
    wide = ops.fastfood_adjoint(plan, theta, plan.scales, [grad.float() for grad in grads], backend)
    for got, expected in zip(ops.fastfood_adjoint(plan, theta, plan.scales, grads, backend), wide, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.skipif(not ISAS, reason="four million weights take the reference too long")
def test_the_gradient_of_a_tensor_depends_on_the_length_of_the_plans_runs():
    """Runs are longer in plans of many weights, which are added up in another order; nothing else of a plan matters."""
    plan = Plan({"a": (2000, 1024), "b": (2600, 1024)}, 1000, 3)
    part = plan.select(["a"])
    assert (plan.run_blocks, part.run_blocks) == (2, 1)
    theta, grad = sequence(1000), sequence(2000 * 1024, 53).view(2000, 1024)
    dtheta, dfactors = ops.fastfood_adjoint(plan, theta, plan.scales, [grad, None], "cpu")
    alone = ops.fastfood_adjoint(part, theta, part.scales, [grad], "cpu")
    assert relative_error(alone[0], dtheta) <= 1e-6
    part.run_blocks = plan.run_blocks
    alone = ops.fastfood_adjoint(part, theta, part.scales, [grad], "cpu")
    assert_same_bits(alone[0], dtheta)
    assert_same_bits(alone[1], dfactors[:1])


@pytest.mark.parametrize("span", [3, 16])
def test_rows_are_the_same_bits_for_every_span(span, backend, monkeypatch):
    """A GPU makes whole tiles where a CPU makes single blocks. The gradients are added up in another order."""
    plan, rows = Plan({"table": (90, 300)}, 1000, 3), torch.arange(0, 90, 7)
    base, grad = sequence(90 * 300, 29).view(90, 300), sequence(13 * 300, 53).view(13, 300)
    found = []
    for entries in (1, span):
        monkeypatch.setattr(ops, "row_span", lambda *_, entries=entries: entries)
        leaves = leaves_of(plan)
        made = rows_of(Projection(plan, backend=backend), *leaves, Part(plan), base, rows)
        made.backward(grad)
        found.append([made, *(leaf.grad for leaf in leaves)])
    assert_same_bits(found[1][0], found[0][0])
    for other, one in zip(found[1][1:], found[0][1:], strict=True):
        assert relative_error(other, one) <= 1e-5
