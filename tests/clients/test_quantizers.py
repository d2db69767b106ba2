"""W0 in the formats of the libraries that quantize, each by the library itself, on a CPU (docs/integration.md)."""

import copy
import importlib
import pickle

import pytest
import torch
import transformers
from models import IDS, bert, moved, relative
from torch import nn

from hsaid_kernels import HSAID

LABELS = torch.tensor([0, 1])


def model_of(size: int = 64, **options) -> nn.Module:
    torch.manual_seed(0)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return bert(hidden_size=size, intermediate_size=size, **quiet, **options)


def replaced(make, kind: type = nn.Linear) -> nn.Module:
    """A BERT with layers that `make` has made of those of this kind, all but the classifier."""
    model = model_of()
    for name, module in list(model.named_modules()):
        if type(module) is kind and name != "classifier":
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, make(module))
    return model


def library(name: str):
    return pytest.importorskip(name, exc_type=ImportError)


def linear_of_4_bits(**options):
    modules = library("bitsandbytes").nn

    def make(linear):
        made = modules.Linear4bit(linear.in_features, linear.out_features, **options)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")  # which quantizes it

    return make


def linear_of_8_bits(linear):
    made = library("bitsandbytes").nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def embedding(kind: str):
    def make(table):
        made = getattr(library("bitsandbytes").nn, kind)(table.num_embeddings, table.embedding_dim)
        made.load_state_dict(table.state_dict())
        made.padding_idx = table.padding_idx
        return made.to("cpu")

    return make


def hqq(bits: int):
    def make(linear):
        quantize = library("hqq.core.quantize")
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32)
        return quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")

    return make


def quanto(weights: str):
    quanto = library("optimum.quanto")
    model = model_of()
    quanto.quantize(model, weights=getattr(quanto, weights), exclude="classifier")
    quanto.freeze(model)
    return model


def bitnet(linear):
    layers = importlib.import_module("transformers.integrations.bitnet")
    made = layers.BitLinear(linear.in_features, linear.out_features, True, dtype=torch.float32)
    scale = 1 / linear.weight.detach().abs().mean()
    codes = (linear.weight.detach() * scale).round().clamp(-1, 1).to(torch.int8)
    made.weight, made.weight_scale = nn.Buffer(layers.pack_weights(codes)), nn.Buffer(scale.reshape(1))
    made.bias = nn.Buffer(linear.bias.detach().clone())
    return made


def of_gptqmodel(module: str, kind: str):
    """With codes at random."""

    def make(linear):
        cls = getattr(library(f"gptqmodel.nn_modules.qlinear.{module}"), kind)
        sizes = dict(in_features=linear.in_features, out_features=linear.out_features, group_size=32)
        made = cls(bits=4, sym=True, desc_act=False, bias=True, pack_dtype=torch.int32, register_buffers=True, **sizes)
        made.qweight.random_(-(2**31), 2**31 - 1)
        made.qzeros.random_(-(2**31), 2**31 - 1)
        made.scales.uniform_(0.005, 0.02)
        made.bias.copy_(linear.bias.detach())
        made.post_init()
        return made

    return make


def torchao(config, size: int = 64, dtype: torch.dtype = torch.float32):
    quantization = library("torchao.quantization")
    model = model_of(size)
    chosen = config(quantization)
    quantization.quantize_(model, chosen, lambda module, name: isinstance(module, nn.Linear) and name != "classifier")
    return model.to(dtype)


def int4_opaque(_):
    return library("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=32)


def nf4_tensors():
    nf4 = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    model = model_of(128)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            module.weight = nn.Parameter(nf4.to_nf4(module.weight.detach()), requires_grad=False)
    return model


FORMATS = {
    "bitsandbytes nf4": lambda: replaced(linear_of_4_bits(quant_type="nf4", compress_statistics=False)),
    "bitsandbytes nf4, twice": lambda: replaced(linear_of_4_bits(quant_type="nf4")),
    "bitsandbytes fp4": lambda: replaced(linear_of_4_bits(quant_type="fp4")),
    "bitsandbytes nf4, stored as bfloat16": lambda: replaced(linear_of_4_bits(quant_storage=torch.bfloat16)),
    "bitsandbytes int8": lambda: replaced(linear_of_8_bits),
    "bitsandbytes EmbeddingNF4": lambda: replaced(embedding("EmbeddingNF4"), nn.Embedding),
    "bitsandbytes Embedding8bit": lambda: replaced(embedding("Embedding8bit"), nn.Embedding),
    "hqq 4": lambda: replaced(hqq(4)),
    "hqq 3": lambda: replaced(hqq(3)),
    "quanto int8": lambda: quanto("qint8"),
    "quanto int4": lambda: quanto("qint4"),
    "quanto float8": lambda: quanto("qfloat8"),
    "bitnet": lambda: replaced(bitnet),
    "gptq": lambda: replaced(of_gptqmodel("torch", "TorchLinear")),
    "awq": lambda: replaced(of_gptqmodel("torch_awq", "AwqTorchLinear")),
    "torchao int8": lambda: torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao int4 in int8": lambda: torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    "torchao float8": lambda: torchao(lambda q: q.Float8WeightOnlyConfig()),
    "torchao int8, then bfloat16": lambda: torchao(lambda q: q.Int8WeightOnlyConfig(), dtype=torch.bfloat16),
    "torchao float8, then bfloat16": lambda: torchao(lambda q: q.Float8WeightOnlyConfig(), dtype=torch.bfloat16),
    "torchao int4, opaque": lambda: torchao(int4_opaque, 128),
    "torchao nf4": nf4_tensors,
}
# How far the logits at the start are from those of the library's own forward, in training: relative. What rounds more
# than we do says so in docs/integration.md. None: that forward fails.
OFF = {
    "bitnet": 0.02,
    "awq": 5e-3,
    "gptq": 1e-6,
    "torchao int8": 1e-6,
    "torchao int4, opaque": 1e-5,
    "torchao int8, then bfloat16": 0.01,
    "torchao float8, then bfloat16": None,
}


@pytest.mark.parametrize("name", FORMATS)
def test_trains_as_over_the_float_model(name, tmp_path):
    model = FORMATS[name]().train()
    if OFF.get(name, 0) is not None:
        expected = model(IDS).logits.detach()
    state = {} if "Embedding" in name else {key: str(value) for key, value in model.state_dict().items()}
    names = [key for key, _ in model.named_parameters()]

    few = HSAID(model, 100, memory="block")
    many = HSAID(few.merge(), 100)
    assert not any("bitsandbytes" in type(m).__module__ for m in many.model.modules())
    assert few.plan.names == many.plan.names == HSAID(model_of(few.config.hidden_size), 100).plan.names
    if OFF.get(name, 0) is not None:
        assert relative(few(IDS).logits, expected) <= OFF.get(name, 0)
    moved(few)
    for own, other in zip(few.parameters(), many.parameters(), strict=True):
        other.data.copy_(own)
    output, other = few(IDS, labels=LABELS), many(IDS, labels=LABELS)
    output.loss.backward()
    other.loss.backward()
    if "then" in name or name in ("gptq", "awq"):  # where W0 is rounded once more, in 16 bits
        assert relative(output.logits, other.logits) < 0.02
        assert relative(few.theta.grad, many.theta.grad) < 0.05
    else:
        assert torch.equal(output.logits, other.logits)
        assert torch.equal(few.theta.grad, many.theta.grad)
        assert torch.equal(few.multipliers.grad, many.multipliers.grad)

    assert torch.equal(few.merge()(IDS).logits, output.logits)
    if state:
        assert {key: str(value) for key, value in model.state_dict().items()} == state
    assert [key for key, _ in model.named_parameters()] == names
    assert not any(key.startswith("model.") for key in few.state_dict())  # codes are in no checkpoint
    few.save_pretrained(tmp_path)
    assert few.unwrap() is model and "hsaid" not in "".join(key for m in model.modules() for key in vars(m))
    again = HSAID.from_pretrained(tmp_path, model, memory="block")
    assert torch.equal(again(IDS).logits, output.logits)
    if not name.startswith(("torchao", "gptq", "quanto float8")):  # which pickle does not take
        assert torch.equal(pickle.loads(pickle.dumps(again))(IDS).logits, output.logits)
    if not name.startswith(("quanto", "gptq")):  # which deepcopy does not take
        assert torch.equal(copy.deepcopy(again)(IDS).logits, output.logits)
    again.unwrap()
    if OFF.get(name, 0) is not None:
        assert torch.equal(model(IDS).logits, expected)


def test_a_task_goes_from_four_bits_to_floats_and_back(tmp_path):
    few = moved(HSAID(FORMATS["bitsandbytes nf4"](), 100, memory="block"))
    few.save_pretrained(tmp_path)
    many = model_of()
    with pytest.warns(
        UserWarning, match=r"W0 is not what was trained from in 7 of 25 tensors .*\d\d\.\d% of the weights"
    ):
        hsaid = HSAID.from_pretrained(tmp_path, many)
    assert torch.equal(hsaid.theta, few.theta)
    hsaid.save_pretrained(tmp_path)
    model = few.unwrap()
    with pytest.warns(UserWarning, match="W0 is not what was trained from in 7 of 25 tensors"):
        again = HSAID.from_pretrained(tmp_path, model, memory="block")
    assert relative(again(IDS).logits, hsaid(IDS).logits) < 0.2


ROWS = [{"input_ids": torch.full((8,), 10 + 10 * (i % 2)), "labels": i % 2} for i in range(8)]
BITSANDBYTES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bfloat16": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": dict(load_in_8bit=True),
}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_trainer_trains_what_transformers_has_quantized(name, tmp_path):
    library("bitsandbytes")
    model_of().save_pretrained(tmp_path / "float")
    kind = transformers.AutoModelForSequenceClassification
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[name])
    model = kind.from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu")
    hsaid = HSAID(model, 100, memory="block")
    arguments = transformers.TrainingArguments(
        tmp_path / "runs", max_steps=20, learning_rate=0.05, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = transformers.Trainer(hsaid, arguments, train_dataset=ROWS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    hsaid.eval()
    merged, logits = hsaid.merge(), hsaid(IDS).logits
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert not hasattr(merged.config, "quantization_config") and not getattr(merged, "is_quantized", False)
    assert relative(merged(IDS).logits, logits) < (1e-2 if name == "bfloat16" else 1e-9)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(kind.from_pretrained(tmp_path / "merged").eval()(IDS).logits, merged(IDS).logits)
    merged.half()


def test_bitsandbytes_reorders_codes_when_it_evaluates():
    """On a CPU with AVX-512 for bfloat16, where it also rounds the scales, for good."""
    bitsandbytes = library("bitsandbytes")
    model = FORMATS["bitsandbytes nf4, twice"]()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    before = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    with torch.no_grad():
        model.eval()(IDS)
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("it does not on this machine")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    w0 = HSAID(model, 100, memory="block").w0()[name].dequantize()
    assert 0 < relative(w0, before) < 2**-8 and torch.equal((w0 * 1e30).sign(), (before * 1e30).sign())


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "hqq 4", "gptq", "awq", "bitnet"])
def test_heads_of_quantized_attention(name):
    hsaid = HSAID(FORMATS[name](), 500, memory="block", heads=True, pruned={0: [1]})
    many = HSAID(model_of(), 500, heads=True, pruned={0: [1]})
    assert [str(piece) for piece in hsaid.plan.pieces] == [str(piece) for piece in many.plan.pieces]


def test_bitsandbytes_before_it_has_quantized_anything():
    layers = library("bitsandbytes").nn
    for layer in (layers.Linear4bit(64, 64), layers.Linear8bitLt(64, 64, has_fp16_weights=False)):
        model = model_of()
        model.bert.pooler.dense = layer
        with pytest.raises(TypeError, match="whose weight is not quantized yet: model.to"):
            HSAID(model, 100, memory="block")
    model.bert.pooler.dense = layers.Linear8bitLt(64, 64)
    with pytest.raises(TypeError, match="make it with has_fp16_weights=False"):
        HSAID(model, 100, memory="block")


def test_a_copy_of_a_part_is_of_one_dtype():
    hsaid = moved(HSAID(replaced(linear_of_4_bits(compute_dtype=torch.bfloat16)), 100, memory="block"))
    part = hsaid.model.bert.pooler
    copied, hidden = copy.deepcopy(part), torch.randn(2, 4, 64)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    assert relative(copied(hidden), part(hidden)) < 1e-2


def compressed(tmp_path, weights, bits: str):
    """A model of which compressed-tensors has packed all linear layers but the classifier, as loaded."""
    library("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply

    model = model_of()
    largest = 7 if weights["type"] == "int" else 448
    arguments = QuantizationArgs(symmetric=True, strategy="channel", **weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=bits)
    apply(model, QuantizationConfig(config_groups={"all": scheme}, format=bits, ignore=["classifier"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / largest
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    kind, dense = transformers.AutoModelForSequenceClassification, transformers.CompressedTensorsConfig(dequantize=True)
    return kind.from_pretrained(tmp_path), kind.from_pretrained(tmp_path, quantization_config=dense)


COMPRESSED = {"pack-quantized": dict(num_bits=4, type="int"), "float-quantized": dict(num_bits=8, type="float")}


@pytest.mark.parametrize("bits", COMPRESSED)
def test_compressed_tensors_stays_compressed(bits, tmp_path):
    model, dense = compressed(tmp_path, COMPRESSED[bits], bits)
    state = {key: str(value) for key, value in model.state_dict().items()}
    hooks = [(name, "forward" in vars(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    expected = dense.eval()(IDS).logits
    few, many = HSAID(model.eval(), 100, memory="block"), HSAID(dense, 100)
    assert few.plan.names == many.plan.names and torch.equal(few(IDS).logits, expected)
    moved(few)
    for own, other in zip(few.parameters(), many.parameters(), strict=True):
        other.data.copy_(own)
    output, other = few(IDS, labels=LABELS), many(IDS, labels=LABELS)
    output.loss.backward()
    other.loss.backward()
    assert torch.equal(output.logits, other.logits) and torch.equal(few.theta.grad, many.theta.grad)
    merged = few.merge()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(IDS).logits, output.logits)
    few.unwrap()
    assert {key: str(value) for key, value in model.state_dict().items()} == state
    assert [(name, "forward" in vars(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()] == hooks
    assert torch.equal(model(IDS).logits, expected)  # after which it is decompressed
    with pytest.raises(TypeError, match=r"compressed-tensors that is decompressed: load .*dequantize=True"):
        HSAID(model, 100, memory="block")


def test_gguf_is_dequantized_as_it_is_loaded(tmp_path):
    gguf = library("gguf")
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=4, max_position_embeddings=64, **sizes)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    for key, value in {
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "rope.dimension_count": 16,
        "vocab_size": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    torch.manual_seed(0)
    parts = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj")
    parts |= dict(
        attn_output="self_attn.o_proj", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"
    )
    for name in ("token_embd", "output", *(f"blk.0.{part}" for part in parts)):
        values = gguf.quants.quantize(torch.randn(64, 64).numpy() / 8, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=config).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    hsaid = HSAID(model, 100)
    assert len(hsaid.plan.names) == 12 and torch.equal(hsaid(ids).logits, expected)
    merged = moved(hsaid).merge()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(ids).logits, hsaid(ids).logits)
