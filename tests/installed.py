"""python tests/installed.py [cuda]: that the hsaid_kernels of this environment is whole.

It is imported from there, gives the known answers (known_answers.json) on each of this machine's instruction sets, and
runs a model forward and backward. With "cuda" it has a CUDA library too, which loads into a torch for CUDA and gives
the known answers where there is a GPU. Needs the package and nothing else; an exception says what is wrong.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from helpers import ISAS, assert_same_bits, cpu_isa, sequence

import hsaid_kernels
from hsaid_kernels import HSAID, available_backends
from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Projection

KNOWN = json.loads((Path(__file__).parent / "known_answers.json").read_text(encoding="utf-8"))


def digest(x: torch.Tensor) -> str:
    return hashlib.blake2b(x.cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def check_known_answers(backend: str, device: str) -> None:
    """Forward of all dtypes and adjoint, as in tests/fastfood/test_reference.py."""
    for known in KNOWN["plans"]:
        given = known["plan"]
        choices = {"width": given["width"], "diagonal": given["diagonal"], "chunks": given.get("chunks", "all")}
        plan = Plan(given["shapes"], given["dim"], int(given["seed"], 16), **choices)
        theta = sequence(plan.dim).to(device)
        lambdas = torch.tensor(list(given["lambda"].values()), device=device)
        sizes = {name: (math.prod(shape), shape) for name, shape in plan.shapes.items()}
        base = {name: sequence(size, 29, 97).view(shape).to(device) for name, (size, shape) in sizes.items()}
        grads = {name: sequence(size, 31, 89).view(shape).to(device) for name, (size, shape) in sizes.items()}
        for dtype, key in [(None, "digest"), (torch.bfloat16, "bfloat16 digest"), (torch.float16, "float16 digest")]:
            projection = Projection(plan, backend=backend, **({} if dtype is None else {"dtype": dtype}))
            for name, weights in projection.forward(theta, lambdas, base).items():
                assert digest(weights) == known["forward"][name][key], (backend, given, name, key)
        dtheta, _ = Projection(plan, backend=backend).adjoint(grads, theta, lambdas)
        assert digest(dtheta) == known["adjoint"]["dtheta"]["digest"], (backend, given, "dtheta")


def outputs_and_gradient(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    hsaid = HSAID(model, intrinsic_dim=20, seed=0, backend=backend)
    with torch.no_grad():
        hsaid.theta.copy_(sequence(20)[: len(hsaid.theta)])
    out = hsaid(sequence(60).view(5, 12))
    out.sum().backward()
    return out.detach(), hsaid.theta.grad


package = Path(hsaid_kernels.__file__).resolve().parent
assert Path(sys.prefix).resolve() in package.parents, f"{package} is not in this environment, {sys.prefix}"
available = available_backends()
assert available["cpu"] is True, available["cpu"]
assert ISAS
for isa in ISAS:
    with cpu_isa(isa):
        check_known_answers("cpu", "cpu")
for got, expected in zip(outputs_and_gradient("cpu"), outputs_and_gradient("reference"), strict=True):
    assert_same_bits(got, expected, "a model")
try:  # an error passes through torch: it needs torch's own C++ runtime
    torch.ops.hsaid_kernels.hadamard_transform(torch.ones(2, dtype=torch.int16), 1.0)
except RuntimeError as error:
    assert "expected float32" in str(error)
else:
    raise AssertionError("hadamard_transform of int16 was not refused")
seen = [f"known answers on {', '.join(ISAS)}"]

loads = ops._load("_cuda", "CUDA") if torch.backends.cuda.is_built() else available["cuda"]
if "cuda" in sys.argv[1:]:
    if torch.backends.cuda.is_built():
        assert loads is True, loads
        seen.append("the CUDA library loads")
    if torch.cuda.is_available():
        check_known_answers("cuda", "cuda")
        seen.append(f"known answers on {torch.cuda.get_device_name()}")
else:
    assert "is not built" in str(loads) or not torch.backends.cuda.is_built(), "there is a CUDA library"
python = ".".join(map(str, sys.version_info[:2]))
print(f"hsaid_kernels {hsaid_kernels.__version__}, Python {python}, torch {torch.__version__}: {'; '.join(seen)}")
