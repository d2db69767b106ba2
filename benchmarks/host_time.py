"""What the host takes for a call over the 201 tensors of mBERT on a GPU, with launches that do nothing: needs no GPU.

    python benchmarks/host_time.py

A call goes the whole way, from hsaid_kernels/fastfood/ops.py through torch's dispatcher and all checks to the launches.
CUDA's are those of the emulated device (build/cmake/_emulated.so, which `make test` builds), Triton's those of a driver
that only writes them down. Left out is what the runtime takes to queue a kernel. The tensors are mBERT's at a sixteenth
of the width, because a host has no allocator of a GPU's kind: memory for weights of full size would cost 8 us a call.
Beside the calls, in the same rounds: to ask each tensor for its address from Python, as Triton's backend has to; to
hand all tensors to an operator in Python that does nothing; and an adjoint of which every gradient is missing, which
has all of a call but tensors, and in Triton no launch.
"""

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import shapes
import torch
from torch import Tensor

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan

CALLS, ROUNDS = 200, 15


def microseconds(parts: dict[str, Callable[[], object]], calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, float]:
    """Of a call of each part: the median over rounds in which the parts take turns."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):  # the first round is for warming up
        for name, part in parts.items():
            begin = time.perf_counter()
            for _ in range(calls):
                part()
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def backends(stack: ExitStack) -> list[str]:
    """Those whose launches can be left out here, prepared for it until the stack is closed."""
    import emulated

    found = []
    if emulated.LIBRARY.exists():
        os.environ["HSAID_EMULATED_IDLE"] = "1"
        emulated.emulate_cuda()
        found.append("cuda")
    if importlib.util.find_spec("triton"):
        import triton_offline

        stack.enter_context(triton_offline.fake_device())
        found.append("triton")
    return found


def main() -> None:
    torch.set_num_threads(1)
    plan = Plan({name: tuple(-(-n // 16) for n in shape) for name, shape in shapes.mbert().items()}, 1000)
    tensors = plan.views(torch.zeros(plan.numel))
    theta, factors = torch.randn(plan.dim), plan.scales
    torch.library.define("hsaid_benchmarks::nothing", "(Tensor theta, Tensor[] tensors) -> ()")
    torch.library.impl("hsaid_benchmarks::nothing", "CPU")(lambda theta, tensors: None)
    nothing = torch.ops.hsaid_benchmarks.nothing.default
    parts: dict[str, Callable[[], object]] = {
        "asking for addresses": lambda: list(map(Tensor.data_ptr, tensors)),
        "an operator in Python that does nothing": lambda: nothing(theta, tensors),
    }
    with ExitStack() as stack:
        for name in backends(stack):
            arguments = plan, theta, factors, tensors
            parts[f"{name}, forward"] = lambda b=name, a=arguments: ops.fastfood_forward(*a, torch.float32, b)
            parts[f"{name}, adjoint"] = lambda b=name, a=arguments: ops.fastfood_adjoint(*a, b)
            missing = plan, theta, factors, [None] * len(tensors)
            parts[f"{name}, adjoint of nothing"] = lambda b=name, a=missing: ops.fastfood_adjoint(*a, b)
        print(f"{len(tensors)} tensors, torch {torch.__version__}")
        for name, time_of_call in microseconds(parts).items():
            print(f"{name:40} {time_of_call:6.1f} us")


if __name__ == "__main__":
    main()
