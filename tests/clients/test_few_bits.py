"""Layers of hqq, optimum-quanto and compressed-tensors: which are left as they are, and which are refused."""

import pytest
import torch
import transformers
from models import IDS, bert, moved
from torch import nn

from hsaid_kernels import HSAID

LABELS = torch.tensor([0, 1])


def model_of(**options) -> nn.Module:
    torch.manual_seed(0)
    return bert(hidden_size=64, intermediate_size=64, **options).eval()


def test_hqq_is_left_as_it_is():
    hqq = pytest.importorskip("hqq.core.quantize")
    model = model_of()
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        layer = hqq.HQQLinear(getattr(attention, name), config, compute_dtype=torch.float32, device="cpu")
        setattr(attention, name, layer)
    with pytest.warns(UserWarning, match=r"got 3 hqq\.core\.quantize\.HQQLinear \(12,288 weights\) with packed ones"):
        hsaid = HSAID(model, 100)
    assert not any("query" in name for name in hsaid.plan.names)


def quanto(**options) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    model = model_of()
    library.quantize(model, weights=library.qint8, **options)
    return model


def test_quanto_is_refused_when_frozen():
    model = quanto()
    pytest.importorskip("optimum.quanto").freeze(model)
    for memory in ("step", "block"):
        with pytest.raises(TypeError, match=r"query', a QLinear, which would quantize the projected weight once more"):
            HSAID(model, 100, memory=memory)
    expected = model(IDS).logits
    left_out = "query|key|value|dense|classifier"
    hsaid = HSAID(model, 100, memory="block", exclude=left_out)
    assert torch.equal(hsaid(IDS).logits, expected)
    hsaid(IDS, labels=LABELS).loss.backward()
    assert hsaid.theta.grad.all()


def test_quanto_trains_while_it_is_not_frozen():
    gradients = []
    for memory in ("step", "block"):
        hsaid = moved(HSAID(quanto(), 100, memory=memory))
        output = hsaid(IDS, labels=LABELS)
        output.loss.backward()
        gradients.append(hsaid.theta.grad)
        assert torch.equal(hsaid.merge()(IDS).logits, output.logits)
    assert gradients[0].all() and torch.equal(*gradients)


@pytest.fixture
def compressed(tmp_path):
    """The directory of a model whose linear layers compressed-tensors has packed."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply

    model = model_of()
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    apply(model, QuantizationConfig(config_groups={"all": scheme}, format="pack-quantized", ignore=["classifier"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 7
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    return tmp_path


def test_compressed_tensors_is_refused_until_it_is_dequantized(compressed):
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(compressed).eval()
    expected = "query', a Linear of compressed-tensors: load .*CompressedTensorsConfig\\(dequantize=True\\)"
    with pytest.raises(TypeError, match=expected):
        HSAID(model, 100, memory="block")
    logits = model(IDS).logits  # which replaces its parameters
    with pytest.raises(TypeError, match=expected):
        HSAID(model, 100, memory="block")
    dequantized = transformers.CompressedTensorsConfig(dequantize=True)
    hsaid = HSAID(kind.from_pretrained(compressed, quantization_config=dequantized).eval(), 100)
    assert any("query.weight" in name for name in hsaid.plan.names)
    assert torch.allclose(hsaid(IDS).logits, logits, atol=1e-6)
