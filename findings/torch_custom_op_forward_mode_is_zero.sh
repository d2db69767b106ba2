#!/usr/bin/env bash
# torch 2.13.0. A custom op (torch.library.custom_op) with a backward from register_autograd has no forward-mode
# derivative, which torch does not say: torch.func.jvp and jacfwd return zeros, and a dual tensor loses its tangent.
# torch.func.grad of the same op raises an error. For y = 2 x, seen:
#
#   dual tensor: tangent None;  jvp: [0, 0, 0];  jacfwd: all 0;  torch.func.grad: RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("findings::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_fake(lambda x: torch.empty_like(x))
double.register_autograd(lambda ctx, grad: grad * 2)

x, one = torch.ones(3, requires_grad=True), torch.ones(3)
double(x).sum().backward()
assert x.grad.tolist() == [2.0, 2.0, 2.0], "not as described: the backward itself"
with forward_ad.dual_level():
    tangent = forward_ad.unpack_dual(double(forward_ad.make_dual(one, one))).tangent
_, jvp = torch.func.jvp(double, (one,), (one,))
jacobian = torch.func.jacfwd(double)(one)
print("dual tensor: tangent", tangent, " jvp:", jvp.tolist(), " jacfwd:", jacobian.tolist())
assert tangent is None and not jvp.any() and not jacobian.any(), "not as described"
try:
    torch.func.grad(lambda t: double(t).sum())(one)
except RuntimeError as error:
    print("torch.func.grad:", type(error).__name__, str(error)[:60], "...")
else:
    raise AssertionError("not as described: torch.func.grad")
print("as described")
PYTHON
