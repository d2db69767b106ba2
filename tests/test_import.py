"""What imports cost: nothing of what only some of it needs."""

import subprocess
import sys

import pytest

import hsaid_kernels

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed", "transformers", "triton", "accelerate", "sympy")
LOADED_BY = """
import sys
import torch
before = set(sys.modules)
{}
print(*sorted(set(sys.modules) - before))
"""


def modules(program: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()[-1].split()


def test_heavy_packages_are_not_imported():
    loaded = modules(LOADED_BY.format("from hsaid_kernels import *\nfrom hsaid_kernels import compat, heads"))
    assert not any(name.split(".")[0] == "peft" for name in loaded)
    assert "hsaid_kernels.wrapper.hsaid" in loaded and "hsaid_kernels.fastfood.ops" in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["measure", "--help"], ["info", "--help"], ["--version"], ["nonsense"]],
)
def test_help_does_not_wait_for_torch(arguments):
    program = f"""
import sys
from hsaid_kernels.app.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print(*sys.modules)
"""
    assert [name for name in modules(program) if name.startswith(("torch", "numpy", "transformers", "tqdm"))] == []


def test_public_names():
    for name in hsaid_kernels.__all__:
        assert getattr(hsaid_kernels, name) is not None and name in dir(hsaid_kernels)
    with pytest.raises(AttributeError, match="module 'hsaid_kernels' has no attribute 'nonsense'"):
        hsaid_kernels.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["compat", "heads", "data", "training", "measure"])
def test_modules_that_hand_on_public_names(name):
    program = f"import hsaid_kernels.{name} as m; print(*(n for n in m.__all__ if not hasattr(m, n)), 'end')"
    assert modules(program) == ["end"]


def refusal_of_peft(program: str) -> str:
    program = (
        f"import sys, types\n{program}\ntry:\n    import hsaid_kernels.peft\nexcept ImportError as e:\n    print(e)"
    )
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_without_peft():
    said = refusal_of_peft("sys.modules['peft'] = None")
    assert said == 'hsaid_kernels.peft needs peft >= 0.21: pip install "hsaid_kernels[peft]"'


def test_with_a_peft_that_is_too_old():
    old = """
class BaseTuner: ...
names = ("peft", "peft.tuners", "peft.tuners.tuners_utils")
sys.modules.update({name: types.ModuleType(name) for name in names})
sys.modules["peft"].__version__ = "0.18.0"
sys.modules["peft.tuners.tuners_utils"].BaseTuner = BaseTuner
"""
    assert refusal_of_peft(old) == "hsaid_kernels.peft: expected peft >= 0.21, got 0.18.0: pip install -U peft"
