"""The judge of heads: right for one architecture of each layout, and wrong where a layout is made so. For all that
transformers has: tests/architectures.py.
"""

import copy
import re

import pytest
import torch
from models import IDS, bert, snapshot
from tiny import tiny_model
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.app.example_inputs import example_inputs
from hsaid_kernels.heads import check
from hsaid_kernels.hierarchy.layouts import LAYOUTS, register_attention

# Of each layout that a test of prune_heads in test_heads.py does not run: a type, and whether with groups.
TYPES = {
    "falcon": True,
    "codegen": False,
    "gpt_bigcode": True,
    "qwen3_next": True,
    "deepseek_v3": False,
    "jetmoe": True,
    "xlnet": False,
    "gemma3n_text": True,
    "perceiver": False,
    "lilt": False,
    "levit": False,
    "squeezebert": False,
    "reformer": False,
    "kyutai_speech_to_text": True,
    "deberta": False,
    "longformer": False,
    "gpt_oss": True,
}


@pytest.fixture
def registered():
    before = list(LAYOUTS)
    yield register_attention
    LAYOUTS[:] = before


@pytest.mark.parametrize("kind", TYPES)
def test_layouts_are_right(kind):
    model = tiny_model(kind, **(dict(groups=2, size=8) if TYPES[kind] else {}))
    found = check(model, example_inputs(model))
    assert found and {one.verdict for one in found if one.verdict != "whole"} == {"right"}, list(map(str, found))
    whole = {one.kind for one in found if one.verdict == "whole"}
    assert whole <= {"Qwen3NextGatedDeltaNet"}


def test_torchs_own_attention():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    found = check(encoder, {"src": torch.randn(1, 5, 8)})
    assert [(one.name, one.heads, one.verdict) for one in found] == [
        (f"layers.{n}.self_attn", 2, "right") for n in (0, 1)
    ]


class Attention(nn.Module):
    """Two heads of size 4, and ways in which they are not on their own."""

    num_heads = 2

    def __init__(self, order="qkv", around=False, shared=False):
        super().__init__()
        self.order, self.around, self.shared = order, around, shared
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        results = self.qkv(x)
        if self.order == "heads":
            q, k, v = results.view(*x.shape[:-1], 2, 12).split(4, -1)
        else:
            q, k, v = (part.view(*x.shape[:-1], 2, 4) for part in results.chunk(3, -1))
        if self.shared:
            k = k + k.flip(-2)
        q, k, v = (part.transpose(-2, -3) for part in (q, k, v))
        mixed = (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(-2, -3).flatten(-2)
        return self.proj(mixed) + (v.transpose(-2, -3).flatten(-2) if self.around else 0)


@pytest.mark.parametrize(
    "options, verdict, why",
    [
        ({}, "right", ""),
        ({"order": "heads"}, "wrong", r"the \w+ of heads \[1\] reaches the results of others"),
        ({"around": True}, "wrong", r"queries, keys or values of heads \[1\] are used elsewhere too"),
        ({"shared": True}, "wrong", r"the key of heads \[1\] reaches the results of others"),
    ],
)
def test_what_is_wrong_is_found(options, verdict, why):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention(**options))
    (found,) = check(model, {"input": torch.randn(2, 5, 8)})
    assert found.verdict == verdict
    assert re.fullmatch(why, found.why)


def test_keys_that_another_layer_reads_are_found(registered):
    """As Gemma 3n was divided before."""
    registered({"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "o_proj", kinds="Gemma3nTextAttention")
    model = tiny_model("gemma3n_text", groups=2, size=8)
    wrong = [one.name for one in check(model, example_inputs(model)) if one.verdict == "wrong"]
    assert wrong == ["layers.0.self_attn", "layers.1.self_attn"]  # the next two read theirs


def test_nothing_is_changed_and_what_cannot_be_is_refused():
    model = bert()
    before = snapshot(model)
    (found,) = check(model.train(), {"input_ids": IDS})
    assert str(found) == "bert.encoder.layer.0.attention.self (BertSelfAttention, 2 heads): right"
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (found,) = check(model, {"input_ids": IDS[:, :1]})  # queries and keys have no effect on a single token
    assert found.verdict == "right"
    with pytest.raises(TypeError, match=r"inputs: expected arguments by name, \{name: tensor\}, got Tensor"):
        check(model, IDS)
    with pytest.raises(ValueError, match="model: expected one with weights, got one on the meta device"):
        check(copy.deepcopy(model).to("meta"), {"input_ids": IDS})
    with (
        HSAID(model, 200),
        pytest.raises(ValueError, match=r"model: expected a plain model, got one that an HSAID wraps"),
    ):
        check(model, {"input_ids": IDS})
    with pytest.raises(ValueError, match="model: expected the same results in two calls"):
        check(nn.Sequential(Attention(), Noise()), {"input": torch.randn(2, 5, 8)})


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(len(x), 1, 1, generator=torch.Generator().manual_seed(torch.seed()))
