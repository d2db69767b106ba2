"""The projection of a step and its adjoint, with only the rows of the embeddings that a batch of 32 x 32 tokens reads.

Beside it: all weights, as a step of `HSAID` took before rows were made on demand.
"""

from dataclasses import dataclass

import pytest
import shapes
import torch

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import rows_of

TABLES = {"mBERT": "bert.embeddings.word_embeddings.weight", "XLM-R base": "embeddings.word_embeddings.weight"}
TOKENS = (32, 32)


@dataclass(frozen=True)
class Case:
    model: str
    diagonal: str
    dim: int

    def __str__(self) -> str:
        return f"{self.model}-{self.diagonal}-{self.dim}"


CASES = [
    Case(model, diagonal, dim) for model in TABLES for diagonal in ("gaussian", "rademacher") for dim in (1000, 16384)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_on_demand(case, weights, measure, record):
    base, _ = weights(case.model, torch.float32)
    whole = Plan(shapes.tensors(case.model), case.dim, 0, diagonal=case.diagonal)
    name = TABLES[case.model]
    part, others = Part(whole, [name]), whole.select([other for other in whole.names if other != name])
    projection = Projection(part.plan)
    theta = torch.randn(case.dim, generator=torch.Generator().manual_seed(0))
    leaf = theta.clone().requires_grad_()
    of_whole = whole.views(base)
    of_others = [tensor for name, tensor in zip(whole.names, of_whole) if name in others.shapes]
    (of_table,) = whole.views(base, [name])
    ids = torch.randint(len(of_table), TOKENS, generator=torch.Generator().manual_seed(1))

    def everything() -> None:
        ops.fastfood_forward(whole, theta, whole.scales, of_whole, torch.float32, "cpu")
        ops.fastfood_adjoint(whole, theta, whole.scales, of_whole, "cpu")

    def on_demand() -> None:
        ops.fastfood_forward(others, theta, others.scales, of_others, torch.float32, "cpu")
        rows = rows_of(projection, leaf, whole.scales, part, of_table, torch.unique(ids))
        ops.fastfood_adjoint(others, theta, others.scales, of_others, "cpu")
        torch.autograd.grad(rows, leaf, rows.detach())

    columns = measure(on_demand, {"whole": everything}, rounds=7)
    record(what="rows", model=case.model, diagonal=case.diagonal, d=case.dim, tokens=ids.numel(), **columns)
