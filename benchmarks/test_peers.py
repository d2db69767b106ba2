"""Other ways to the same end, in the same rounds as ours and on the same tensors.

The published algorithm takes minutes for the word embeddings: the quick profile has it on one matrix. How long
it would take for all of mBERT is that time scaled by the operations, and the row says so ("scaled").
"""

import itertools
import math

import peers
import pytest
import results
import shapes
import torch

from hsaid_kernels import Projection
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan

MATRIX, EMBEDDINGS = "bert.encoder.layer.0.intermediate.dense.weight", "bert.embeddings.word_embeddings.weight"
DIM = 1000
CASES = [(MATRIX, transform) for transform in peers.TRANSFORMS]
CASES += [pytest.param(EMBEDDINGS, t, marks=pytest.mark.full) for t in ("butterflies", "hadamard_transform")]


@pytest.mark.parametrize("tensor, transform", CASES)
def test_published(measure, record, tensor, transform):
    """Forward and backward: the weights, and the gradients of theta and of the tensor's factor."""
    shape = shapes.mbert()[tensor]
    numel = math.prod(shape)
    base, grad = torch.randn(shape), torch.randn(shape)
    theta, factor = torch.randn(DIM, requires_grad=True), torch.ones(1, requires_grad=True)
    published = peers.Published(numel, DIM, peers.TRANSFORMS[transform])
    ours = Projection.from_shapes({tensor: shape}, DIM)

    def step(weights: torch.Tensor) -> None:
        torch.autograd.grad(weights, (theta, factor), grad.view_as(weights))

    step(ours.forward(theta, factor, {tensor: base})[tensor])  # the warm-up of ours, where there is no other
    columns = measure(
        lambda: step(published.forward(base.view(-1), theta, factor)),
        {"ours": lambda: step(ours.forward(theta, factor, {tensor: base})[tensor])},
        **(dict(rounds=1, warmup=0) if numel > 2**24 else dict(rounds=3)),
    )
    work = {name: peers.published_work(math.prod(s)) for name, s in shapes.mbert().items()}
    scale = sum(work.values()) / work[tensor]
    every = sum(1 << (math.prod(s) - 1).bit_length() for s in shapes.mbert().values())
    record(
        what="published",
        transform=transform,
        tensor=tensor,
        weights=numel,
        dtype="float32",
        d=DIM,
        **columns,
        scaled_to="mBERT",
        scaled_ms=columns["ms"] * scale,
        random_MB=every * published.random_bytes() / published.size / 1e6,
    )


@pytest.mark.parametrize("dim", [DIM, pytest.param(16384, marks=pytest.mark.full)])
def test_drawing_normals(measure, record, weights, dim):
    """Torch drawing as many normals as mBERT has weights, and doing nothing with them."""
    plan = Plan(shapes.mbert(), dim)
    flat, out = weights("mBERT", torch.float32)
    drawn = out[: sum(map(math.prod, plan.shapes.values()))]
    arguments = (plan, torch.randn(dim), plan.scales, plan.views(flat), torch.float32, "cpu")
    columns = measure(drawn.normal_, {"ours": lambda: ops.fastfood_forward(*arguments)}, rounds=3)
    record(what="normals", model="mBERT", weights=len(drawn), dtype="float32", d=dim, **columns)


@pytest.mark.full
def test_gpart(measure, record, weights):
    """Forward and backward of all tensors of mBERT; GPart's own code has a second matrix product a layer besides."""
    dim, seed = 131_072, 0
    plan = Plan(shapes.mbert(), dim)
    flat, _ = weights("mBERT", torch.float32)
    base, theta = plan.views(flat), torch.randn(dim, requires_grad=True)
    counts = [tensor.numel() for tensor in base]
    sizes = torch.zeros(dim)
    for first, count in zip(itertools.accumulate(counts, initial=0), counts):
        sizes += peers.gpart_groups(first, count, seed, dim).bincount(minlength=dim)
    norms = sizes.sqrt()

    def theirs() -> None:
        for first, tensor in zip(itertools.accumulate(counts, initial=0), base):
            torch.autograd.grad(peers.GPart.apply(theta, tensor, norms, first, seed), theta, tensor)

    def ours() -> None:
        ops.fastfood_forward(plan, theta.detach(), plan.scales, base, torch.float32, "cpu")
        ops.fastfood_adjoint(plan, theta.detach(), plan.scales, base, "cpu")

    columns = measure(theirs, {"ours": ours}, rounds=3)
    columns |= results.remark(f"ours / GPart's formula in torch, d = {dim:,}", 1 / columns["/ours"], 1 / 20)
    record(what="gpart", model="mBERT", weights=sum(counts), dtype="float32", d=dim, **columns)


@pytest.mark.parametrize("dim", [200, pytest.param(DIM, marks=pytest.mark.full)])
def test_dense_gaussian(measure, record, dim):
    """A dense Gaussian matrix of 768 * 768 rows, for one matrix of weights; for all of mBERT it would not fit."""
    shape = (768, 768)
    base, grad = torch.randn(math.prod(shape)), torch.randn(math.prod(shape))
    matrix, theta = torch.randn(len(base), dim).div_(math.sqrt(len(base))), torch.randn(dim)
    plan = Plan({"w": shape}, dim)

    def dense() -> None:
        torch.addmv(base, matrix, theta)
        torch.mv(matrix.T, grad)

    def ours() -> None:
        ops.fastfood_forward(plan, theta, plan.scales, [base.view(shape)], torch.float32, "cpu")
        ops.fastfood_adjoint(plan, theta, plan.scales, [grad.view(shape)], "cpu")

    columns = measure(dense, {"ours": ours}, rounds=5)
    whole = sum(map(math.prod, shapes.mbert().values())) * dim * 4
    record(
        what="dense",
        weights=len(base),
        dtype="float32",
        d=dim,
        **columns,
        random_MB=matrix.nbytes / 1e6,
        random_MB_mBERT=whole / 1e6,
    )
