"""Which values of fused tensors are whose expert's, against slices by hand; and the level L6."""

import pytest
import torch
import transformers
from torch import nn

from hsaid_kernels import Hierarchy
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.hierarchy.experts import find_experts

SIZES = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=4)
DBRX = dict(vocab_size=20, d_model=8, n_heads=2, n_layers=1, attn_config={"kv_n_heads": 2, "rope_theta": 1e4})


def build(name: str, **config) -> nn.Module:
    model_class = getattr(transformers, f"{name}Model")
    with torch.device("meta"):
        return model_class(model_class.config_class(**SIZES | config))


MODELS = {
    "Mixtral": lambda: build("Mixtral", intermediate_size=6, num_local_experts=3),
    "GptOss": lambda: build("GptOss", intermediate_size=6, num_local_experts=3),
    "Llama4Text": lambda: build(
        "Llama4Text", intermediate_size=6, intermediate_size_mlp=6, num_local_experts=3, interleave_moe_layer_step=1
    ),
    "DeepseekV3": lambda: build(
        "DeepseekV3", num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=6,
        n_group=1, topk_group=1, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=4,
    ),
    "JetMoe": lambda: build("JetMoe", kv_channels=4, num_local_experts=3, intermediate_size=6, num_attention_heads=4),
}  # fmt: skip


def dbrx() -> nn.Module:
    ffn = {"ffn_hidden_size": 6, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 8}
    with torch.device("meta"):
        return transformers.DbrxModel(transformers.DbrxConfig(**DBRX, ffn_config=ffn))


def parts(hierarchy: Hierarchy, tensor: str) -> dict[str, set[int]]:
    """{label: places in the flat tensor} of the segments of one tensor."""
    (name,) = [name for name in hierarchy.tensors if name.endswith(tensor)]
    numbers = torch.arange(torch.Size(hierarchy.shapes[name]).numel())
    return {
        s.label: set(numbers.as_strided((s.rows, s.cols), (s.row_stride, 1), s.offset).flatten().tolist())
        for s in hierarchy.segments
        if s.tensor == name
    }


@pytest.mark.parametrize(
    "name, tensor, half, values",
    [  # what belongs to expert 1, or to its gate
        ("Mixtral", "experts.gate_up_proj", "/gate", lambda w: w[1, :6]),
        ("Mixtral", "experts.gate_up_proj", "/up", lambda w: w[1, 6:]),
        ("Mixtral", "experts.down_proj", "", lambda w: w[1]),
        ("GptOss", "experts.gate_up_proj", "/gate", lambda w: w[1, :, ::2]),
        ("GptOss", "experts.gate_up_proj", "/up", lambda w: w[1, :, 1::2]),
        ("GptOss", "experts.gate_up_proj_bias", "/up", lambda w: w[1, 1::2]),
        ("GptOss", "experts.down_proj_bias", "", lambda w: w[1]),
        ("Llama4Text", "experts.gate_up_proj", "/gate", lambda w: w[1, :, :6]),
        ("Llama4Text", "experts.gate_up_proj", "/up", lambda w: w[1, :, 6:]),
        ("Llama4Text", "experts.down_proj", "", lambda w: w[1]),
        ("JetMoe", "mlp.input_linear.weight", "/up", lambda w: w[1, 6:]),
        ("JetMoe", "self_attention.experts.input_linear.weight", "", lambda w: w[1]),
    ],
)
def test_places(name, tensor, half, values):
    hierarchy = Hierarchy.from_model(MODELS[name](), experts=True)
    (shape,) = [shape for key, shape in hierarchy.shapes.items() if key.endswith(tensor)]
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    assert parts(hierarchy, tensor)[f"expert.1{half}"] == set(values(numbers).flatten().tolist())


def test_dbrx_has_blocks_of_rows():
    hierarchy = Hierarchy.from_model(dbrx(), experts=True)
    for tensor in ("w1", "v1", "w2"):
        assert parts(hierarchy, tensor) == {f"expert.{e}": set(range(48 * e, 48 * e + 48)) for e in range(3)}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_in_one_segment(name, heads):
    model = MODELS[name]()
    hierarchy = Hierarchy.from_model(model, heads=heads, experts=True)
    assert sum(segment.numel for segment in hierarchy.segments) == sum(p.numel() for p in model.parameters())
    Plan(hierarchy.shapes, 10, segments=hierarchy.segments)  # refuses two over one element, or of one stream
    assert len(set(hierarchy.paths)) == len(hierarchy.segments)
    assert hierarchy.levels == ("L1", "L2", "L3", "L4", *(["L5"] * heads), "L6")
    assert hierarchy.partition("L6").num_multipliers == len(hierarchy.nodes("L6"))


def test_nodes():
    mixtral = Hierarchy.from_model(MODELS["Mixtral"](), experts=True)
    assert mixtral.nodes("L6") == ("expert.0", "expert.1", "expert.2")
    assert {"gate_up_proj.gate", "gate_up_proj.up", "down_proj"} <= set(mixtral.nodes("L4"))
    assert mixtral.partition("L1+L6|L3|L4").components[0].paths[-4:] == (
        ("layers.0", "expert.0"), ("layers.0", "expert.1"), ("layers.0", "expert.2"), ("norm", None),
    )  # fmt: skip
    router = [path for path, s in zip(mixtral.paths, mixtral.segments) if s.tensor == "layers.0.mlp.gate.weight"]
    assert len(router) == 1 and router[0][-1] is None
    jetmoe = Hierarchy.from_model(MODELS["JetMoe"](), experts=True)  # two sets of experts in a block
    assert set(jetmoe.nodes("L6")) == {f"{place}.expert.{e}" for place in ("self_attention", "mlp") for e in range(3)}


def test_shared_experts_keep_their_name():
    model = MODELS["DeepseekV3"]()
    assert "shared_experts.gate_proj" in Hierarchy.from_model(model, experts=True).nodes("L3")
    assert "shared_experts.gate_proj" not in Hierarchy.from_model(model).nodes("L3")  # as ever


def test_experts_that_are_modules_of_their_own():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(3))

    model = nn.Sequential(nn.Linear(4, 4), Mixture())
    (layer,) = find_experts(model)
    assert (layer.name, layer.count, layer.fused) == ("1.experts", 3, {})
    assert layer.pieces([2]) == {(f"1.experts.2.{n}.{key}", "") for n in (0, 1) for key in ("weight", "bias")}
    hierarchy = Hierarchy.from_model(model, experts=True)
    assert hierarchy.nodes("L6") == ("expert.0", "expert.1", "expert.2")
    assert [segment.label for segment in hierarchy.segments] == [""] * len(hierarchy.tensors)


def test_refusals():
    with pytest.raises(ValueError, match=r"experts: expected True for a model with experts, got a Linear without"):
        Hierarchy.from_model(nn.Linear(2, 2), experts=True)
    with pytest.raises(TypeError, match=r"experts: expected True or False, got 1"):
        Hierarchy.from_model(nn.Linear(2, 2), experts=1)
    with pytest.raises(ValueError, match=r"without experts: L6 is there with experts=True"):
        Hierarchy.from_model(nn.Linear(2, 2)).partition("L1|L6")
