"""Some blocks of a table alone: the same bits as in the whole, on the CPU as in the reference; and the rows in them."""

import pytest
import torch
from helpers import ISAS, assert_same_bits, cpu_isa, poison, relative_error, sequence, threads
from torch import Tensor

from hsaid_kernels import available_backends
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood import rows as rows_module
from hsaid_kernels.fastfood.plan import Plan, Segment
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import Blocks, has_rows, rows_of

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not True, reason="the CPU library is not built")

#         rows, columns, len(theta), width: ragged ends, rows of several blocks and several rows in a block, chunks
TABLES = [(50, 12, 20, 32), (77, 50, 100, 64), (30, 400, 300, 256), (40, 7, 70, 32), (90, 300, 2500, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plan_of(table: tuple, **options) -> Plan:
    rows, columns, dim, width = table
    return Plan({"table": (rows, columns)}, dim, 3, width=width, **options)


def values_of(plan: Plan, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """theta, factor, base"""
    (shape,) = plan.shapes.values()
    base = sequence(shape[0] * shape[1], 29).view(shape).to(dtype)
    return sequence(plan.dim), plan.scales * 1.7, base


def lists_of(plan: Plan, span: int) -> list[Tensor]:
    count = -(-plan.blocks(plan.pieces[0]) // span)
    chosen = [[], [0], [count - 1], list(range(count)), list(range(1, count, 3)), [0, count // 2, count - 1]]
    return [torch.tensor(sorted(set(entries)), dtype=torch.int64) for entries in chosen]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
def test_listed_blocks_are_those_of_the_whole(table, diagonal):
    plan = plan_of(table, diagonal=diagonal)
    for dtype in DTYPES:
        theta, factor, base = values_of(plan, dtype)
        for span in (1, 2, 4):
            for listed in lists_of(plan, span):
                expected = ops.fastfood_forward(plan, theta, factor, [base], dtype, "reference", listed, span)
                for isa in ISAS:
                    with cpu_isa(isa):
                        poison(len(expected), dtype)
                        got = ops.fastfood_forward(plan, theta, factor, [base], dtype, "cpu", listed, span)
                    assert_same_bits(got, expected, f"{isa}, span {span}, {listed.tolist()}")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("diagonal", ["gaussian", "rademacher"])
def test_the_adjoint_of_listed_blocks(table, diagonal):
    plan = plan_of(table, diagonal=diagonal)
    theta, factor, _ = values_of(plan)
    for span in (1, 4):
        for listed in lists_of(plan, span):
            grad = sequence(len(listed) * span * plan.width, 53)
            expected = ops.fastfood_adjoint(plan, theta, factor, [grad], "reference", listed, span)
            for isa in ISAS:
                with cpu_isa(isa):
                    got = ops.fastfood_adjoint(plan, theta, factor, [grad], "cpu", listed, span)
                for one, other in zip(got, expected, strict=True):
                    assert_same_bits(one, other, f"{isa}, span {span}, {listed.tolist()}")


@pytest.mark.parametrize("base", ["strided", "none"])
def test_other_bases(base):
    plan = plan_of(TABLES[1])
    theta, factor, dense = values_of(plan)
    given = [] if base == "none" else [dense.t().contiguous().t()]
    listed = lists_of(plan, 1)[-1]
    expected = ops.fastfood_forward(plan, theta, factor, given, torch.float32, "reference", listed, 1)
    got = ops.fastfood_forward(plan, theta, factor, given, torch.float32, "cpu", listed, 1)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_are_those_of_the_whole_table(backend, table):
    plan = plan_of(table)
    count = table[0]
    for dtype in DTYPES:
        theta, factor, base = values_of(plan, dtype)
        projection = Projection(plan, dtype=dtype, backend=backend)
        (whole,) = plan.views(projection.flat(theta, factor, [base]))
        for rows in ([0], [count - 1], [0, count - 1], range(count), range(3, count, 7), []):
            chosen = torch.tensor(list(rows), dtype=torch.int64)
            got = rows_of(projection, theta, factor, Part(plan), base, chosen)
            assert_same_bits(got, whole[chosen], str(chosen.tolist()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("table", TABLES)
def test_gradients_of_rows_are_those_of_the_whole_table(backend, table):
    """1e-5 of float64, as the whole adjoint has to be; a row that is not looked up has the gradient 0."""
    plan = plan_of(table)
    rows = torch.arange(0, table[0], 5)
    leaves = [value.clone().requires_grad_() for value in values_of(plan)[:2]]
    projection, base = Projection(plan, backend=backend), values_of(plan)[2]
    upstream = sequence(len(rows) * table[1], 61).view(len(rows), table[1])
    rows_of(projection, *leaves, Part(plan), base, rows).backward(upstream)
    whole = torch.zeros(table[:2], dtype=torch.float64)
    whole[rows] = upstream.double()
    exact = ops.fastfood_adjoint(plan, *(leaf.detach().double() for leaf in leaves), [whole], "reference")
    for leaf, expected in zip(leaves, exact, strict=True):
        assert relative_error(leaf.grad, expected) <= 1e-5


def test_rows_of_one_part_of_a_plan_get_its_factor_alone():
    shapes = {"a": (30, 8), "table": (40, 12), "b": (9,)}
    plan = Plan(shapes, 40, 3, width=32)
    part = Part(plan, ["table"])
    theta, factors = sequence(40).requires_grad_(), torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    projection, rows = Projection(part.plan), torch.tensor([1, 39])
    got = rows_of(projection, theta, factors, part, torch.zeros(40, 12), rows)
    whole = Projection(plan).forward(theta.detach(), (factors / plan.scales).detach())["table"]
    assert relative_error(got, whole[rows]) <= 1e-6
    got.sum().backward()
    assert factors.grad[1] and not factors.grad[[0, 2]].any()


@pytest.mark.parametrize("most", [2**23, 256])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("table", TABLES)
def test_a_row_that_stays_that_of_the_base(backend, table, most, monkeypatch):
    """Among the rows, first, last, or not there: as in the whole table. The gradient as of the rows without it."""
    monkeypatch.setattr(rows_module, "MOST", most)
    plan = plan_of(table)
    *values, base = values_of(plan)
    for kept, rows in ((6, range(0, 30, 3)), (0, range(0, 30, 5)), (29, range(2, 30, 3)), (7, range(0, 30, 3))):
        projection, chosen = Projection(plan, backend=backend, kept={"table": kept}), torch.tensor(list(rows))
        (whole,) = plan.views(projection.flat(*values, [base]))
        leaves = [value.clone().requires_grad_() for value in values]
        got = rows_of(projection, *leaves, Part(plan), base, chosen)
        assert_same_bits(got, whole[chosen], str(kept))
        assert torch.equal(whole[kept], base[kept]) and not torch.equal(whole[1], base[1])
        upstream = sequence(got.numel(), 61).view(got.shape)
        before = upstream.clone()
        got.backward(upstream)
        assert torch.equal(upstream, before)
        expected = [value.clone().requires_grad_() for value in values]
        others = chosen != kept
        without = rows_of(Projection(plan, backend=backend), *expected, Part(plan), base, chosen[others])
        without.backward(upstream[others])
        for leaf, other in zip(leaves, expected, strict=True):
            assert relative_error(leaf.grad, other.grad) <= 1e-6


def test_the_number_of_threads_changes_no_bit():
    plan = plan_of((4000, 60, 500, 512))
    theta, factor, base = values_of(plan)
    rows = torch.arange(0, 4000, 3)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaves = [theta.clone().requires_grad_(), factor.clone().requires_grad_()]
            got = rows_of(Projection(plan), *leaves, Part(plan), base, rows)
            got.square().sum().backward()
            results.append((got.detach(), *(leaf.grad for leaf in leaves)))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_only_the_blocks_of_the_rows_are_listed():
    """1,000 rows of mBERT's table in blocks of 1,024 values: at most two blocks a row, of 89,661."""
    rows = torch.randperm(119_547)[:1000].sort().values
    blocks = Blocks.of(rows, 768, 1024, 1)
    expected = {value // 1024 for row in rows.tolist() for value in (row * 768, row * 768 + 767)}
    assert set(blocks.listed.tolist()) == expected and len(blocks.listed) == len(expected) <= 2000
    assert blocks.pieces.shape == (1000, 3) and blocks.size == 256


def test_whose_rows_can_be_made():
    shapes = {"table": (6, 8), "bands": (6, 8), "vector": (48,)}
    bands = [Segment("bands", 0, 6, 4, 8, "a"), Segment("bands", 4, 6, 4, 8, "b")]
    plan = Plan(shapes, 20, segments=[Segment("table", 0, 1, 48, 48), *bands, Segment("vector", 0, 1, 48, 48)])
    assert [name for name in shapes if has_rows(plan, name)] == ["table"]


WRONG = {
    "beyond the end": (torch.tensor([0, 19]), 1, "listed: expected rising numbers from 0 to 18, got 19"),
    "negative": (torch.tensor([-1]), 1, "listed: expected rising numbers from 0 to 18, got -1"),
    "twice the same": (torch.tensor([3, 3]), 1, "listed: expected rising numbers"),
    "falling": (torch.tensor([3, 2]), 1, "listed: expected rising numbers"),
    "another dtype": (torch.tensor([0], dtype=torch.int32), 1, "listed: expected a contiguous int64 tensor"),
    "a matrix": (torch.tensor([[0]]), 1, "listed: expected a contiguous int64 tensor"),
    "no span": (torch.tensor([0]), 0, "span"),
    "too many": (torch.arange(30), 1, "listed: expected at most 19 entries"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_lists_are_refused(what):
    listed, span, message = WRONG[what]
    plan = plan_of((50, 12, 20, 32))
    theta, factor, base = values_of(plan)
    with pytest.raises(RuntimeError, match=message):
        ops.fastfood_forward(plan, theta, factor, [base], torch.float32, "cpu", listed, span)
    with pytest.raises(RuntimeError, match=message):
        grad = torch.zeros(max(1, listed.numel() * span) * 32)
        ops.fastfood_adjoint(plan, theta, factor, [grad], "cpu", listed, span)


def test_a_plan_of_several_segments_or_a_short_gradient_is_refused():
    two = Plan({"a": (50, 12), "b": (4,)}, 20, 3, width=32)
    listed, theta = torch.tensor([0, 2]), sequence(20)
    with pytest.raises(RuntimeError, match="segments: expected one dense segment"):
        ops.fastfood_forward(two, theta, two.scales, [], torch.float32, "cpu", listed, 1)
    one = plan_of((50, 12, 20, 32))
    with pytest.raises(RuntimeError, match="grads: tensor 0 has 63 elements, the plan needs 64"):
        ops.fastfood_adjoint(one, theta, one.scales, [torch.zeros(63)], "cpu", listed, 1)


def test_opcheck():
    plan = plan_of((50, 12, 20, 32))
    theta, factor, base = values_of(plan)
    listed, op = torch.tensor([1, 4, 18]), torch.ops.hsaid_kernels
    numbers = (plan.seed, plan.width, plan.rademacher)
    arguments = (theta, factor, [base], plan.segments, *numbers, plan.holes, plan.numel, torch.float32, listed, 1)
    torch.library.opcheck(op.fastfood_forward, arguments)
    grad = sequence(96)
    torch.library.opcheck(
        op.fastfood_adjoint, (theta, factor, [grad], plan.segments, *numbers, plan.run_blocks, listed, 1)
    )


def test_a_second_derivative_is_refused():
    plan = plan_of(TABLES[0])
    theta, factor, base = values_of(plan)
    theta.requires_grad_()
    got = rows_of(Projection(plan), theta, factor, Part(plan), base, torch.tensor([2, 3]))
    (grad,) = torch.autograd.grad(got.square().sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_theta_may_not_change_before_backward():
    plan = plan_of(TABLES[0])
    theta, factor, base = values_of(plan)
    theta.requires_grad_()
    got = rows_of(Projection(plan), theta, factor, Part(plan), base, torch.tensor([2, 3]))
    with torch.no_grad():
        theta.add_(1.0)
    with pytest.raises(RuntimeError, match="theta has been changed in place"):
        got.sum().backward()


def test_many_rows_are_made_some_at_a_time(monkeypatch):
    plan, calls = plan_of((500, 30, 200, 256)), []
    theta, factor, base = values_of(plan)
    rows_at_once = torch.arange(0, 500, 2)
    forward = ops.fastfood_forward

    def watched(*arguments):
        calls.append(forward(*arguments))
        return calls[-1]

    monkeypatch.setattr(ops, "fastfood_forward", watched)
    results = []
    for most in (2**23, 4096):
        monkeypatch.setattr(rows_module, "MOST", most)
        calls.clear()
        leaves = [theta.clone().requires_grad_(), factor.clone().requires_grad_()]
        got = rows_of(Projection(plan), *leaves, Part(plan), base, rows_at_once)
        got.square().sum().backward()
        assert max(call.numel() for call in calls) <= most and (len(calls) > 20) == (most == 4096)
        results.append((got.detach(), *(leaf.grad for leaf in leaves)))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(one, other) <= 1e-6


def test_listed_blocks_in_a_compiled_graph():
    """They have no op that names its plan: a graph has the plan's tables."""
    plan = plan_of(TABLES[0])
    theta, factor, base = values_of(plan)
    listed = torch.tensor([1, 4])

    def run(theta):
        return ops.fastfood_forward(plan, theta, factor, [base], torch.float32, "cpu", listed, 1)

    assert_same_bits(torch.compile(run, backend="eager")(theta), run(theta))
