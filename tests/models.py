"""Small models for the tests of HSAID, and what they share around them."""

import functools

import torch
import transformers
from torch import nn

from hsaid_kernels import available_backends
from hsaid_kernels.wrapper.hsaid import HSAID

BACKENDS = [name for name in ("cpu", "reference") if available_backends()[name] is True]  # those of models on the CPU
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
IDS = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35]])

FAMILY_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=60) | SPECIAL
T5 = dict(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0) | SPECIAL
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2)
FAMILIES = {
    "Bert": FAMILY_SIZES,
    "Roberta": FAMILY_SIZES | SPECIAL,
    "DistilBert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=60),
    "Albert": FAMILY_SIZES | {"embedding_size": 16},
    "DebertaV2": FAMILY_SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "T5": T5,
    "Bart": BART | dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, decoder_start_token_id=0) | SPECIAL,
    "GPT2": GPT2,
    "GPTNeoX": FAMILY_SIZES | SPECIAL,
    "Llama": FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2},
    "Qwen3": FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 6},
    "Phi3": FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2},
    "ModernBert": FAMILY_SIZES | SPECIAL,
    "Mistral": FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2},
    "Gemma": FAMILY_SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8},
    "Phi": FAMILY_SIZES | SPECIAL,
    "OPT": FAMILY_SIZES | SPECIAL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=60) | SPECIAL,
    "Electra": FAMILY_SIZES | {"embedding_size": 32},
    "MPNet": FAMILY_SIZES | SPECIAL,
    "CLIPText": FAMILY_SIZES | SPECIAL,
    "ViT": FAMILY_SIZES | {"image_size": 16, "patch_size": 4},
}


def bert(**changes) -> nn.Module:
    config = transformers.BertConfig(**SIZES | {"max_position_embeddings": 16} | changes)
    return transformers.BertForSequenceClassification(config)


def tied_models() -> dict:
    t5 = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    gpt2 = dict(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    albert = dict(SIZES, num_hidden_layers=2, embedding_size=8, max_position_embeddings=16)
    masked = transformers.BertConfig(**SIZES, max_position_embeddings=16)
    return {
        "bert": lambda: transformers.BertForMaskedLM(masked),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**albert)),
    }


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def moved(hsaid: HSAID) -> HSAID:
    """Away from the start, so that weights are not W0."""
    with torch.no_grad():
        hsaid.theta.normal_()
        hsaid.multipliers.uniform_(0.5, 1.5)
    return hsaid


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reads(model: nn.Module) -> dict:
    """What a read of each parameter gives, by each of its names."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name: functools.reduce(getattr, name.split("."), model) for name in names}


def snapshot(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def family(name: str, **changes) -> nn.Module:
    """A model of transformers, two layers of four heads, with weights large enough that every head matters."""
    config = getattr(transformers, f"{name}Config")(**FAMILIES.get(name, FAMILY_SIZES | SPECIAL) | changes)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.1 if parameter.dim() == 1 else 0.3)
    return model


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def change(hsaid: HSAID) -> None:
    with torch.no_grad():
        hsaid.theta.add_(torch.randn(len(hsaid.theta)))


def gradient(hsaid: HSAID, compute) -> torch.Tensor:
    hsaid.zero_grad()
    compute().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in hsaid.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
