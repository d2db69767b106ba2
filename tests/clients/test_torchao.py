"""torchao quantizes a model; an HSAID over it has the weights over its dequantized values."""

import copy

import pytest
import torch
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
