"""torchao quantizes a model; an HSAID over it has the weights over its dequantized values."""

import copy
import pickle

import pytest
import torch
import transformers
from models import IDS, bert, moved
from torch import nn

from hsaid_kernels import HSAID

quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(),
    "int4 in int8": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_trains_as_over_the_dequantized_values(what):
    torch.manual_seed(0)
    few, many = bert(hidden_size=64, num_hidden_layers=2).eval(), bert(hidden_size=64, num_hidden_layers=2).eval()
    quantization.quantize_(few, CONFIGS[what]())
    quantized = 0
    with torch.no_grad():
        for own, parameter in zip(few.parameters(), many.parameters(), strict=True):
            quantized += type(own) is not nn.Parameter
            parameter.copy_(own.dequantize() if type(own) is not nn.Parameter else own)
    assert quantized > 10
    found = []
    for model, memory in ((few, "block"), (many, "step")):
        torch.manual_seed(1)
        hsaid = moved(HSAID(model, 200, memory=memory))
        optimizer = torch.optim.AdamW(hsaid.parameter_groups())
        losses = []
        for _ in range(3):
            loss = hsaid(IDS, labels=torch.tensor([0, 1])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, hsaid.theta.detach().clone(), hsaid))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and len(set(found[0][0])) == 3
    merged = found[0][2].merge()
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, found[1][2](IDS).logits)


def test_the_model_is_given_back_and_wrapped_again(tmp_path):
    torch.manual_seed(0)
    model = bert(hidden_size=64).eval()
    quantization.quantize_(model, CONFIGS["int8"]())
    before = {name: type(parameter) for name, parameter in model.named_parameters()}
    hsaid = moved(HSAID(model, 100, memory="block"))
    with torch.no_grad():
        logits = hsaid(IDS).logits
        assert torch.equal(copy.deepcopy(hsaid)(IDS).logits, logits)
    hsaid.save_pretrained(tmp_path)
    assert {name: type(parameter) for name, parameter in hsaid.unwrap().named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(HSAID.from_pretrained(tmp_path, model, memory="block")(IDS).logits, logits)


def loaded(directory, config) -> nn.Module:
    """A model that transformers has quantized while it loaded it."""
    torch.manual_seed(0)
    bert(hidden_size=64).save_pretrained(directory)
    quantized = transformers.TorchAoConfig(config)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(directory, quantization_config=quantized, dtype=torch.float32).eval()


def train(model: nn.Module, directory) -> transformers.Trainer:
    options = dict(use_cpu=True, max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[])
    arguments = transformers.TrainingArguments(str(directory), disable_tqdm=True, save_strategy="no", **options)
    rows = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": i % 2} for i in range(16)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("options", [{}, dict(exclude="output"), dict(dtype=torch.bfloat16)])
def test_trainer_over_a_model_that_transformers_has_quantized(options, reloaded, tmp_path):
    model = loaded(tmp_path / "plain", CONFIGS["int8"]())
    if reloaded:
        model.save_pretrained(tmp_path / "int8")
        model = type(model).from_pretrained(tmp_path / "int8").eval()
    before = {name: type(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="purely quantized"):
        train(model, tmp_path)
    hsaid = HSAID(model, 100, memory="block", **options)
    train(hsaid, tmp_path)
    assert hsaid.theta.all()
    hsaid.eval()
    with torch.no_grad():
        expected = hsaid(IDS).logits
    merged = hsaid.merge()
    with torch.no_grad():
        # Layers that are left out multiply codes and scale afterwards.
        assert torch.allclose(merged(IDS).logits, expected, atol=0 if options.get("exclude") is None else 1e-6, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert all(map(torch.equal, merged.state_dict().values(), again.state_dict().values()))
    assert not hasattr(again.config, "quantization_config")
    copy.deepcopy(merged).half()
    copy.deepcopy(merged).float()
    pickle.dumps(merged)
    if "dtype" not in options:
        train(merged, tmp_path)
    plain = hsaid.unwrap()
    assert plain.is_quantized and plain.hf_quantizer.quantization_config is plain.config.quantization_config
    assert {name: type(parameter) for name, parameter in plain.named_parameters()} == before


def test_activations_are_not_quantized():
    torch.manual_seed(0)
    model = bert(hidden_size=64).eval()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    dense = bert(hidden_size=64).eval()
    with torch.no_grad():
        for own, parameter in zip(model.parameters(), dense.parameters(), strict=True):
            parameter.copy_(own.dequantize() if type(own) is not nn.Parameter else own)
        own, hsaid = model(IDS).logits, HSAID(model, 100, memory="block")
        logits = hsaid(IDS).logits
        assert torch.equal(logits, HSAID(dense, 100)(IDS).logits) and not torch.allclose(logits, own, atol=1e-4)
