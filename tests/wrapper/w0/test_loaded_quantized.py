"""Models that transformers notes as quantized, as those loaded from GGUF: an HSAID over them trains, and merges."""

import copy
import functools
import types
from pathlib import Path

import pytest
import torch
import transformers
from few_bits import Int8, quantized
from models import IDS, bert, moved
from test_packed import Packed, replaced
from torch import nn

from hsaid_kernels import HSAID

ROWS = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": i % 2} for i in range(8)]


class Configuration:
    quant_method = "gguf"

    def to_dict(self):
        return {"quant_method": self.quant_method}


class Quantizer:
    is_trainable = is_qat_trainable = False

    def __init__(self):
        self.quantization_config = Configuration()

    def is_serializable(self):
        return False


class Conversion:
    """As torchao's, by which a loaded checkpoint cannot be saved again."""

    def __init__(self, quantizer):
        self.operations = [types.SimpleNamespace(hf_quantizer=quantizer)]

    def reverse_transform(self):
        raise NotImplementedError


def noted(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """As from_pretrained leaves a quantized model."""
    model.hf_quantizer = quantizer = Quantizer()
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config, model.config._is_quantized = quantizer.quantization_config, True
    model._weight_conversions = [Conversion(quantizer)]
    return model


def notes(model: nn.Module) -> tuple:
    attributes = {name: model.__dict__.get(name) for name in ("is_quantized", "quantization_method", "hf_quantizer")}
    return attributes, model.config.__dict__.get("quantization_config"), "_is_quantized" in model.config.__dict__


def train(model: nn.Module, directory: Path) -> transformers.Trainer:
    options = dict(use_cpu=True, max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, report_to=[])
    arguments = transformers.TrainingArguments(str(directory), disable_tqdm=True, save_strategy="no", **options)
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("prepare", [lambda model: model, quantized])
def test_trainer_trains_and_the_model_stays_as_it_was(prepare, tmp_path):
    model = noted(prepare(bert()))
    before = notes(model)
    with pytest.raises(ValueError, match="quantized"):
        train(model, tmp_path)
    hsaid = HSAID(model, 80, memory="block")
    assert hsaid.is_quantized is False and hsaid.hf_quantizer is model.hf_quantizer
    train(hsaid, tmp_path)
    assert hsaid.theta.all()
    hsaid.merge()
    assert notes(hsaid.unwrap()) == before and before[0]["is_quantized"]


def test_what_is_not_noted_is_not_shown():
    assert not hasattr(HSAID(bert(), 80), "is_quantized")


@pytest.mark.parametrize("options", [{}, dict(exclude="query"), dict(dtype=torch.bfloat16)])
def test_a_merged_model_is_an_ordinary_one(options, tmp_path):
    model = noted(quantized(bert().eval()))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.extra_repr = types.MethodType(functools.partial(repr), module)  # which cannot be pickled
    hsaid = moved(HSAID(model, 80, memory="block", **options))
    merged = hsaid.merge()
    kinds = {type(parameter) for parameter in merged.parameters()}
    assert kinds == {nn.Parameter} and {type(p) for p in model.parameters()} == {Int8, nn.Parameter}
    for name, weight in hsaid.weights().items():
        assert torch.equal(merged.get_parameter(name), weight)
    left_out = model.bert.encoder.layer[0].attention.self.query.weight
    if "exclude" in options:
        query = merged.bert.encoder.layer[0].attention.self.query.weight
        assert torch.equal(query, left_out.dequantize()) and not query.requires_grad
    others = [p for name, p in merged.named_parameters() if "query" not in name or "exclude" not in options]
    assert all(parameter.requires_grad for parameter in others)
    assert notes(merged) == (dict.fromkeys(notes(model)[0]), None, False)
    assert next(copy.deepcopy(merged).half().parameters()).dtype == torch.float16
    assert next(copy.deepcopy(merged).float().parameters()).dtype == torch.float32
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(map(torch.equal, merged.state_dict().values(), again.state_dict().values()))
    torch.save(merged, tmp_path / "whole.pt")
    if "dtype" not in options:
        train(merged, tmp_path)
        assert not torch.equal(merged.classifier.weight, again.classifier.weight)


def test_a_merged_model_with_packed_layers_stays_noted():
    model = noted(replaced(Packed))
    merged = HSAID(model, 80, include="embeddings|classifier").merge()
    assert merged.is_quantized and merged.config.quantization_config.quant_method == "gguf"


def test_submodels_are_freed_of_their_notes_too():
    inner = noted(bert().bert)
    merged = HSAID(nn.Sequential(inner, nn.Linear(16, 2)), 80).merge()
    assert notes(merged[0]) == (dict.fromkeys(notes(inner)[0]), None, False) and inner.is_quantized
    assert merged[0](IDS).pooler_output.shape == (2, 16)
