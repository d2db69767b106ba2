"""Small models for the tests of HSAID, and what they share around them."""

import torch
import transformers
from torch import nn

from hsaid_kernels import available_backends
from hsaid_kernels.module import HSAID

BACKENDS = [name for name in ("cpu", "reference") if available_backends()[name] is True]  # those of models on the CPU
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
IDS = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 35]])


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


def snapshot(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
