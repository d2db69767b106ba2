"""Weights of a kind that is not known are refused. The layers here are made as those of libraries are."""

import warnings

import pytest
import torch
import transformers
from models import FAMILIES, IDS, bert, family, moved, reads
from torch import nn
from torch.nn.utils import parametrizations, prune

from hsaid_kernels import HSAID
from hsaid_kernels.compat import FastfoodWrap


class HqqLinear(nn.Module):
    """As of hqq: codes are a parameter without gradients, and the bias is a plain attribute."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes = torch.randint(0, 255, (linear.out_features, linear.in_features // 2), dtype=torch.uint8)
        self.W_q, self.bias = nn.Parameter(codes, requires_grad=False), linear.bias.detach()
        self.meta = {"scale": torch.ones(4, 1)}

    def forward(self, x):
        return x @ torch.cat((self.W_q & 15, self.W_q >> 4), 1).to(x.dtype).t() / 16 + self.bias


class GptqLinear(nn.Module):
    """As of gptqmodel: everything is in buffers, scales in a matrix of floats."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = rows, columns = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.randint(-(2**31), 2**31, (rows // 8, columns), dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, columns // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2, columns, dtype=torch.float16))
        self.register_buffer("g_idx", torch.arange(rows, dtype=torch.int32))


class Packed(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        codes = torch.randint(-7, 7, (linear.in_features, linear.out_features), dtype=torch.int32)
        self.register_buffer("codes", codes)


class Experts(nn.Module):
    """As GPT-OSS's in MXFP4: two weights in a byte, and biases that are a matrix of floats."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.blocks = nn.Parameter(torch.randint(0, 255, (2, 8, 8), dtype=torch.uint8), requires_grad=False)
        self.biases = nn.Parameter(torch.zeros(2, 16))


class Byte(nn.Linear):
    """As of transformers' FineGrainedFP8, loaded."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)


class Opaque(nn.Module):
    """Whose weight nothing in Python shows."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features


def replaced(kind) -> nn.Module:
    """A BERT whose four linear layers of attention are of this kind."""
    model = bert()
    attention = model.bert.encoder.layer[0].attention
    for module in (attention.self, attention.output):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


PACKED = {
    HqqLinear: r"4 test_packed\.HqqLinear \(1,024 weights\) with others",
    GptqLinear: r"4 test_packed\.GptqLinear \(1,024 weights\)",
    Packed: r"4 test_packed\.Packed \(1,024 codes\)",
    Experts: r"4 test_packed\.Experts \(512 codes\)",
    Byte: r"4 test_packed\.Byte \(1,024 weights\)",
    Opaque: r"4 test_packed\.Opaque \(1,024 weights\)",
}


@pytest.mark.parametrize("kind", PACKED)
def test_unknown_weights_are_refused(kind):
    model = replaced(kind)
    with pytest.raises(TypeError, match=rf"got {PACKED[kind]}.*register_quantized.*include="):
        HSAID(model, 60)
    HSAID(model, 60, include="embeddings|classifier")


def test_of_torch_ao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear})
        recurrent = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LayerNorm(8), nn.LSTM(8, 8)), {nn.LSTM})
    with pytest.raises(TypeError, match=r"got 8 torch\.ao\.nn\.quantized\.dynamic\S*\.Linear \(2,336 weights\)"):
        HSAID(model, 60)
    with pytest.raises(TypeError, match=r"got 1 torch\.ao\.nn\.quantized\.\S*\.PackedParameter with others"):
        HSAID(recurrent, 10, "did")


def test_all_kinds_are_said_at_once():
    model = replaced(HqqLinear)
    model.classifier = Packed(model.classifier)
    for make in (lambda: HSAID(model, 60), lambda: FastfoodWrap(model, 60, "cpu")):
        with pytest.raises(
            TypeError, match=r"4 test_packed.HqqLinear \(1,024 weights\) and 1 test_packed.Packed \(32 c"
        ):
            make()


def test_a_checkpoint_says_what_is_projected(tmp_path):
    hsaid = moved(HSAID(replaced(HqqLinear).eval(), 60, include="embeddings|classifier"))
    hsaid.save_pretrained(tmp_path)
    expected, model = hsaid(IDS).logits, hsaid.unwrap()
    assert torch.equal(HSAID.from_pretrained(tmp_path, model)(IDS).logits, expected)


def test_unknown_layers_below_adapters_are_meant_to_stay():
    class Lora(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.base_layer, self.lora_A = HqqLinear(linear), nn.Linear(linear.in_features, 4, bias=False)

    assert any("lora_A" in name for name in HSAID(replaced(Lora), 60).plan.names)


class Tables(nn.Module):
    """Masks and numbers of places, in the forms that models keep them in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 8).tril().to(torch.uint8))
        self.register_buffer("places", torch.arange(64).view(8, 8))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("places", torch.arange(64, dtype=torch.int32).view(8, 8))


def pruned(linear: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(linear, "weight", 0.5)


def gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
    )


def swin() -> nn.Module:
    sizes = dict(image_size=16, patch_size=2, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    return transformers.SwinModel(transformers.SwinConfig(**sizes))


@pytest.mark.parametrize("layer", [pruned, nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.orthogonal])
def test_computed_weights_are_not_unknown(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.Linear(8, 8), layer(nn.Linear(8, 8)))
    HSAID(model, 20)


@pytest.mark.parametrize("make", [gpt2, swin, *(lambda name=name: family(name) for name in FAMILIES)])
def test_ordinary_models_are_known(make):
    HSAID(make(), 400)


def test_tables_and_masks_are_no_weights():
    HSAID(nn.Sequential(nn.Linear(8, 8), Tables(), Attention()), 20)


class Scheme:
    def __init__(self, weights):
        self.weights = weights


def test_layers_that_compressed_tensors_has_decompressed_are_refused():
    model = bert()
    model.classifier.quantization_scheme, model.classifier.quantization_status = Scheme("4 bits"), "decompressed"
    before = reads(model)
    for options in ({}, dict(exclude="classifier")):
        with pytest.raises(
            TypeError, match=r"a Linear of compressed-tensors that is decompressed: load the model anew"
        ):
            HSAID(model, 60, memory="block", **options)
    assert all(value is before[name] for name, value in reads(model).items())


def test_where_only_activations_are_compressed_the_model_is_plain():
    model = bert()
    model.classifier.quantization_scheme, model.classifier.quantization_status = Scheme(None), "frozen"
    HSAID(model, 60)
