"""What a process pays once: its first forward and adjoint, and the memory they take beyond what goes in and out."""

import json
import subprocess
import sys

import pytest
from helpers import ISAS

FIRST_CALL = """
import sys; sys.path[:0] = {path}
import json, time, torch
from helpers import memory
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
import shapes

start = time.perf_counter()
plan = Plan(shapes.mbert(), {dim})
planned = time.perf_counter()
theta, base = torch.ones({dim}), plan.views(torch.ones(plan.numel))
before, began = memory("VmRSS"), time.perf_counter()
flat = ops.fastfood_forward(plan, theta, plan.scales, base, torch.float32, "cpu")
forward, forward_peak = time.perf_counter(), memory("VmHWM") - before - flat.nbytes
before = memory("VmRSS")
after = time.perf_counter()
ops.fastfood_adjoint(plan, theta, plan.scales, base, "cpu")
adjoint = time.perf_counter()
print(json.dumps(dict(plan_ms=1e3 * (planned - start), forward_ms=1e3 * (forward - began),
    adjoint_ms=1e3 * (adjoint - after), forward_MB=forward_peak / 1e6, adjoint_MB=(memory("VmHWM") - before) / 1e6)))
"""


@pytest.mark.skipif(sys.platform != "linux" or not ISAS, reason="reads the resident set as Linux gives it")
@pytest.mark.parametrize("dim", [1000, 16384, pytest.param(100_000, marks=pytest.mark.full)])
def test_first_call(record, dim):
    code = FIRST_CALL.format(path=sys.path, dim=dim)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record(what="first call", backend="cpu", isa=ISAS[0], model="mBERT", d=dim, **json.loads(run.stdout))
