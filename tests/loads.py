"""python tests/loads.py FOLDER: loads the _cpu.so and _cuda.so there into this torch, looks where they registered their
kernels, calls one with a bad argument. Prints what went wrong; ends with 1 then. Needs no GPU."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from hsaid_kernels.fastfood import ops

folder, what = Path(sys.argv[1]), f"torch {torch.__version__}"
failed = False
for library, key in (("_cpu", "CPU"), ("_cuda", "CUDA")):
    reason = ops._load(library, key, folder)
    failed |= reason is not True
    print(f"{what}: {folder.parent.name}'s {library}.so", "is loaded and registered" if reason is True else reason)
try:
    ops.kernels("cpu").hadamard_transform(torch.ones(2, dtype=torch.int16), 1.0)
except RuntimeError as error:
    failed |= "expected float32" not in str(error)
except NotImplementedError:  # nothing is registered, as said above
    failed = True
raise SystemExit(failed)
