#!/usr/bin/env bash
# torch 2.13.0, on the CPU. A step of AdamW(fused=True) writes to its parameters without increasing their version
# counters. So a backward pass that needs the values of before the step is not refused, as it is after a step that is
# not fused ("modified by an inplace operation"): it silently computes with the new ones. Seen:
#
#   fused=False: version +2, refused
#   fused=True: version +0, gradient [0.99, 1.98, 2.97] where forward's is [2.0, 4.0, 6.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

x = torch.tensor([1.0, 2.0, 3.0])
found = {}
for fused in (False, True):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([w], lr=0.5, fused=fused)
    loss = (w * w * x).sum()  # its gradient is 2 w x, of the w of forward
    w.sum().backward()
    before = w._version
    optimizer.step()
    moved, w.grad = w._version - before, None
    try:
        loss.backward()
        found[fused] = moved, [round(value, 2) for value in w.grad.tolist()]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        found[fused] = moved, "refused"
    print(f"fused={fused}: version +{moved}, {found[fused][1]} (forward's: {(2 * x).tolist()})")
assert found[False][0] > 0 and found[False][1] == "refused", "not as described"
assert found[True] == (0, [0.99, 1.98, 2.97]), "not as described"
print("as described")
PYTHON
