"""What a process pays once: its first forward and adjoint, and the memory they take beyond what goes in and out.

Beside the forward: later ones, and filling as much memory that is new to the process, which the system clears first and
the host of a virtual machine may have to find.
"""

import json
import subprocess
import sys

import pytest
import results
from helpers import ISAS

FIRST_CALL = """
import sys; sys.path[:0] = {path}
import json, mmap, statistics, time, torch
from helpers import memory
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
import shapes

def ms(f):
    start = time.perf_counter()
    result = f()
    return 1e3 * (time.perf_counter() - start), result

def forward():
    return ops.fastfood_forward(plan, theta, plan.scales, base, torch.float32, "cpu")

columns = dict()
columns["plan_ms"], plan = ms(lambda: Plan(shapes.mbert(), {dim}))
theta, base = torch.ones({dim}), plan.views(torch.ones(plan.numel))
before = memory("VmRSS")
columns["forward_ms"], flat = ms(forward)
columns["forward_MB"] = (memory("VmHWM") - before - flat.nbytes) / 1e6
before = memory("VmRSS")
columns["adjoint_ms"], _ = ms(lambda: ops.fastfood_adjoint(plan, theta, plan.scales, base, "cpu"))
columns["adjoint_MB"] = (memory("VmHWM") - before) / 1e6
room = mmap.mmap(-1, flat.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
room.madvise(mmap.MADV_HUGEPAGE)
room = torch.frombuffer(room, dtype=torch.uint8)
columns["new_ms"], columns["again_ms"] = (ms(lambda: room.fill_(1))[0] for _ in range(2))
del flat
columns["later_ms"] = statistics.median(ms(forward)[0] for _ in range(7))
print(json.dumps(columns))
"""


@pytest.mark.skipif(sys.platform != "linux" or not ISAS, reason="reads the resident set as Linux gives it")
@pytest.mark.parametrize("dim", [1000, 16384, pytest.param(100_000, marks=pytest.mark.full)])
def test_first_call(record, dim):
    code = FIRST_CALL.format(path=sys.path, dim=dim)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    columns = json.loads(run.stdout)
    columns["/later"] = columns["forward_ms"] / columns["later_ms"]
    columns |= results.remark(f"d = {dim:,}, first forward / later ones", columns["/later"], 3)
    record(what="first call", backend="cpu", isa=ISAS[0], model="mBERT", d=dim, **columns)
