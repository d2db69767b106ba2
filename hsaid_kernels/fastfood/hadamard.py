"""The public `hadamard_transform` and its in-place form: dimensions, dtypes, backends and memory, over the ops."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from hsaid_kernels.fastfood import ops, reference
from hsaid_kernels.fastfood.plan import check_choice

INTEGERS = (torch.int32, torch.int64)
ORDERS = (1, 12, 20, 28)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128, *INTEGERS)


def hadamard_transform(
    x: Tensor, scale: float = 1.0, backend: str = "auto", *, dim: int = -1, out: Tensor | None = None, order: int = 1
) -> Tensor:
    """Walsh-Hadamard transform along one dimension, times `scale`; shape and dtype are those of x.

    Args:
        x: in float32, float64, bfloat16, float16, complex64, complex128, int32 or int64, with any strides; may be on
            the meta device. If its size d along `dim` is not order * 2^k, x is padded with zeros to the next such
            number n, and the result truncated to d.
        scale: a real number; for integers 1. 1 / sqrt(n) makes the transform orthonormal.
        backend: "auto", or one of `available_backends()`. Integers are transformed on the CPU only.
        dim: the dimension to transform; negative ones count from the end.
        out: a tensor for the result, with x's shape, dtype and device. It may be x, or share memory with x.
        order: 1, 12, 20 or 28: n is the least order * 2^k that holds d, for example 20 * 2^10 = 20,480. Above 1, H is
            the Kronecker product of Paley's symmetric Hadamard matrix of this order (second construction) and the one
            of order 2^k. On the CPU this costs half as much again; on GPUs it takes one pass over memory more.

    With order 1 equivalent to `torch.nn.functional.linear(pad(x), hadamard_matrix(n))[..., :d] * scale` for the last
    dimension, but needs only n log2 n additions per row. H is in natural (Hadamard) order, as scipy.linalg.hadamard's.
    16-bit inputs are accumulated in float32 and rounded once. Integers are exact: where a value of the result does not
    fit x's dtype, this raises. Complex numbers are transformed as two real tensors. Differentiable to any order in
    backward and forward mode, also by `torch.func`, whose vmap works too; with `out`, as everywhere in torch, not.

    Returns:
        `out` if given, else a new tensor.

    Raises:
        TypeError: x is not a dense tensor of one of these dtypes, or of integers for a backend other than "cpu" and
            "reference"; scale is not a real number; dim is not an integer; out is not a tensor.
        ValueError: x has no dimension, or size 0 along `dim`; x has integers and scale is not 1; out differs from x in
            shape, dtype or device, or elements of it may overlap; backend is an unknown name; order is another number.
        IndexError: x has no dimension `dim`.
        RuntimeError: the backend cannot be used, or not for x's device; the transform of integers does not fit their
            dtype, in which case out is left as it was; out is given, and it or x requires grad.
    """
    scale, dim, order = _checked(x, scale, dim, order)
    if out is None:
        return _transform(x, scale, dim, backend, order)
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    for what, of_out, of_x in (
        ("shape", tuple(out.shape), tuple(x.shape)),
        ("dtype", out.dtype, x.dtype),
        ("device", out.device, x.device),
    ):
        if of_out != of_x:
            raise ValueError(f"out: expected x's {what} {of_x}, got {of_out}")
    for name, tensor in (("x", x), ("out", out)):
        if _has_derivative(tensor):
            raise RuntimeError(f"{name}: expected a tensor that does not require grad with `out`, got one that does")
    return _write(x, scale, dim, backend, order, out, "out")


def hadamard_transform_(
    x: Tensor, scale: float = 1.0, backend: str = "auto", *, dim: int = -1, order: int = 1
) -> Tensor:
    """`hadamard_transform` in x's memory. Returns x.

    Differentiable as torch's own in-place operations: a leaf that requires grad is refused while gradients are enabled.

    Raises what `hadamard_transform` does, and
        ValueError: elements of x may overlap in memory, as those of an expanded tensor do.
    """
    scale, dim, order = _checked(x, scale, dim, order)
    return _write(x, scale, dim, backend, order, x, "x")


def _checked(x: Tensor, scale: float, dim: int, order: int) -> tuple[float, int, int]:
    """`scale` as a float, `dim` counted from the front, `order` as an int."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        narrow = isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()
        hint = "; convert it, for example by x.to(torch.int32)" if narrow else ""
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[:-1])
        raise TypeError(f"x: expected a tensor in {names} or int64, got {got}{hint}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got layout {x.layout}")
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: expected a real number, got {type(scale).__name__}")
    if x.dtype in INTEGERS and scale != 1:
        raise ValueError(f"scale: expected 1 for a tensor of integers, got {scale}")
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got shape ()")
    if not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim: expected {-x.dim()} to {x.dim() - 1} for shape {tuple(x.shape)}, got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"x: expected a size of at least 1 along dimension {dim}, got shape {tuple(x.shape)}")
    if not isinstance(order, numbers.Integral) or order not in ORDERS:
        raise ValueError(f"order: expected 1, 12, 20 or 28, got {order!r}")
    return float(scale), dim % x.dim(), int(order)


def _transform(x: Tensor, scale: float, dim: int, backend: str, order: int) -> Tensor:
    if x.is_complex():
        return torch.complex(
            _transform(x.real, scale, dim, backend, order), _transform(x.imag, scale, dim, backend, order)
        )
    if dim != x.dim() - 1:
        return _transform_rows(x.movedim(dim, -1), scale, backend, order).movedim(-1, dim)
    return _transform_rows(x, scale, backend, order)


def _transform_rows(x: Tensor, scale: float, backend: str, order: int) -> Tensor:
    """Along the last dimension of x, which is not complex."""
    if x.is_meta:  # no values to compute: the fake kernel
        check_choice("backend", backend, ops.BACKENDS)
        return torch.ops.hsaid_kernels.hadamard_transform(x, scale, order)
    chosen = ops.choose_backend(backend, x.device)
    if chosen == "reference" and x.dtype in INTEGERS:
        return reference.integer_hadamard_transform(x, order)
    if chosen not in ("cpu", "reference") and x.dtype in INTEGERS:
        raise TypeError(f"x: expected floating-point or complex numbers for backend {chosen!r}, got {x.dtype}")
    # GPU kernels support the dtypes of models only. float64 is for gradient checks.
    if chosen == "reference" or (chosen != "cpu" and x.dtype == torch.float64):
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return reference.hadamard_transform(wide, scale, order).to(x.dtype)
    if chosen != "cpu" and order > 1:
        return torch.ops.hsaid_kernels.hadamard_transform_of_order(x, scale, order, chosen)
    return ops.kernels(chosen).hadamard_transform(x, scale, order)


def _write(x: Tensor, scale: float, dim: int, backend: str, order: int, out: Tensor, name: str) -> Tensor:
    """Writes the transform into `out`, the argument of this name: by the kernel itself, or a copy of what it returns.

    The copy is torch's, which knows what autograd, torch.func and torch.compile make of a tensor that changes.
    """
    if _may_overlap(out):
        got = f"shape {tuple(out.shape)} and strides {out.stride()}"
        raise ValueError(f"{name}: expected elements that do not overlap in memory, got {got}")
    if not _kernel_writes(x, dim, out) or ops.choose_backend(backend, x.device) != "cpu":
        return out.copy_(_transform(x, scale, dim, backend, order))
    torch.ops.hsaid_kernels.hadamard_transform_into(x, scale, out, order)
    if not out.is_inference():
        increment_version(out)
    return out


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may lie at the same place: some stride is less than what the smaller ones reach over."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride < reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _kernel_writes(x: Tensor, dim: int, out: Tensor) -> bool:
    """Whether the CPU's kernel may write into `out`, and nobody has to know but autograd's count of versions."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(t) in (Tensor, torch.nn.Parameter) and not _has_derivative(t) for t in (x, out))
        and out.device.type == "cpu"
        and out.is_inference() <= torch.is_inference_mode_enabled()
        and not (x.is_complex() or x.is_neg() or out.is_neg())
        and dim == x.dim() - 1
        and out.is_contiguous()
        and (out is x or not torch._C._overlaps(x, out))
    )


def _has_derivative(x: Tensor) -> bool:
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None
