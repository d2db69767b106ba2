"""The GPU backends that are here, by what `make gpu` measures them with."""

import gpu
import pytest


@pytest.mark.full
@pytest.mark.skipif(not gpu.BACKENDS, reason="no backend for a GPU here: available_backends() says why")
def test_gpu(record):
    for row in gpu.all_rows():
        record(**row)
