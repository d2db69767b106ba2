"""`hadamard_transform` alone, 2^24 values or a few less in rows of n, against torch.add over the same bytes: into a
tensor that is there, and ("new") into one that is made, as the transform's is, whose pages the system must give first.
Beside it the transform in place.
"""

import math

import pytest
import torch

from hsaid_kernels import hadamard_transform, hadamard_transform_


def full(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.full)


@pytest.mark.parametrize("n", [1024, 16384, *map(full, (64, 20480, 65536, 2**20))])
@pytest.mark.parametrize("dtype", ["float32", *map(full, ("bfloat16", "float64"))])
def test_hadamard_transform(measure, record, dtype, n):
    order = 20 if n % 5 == 0 else 1
    x = torch.randn(2**24 // n, n).to(getattr(torch, dtype))
    out, place = torch.empty_like(x), x.clone()
    beside = {
        "floor": lambda: torch.add(x, 1.0, out=out),
        "new": lambda: torch.add(x, 1.0),
        "in_place": lambda: hadamard_transform_(place, 1 / math.sqrt(n), order=order),
    }
    columns = measure(lambda: hadamard_transform(x, order=order), beside)
    record(what="hadamard_transform", backend="cpu", dtype=dtype, n=n, threads=torch.get_num_threads(), **columns)
