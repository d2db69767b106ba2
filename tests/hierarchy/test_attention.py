"""Where heads are: counts and bands by hand for each kind of attention; tests/wrapper/test_heads.py uses them."""

import pytest
import torch
import transformers
from torch import nn

from hsaid_kernels import Hierarchy
from hsaid_kernels.fastfood.plan import Plan, Segment
from hsaid_kernels.hierarchy.attention import find_attention, find_attentions, find_divisions, survey
from hsaid_kernels.hierarchy.layouts import LAYOUTS, register_attention
from hsaid_kernels.wrapper.heads import pruned_heads
from hsaid_kernels.wrapper.hsaid import HSAID

CASES = {  # model, configuration: (attention modules, heads, key/value heads, size of a head, segments of all of them)
    "BertModel": ({"vocab_size": 119547}, (12, 12, 12, 64, 12 * 7 * 12)),
    "RobertaModel": ({}, (12, 12, 12, 64, 12 * 7 * 12)),
    "DistilBertModel": ({}, (6, 12, 12, 64, 6 * 7 * 12)),
    "T5Model": ({}, (18, 8, 8, 64, 18 * 4 * 8)),
    "MT5Model": ({}, (24, 6, 6, 64, 24 * 4 * 6)),  # 384 outputs of 512 inputs
    "GPT2Model": ({}, (12, 12, 12, 64, 12 * 3 * 12)),
    "LlamaModel": ({"num_key_value_heads": 8}, (32, 32, 8, 128, 32 * (2 * 32 + 2 * 8))),
    "ViTModel": ({}, (12, 12, 12, 64, 12 * 7 * 12)),
    "AlbertModel": ({}, (1, 64, 64, 64, 7 * 64)),  # one module for all layers
    "BartModel": ({"decoder_attention_heads": 8}, (36, 16, 16, 64, 12 * 7 * 16 + 24 * 7 * 8)),
    "ModernBertModel": ({}, (22, 12, 12, 64, 22 * 2 * 12)),
    "BlipVisionModel": ({"num_hidden_layers": 2}, (2, 12, 12, 64, 2 * 3 * 12)),
    "GPTNeoXModel": ({"num_hidden_layers": 2}, (2, 64, 64, 96, 2 * 3 * 64)),
    "Phi3Model": ({"num_hidden_layers": 2, "num_key_value_heads": 8}, (2, 32, 8, 96, 2 * (2 * 32 + 8))),
}


def build(name: str, **config) -> nn.Module:
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**config))


@pytest.mark.parametrize("name", CASES)
def test_counts(name):
    config, expected = CASES[name]
    model = build(name, **config)
    found = find_attentions(model)
    segments = [segment for attention in found for segment in attention.segments()]
    assert (len(found), found[0].heads, found[0].groups, found[0].head_dim, len(segments)) == expected
    names = [name for name, _ in model.named_modules()]
    assert [names.index(attention.name) for attention in found] == sorted(names.index(a.name) for a in found)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    divided = {segment.tensor for segment in segments}
    for tensor in divided:  # its segments cover it, each element once: Plan refuses two over one
        own = [segment for segment in segments if segment.tensor == tensor]
        assert sum(segment.numel for segment in own) == shapes[tensor].numel()
    Plan(
        {name: shapes[name] for name in list(divided)[:2]},
        10,
        segments=[s for s in segments if s.tensor in list(divided)[:2]],
    )


def test_mbert_has_twelve_heads_in_twelve_layers():
    hierarchy = Hierarchy.from_model(build("BertForSequenceClassification", vocab_size=119547), heads=True)
    assert hierarchy.levels == ("L1", "L2", "L3", "L4", "L5")
    assert hierarchy.nodes("L5") == tuple(f"head.{head}" for head in range(12))
    assert len({(path[0], path[4]) for path in hierarchy.paths if path[4]}) == 144
    assert len(hierarchy.tensors) == 201
    assert len(hierarchy.segments) == len(set(hierarchy.paths)) == 201 - 12 * 7 + 12 * 7 * 12
    whole = [path for path, segment in zip(hierarchy.paths, hierarchy.segments) if not segment.label]
    assert all(path[4] is None for path in whole)
    assert ("layer.3", "attention", "dense", "bias", None) in whole  # of the output layer


@pytest.mark.parametrize(
    "spec, counts",
    {
        "did": [],
        "said": [201],
        "hsaid-3": [39, 8, 2],
        "L1+L2|L3|L4|L5": [39, 8, 2, 12],
        "L1+L5|L3|L4": [15 + 144, 8, 2],
        "L5": [12],
        "L1+L2+L3+L4+L5": [1125],
    }.items(),
)
def test_partitions_of_mbert(spec, counts):
    hierarchy = Hierarchy.from_model(build("BertForSequenceClassification", vocab_size=119547), heads=True)
    partition = hierarchy.partition(spec)
    assert [len(component.paths) for component in partition.components] == counts
    assert partition.multiplier_index.shape == (1125, len(counts))
    assert torch.equal(partition.factors(partition.initial()), torch.ones(1125))
    assert hierarchy.partition(partition.spec).spec == partition.spec


def test_a_heads_multiplier_reaches_its_own_segments():
    hierarchy = Hierarchy.from_model(build("BertModel", num_hidden_layers=2), heads=True)
    partition = hierarchy.partition("L1+L5|L3|L4")
    multipliers = partition.initial()
    multipliers[partition.components[0].paths.index(("layer.1", "head.3"))] = 2
    changed = [s for s, factor in zip(hierarchy.segments, partition.factors(multipliers)) if factor != 1]
    attention = find_attention(build("BertModel", num_hidden_layers=2), 1)
    assert {(s.tensor, s.label) for s in changed} == attention.pieces([3])
    assert len(changed) == 7


def test_segments_by_hand():
    def segments(name: str, **config) -> dict[str, list[Segment]]:
        (attention,) = find_attentions(build(name, **config))
        found = {}
        for segment in attention.segments():
            found.setdefault(".".join(segment.tensor.split(".")[-2:]), []).append(segment)
        return found

    sizes = dict(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    bert = segments("BertModel", **sizes)
    assert list(bert) == [f"{role}.{key}" for role in ("query", "key", "value") for key in ("weight", "bias")] + [
        "dense.weight"
    ]
    layer = "encoder.layer.0.attention."
    assert bert["key.weight"] == [Segment(f"{layer}self.key.weight", 32 * h, 1, 32, 64, f"head.{h}") for h in (0, 1)]
    assert bert["key.bias"] == [Segment(f"{layer}self.key.bias", 4 * h, 1, 4, 8, f"head.{h}") for h in (0, 1)]
    assert bert["dense.weight"] == [Segment(f"{layer}output.dense.weight", 4 * h, 8, 4, 8, f"head.{h}") for h in (0, 1)]

    gpt2 = segments("GPT2Model", vocab_size=10, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    assert gpt2["c_attn.weight"][1] == Segment("h.0.attn.c_attn.weight", 4, 3 * 8, 4, 8, "head.1")  # columns, 3 a row
    assert gpt2["c_attn.bias"][1] == Segment("h.0.attn.c_attn.bias", 4, 3, 4, 8, "head.1")
    assert gpt2["c_proj.weight"][1] == Segment("h.0.attn.c_proj.weight", 32, 1, 32, 64, "head.1")  # rows

    llama = segments("LlamaModel", **sizes | {"num_attention_heads": 4, "num_key_value_heads": 2})
    assert [s.label for s in llama["q_proj.weight"]] == ["head.0", "head.1", "head.2", "head.3"]
    assert [(s.label, s.offset, s.cols) for s in llama["k_proj.weight"]] == [("group.0", 0, 16), ("group.1", 16, 16)]

    phi3 = segments("Phi3Model", **sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0})
    assert phi3["qkv_proj.weight"][4:] == [  # after four of the queries, key and value of a group
        Segment("layers.0.self_attn.qkv_proj.weight", (8 + 2 * g) * 8, 2, 16, 32, f"group.{g}") for g in (0, 1)
    ]


def test_torchs_own_attention():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    (attention,) = find_attentions(encoder)
    assert (attention.heads, attention.head_dim) == (2, 4)
    first = [s for s in attention.segments() if s.label == "head.1"]
    assert first == [
        Segment("layers.0.self_attn.in_proj_weight", 32, 3, 32, 64, "head.1"),
        Segment("layers.0.self_attn.in_proj_bias", 4, 3, 4, 8, "head.1"),
        Segment("layers.0.self_attn.out_proj.weight", 4, 8, 4, 8, "head.1"),
    ]


def test_gpt2_cross_attention():
    model = build("GPT2Model", vocab_size=10, n_embd=8, n_layer=1, n_head=2, add_cross_attention=True)
    own, cross = find_attentions(model)
    assert cross.name == "h.0.crossattention"
    places = {(bands.role, bands.tensor.rpartition("attention.")[2], bands.starts[0]) for bands in cross.bands}
    assert {("query", "q_attn.weight", 0), ("key", "c_attn.weight", 0), ("value", "c_attn.weight", 8)} <= places


def test_groups():
    (attention,) = find_attentions(build("LlamaModel", num_hidden_layers=1, num_key_value_heads=8))
    names = {tensor.rpartition("attn.")[2] + " " + label for tensor, label in attention.pieces([0, 1, 2])}
    assert names == {f"{layer}.weight head.{head}" for layer in ("q_proj", "o_proj") for head in (0, 1, 2)}
    assert len(attention.pieces([4, 5, 6, 7])) == 2 * 4 + 2
    hierarchy = Hierarchy.from_model(build("LlamaModel", num_hidden_layers=1, num_key_value_heads=8), heads=True)
    assert hierarchy.nodes("L5") == (*(f"head.{h}" for h in range(32)), *(f"group.{g}" for g in range(8)))


def test_parameters_that_two_modules_share_are_divided_once():
    model = build("BertModel", num_hidden_layers=2)
    one, two = (layer.attention.self for layer in model.encoder.layer)
    two.query.weight = one.query.weight
    hierarchy = Hierarchy.from_model(model, heads=True)
    assert len(hierarchy.segments) == len(set(hierarchy.paths))


def test_masked_parameters_are_the_same_nodes():
    model = build("BertModel", num_hidden_layers=1)
    plain = Hierarchy.from_model(model, heads=True)
    query = model.encoder.layer[0].attention.self.query
    torch.nn.utils.prune.identity(query, "weight")
    masked = Hierarchy.from_model(model, heads=True)
    assert "encoder.layer.0.attention.self.query.weight_orig" in masked.tensors
    assert sorted(masked.paths, key=str) == sorted(plain.paths, key=str)


def test_skip_and_merge_of_heads():
    model = build("BertModel", num_hidden_layers=1)
    hierarchy = Hierarchy.from_model(model, merge={"even": ["head.0", "head.2"]}, skip=["L5:head.1"], heads=True)
    assert hierarchy.nodes("L5") == ("even", *(f"head.{h}" for h in range(3, 12)))
    assert hierarchy.partition("L5").num_multipliers == 10


def test_errors():
    model = build("BertModel", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads .* got a Linear without any"):
        find_attentions(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        find_attentions(3)
    with pytest.raises(ValueError, match=r"layer: expected a number from 0 to 1, got 2"):
        find_attention(model, 2)
    with pytest.raises(ValueError, match=r"layer: expected the name of an attention module \('encoder.layer.0"):
        find_attention(model, "encoder.layer.0")
    with pytest.raises(TypeError, match=r"heads: expected True or False, got 1"):
        Hierarchy.from_model(model, heads=1)
    for wrong in (None, 1.0, True):
        with pytest.raises(TypeError, match=r"layer: expected a number or a module's name"):
            find_attention(model, wrong)
    with pytest.raises(ValueError, match=r"without heads: L5 is there with heads=True"):
        Hierarchy.from_model(model).partition("L1|L5")


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("ConvBertModel", {}, "ConvBertSelfAttention.*a convolution adds to the heads' results"),
        ("Olmo2Model", {}, "Olmo2Attention.*q_norm divides all heads by one norm"),
        ("DiffLlamaModel", {}, "DiffLlamaAttention.*the results of two heads are subtracted"),
        ("DogeModel", {}, "DogeAttention.*the mask of a head is made of all values"),
        ("BitNetModel", {}, "BitNetAttention.*attn_sub_norm divides all heads by one norm"),
        ("AutoformerModel", {"prediction_length": 2}, "AutoformerAttention.*choose the delays"),
        ("MambaModel", {}, "MambaMixer.*it has channels, but no heads"),
        ("Mamba2Model", {}, "Mamba2Mixer.*its heads share B and C, and a norm"),
        ("RwkvModel", {}, "RwkvSelfAttention.*its layers have no known layout"),
    ],
)
def test_heads_that_are_not_on_their_own_are_refused(name, config, message):
    model = build(name, **config)
    with pytest.raises(
        ValueError, match=rf"model: expected one with attention heads that can be told apart.*{message}"
    ):
        Hierarchy.from_model(model, heads=True)
    Hierarchy.from_model(model)
    assert pruned_heads(model) == {}


def test_modules_that_are_left_whole_are_named():
    model = build("MiniMaxModel", num_hidden_layers=2)
    found = survey(model)
    assert found.whole == {"layers.1.self_attn": "a norm divides the results of all heads"}
    assert [attention.name for attention in found.divided] == ["layers.0.self_attn"]
    assert survey(build("BertModel", num_hidden_layers=1)).whole == {}
    group = survey(build("GroupViTModel")).whole
    assert set(group.values()) == {"it says neither the number nor the size of its heads"} and len(group) == 2


def test_attention_without_an_output_layer():
    """Not a module that can be known, and no reason for `HSAID` to fail."""
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "mix": nn.Linear(8, 8)})
    model.head_dim = 4
    with pytest.raises(ValueError, match="is left whole: no output layer is known"):
        find_attentions(model)
    assert len(HSAID(model, 100).plan.pieces) == 4


def test_keys_that_several_layers_read_belong_to_none():
    """Gemma 3n: layers 2 and 3 use keys and values of layers 0 and 1."""
    sizes = dict(vocab_size=20, vocab_size_per_layer_input=20, hidden_size=16, hidden_size_per_layer_input=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_hidden_layers=4, laurel_rank=2)
    layers = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    layers |= dict(intermediate_size=[8] * 4, activation_sparsity_pattern=[0.0] * 4)
    found = find_attentions(build("Gemma3nTextModel", **sizes, **layers))
    assert [attention.name for attention in found] == [f"layers.{layer}.self_attn" for layer in range(4)]
    for attention in found:
        assert {bands.tensor.split(".")[-2] for bands in attention.bands} == {"q_proj", "o_proj"}


NEW = dict(num_kv_heads=2, new_decoder_architecture=True)


@pytest.mark.parametrize(
    "name, config, layer, starts",
    [  # of query, key and value of heads or groups 0, 1, ... in rows of a head's size
        (
            "Falcon",
            dict(num_kv_heads=2, new_decoder_architecture=True),
            "query_key_value",
            ([0, 1, 4, 5], [2, 6], [3, 7]),
        ),
        ("Falcon", dict(multi_query=True, new_decoder_architecture=False), "query_key_value", ([0, 1, 2, 3], [4], [5])),
        ("Falcon", dict(multi_query=False), "query_key_value", ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11])),
        ("GPTBigCode", dict(multi_query=True), "c_attn", ([0, 1, 2, 3], [4], [5])),
        ("GPTBigCode", dict(multi_query=False), "c_attn", ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11])),
        ("CodeGen", dict(rotary_dim=4), "qkv_proj", ([0, 3, 6, 9], [2, 5, 8, 11], [1, 4, 7, 10])),
    ],
)
def test_orders_of_fused_layers(name, config, layer, starts):
    sizes = dict(vocab_size=20, num_hidden_layers=1, hidden_size=16, num_attention_heads=4)
    if name != "Falcon":
        sizes = dict(vocab_size=20, n_layer=1, n_embd=16, n_head=4)
    (attention,) = find_attentions(build(f"{name}Model", **sizes, **config))
    weights = [bands for bands in attention.bands if bands.tensor.endswith(f"{layer}.weight")]
    assert [bands.role for bands in weights] == [
        "query",
        *(["value", "key"] if name == "CodeGen" else ["key", "value"]),
    ]
    found = {bands.role: [start // 4 for start in bands.starts] for bands in weights}
    assert (found["query"], found["key"], found["value"]) == starts
    segments = list(attention.segments())
    assert {segment.label for segment in segments} == {
        *(f"head.{head}" for head in range(4)),
        *(f"group.{group}" for group in range(attention.groups) if attention.groups < 4),
    }


def test_what_belongs_to_heads_besides():
    model = build("LongformerModel", num_hidden_layers=1, attention_window=[4])
    (attention,) = find_attentions(model)
    others = {bands.tensor.split("self.")[1] for bands in attention.bands if bands.role == "other"}
    assert others == {f"{name}_global.{key}" for name in ("query", "key", "value") for key in ("weight", "bias")}
    (attention,) = find_attentions(build("GptOssModel", num_hidden_layers=1))
    (sinks,) = [bands for bands in attention.bands if bands.role == "other"]
    assert (sinks.tensor, sinks.size, sinks.count) == ("layers.0.self_attn.sinks", 1, 64)


def test_the_first_version_divides_as_it_did():
    longformer = build("LongformerModel", num_hidden_layers=1, attention_window=[4])
    assert all(bands.role != "other" for bands in find_attentions(longformer, version=1)[0].bands)
    assert not survey(build("DeepseekV3Model", num_hidden_layers=1), version=1).divided
    grouped = survey(build("GroupViTModel"), version=1)  # by the configuration, which is wrong of two of them
    assert len(grouped.divided) == len(survey(build("GroupViTModel")).divided) + 2
    for name in ("T5Model", "GPT2Model", "ModernBertModel", "BlipVisionModel", "Phi3Model"):
        model = build(name, **CASES[name][0])
        assert find_divisions(model, 1) == find_divisions(model)


@pytest.fixture
def registered():
    before = list(LAYOUTS)
    yield register_attention
    LAYOUTS[:] = before


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.together, self.mixed = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.together(x).view(*x.shape[:-1], 2, 12).transpose(-2, -3).split(4, -1)
        return self.mixed((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(-2, -3).flatten(-2))


def test_an_attention_of_ones_own(registered):
    model = nn.Sequential(nn.Linear(8, 8), Mixing())
    with pytest.raises(ValueError, match="without any"):
        find_attentions(model)
    registered({"together": "(q k v)"}, "mixed", kinds="Mixing")
    (attention,) = find_attentions(model)
    assert [s.offset for s in attention.segments() if s.tensor == "1.together.weight"] == [0, 96]
    registered({"together": "q"}, kinds="Mixing", whole="it mixes")
    assert survey(model).whole == {"1": "it mixes"}
    for wrong in ({}, {"together": "x"}, {"together": "(q k"}, {"together": 3}):
        with pytest.raises((TypeError, ValueError), match="layers: expected"):
            registered(wrong)
    with pytest.raises(ValueError, match="kinds: expected a regular expression, got '\\('"):
        registered({"together": "q"}, kinds="(")
