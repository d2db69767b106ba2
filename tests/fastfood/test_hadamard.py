"""`hadamard_transform` along any dimension, of any order, into given memory, of integers and of complex numbers."""

import functools
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from helpers import ISAS, assert_same_bits, poison, threads
from torch import Tensor, func
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from hsaid_kernels import available_backends, hadamard_transform, hadamard_transform_
from hsaid_kernels.fastfood import ops

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.int32, torch.int64)
SCALE = 0.5
OP = torch.ops.hsaid_kernels.hadamard_transform_into
needs_cpu = pytest.mark.skipif(not ISAS, reason=f"cpu: {available_backends()['cpu']}")
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


def numbers(shape, dtype) -> Tensor:
    if dtype in INTEGERS:
        return torch.randint(-50, 50, shape, dtype=dtype)
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def scale_for(dtype) -> float:
    return 1 if dtype in INTEGERS else SCALE


def by_matrix(x: Tensor, scale: float = SCALE, dim: int = -1) -> Tensor:
    """By scipy's matrix, in x's dtype."""
    size = x.shape[dim]
    h = torch.tensor(scipy.linalg.hadamard(1 << (size - 1).bit_length()), dtype=torch.int64)[:size, :size]
    moved = x.movedim(dim, -1)
    return ((moved[..., None, :] * h).sum(-1) * scale).movedim(-1, dim).to(x.dtype)


# --- dimensions and dtypes


@backends
@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *INTEGERS))
@pytest.mark.parametrize("dim", range(-3, 3))
def test_dim(dim, dtype, backend):
    scale = scale_for(dtype)
    for shape in ((4, 5, 8), (1, 2, 3), (16, 1, 40)):
        x = numbers(shape, dtype)
        got = hadamard_transform(x, scale, backend, dim=dim)
        assert got.dtype == dtype
        rows = hadamard_transform(x.movedim(dim, -1).contiguous(), scale, backend)
        assert torch.equal(got, rows.movedim(-1, dim))
        if dtype in INTEGERS:
            assert torch.equal(got, by_matrix(x, 1, dim))
        else:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            torch.testing.assert_close(got, by_matrix(x.to(wide), scale, dim).to(dtype))


@needs_cpu
@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *INTEGERS))
def test_memory_of_any_kind(dtype):
    """Strides, offsets, broadcast and read-only memory, lazy conjugates and negatives, an empty batch."""
    scale = scale_for(dtype)
    x = numbers((6, 5, 4), dtype)
    read_only = np.arange(24).reshape(3, 8)
    read_only.flags.writeable = False
    for view in (x.mT, x[:, ::2], x[1:, 1:, 1:], x[..., :1].expand(6, 5, 9), x[:0], x[:, 2], x[3, 3]):
        before = view.clone()
        for dim in range(view.dim()):
            if view.shape[dim]:
                expected = hadamard_transform(view.contiguous(), scale, dim=dim)
                assert torch.equal(hadamard_transform(view, scale, dim=dim), expected)
                out = torch.empty_like(expected)
                assert hadamard_transform(view, scale, dim=dim, out=out) is out and torch.equal(out, expected)
        assert torch.equal(view, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of NumPy's arrays that are read-only
        source = torch.from_numpy(read_only)
    assert torch.equal(hadamard_transform(source), by_matrix(source, 1))
    if dtype.is_complex:
        assert torch.equal(hadamard_transform(x.conj(), scale), hadamard_transform(x.conj().resolve_conj(), scale))
        assert torch.equal(hadamard_transform(x.conj().imag, scale), hadamard_transform(-x.imag, scale))


@needs_cpu
@pytest.mark.parametrize("n", [1, 2, 3, 4, 64, 100, 256, 300, 4096, 2**16, 2**18])
def test_float64_has_the_same_bits_on_every_isa_and_for_any_threads(n, isa):
    x = torch.randn(3, n, dtype=torch.float64)
    expected = hadamard_transform(x, SCALE, "reference")
    for count in (1, 2, 5):
        with threads(count):
            assert_same_bits(hadamard_transform(x, SCALE), expected, isa)
            assert_same_bits(hadamard_transform_(x.clone(), SCALE), expected, isa)


# --- in place, and out


@backends
@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *INTEGERS))
@pytest.mark.parametrize("n", [1, 2, 3, 32, 100, 2048])
def test_in_place_and_out(n, dtype, backend):
    scale = scale_for(dtype)
    x = numbers((3, n), dtype)
    expected = hadamard_transform(x, scale, backend)
    poison(x.numel(), dtype if dtype in FLOATS else torch.float32)
    out, place = torch.empty_like(x), x.clone()
    version = place._version, out._version
    assert hadamard_transform(x, scale, backend, out=out) is out
    assert hadamard_transform_(place, scale, backend) is place
    assert torch.equal(out, expected) and torch.equal(place, expected)
    assert place._version > version[0] and out._version > version[1]
    assert hadamard_transform(x, scale, backend, out=x) is x and torch.equal(x, expected)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64])
def test_in_place_on_views(dtype):
    """Only what the view shows is written."""
    scale = scale_for(dtype)
    for view in (lambda x: x[1:-1], lambda x: x[:, 2:-3], lambda x: x[:, ::2], lambda x: x.mT, lambda x: x[2]):
        for dim in (0, -1):
            x = numbers((8, 16), dtype)
            expected = x.clone()
            view(expected).copy_(hadamard_transform(view(x).clone(), scale, dim=dim))
            hadamard_transform_(view(x), scale, dim=dim)
            assert torch.equal(x, expected)
            x = numbers((8, 16), dtype)
            out = numbers((8, 16), dtype)
            expected = out.clone()
            view(expected).copy_(hadamard_transform(view(x), scale, dim=dim))
            hadamard_transform(view(x), scale, dim=dim, out=view(out))
            assert torch.equal(out, expected)


@needs_cpu
def test_out_that_shares_memory_with_x():
    """As if x had been read before anything was written."""
    memory = torch.randn(100)
    for first, second in ((0, 1), (1, 0), (0, 40), (7, 7)):
        shared = memory.clone()
        x, out = shared[first : first + 50], shared[second : second + 50]
        expected = hadamard_transform(x.clone(), SCALE)
        hadamard_transform(x, SCALE, out=out)
        assert_same_bits(out, expected)
    shared = memory.clone().view(50, 2)
    expected = hadamard_transform(shared[:, 0].clone())
    hadamard_transform(shared[:, 0], out=shared[:, 1])
    assert_same_bits(shared[:, 1], expected)
    assert_same_bits(shared[:, 0], memory.view(50, 2)[:, 0])


@backends
def test_overlapping_elements_are_refused(backend):
    message = r"expected elements that do not overlap in memory, got shape \(3, 4\) and strides \((0|1|2), 1\)"
    memory = torch.randn(12)
    for overlapping in (torch.randn(4).expand(3, 4), memory.unfold(0, 4, 1)[:3], memory.as_strided((3, 4), (2, 1))):
        with pytest.raises(ValueError, match=f"^x: {message}"):
            hadamard_transform_(overlapping, backend=backend)
        with pytest.raises(ValueError, match=f"^out: {message}"):
            hadamard_transform(torch.randn(3, 4), backend=backend, out=overlapping)
    hadamard_transform_(torch.randn(1, 4).expand(1, 4), backend=backend)
    hadamard_transform_(torch.randn(4).as_strided((1, 4), (0, 1)), backend=backend)
    assert hadamard_transform_(torch.randn(1, 4).expand(0, 3, 4), backend=backend).shape == (0, 3, 4)


@needs_cpu
@pytest.mark.parametrize("n", [16, 2048, 2**16])
def test_large_results_leave_the_pool_or_come_back(n):
    """Results of 16 MB are in memory that is used again, but never while somebody holds it."""
    x = torch.randn(2**22 // n, n)
    expected = hadamard_transform(x[:2])
    kept = [hadamard_transform(x) for _ in range(3)]
    assert len({y.data_ptr() for y in kept}) == 3
    for y in kept:
        assert_same_bits(y[:2], expected)
    del y, kept
    assert ops.empty_cache() > 0
    assert_same_bits(hadamard_transform(torch.cat([x] * 5))[:2], expected)
    ops.empty_cache()


@pytest.mark.parametrize(
    "out, error, message",
    [
        ([1.0], TypeError, "out: expected a tensor, got list"),
        (torch.empty(4, 4), ValueError, r"out: expected x's shape \(3, 4\), got \(4, 4\)"),
        (torch.empty(3, 4).double(), ValueError, "out: expected x's dtype torch.float32, got torch.float64"),
        (torch.empty(3, 4, device="meta"), ValueError, "out: expected x's device cpu, got meta"),
        (torch.empty(3, 4).requires_grad_(), RuntimeError, "out: expected a tensor that does not require grad"),
    ],
)
def test_out_refuses(out, error, message):
    with pytest.raises(error, match=message):
        hadamard_transform(torch.ones(3, 4), out=out)


@pytest.mark.parametrize(
    "x, keywords, error, message",
    [
        (torch.ones(3), {"dim": 1}, IndexError, r"dim: expected -1 to 0 for shape \(3,\), got 1"),
        (torch.ones(3, 2), {"dim": -3}, IndexError, r"dim: expected -2 to 1 for shape \(3, 2\), got -3"),
        (torch.ones(3, 2), {"dim": 1.0}, TypeError, "dim: expected an integer, got float"),
        (torch.ones(3, 2), {"dim": None}, TypeError, "dim: expected an integer, got NoneType"),
        (torch.ones(3, 2), {"order": 12.0}, ValueError, "order: expected 1, 12, 20 or 28, got 12.0"),
        (torch.ones(0, 2), {"dim": 0}, ValueError, r"size of at least 1 along dimension 0, got shape \(0, 2\)"),
        (torch.ones(3).int(), {"scale": 0.5}, ValueError, "scale: expected 1 for a tensor of integers, got 0.5"),
        (torch.ones(3).short(), {}, TypeError, r"got torch.int16; convert it, for example by x.to\(torch.int32\)"),
        (torch.ones(3).bool(), {}, TypeError, "got torch.bool; convert it"),
        (torch.ones(3, dtype=torch.complex32), {}, TypeError, "got torch.complex32$"),
        (torch.ones(3).to_sparse(), {}, TypeError, "x: expected a dense tensor, got layout torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("transform", [hadamard_transform, hadamard_transform_])
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_refuses(transform, x, keywords, error, message):
    with pytest.raises(error, match=message):
        transform(x, **keywords)


# --- order * 2^k values


def paley_matrix(order: int) -> np.ndarray:
    """By the definition: the squares of the field, found one by one."""
    half = order // 2
    if half == 10:  # a + b sqrt(-1), a and b modulo 3
        elements = [(k % 3, k // 3) for k in range(9)]
        squares = {((a * a - b * b) % 3, 2 * a * b % 3) for a, b in elements[1:]}
    else:
        elements = [(k, 0) for k in range(half - 1)]
        squares = {(a * a % (half - 1), 0) for a, _ in elements[1:]}
    p = 3 if half == 10 else half - 1
    c = np.ones((half, half), dtype=int)
    for i, (a, b) in enumerate(elements):
        for j, (d, e) in enumerate(elements):
            c[i + 1, j + 1] = 1 if ((a - d) % p, (b - e) % p) in squares else -1
    np.fill_diagonal(c, 0)
    return np.kron(c, [[1, 1], [1, -1]]) + np.kron(np.eye(half, dtype=int), [[1, -1], [-1, -1]])


orders = pytest.mark.parametrize("order", [12, 20, 28])


@backends
@orders
def test_order_is_the_matrix_of_paley(order, backend):
    for k in (0, 1, 2, 5):
        expected = torch.from_numpy(np.kron(paley_matrix(order), scipy.linalg.hadamard(1 << k)))
        got = hadamard_transform(torch.eye(order << k, dtype=torch.int64), backend=backend, order=order)
        assert torch.equal(got, expected)
        assert torch.equal(got, got.T)
        assert torch.equal(got @ got, (order << k) * torch.eye(order << k, dtype=torch.int64))


@needs_cpu
@orders
@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *INTEGERS))
def test_order_has_the_same_bits_on_every_isa_and_for_any_threads(order, dtype, isa):
    """Whole and padded rows, in place, in `out`, along another dimension."""
    scale = scale_for(dtype)
    for size in (1, order, 2 * order, 3 * order - 1, order << 6, (order << 12) - 7, order << 12):
        x = numbers((3, size), dtype)
        expected = hadamard_transform(x, scale, "reference", order=order)
        for count in (1, 3):
            with threads(count):
                assert torch.equal(hadamard_transform(x, scale, order=order), expected), (isa, size, count)
        assert torch.equal(hadamard_transform_(x.clone(), scale, order=order), expected)
        assert torch.equal(hadamard_transform(x, scale, order=order, out=torch.empty_like(x)), expected)
        assert torch.equal(hadamard_transform(x.mT, scale, order=order, dim=0), expected.mT)


@pytest.mark.parametrize("order", [0, 2, 3, 5, 40, -12, "12", 12.0, 12.5, None])
def test_orders_that_are_refused(order):
    for transform in (hadamard_transform, hadamard_transform_):
        with pytest.raises(ValueError, match=f"order: expected 1, 12, 20 or 28, got {order!r}"):
            transform(torch.ones(24), order=order)
    x = torch.randn(24)
    assert_same_bits(hadamard_transform(x, order=np.int64(12)), hadamard_transform(x, order=12))
    if ISAS and isinstance(order, int):
        with pytest.raises(RuntimeError, match=f"order: expected 1, 12, 20 or 28, got {order}"):
            torch.ops.hsaid_kernels.hadamard_transform(torch.ones(24), 1.0, order)


@backends
@orders
def test_derivatives_of_an_order(order, backend):
    x = torch.randn(2, 2 * order - 3, dtype=torch.float64, requires_grad=True)
    f = functools.partial(hadamard_transform, scale=SCALE, backend=backend, order=order)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    (grad,) = torch.autograd.grad(f(x).pow(3).sum(), x)
    torch.testing.assert_close(func.vmap(func.grad(lambda x: f(x).pow(3).sum()))(x.detach()), grad)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).pow(3).sum(), x)[0], grad)
    assert f(torch.empty(2, 5, device="meta")).shape == (2, 5)


@needs_cpu
@orders
def test_integers_of_an_order_are_exact_or_refused(order):
    most = torch.iinfo(torch.int32).max
    for backend in ("cpu", "reference"):
        fits = torch.full((order,), most // order, dtype=torch.int32)
        exact = paley_matrix(order).sum(1) * (most // order)
        assert hadamard_transform(fits, backend=backend, order=order).tolist() == exact.tolist()
        with pytest.raises(RuntimeError, match="x: expected integers whose transform fits int32, got larger ones"):
            hadamard_transform(torch.full((order,), most, dtype=torch.int32), backend=backend, order=order)


@backends
def test_rotates_the_hidden_values_of_a_model(backend):
    """As quantization methods rotate what a layer takes, so that no value stands out: the model computes the same."""
    config = transformers.BertConfig(vocab_size=50, hidden_size=24, num_attention_heads=2, intermediate_size=80)
    model = transformers.BertModel(config).eval().requires_grad_(False)
    tokens = torch.randint(50, (2, 7))
    expected = model(tokens).last_hidden_state
    for layer in model.encoder.layer:
        rotate = functools.partial(hadamard_transform, scale=80**-0.5, backend=backend, order=20)
        layer.output.dense.weight.copy_(rotate(layer.output.dense.weight))
        layer.output.dense.register_forward_pre_hook(lambda _, inputs, rotate=rotate: (rotate(inputs[0]),))
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)


@needs_cpu
def test_size_of_the_cache_changes_no_bit(monkeypatch):
    """Rows that fit it go past the caches."""
    x = torch.randn(40, 2**16)
    expected = hadamard_transform(x)
    for size in ("32768", "524288", "67108864", ""):
        monkeypatch.setenv("HSAID_CPU_L2", size)
        assert_same_bits(hadamard_transform(x), expected)
    for wrong in ("1 MB", "-5", "0", "1e6"):
        monkeypatch.setenv("HSAID_CPU_L2", wrong)
        with pytest.raises(RuntimeError, match=f"HSAID_CPU_L2: expected a number of bytes, got {wrong}"):
            hadamard_transform(x)


# --- integers


@backends
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_exact_or_refused(dtype, backend):
    """Values near the limits, whose transform may fit or not: by Python's integers."""
    most, least = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    generator = np.random.default_rng(1)
    fitted = 0
    for size in (1, 2, 3, 8, 13):
        h = scipy.linalg.hadamard(1 << (size - 1).bit_length()).astype(object)[:size, :size]
        for _ in range(40):
            bound = most >> int(generator.integers(0, 5))
            row = [int(v) for v in generator.integers(-bound - 1, bound, size, dtype=np.int64, endpoint=True)]
            x = torch.tensor([[0] * size, row], dtype=dtype)
            exact = [int(v) for v in np.array(row, dtype=object) @ h]
            place = x.clone()
            if all(least <= v <= most for v in exact):
                fitted += 1
                assert hadamard_transform(x, backend=backend)[1].tolist() == exact
                assert hadamard_transform_(place, backend=backend)[1].tolist() == exact
            else:
                message = f"x: expected integers whose transform fits {str(dtype)[6:]}, got larger ones"
                with pytest.raises(RuntimeError, match=message):
                    hadamard_transform(x, backend=backend)
                with pytest.raises(RuntimeError, match=message):
                    hadamard_transform_(place, backend=backend)
                assert torch.equal(place, x), "it is left as it was"
    assert 40 < fitted < 200


@needs_cpu
def test_integers_on_other_backends():
    assert hadamard_transform(torch.ones(2, 3, dtype=torch.int32, device="meta")).dtype == torch.int32
    doubled = func.vmap(functools.partial(hadamard_transform, dim=0))(torch.arange(12).view(3, 4))
    assert torch.equal(doubled, by_matrix(torch.arange(12).view(3, 4), 1))
    with pytest.raises(RuntimeError, match="scale: expected 1 for integers, got 0.5"):
        torch.ops.hsaid_kernels.hadamard_transform(torch.ones(2, dtype=torch.int32), 0.5)


# --- derivatives


def cubed(f):
    return lambda x: f(x).pow(3).abs().sum()


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradcheck(dim, dtype, backend):
    x = numbers((3, 5, 4), dtype).requires_grad_()
    f = functools.partial(hadamard_transform, scale=SCALE, backend=backend, dim=dim)

    def in_place(x):
        y = x * 2
        return hadamard_transform_(y[:, 1:], SCALE, backend, dim=dim) + y[:, :4]

    for function in (f, in_place):
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_torch_func(dtype):
    x, tangent = numbers((2, 3, 6), dtype)
    for f, g in (
        (lambda x: hadamard_transform(x, SCALE, dim=0), lambda x: by_matrix(x, dim=0)),
        (lambda x: hadamard_transform_(x.clone(), SCALE, dim=-1), by_matrix),
        (lambda x: hadamard_transform_(x.clone(), SCALE, dim=0), lambda x: by_matrix(x, dim=0)),
    ):
        for of in (
            lambda f: func.jvp(f, (x,), (tangent,))[1],
            lambda f: func.vjp(f, x)[1](tangent)[0],
            lambda f: func.vmap(f)(torch.stack([x, tangent])),
            lambda f: func.vmap(f, 2)(torch.stack([x, tangent], 2)),
        ):
            torch.testing.assert_close(of(f), of(g))
        torch.testing.assert_close(func.grad(cubed(f))(x), func.grad(cubed(g))(x))
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(got, g(tangent))


@needs_cpu
def test_in_place_and_autograd():
    leaf = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        hadamard_transform_(leaf)
    with torch.no_grad():
        expected = hadamard_transform(leaf)
        assert_same_bits(hadamard_transform_(leaf), expected)
    x = torch.randn(4, requires_grad=True)
    y = x.exp()
    z = y.pow(2)  # needs y as it was
    hadamard_transform_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    saved = torch.randn(4)
    z = (x * saved).sum()
    hadamard_transform_(saved)  # by the kernel, which autograd must hear of too
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    with forward_ad.dual_level():  # the tangent of what is written over goes too
        primal = forward_ad.make_dual(torch.randn(4), torch.randn(4))
        tangent = forward_ad.unpack_dual(primal).tangent.clone()
        hadamard_transform_(primal, SCALE)
        torch.testing.assert_close(forward_ad.unpack_dual(primal).tangent, by_matrix(tangent))


@needs_cpu
def test_out_and_autograd():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="x: expected a tensor that does not require grad with `out`"):
        hadamard_transform(x, out=torch.empty(4))
    with torch.no_grad():
        out = torch.empty(4)
        assert_same_bits(hadamard_transform(x, out=out), hadamard_transform(x))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="x: expected a tensor that does not"):
        hadamard_transform(forward_ad.make_dual(torch.randn(4), torch.randn(4)), out=torch.empty(4))
    with pytest.raises(RuntimeError, match="has no derivative"):
        OP(x, 1.0, torch.empty(4))


@needs_cpu
def test_inference_mode():
    x = torch.randn(2, 4)
    with torch.inference_mode():
        expected = hadamard_transform(x)
        y = x.clone()
        assert_same_bits(hadamard_transform_(y), expected)
        version = x._version
        hadamard_transform_(x)
        assert x._version > version
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        hadamard_transform_(y)


# --- compilation, fake and meta tensors, the op itself


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_compiles_whole(dtype):
    scale = scale_for(dtype)

    def f(x, out):
        y = x * 2
        hadamard_transform_(y, scale, dim=0)
        hadamard_transform(y, scale, out=out)
        return hadamard_transform(x, scale, dim=-2) + y

    x = numbers((4, 6), dtype)
    outs = torch.empty_like(x), torch.empty_like(x)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x, outs[0])
    torch.testing.assert_close(got, f(x, outs[1]))
    torch.testing.assert_close(outs[0], outs[1])


@needs_cpu
def test_gradients_of_compiled_in_place_transforms():
    def f(x):
        y = x * 2
        return hadamard_transform_(y, SCALE, dim=0).pow(3).sum()

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(by_matrix(x * 2, dim=0).pow(3).sum(), x)[0])


@pytest.mark.parametrize("dtype", (*FLOATS, *COMPLEX, *INTEGERS))
def test_meta_and_fake_tensors(dtype):
    scale = scale_for(dtype)
    x = torch.empty(3, 5, dtype=dtype, device="meta")
    for dim in (0, 1):
        y = hadamard_transform(x, scale, dim=dim)
        assert y.is_meta and y.shape == x.shape and y.dtype == dtype
        assert hadamard_transform(x, scale, dim=dim, out=y) is y
        assert hadamard_transform_(y, scale, dim=dim) is y
    with FakeTensorMode():
        x = torch.empty(3, 5, dtype=dtype)
        assert hadamard_transform_(x, scale, "cpu" if ISAS else "reference", dim=0) is x


@needs_cpu
@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS))
@pytest.mark.parametrize("shape", [(1,), (2, 5), (3, 0, 7), (2, 64)])
def test_opcheck(shape, dtype):
    x = numbers(shape, dtype)
    torch.library.opcheck(OP.default, (x, 1.0, torch.empty_like(x)))
    torch.library.opcheck(torch.ops.hsaid_kernels.hadamard_transform.default, (x, 1.0))


@needs_cpu
def test_op_refuses():
    x = torch.randn(4, 4)
    for out, message in (
        (torch.empty(4, 5), "out: expected a tensor like x, on the CPU"),
        (torch.empty(4, 4).double(), "out: expected a tensor like x, on the CPU"),
        (torch.empty(4, 4).mT, "out: expected a contiguous tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(x, 1.0, out)
    memory = torch.randn(20)
    with pytest.raises(RuntimeError, match="out: expected x's memory, or none of it"):
        OP(memory[:16], 1.0, memory[1:17])
