"""What the tests share: the backends and instruction sets at hand, bitwise comparison, poison, exact test values."""

import os
from contextlib import contextmanager

import torch
from torch import Tensor

from hsaid_kernels import available_backends

SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# For a script in a folder of tests, which imports from this one too.
_PATHS = filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_PATHS)}


@contextmanager
def cpu_isa(name: str):
    """The CPU library's kernels for one instruction set; it reads the variable at each call."""
    before = os.environ.get("HSAID_CPU_ISA")
    os.environ["HSAID_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["HSAID_CPU_ISA"]
        else:
            os.environ["HSAID_CPU_ISA"] = before


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _isas() -> list[str]:
    if available_backends()["cpu"] is not True:
        return []
    found = []
    for name in ("avx512", "avx2", "neon", "portable"):
        try:
            with cpu_isa(name):
                torch.ops.hsaid_kernels.hadamard_transform(torch.ones(2), 1.0)
        except RuntimeError:
            continue
        found.append(name)
    return found


ISAS = _isas()  # of the CPU library on this machine, the fastest first


def memory(field: str) -> int:
    """Bytes of this process by Linux: VmRSS, VmHWM. getrusage would count what the parent held when it forked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def reset_peak() -> int:
    """Lets VmHWM, the most that this process has held, begin again; returns what it holds now."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return memory("VmRSS")


def mapping(tensor: Tensor) -> dict[str, int]:
    """Of the mapping of this process, by Linux, that a tensor lies in: bytes that are in memory (Rss), its share of
    these (Pss: divided by how many processes map a page) and its own copies of them (Anonymous)."""
    found: dict[str, int] = {}
    with open("/proc/self/smaps") as lines:
        for first, *rest in map(str.split, lines):
            if not first.endswith(":"):
                begin, end = (int(address, 16) for address in first.split("-"))
                inside = begin <= tensor.data_ptr() < end
            elif inside and first in ("Rss:", "Pss:", "Anonymous:"):
                found[first[:-1]] = int(rest[0]) * 1024
    return found


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to the last bit; any NaN equals any other. Says where the first difference is, with both values."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    integer = SAME_SIZE_INTEGER[got.element_size()]
    bits, expected_bits = (t.detach().contiguous().view(integer) for t in (got, expected))
    different = (bits != expected_bits) & ~(got.isnan() & expected.isnan())
    if not different.any():
        return
    at = tuple(different.nonzero()[0].tolist())
    mask = (1 << 8 * got.element_size()) - 1
    raise AssertionError(
        f"{what}: {int(different.sum())} of {got.numel()} values differ, first at {list(at)}: got {got[at].item()!r} "
        f"(0x{bits[at].item() & mask:x}), expected {expected[at].item()!r} (0x{expected_bits[at].item() & mask:x})"
    )


def relative_error(got: Tensor, exact: Tensor) -> float:
    """In the 2-norm."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def poison(numel: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
    """Leaves NaN in memory that the next tensor of this size is likely to get, so that unwritten elements show."""
    for tensor in [torch.full((numel,), torch.nan, dtype=dtype, device=device) for _ in range(4)]:
        del tensor


def sequence(count: int, factor: int = 37, modulus: int = 101) -> Tensor:
    """float32 [count] in about -0.5 .. 0.5, the same bits on every machine; as in known_answers.json."""
    return (torch.arange(count) * factor % modulus - modulus // 2).float() / (modulus - 2)
