#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0, on a CPU. A forward pass of Linear4bit writes to a parameter: where compute_dtype is
# bfloat16 and the bias is float32, layer.bias.data is replaced by its bfloat16 copy, and stays so. The parameter object
# and its version counter are the same, so neither an optimizer nor autograd notices; state_dict() then saves the rounded
# bias, and a model whose parameters were all float32 has two dtypes after one inference. Seen:
#
#   before: torch.float32, after one inference: torch.bfloat16, the same parameter: True, version +0
#   bits lost: values differ from before by up to 0.2% of the largest
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy packaging psutil
"$folder/venv/bin/pip" install -qq --no-compile --no-deps bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON' 2>&1 | grep -v "^Failed to load"
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 128, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").train()
bias, before, version = layer.bias, layer.bias.detach().clone(), layer.bias._version
with torch.no_grad():
    layer(torch.randn(4, 128))
same, moved = layer.bias is bias, layer.bias._version - version
print(f"before: {before.dtype}, after one inference: {layer.bias.dtype}, the same parameter: {same}, version +{moved}")
off = ((layer.bias.float() - before).abs().max() / before.abs().max()).item()
print(f"bits lost: values differ from before by up to {off:.1%} of the largest")
assert before.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16, "not as described"
assert same and moved == 0 and 0 < off < 2**-8, "not as described"
print("as described")
PYTHON
