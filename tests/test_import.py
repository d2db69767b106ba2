"""What `import hsaid_kernels` costs: nothing of what only some of it needs."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
before = set(sys.modules)
import hsaid_kernels
print(*sorted(set(sys.modules) - before))
"""


def test_heavy_packages_are_not_imported():
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    loaded = run.stdout.split()
    assert "hsaid_kernels.ops" in loaded
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed", "transformers", "triton", "accelerate", "sympy")
    assert [name for name in loaded if name.startswith(heavy)] == []
