"""A whole training step of mBERT, and how much of it the projection takes; beside it what a user would take instead."""

import json
import os
import subprocess
import sys

import pytest
import results

TITLES = {
    "hsaid": "H-SAID",
    "block": 'H-SAID, memory="block"',
    "tables": "H-SAID, whole tables",
    "held": "H-SAID, gradients held to the end",
    "mixed": "H-SAID, bfloat16 over float32 W0",
    "bfloat16": "H-SAID, bfloat16",
    "full": "full fine-tuning, AdamW",
    "unilora": "peft UniLoRA",
    "vera": "peft VeRA",
    "lora": "peft LoRA, r = 1",
}
QUICK = ("hsaid", "block", "full", "unilora", "vera", "lora")
PEFT = ("unilora", "vera", "lora")


@pytest.mark.parametrize("method", TITLES)
def test_training_step(request, record, method):
    pytest.importorskip("transformers")
    if method not in QUICK and not request.config.option.full:
        pytest.skip("with --full")
    if method in PEFT and not hasattr(pytest.importorskip("peft"), "UniLoraConfig"):
        pytest.skip("peft has no UniLoRA: its version is too old")
    steps = 3 if not request.config.option.full else 1 if "bfloat16" in TITLES[method] else 8
    # A process of its own: the peak of memory is a process's.
    path = os.pathsep.join(filter(None, [str(results.HERE.parent), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, results.HERE / "step.py", method, f"--steps={steps}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    steps = told["steps"]
    row = results.spread("ms", [1e3 * sum(step.values()) for step in steps])
    for part in steps[0]:
        row |= results.spread(f"{part}_ms", [1e3 * step[part] for step in steps])
    if method == "hsaid":
        row |= results.spread("share", [(s["projection"] + s["adjoint"]) / sum(s.values()) for s in steps])
    record(
        what="step",
        method=TITLES[method],
        model="mBERT",
        trained=told["trained"],
        rounds=len(steps),
        **row,
        peak_MB=told["peak_bytes"] / 1e6,
        peft=results.version("peft") if method in PEFT else None,
    )
