"""`hadamard_transform` beside other packages' transforms, those of benchmarks/peers.py that are installed."""

from collections.abc import Callable

import peers
import pytest
import results
import torch
from helpers import threads

from hsaid_kernels import hadamard_transform, hadamard_transform_

LENGTHS = [1024, 16384, *(pytest.param(n, marks=pytest.mark.full) for n in (256, 4096, 65536, 2**18, 2**20))]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])
@pytest.mark.parametrize("where", ["new", "in place"])
def test_beside_other_packages(measure, record, where, dtype, n):
    """2^22 values on one thread, beside the packages that are installed. One whose result is wrong is not timed."""
    found = peers.installed_transforms(getattr(torch, dtype))
    found = {name: transform for name, transform in found.items() if where == "new" or transform.in_place}
    if not found:
        pytest.skip(f"none of {', '.join(peers.PACKAGES)} is installed")
    x = torch.randn(2**22 // n, n, dtype=getattr(torch, dtype))
    ours = peers.Transform(hadamard_transform, hadamard_transform_)
    with threads(1):
        errors = {
            name: peers.error_of(result(transform, where, x.clone()), x, transform.normalized)
            for name, transform in {"ours": ours, **found}.items()
        }
        assert errors.pop("ours") <= 1
        wrong = [name for name, error in errors.items() if error > 1]
        timed = {name: runner(found[name], where, x) for name in found if name not in wrong}
        columns = measure(runner(ours, where, x), timed)
    fastest = max((columns[f"/{name}"] for name in timed), default=0)
    what = f"{dtype}, n = {n:,}, {where}: ours / the fastest of the others"
    columns |= results.remark(what, fastest, 0.8 if (where, dtype) == ("new", "float32") else 1.0)
    versions = {name: results.version(name) for name in found}
    record(what="transform beside", where=where, dtype=dtype, n=n, threads=1, **columns, packages=versions, wrong=wrong)


def result(transform: peers.Transform, where: str, x: torch.Tensor) -> torch.Tensor:
    """H x; in place it is x."""
    if where == "new":
        return transform.new(x)
    transform.in_place(x)
    return x


def runner(transform: peers.Transform, where: str, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What is timed. In place, a value grows by sqrt(n) in each of ten rounds, and is small enough to stay finite."""
    values = x if where == "new" else x * 2.0**-24
    return lambda: result(transform, where, values)
