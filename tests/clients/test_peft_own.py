"""PEFT's own tests of models that are not transformers', for adapters of HSAID in the place of its own methods.

They are in PEFT's source distribution, which `make clients` puts into build/peft.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import ENVIRONMENT

pytest.importorskip("peft")

VERSION = importlib.metadata.version("peft")
SOURCE = Path(__file__).parents[2] / "build" / "peft" / f"peft-{VERSION}.tar.gz"
CASES = """
from hsaid_kernels.peft import HSAIDConfig

SMALL = dict(intrinsic_dim=40, lr_scale=1.0)  # these tests train by SGD, at rates for steps of its own
TEST_CASES = [
    ("all", "MLP", HSAIDConfig, dict(SMALL)),
    ("did", "MLP", HSAIDConfig, dict(SMALL, partition="did", target_modules=["lin0"])),
    ("saved", "MLP", HSAIDConfig, dict(SMALL, target_modules="lin0", modules_to_save=["lin1"])),
    ("embedding", "EmbConv1D", HSAIDConfig, dict(SMALL, partition="said")),
    ("convolution", "Conv2d", HSAIDConfig, dict(SMALL)),
    ("attention", "MHA", HSAIDConfig, dict(SMALL)),
    ("block", "MLP", HSAIDConfig, dict(SMALL, memory="block")),
]
"""
# {test: (how many cases of it fail, why)}
REFUSED = "several active adapters are refused"
FAILING = {
    "test_active_adapter": (6, REFUSED),
    "test_multiple_active_adapters_with_different_modules_to_save_works": (1, REFUSED),
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": (1, "refused in other words"),
    "test_multiple_active_adapters_with_same_modules_to_save_raises": (1, "refused in other words"),
    "test_adapter_dtype_autocast": (28, "theta is always float32"),
    "test_load_model_low_cpu_mem_usage": (7, "the few values of an adapter are never on the meta device"),
    "test_from_pretrained_config_construction": (7, "the configuration is a copy, which says what None means"),
    "test_in_features_out_features_exposed": (7, "there is no layer for each layer of the model"),
    "test_set_adapter_non_overlapping_modules": (1, "there is no layer for each layer of the model"),
    "test_set_adapter_non_overlapping_modules_to_save": (1, "there is no layer for each layer of the model"),
    "test_set_requires_grad": (1, "there is no layer for each layer of the model"),
    "test_save_load_roundtrip_fsdp_wrapped": (7, "FSDP1 is refused"),
}


@pytest.mark.skipif(not SOURCE.exists(), reason=f"needs {SOURCE.name}, which make clients downloads")
def test_what_peft_tests_of_its_own_methods(tmp_path):
    with tarfile.open(SOURCE) as source:
        source.extractall(tmp_path, filter="data")
    tests = tmp_path / f"peft-{VERSION}" / "tests"
    text, end = (tests / "test_custom_models.py").read_text(), "ALL_PEFT_CONFIG_CLASSES = sorted("
    assert text.count(end) == 1
    (tests / "test_cases.py").write_text(text.replace(end, CASES + end))
    (tests / "__init__.py").touch()
    (tmp_path / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")  # which PEFT's tests import
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # Not the folder of torchvision, which breaks the import of transformers (conftest.py)
    others = [path for path in ENVIRONMENT["PYTHONPATH"].split(os.pathsep) if not path.endswith("build/clients")]
    paths = os.pathsep.join([str(tmp_path), *others])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-q", "-n", "2", "-W", "ignore", "--tb=no", "-rfE"]
        + ["-p", "no:cacheprovider", str(tests / "test_cases.py"), "-k", "HSAIDConfig"],
        env=ENVIRONMENT | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    failed = re.findall(r"^FAILED .*::(\w+)", run.stdout, re.MULTILINE)
    assert {name: failed.count(name) for name in failed} == {name: count for name, (count, _) in FAILING.items()}, (
        run.stdout[-3000:] + run.stderr[-3000:]
    )
    passed = int(re.search(r"(\d+) passed", run.stdout).group(1))
    assert passed > 300 and "error" not in run.stdout.splitlines()[-1]
