"""`hadamard_transform` under autograd, forward mode and torch.func, against a product with the Hadamard matrix."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import ISAS, assert_same_bits
from torch import Tensor, func
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from hsaid_kernels import available_backends, hadamard_transform

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.hsaid_kernels.hadamard_transform
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALE = 0.5
needs_cpu = pytest.mark.skipif(not ISAS, reason=f"cpu: {available_backends()['cpu']}")


def transforms() -> list:
    """`hadamard_transform` by both backends of the CPU, and the op itself."""
    return [
        pytest.param(lambda x: hadamard_transform(x, SCALE, "reference"), id="reference"),
        pytest.param(lambda x: hadamard_transform(x, SCALE), id="cpu", marks=needs_cpu),
        pytest.param(lambda x: OP(x, SCALE), id="op", marks=needs_cpu),
    ]


def by_matrix(x: Tensor) -> Tensor:
    n = 1 << (x.shape[-1] - 1).bit_length()
    h = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64)[: x.shape[-1], : x.shape[-1]]
    return x @ h.to(x.dtype) * SCALE


def scalar(f):
    """Of what f gives, a scalar whose third derivative is not 0 yet."""
    return lambda x: f(x).pow(3).sum()


def dual(f, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


DERIVATIVES = {
    "dual tensors": dual,
    "jvp": lambda f, x, t: func.jvp(f, (x,), (t,))[1],
    "vjp": lambda f, x, t: func.vjp(f, x)[1](t)[0],
    "grad": lambda f, x, t: func.grad(scalar(f))(x),
    "jacfwd": lambda f, x, t: func.jacfwd(f)(x),
    "jacrev": lambda f, x, t: func.jacrev(f)(x),
    "hessian": lambda f, x, t: func.hessian(scalar(f))(x),
    "jacfwd of jacfwd": lambda f, x, t: func.jacfwd(func.jacfwd(scalar(f)))(x),
    "jacrev of jacrev": lambda f, x, t: func.jacrev(func.jacrev(scalar(f)))(x),
    "jvp of grad": lambda f, x, t: func.jvp(func.grad(scalar(f)), (x,), (t,))[1],
    "grad of jvp": lambda f, x, t: func.grad(lambda x: func.jvp(scalar(f), (x,), (t,))[1])(x),
    "grad of grad of grad": lambda f, x, t: func.grad(scalar(func.grad(scalar(func.grad(scalar(f))))))(x / 8),
    "vmap of grad": lambda f, x, t: func.vmap(func.grad(scalar(f)))(x),
    "grad of vmap": lambda f, x, t: func.grad(scalar(func.vmap(f)))(x),
    "vmap of jvp": lambda f, x, t: func.vmap(lambda x, t: func.jvp(f, (x,), (t,))[1])(x, t),
    "vmap of hessian": lambda f, x, t: func.vmap(func.hessian(scalar(f)))(x),
    "linearize": lambda f, x, t: func.linearize(scalar(f), x)[1](t),
}


@pytest.mark.parametrize("dim", [1, 3, 6, 8])
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("f", transforms())
def test_derivatives(f, derivative, dim):
    x, tangent = torch.randn(2, 2, dim, dtype=torch.float64)
    torch.testing.assert_close(derivative(f, x, tangent), derivative(by_matrix, x, tangent))
    with torch.no_grad():  # which torch.func does not heed inside
        torch.testing.assert_close(derivative(f, x, tangent), derivative(by_matrix, x, tangent))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("f", transforms())
def test_gradcheck(f, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    batched = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, **batched)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("f", transforms()[1:])
def test_derivatives_have_the_bits_of_a_transform(f, dtype):
    """It is linear and symmetric: what comes of a tangent or a gradient is its transform, in its dtype.

    Not for the reference, whose stages torch goes through backwards.
    """
    x, other = torch.randn(2, 4, 100).to(dtype)
    expected = f(other)
    assert_same_bits(dual(f, x, other), expected)
    assert_same_bits(func.vjp(f, x)[1](other)[0], expected)
    leaf = x.clone().requires_grad_()
    assert_same_bits(torch.autograd.grad(f(leaf), leaf, other)[0], expected)
    gradient = other.clone().requires_grad_()
    assert_same_bits(torch.autograd.grad(func.vjp(f, x)[1](gradient)[0], gradient, x)[0], f(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("f", transforms())
def test_vmap(f, dtype):
    """Over any dimension, twice too, in one call of the kernel: torch warns where it makes a loop of it."""
    x = torch.randn(2, 3, 4, 5).to(dtype)
    expected = f(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dim in range(4):
            rolled = x.movedim(0, dim)
            assert_same_bits(func.vmap(f, dim)(rolled), expected)
            assert_same_bits(func.vmap(f, dim - 4, 1)(rolled), expected.movedim(0, 1))
        assert_same_bits(func.vmap(func.vmap(f, 1, 1), 2)(x.movedim(0, 2)), expected)
        assert_same_bits(func.vmap(func.vmap(func.vmap(f)))(x), expected)
        assert_same_bits(func.vmap(lambda _: f(x[0, 0]))(x), expected[0, :1].expand(2, 4, 5))
        assert func.vmap(f)(x[:, :0]).shape == (2, 0, 4, 5)


@needs_cpu
def test_vmap_over_scalars():
    """They have no dimension to transform, and the batch is none."""
    with pytest.raises(ValueError, match=r"x: expected at least one dimension, got shape \(\)"):
        func.vmap(hadamard_transform)(torch.ones(4))
    with pytest.raises(IndexError):
        func.vmap(lambda x: OP(x, SCALE))(torch.ones(4))


@needs_cpu
@pytest.mark.parametrize("name", ["jvp", "jacrev", "hessian", "vmap of grad", "grad of grad of grad"])
def test_derivatives_compile_whole(name):
    x, tangent = torch.randn(2, 2, 6, dtype=torch.float64)

    def derivative(f):
        return lambda x: DERIVATIVES[name](f, x, tangent)

    compiled = torch.compile(derivative(lambda x: hadamard_transform(x, SCALE)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), derivative(by_matrix)(x))


@needs_cpu
def test_compiled_autograd():
    x = torch.randn(3, 6, requires_grad=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        hadamard_transform(x, SCALE).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, by_matrix(2 * by_matrix(x.detach())))


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_meta_device(dtype, backend):
    x = torch.empty(2, 5, 3, dtype=dtype, device="meta").mT.requires_grad_()
    y = hadamard_transform(x, SCALE, backend)
    assert y.is_meta and y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    with pytest.raises(ValueError, match="backend: expected one of"):
        hadamard_transform(x, backend="gpu")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_tensors(dtype, backend):
    with FakeTensorMode():
        y = hadamard_transform(torch.empty(2, 5, dtype=dtype), SCALE, backend)
        assert y.shape == (2, 5) and y.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5), np.int64(2), np.uint8(2), Fraction(1, 2), True])
def test_scales_of_any_real_type(scale, backend):
    x = torch.randn(3, 6)
    assert_same_bits(hadamard_transform(x, scale, backend), hadamard_transform(x, float(scale), backend))


@pytest.mark.parametrize("scale", ["0.5", None, 1j, np.complex64(1), [0.5], np.ones(1), torch.ones(2), torch.ones(())])
def test_scales_that_are_no_numbers(scale):
    with pytest.raises(TypeError, match=f"scale: expected a real number, got {type(scale).__name__}"):
        hadamard_transform(torch.ones(4), scale)
