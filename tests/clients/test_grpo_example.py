"""examples/grpo.py: with a hundred values, rewards rise, and the adapter that it leaves writes what was rewarded."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
peft = pytest.importorskip("peft")


def test_the_reward_rises_with_a_hundred_values(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "grpo.py"
    spec = importlib.util.spec_from_file_location("grpo_example", path)
    grpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grpo)
    rewards = grpo.main(["--steps", "25", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "trainable params: 100 ||" in said and f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}" in said
    assert rewards[0] < 0.4 and rewards[-1] > 0.7
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2500
    model, tokenizer = grpo.small_model()
    model = peft.PeftModel.from_pretrained(model, tmp_path)
    ids = tokenizer(["the cat", "the moon"], return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**ids, max_new_tokens=16, do_sample=True)[:, 2:]
    assert sum(grpo.reward(tokenizer.batch_decode(written))) / 2 > 0.6
