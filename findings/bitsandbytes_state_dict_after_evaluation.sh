#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0, on a CPU with AVX-512 for bfloat16. The first evaluation of a Linear4bit layer under
# torch.no_grad() orders its codes anew for a kernel, in place, rounds the scales of the blocks to bfloat16, and
# transposes them. state_dict() puts the codes back in order, but (without double quantization) not the scales: it saves
# them transposed, and the layer itself computes with them in the wrong order from then on, without an error. With double
# quantization the scales are put in order, and stay rounded, for good. Seen, of a layer whose rows differ in size:
#
#   plain: output after an evaluation 0.003, after state_dict() 0.880 off; saved scales (1024,) -> (4, 256)
#   double: output after an evaluation 0.003, after state_dict() 0.003 off; saved scales (1024,) -> (1024,)
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "needs a CPU with avx512_bf16"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy packaging psutil
"$folder/venv/bin/pip" install -qq --no-compile --no-deps bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>&1 | grep -v "^Failed to load"
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
x = torch.randn(8, 256)
found = {}
for name, double in (("plain", False), ("double", True)):
    layer = bnb.nn.Linear4bit(256, 256, quant_type="nf4", compress_statistics=double)
    layer.weight.data.mul_(torch.logspace(-2, 0, 256).unsqueeze(1))
    layer = layer.to("cpu")
    trained, saved = layer.train()(x).detach(), layer.state_dict()["weight.absmax"].clone()
    with torch.no_grad():
        evaluated = layer.eval()(x)
    again = layer.state_dict()["weight.absmax"]
    after = layer.train()(x.clone().requires_grad_()).detach()
    off = [((y - trained).norm() / trained.norm()).item() for y in (evaluated, after)]
    found[name] = *off, tuple(again.shape)
    print(
        f"{name}: output after an evaluation {off[0]:.3f}, after state_dict() {off[1]:.3f} off; "
        f"saved scales {tuple(saved.shape)} -> {tuple(again.shape)}"
    )
assert 0 < found["plain"][0] < 0.01 and found["plain"][1] > 0.5, "not as described"
assert found["plain"][2] == (4, 256) and found["double"][2] == (1024,), "not as described"
assert 5e-4 < found["double"][1] < 0.01, "not as described"
print("as described")
PYTHON
