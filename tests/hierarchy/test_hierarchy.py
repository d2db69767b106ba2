"""The hierarchy: node names and counts per architecture, partitions, multipliers' index and factors, bad input."""

import json
import math
import random
import re

import pytest
import torch
from torch import nn

from hsaid_kernels.hierarchy.hierarchy import Hierarchy

transformers = pytest.importorskip("transformers")

# partition -> distinct paths in each component, for mBERT (DESIGN, section 1)
MBERT_COUNTS = {
    "did": [],
    "none": [],
    "said": [201],
    "L1+L2+L3+L4": [201],
    "L1+L2+L3|L4": [102, 2],
    "L1+L2|L3+L4": [39, 15],
    "L1+L2|L3|L4": [39, 8, 2],
    "hsaid-3": [39, 8, 2],
    "L1|L2|L3|L4": [15, 3, 8, 2],
    "L3": [8],
}


BERT_LEAVES = "word_embeddings position_embeddings token_type_embeddings LayerNorm query key value dense"
ALBERT_LEAVES = f"{BERT_LEAVES} ffn ffn_output".replace("query", "full_layer_layer_norm query")


def build(model_class: str, **config) -> nn.Module:
    model_class = getattr(transformers, model_class)
    with torch.device("meta"):
        return model_class(model_class.config_class(**config))


@pytest.fixture(scope="module")
def mbert_model() -> nn.Module:
    return build("BertForSequenceClassification", vocab_size=119547)


@pytest.fixture(scope="module")
def mbert(mbert_model) -> Hierarchy:
    return Hierarchy.from_model(mbert_model)


def paths(model: nn.Module) -> dict[str, tuple]:
    hierarchy = Hierarchy.from_model(model)
    assert len(set(hierarchy.paths)) == len(hierarchy.tensors)
    return dict(zip(hierarchy.tensors, hierarchy.paths))


def module(**children) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


def toy() -> nn.Module:
    """Parameters on the root and on a container, a list of blocks, a Sequential head with a tied weight."""
    blocks = [module(mix=module(inner=module(fc=nn.Linear(2, 2))), norm=nn.LayerNorm(2)) for _ in range(3)]
    embed = nn.Embedding(5, 2)
    body = module(shift=nn.Parameter(torch.ones(2)), embed=embed, layers=nn.ModuleList(blocks))
    head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 5, bias=False))
    head[2].weight = embed.weight
    return module(scale=nn.Parameter(torch.ones(1)), body=body, head=head)


def test_mbert_nodes(mbert):
    assert mbert.levels == ("L1", "L2", "L3", "L4")
    assert mbert.nodes("L1") == ("embeddings", *(f"layer.{i}" for i in range(12)), "pooler", "classifier")
    assert mbert.nodes("L2") == ("attention", "intermediate", "output")
    assert mbert.nodes("L3") == tuple(BERT_LEAVES.split())
    assert mbert.nodes("L4") == ("weight", "bias")


def test_mbert_paths(mbert):
    assert len(mbert.tensors) == len(mbert.paths) == len(set(mbert.paths)) == 201
    assert sum(math.prod(shape) for shape in mbert.shapes.values()) == 177_854_978
    path = dict(zip(mbert.tensors, mbert.paths))
    assert path["bert.embeddings.word_embeddings.weight"] == ("embeddings", None, "word_embeddings", "weight")
    assert path["bert.encoder.layer.3.attention.self.query.bias"] == ("layer.3", "attention", "query", "bias")
    assert path["bert.encoder.layer.3.attention.output.dense.bias"] == ("layer.3", "attention", "dense", "bias")
    assert path["bert.encoder.layer.3.output.dense.bias"] == ("layer.3", "output", "dense", "bias")
    assert path["bert.pooler.dense.weight"] == ("pooler", None, "dense", "weight")
    assert path["classifier.weight"] == ("classifier", None, None, "weight")
    assert mbert.shapes["classifier.weight"] == (2, 768)


@pytest.mark.parametrize("spec", MBERT_COUNTS)
def test_mbert_partition_counts(mbert, spec):
    partition = mbert.partition(spec)
    assert [len(component.paths) for component in partition.components] == MBERT_COUNTS[spec]
    assert partition.num_multipliers == sum(MBERT_COUNTS[spec])
    assert partition.multiplier_index.shape == (201, len(MBERT_COUNTS[spec]))
    assert partition.multiplier_index.dtype == torch.int64
    again = mbert.partition(partition.spec)
    assert again.spec == partition.spec and torch.equal(again.multiplier_index, partition.multiplier_index)


def test_str_tells_the_counts(mbert):
    text = str(mbert)
    assert text.startswith("201 tensors, 177,854,978 weights; nodes: L1 15, L2 3, L3 8, L4 2\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["L1", "embeddings", "5", "92,208,384"] in rows
    assert ["L1", "layer.0", "…", "layer.11", "(x12)", "16", "7,087,872", "each"] in rows
    assert ["L2", "attention", "10", "2,363,904"] in rows
    assert ["L1", "classifier", "2", "1,538"] in rows
    assert "layer.5" not in text
    assert str(mbert.partition("hsaid-3")) == "L1+L2: 39, L3: 8, L4: 2 -> 49 multipliers"
    assert str(mbert.partition("L3|L4", combine="sum")) == "L3: 8, L4: 2 -> 10 multipliers, summed"
    assert str(mbert.partition("did")) == "did -> 0 multipliers"


ARCHITECTURES = {  # name: (model class, configuration, nodes of L1, L2, L3, L4 in order of appearance)
    "xlm-roberta": (
        "XLMRobertaForSequenceClassification",
        {"num_hidden_layers": 2},
        "classifier embeddings layer.0 layer.1",
        "attention intermediate output",
        "dense out_proj word_embeddings token_type_embeddings LayerNorm position_embeddings query key value",
        "weight bias",
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"n_layers": 2},
        "embeddings layer.0 layer.1 pre_classifier classifier",
        "attention ffn",
        "word_embeddings position_embeddings LayerNorm "
        "q_lin k_lin v_lin out_lin sa_layer_norm lin1 lin2 output_layer_norm",
        "weight bias",
    ),
    "albert": (
        "AlbertForSequenceClassification",
        {"num_hidden_layers": 12},
        "embeddings embedding_hidden_mapping_in albert_layer_groups.0 pooler classifier",
        "attention",
        ALBERT_LEAVES,
        "weight bias",
    ),
    "albert-groups": (
        "AlbertForSequenceClassification",
        {"num_hidden_groups": 2, "inner_group_num": 2},
        "embeddings embedding_hidden_mapping_in albert_layer_groups.0 albert_layer_groups.1 pooler classifier",
        "albert_layers.0 albert_layers.1",
        ALBERT_LEAVES,
        "weight bias",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_layer": 2},
        "wte wpe h.0 h.1 ln_f",
        "attn mlp",
        "ln_1 c_attn c_proj ln_2 c_fc",
        "weight bias",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"num_layers": 2},
        "shared encoder.block.0 encoder.block.1 encoder.final_layer_norm "
        "decoder.block.0 decoder.block.1 decoder.final_layer_norm",
        "SelfAttention DenseReluDense EncDecAttention",
        "q k v o relative_attention_bias layer_norm wi wo",
        "weight",
    ),
    "llama": (
        "LlamaForCausalLM",
        {"num_hidden_layers": 2},
        "embed_tokens layers.0 layers.1 norm lm_head",
        "self_attn mlp",
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj input_layernorm post_attention_layernorm",
        "weight",
    ),
    "vit": (
        "ViTForImageClassification",
        {"num_hidden_layers": 2},
        "embeddings layers.0 layers.1 layernorm classifier",
        "patch_embeddings attention mlp",
        "projection q_proj k_proj v_proj o_proj layernorm_before layernorm_after fc1 fc2",
        "cls_token position_embeddings weight bias",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    model_class, config, *nodes = ARCHITECTURES[name]
    model = build(model_class, **config)
    hierarchy = Hierarchy.from_model(model)
    assert hierarchy.tensors == tuple(name for name, _ in model.named_parameters())
    assert len(set(hierarchy.paths)) == len(hierarchy.tensors)
    assert hierarchy.partition("said").num_multipliers == len(hierarchy.tensors)
    assert [" ".join(hierarchy.nodes(level)) for level in hierarchy.levels] == nodes


def test_t5_sublayers_mean_the_same_in_encoder_and_decoder():
    path = paths(build("T5ForConditionalGeneration", num_layers=2))
    assert path["encoder.block.1.layer.1.DenseReluDense.wi.weight"][1:] == ("DenseReluDense", "wi", "weight")
    assert path["decoder.block.1.layer.2.DenseReluDense.wi.weight"][1:] == ("DenseReluDense", "wi", "weight")
    assert path["decoder.block.1.layer.1.layer_norm.weight"][1:] == ("EncDecAttention", "layer_norm", "weight")
    assert "lm_head.weight" not in path  # tied to shared.weight


def test_parameters_on_root_and_container_and_tied():
    assert paths(toy()) == {
        "scale": (None, None, None, "scale"),
        "body.shift": ("body", None, None, "shift"),
        "body.embed.weight": ("embed", None, None, "weight"),  # and head.2.weight
        **{
            f"body.layers.{i}.{tail}": (f"layers.{i}", *path)
            for i in range(3)
            for tail, path in {
                "mix.inner.fc.weight": ("mix", "fc", "weight"),
                "mix.inner.fc.bias": ("mix", "fc", "bias"),
                "norm.weight": (None, "norm", "weight"),
                "norm.bias": (None, "norm", "bias"),
            }.items()
        },
        "head.0.weight": ("head.0", None, None, "weight"),
        "head.0.bias": ("head.0", None, None, "bias"),
    }


def test_plain_modules():
    assert paths(nn.Linear(2, 3)) == {"weight": (None, None, None, "weight"), "bias": (None, None, None, "bias")}
    stack = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    assert [path[0] for path in paths(stack).values()] == ["0", "0", "2.0", "2.1", "2.1"]
    assert paths(module(net=nn.ModuleList([nn.Linear(1, 1)])))["net.0.bias"] == ("net.0", None, None, "bias")
    # A Sequential above a list is a container, beside one it is a list of blocks.
    model = nn.Sequential(module(encoder=nn.ModuleList([nn.Linear(1, 1)]), norm=nn.LayerNorm(1)), nn.Linear(1, 1))
    assert [path[0] for path in paths(model).values()] == ["encoder.0", "encoder.0", "norm", "norm", "1", "1"]
    # A name that only starts with a digit is a name.
    model = nn.ModuleList([module(conv=nn.ModuleDict({"1x1": nn.Linear(1, 1), "3x3": nn.Linear(1, 1)}))])
    assert paths(model)["0.conv.1x1.weight"] == ("0", "conv", "1x1", "weight")


def test_lists_in_lists():
    model = module(features=nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)))
    assert list(dict.fromkeys(path[0] for path in paths(model).values())) == ["features.0.0", "features.1"]
    # The outermost ModuleList makes the block. Its items' items keep their numbers: one has two children of its own.
    items = nn.ModuleList([module(q=nn.Linear(1, 1), k=nn.Linear(1, 1)), module(up=nn.Linear(1, 1))])
    found = paths(module(layers=nn.ModuleList([items])))
    assert found["layers.0.0.k.weight"] == ("layers.0", "0", "k", "weight")
    assert found["layers.0.1.up.weight"] == ("layers.0", "1", "up", "weight")


def test_what_would_clash_is_kept():
    experts = nn.ModuleList(module(w1=nn.Linear(1, 1, bias=False), w2=nn.Linear(1, 1, bias=False)) for _ in range(2))
    mlp = module(gate=nn.Linear(1, 2, bias=False), experts=experts)
    found = paths(module(layers=nn.ModuleList([module(mlp=mlp, attn=module(deep=module(q=nn.Linear(1, 1))))])))
    assert found["layers.0.mlp.gate.weight"] == ("layers.0", "mlp", "gate", "weight")
    assert found["layers.0.mlp.experts.1.w1.weight"] == ("layers.0", "mlp.experts.1", "w1", "weight")
    assert found["layers.0.attn.deep.q.weight"] == ("layers.0", "attn", "q", "weight")


def test_names_taken_from_children_that_would_clash_are_not_taken():
    def item(name: str) -> nn.Module:
        return module(**{name: module(q=nn.Linear(1, 1)), "norm": nn.LayerNorm(1)})

    block = module(pre=nn.ModuleList([item("a"), item("b")]), post=nn.ModuleList([item("a"), item("b")]))
    found = paths(module(layers=nn.ModuleList([block])))
    assert found["layers.0.pre.1.b.q.weight"] == ("layers.0", "pre.1.b", "q", "weight")
    assert found["layers.0.post.1.norm.weight"] == ("layers.0", "post.1", "norm", "weight")


def test_containers_are_kept_as_little_as_needed():
    def tower() -> nn.Module:
        return module(embed=nn.Linear(1, 1), core=module(layers=nn.ModuleList([nn.Linear(1, 1)])))

    model = module(a=module(text=tower()), b=module(image=tower()), embed=nn.Linear(1, 1), only=nn.Linear(1, 1))
    assert list(dict.fromkeys(path[0] for path in paths(model).values())) == [
        *("text.embed", "text.core.layers.0", "image.embed", "image.core.layers.0", "embed", "only")
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_models_have_as_many_paths_as_tensors(seed):
    draw = random.Random(seed)

    def grow(depth: int) -> nn.Module:
        if depth == 0:
            return nn.Linear(1, 1, bias=draw.random() < 0.5)
        kind = draw.choice([nn.ModuleList, nn.Sequential, module, module])
        if kind is not module:
            items = [grow(depth - 1) for _ in range(draw.randint(1, 3))]
            return kind(items) if kind is nn.ModuleList else kind(*items)
        names = draw.sample(["a", "b", "0", "1", "layer", "weight"], 2)
        return module(p=nn.Parameter(torch.ones(1)), **{name: grow(depth - 1) for name in names})

    for depth in range(1, 6):
        paths(grow(depth))


def test_merge_attention_with_intermediate(mbert_model):
    hierarchy = Hierarchy.from_model(mbert_model, merge={"mix": ("attention", "intermediate")})
    assert hierarchy.nodes("L2") == ("mix", "output")
    partition = hierarchy.partition("said")
    assert partition.num_multipliers == 177
    row = dict(zip(hierarchy.tensors, partition.multiplier_index[:, 0].tolist()))
    layer = "bert.encoder.layer.7"
    assert row[f"{layer}.attention.output.dense.bias"] == row[f"{layer}.intermediate.dense.bias"]
    assert row[f"{layer}.attention.output.dense.bias"] != row[f"{layer}.output.dense.bias"]
    same = Hierarchy.from_model(mbert_model, merge={"attention": ["L2:attention", "L2:intermediate"]})
    assert torch.equal(same.partition("said").multiplier_index, partition.multiplier_index)


def test_skip(mbert_model):
    hierarchy = Hierarchy.from_model(mbert_model, skip=("intermediate", "L3:LayerNorm"))
    path = dict(zip(hierarchy.tensors, hierarchy.paths))
    assert path["bert.encoder.layer.0.intermediate.dense.bias"] == ("layer.0", None, "dense", "bias")
    assert path["bert.embeddings.LayerNorm.bias"] == ("embeddings", None, None, "bias")
    assert hierarchy.nodes("L2") == ("attention", "output")
    assert hierarchy.partition("L3").num_multipliers == 7


def test_skipped_node_on_one_of_its_levels():
    model = module(layers=nn.ModuleList([module(inner=nn.MultiheadAttention(2, 1))]))
    for skip, l2, l3 in [
        ([], ("inner",), ("inner", "out_proj")),
        (["L2:inner"], (), ("inner", "out_proj")),
        (["inner"], (), ("out_proj",)),
    ]:
        hierarchy = Hierarchy.from_model(model, skip)
        assert (hierarchy.nodes("L2"), hierarchy.nodes("L3")) == (l2, l3)


def test_everything_skipped_has_factor_one():
    hierarchy = Hierarchy.from_model(nn.Linear(2, 2), skip=["weight", "bias"])
    assert str(hierarchy).startswith("2 tensors, 6 weights; nodes: L1 0, L2 0, L3 0, L4 0\n")
    for combine in ("product", "sum"):
        partition = hierarchy.partition("L3|L4", combine)
        assert partition.num_multipliers == 0
        assert torch.equal(partition.factors(partition.initial()), torch.ones(2))


def test_choices_are_plain_json(mbert_model):
    skip, merge = ["pooler"], {"mix": ["attention", "intermediate"]}
    hierarchy = Hierarchy.from_model(mbert_model, skip=iter(skip), merge={"mix": tuple(merge["mix"])})
    config = {"skip": hierarchy.skip, "merge": hierarchy.merge, "partition": hierarchy.partition(" L2 + L1 |L4").spec}
    assert json.loads(json.dumps(config)) == config == {"skip": skip, "merge": merge, "partition": "L1+L2|L4"}
    assert Hierarchy.from_model(mbert_model, hierarchy.skip, hierarchy.merge) == hierarchy


def test_select_keeps_order_and_paths(mbert):
    names = [name for name in mbert.tensors if "layer.1." in name or name == "classifier.weight"]
    part = mbert.select(reversed(names))
    assert list(part.tensors) == list(part.shapes) == names
    whole = dict(zip(mbert.tensors, mbert.paths))
    assert part.paths == tuple(whole[name] for name in names)
    assert part.nodes("L1") == ("layer.1", "classifier")
    assert part.partition("hsaid-3").multiplier_index.shape == (len(names), 3)


def test_multiplier_index_by_hand():
    hierarchy = Hierarchy.from_model(toy()).select(["scale", "body.shift", "body.layers.2.norm.bias", "head.0.bias"])
    partition = hierarchy.partition("L1+L3|L4|L2")
    assert [component.levels for component in partition.components] == [("L1", "L3"), ("L4",), ("L2",)]
    assert [component.paths for component in partition.components] == [
        (("body", None), ("layers.2", "norm"), ("head.0", None)),
        (("scale",), ("shift",), ("bias",)),
        (),
    ]
    assert partition.multiplier_index.tolist() == [[-1, 3, -1], [0, 4, -1], [1, 5, -1], [2, 5, -1]]
    multipliers = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    assert partition.factors(multipliers).tolist() == [7, 22, 39, 65]
    assert hierarchy.partition("L1+L3|L4|L2", combine="sum").factors(multipliers).tolist() == [7, 6.5, 8, 9]
    assert hierarchy.partition("L1", combine="sum").factors(multipliers[:3]).tolist() == [1, 2, 3, 5]


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("spec", MBERT_COUNTS)
def test_factors_start_at_one(mbert, spec, combine):
    partition = mbert.partition(spec, combine)
    start = partition.initial()
    assert start.shape == (partition.num_multipliers,) and start.dtype == torch.float32
    assert torch.equal(partition.factors(start), torch.ones(201))
    assert torch.equal(partition.factors(start.bfloat16()), torch.ones(201, dtype=torch.bfloat16))


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("spec", ["said", "hsaid-3", "L1|L2|L3|L4", "L2|L3"])
def test_factors_and_gradient_against_one_hot(mbert, spec, combine):
    partition = mbert.partition(spec, combine)
    torch.manual_seed(0)
    # Multiples of 1/64 near 1 in float64: products and sums of four are exact, so only the sum's division rounds.
    multipliers = 1 + torch.randint(-32, 33, (partition.num_multipliers,), dtype=torch.float64) / 64
    multipliers.requires_grad_()
    present = (partition.multiplier_index >= 0).double()  # [segments, components]
    hot = nn.functional.one_hot(partition.multiplier_index.clamp(min=0), partition.num_multipliers) * present[..., None]
    dense = hot @ multipliers  # [segments, components], 0 where there is no node
    if combine == "product":
        expected = (dense + 1 - present).prod(1)
    else:
        number = present.sum(1)
        expected = torch.where(number > 0, dense.sum(1) / number.clamp(min=1), 1)
    factors = partition.factors(multipliers)
    assert torch.equal(factors, expected)
    weights = torch.randn(201, dtype=torch.float64)
    (actual_grad,) = torch.autograd.grad(factors @ weights, multipliers)
    (expected_grad,) = torch.autograd.grad(expected @ weights, multipliers)
    # A sum of up to 201 terms of at most 1.5**3 * |weight|: 201 eps times their sizes' sum, for either of the two sums,
    # and as much again for what the terms themselves were rounded by.
    bound = 2 * 2 * 201 * torch.finfo(torch.float64).eps * 1.5**3 * weights.abs().sum()
    assert (actual_grad - expected_grad).abs().max() <= bound
    (again,) = torch.autograd.grad(partition.factors(multipliers) @ weights, multipliers)
    assert torch.equal(again, actual_grad)


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_factors_gradcheck(combine):
    partition = Hierarchy.from_model(toy()).partition("L1+L2|L3|L4", combine)
    multipliers = partition.initial().double().add_(torch.rand(partition.num_multipliers)).requires_grad_()
    assert torch.autograd.gradcheck(partition.factors, multipliers)


def test_factors_compile_and_survive_inference_mode(mbert):
    partition = mbert.partition("hsaid-3")
    with torch.inference_mode():
        partition.factors(partition.initial())
    multipliers = partition.initial().mul_(1.5).requires_grad_()
    compiled = torch.compile(partition.factors, backend="eager", fullgraph=True)
    assert torch.equal(compiled(multipliers), partition.factors(multipliers))
    partition.factors(multipliers).sum().backward()
    assert multipliers.grad.count_nonzero() == 49
    meta = partition.factors(partition.initial().to("meta"))
    assert meta.shape == (201,) and meta.device.type == "meta"


EXPECTED = "partition: expected did, none, said, hsaid-3 or each of L1, L2, L3, L4 at most once, as in 'L1+L2|L3|L4', "


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("L1+L7", "got 'L1+L7' with unknown 'L7'"),
        ("SAID", "got 'SAID' with unknown 'SAID'"),
        ("L1|L2|L1", "got 'L1|L2|L1' with L1 2 times"),
        ("L1+L1", "got 'L1+L1' with L1 2 times"),
        ("", "got '' with an empty place"),
        ("L1||L2", "got 'L1||L2' with an empty place"),
        ("L1+|L2", "got 'L1+|L2' with an empty place"),
    ],
)
def test_bad_partition(mbert, spec, message):
    with pytest.raises(ValueError, match=re.escape(EXPECTED + message) + "$"):
        mbert.partition(spec)


@pytest.mark.parametrize("spec", [None, 3, ["L1", "L2"]])
def test_partition_of_wrong_type(mbert, spec):
    with pytest.raises(TypeError, match=re.escape(f"{EXPECTED}got {spec!r}") + "$"):
        mbert.partition(spec)


def test_bad_combine_level_and_multipliers(mbert):
    with pytest.raises(ValueError, match="combine: expected 'product' or 'sum', got 'mean'"):
        mbert.partition("said", combine="mean")
    with pytest.raises(ValueError, match="level: expected one of L1, L2, L3, L4, got 'L5'"):
        mbert.nodes("L5")
    with pytest.raises(ValueError, match=r"multipliers: expected shape \[49\], got \[48\]"):
        mbert.partition("hsaid-3").factors(torch.ones(48))


def test_bad_model():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        Hierarchy.from_model({})
    with pytest.raises(ValueError, match="model: expected at least one parameter, got a ReLU without any"):
        Hierarchy.from_model(nn.ReLU())


def test_bad_select(mbert):
    with pytest.raises(ValueError, match=r"names: expected some of the 201 tensors, got \['nope'\]"):
        mbert.select(["classifier.weight", "nope"])
    with pytest.raises(ValueError, match="names: expected some of the 201 tensors, got none at all"):
        mbert.select([])
    with pytest.raises(TypeError, match="names: expected a list of tensor names, got 'weight'"):
        mbert.select("weight")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"skip": ["atention"]}, ValueError, r"skip: expected nodes of the hierarchy .*L2: mix; L3.*got 'atention'"),
        ({"skip": ["L3:mix"]}, ValueError, r"skip: expected nodes of the hierarchy .*got 'L3:mix'"),
        (
            {"skip": ["mix", "L2:mix"]},
            ValueError,
            "skip: expected each node at most once in skip and merge, got L2:mix again",
        ),
        ({"skip": "mix"}, TypeError, "skip: expected a list of node names, got 'mix'"),
        ({"skip": 3}, TypeError, "skip: expected a list of node names, got 3"),
        ({"skip": [3]}, TypeError, r"skip: expected a list of node names, got \[3\]"),
        ({"merge": {"x": ["fc", "nrm"]}}, ValueError, r"merge: expected nodes of the hierarchy .*got 'nrm'"),
        (
            {"merge": {"x": ["fc", "mix"]}},
            ValueError,
            r"merge: expected .* level in common, got \['fc', 'mix'\] for 'x'",
        ),
        ({"merge": {"x": []}}, ValueError, r"merge: expected nodes that have a level in common, got \[\] for 'x'"),
        (
            {"merge": {"bias": ["weight", "shift"]}},
            ValueError,
            "merge: expected L4:bias among the nodes, or another name, got",
        ),
        (
            {"merge": {"x": ["fc"], "y": ["fc"]}},
            ValueError,
            "merge: expected each node at most once in skip and merge, got L3:fc again",
        ),
        (
            {"skip": ["fc"], "merge": {"x": ["fc", "norm"]}},
            ValueError,
            "merge: expected each node at most once in skip and merge, got L3:fc again",
        ),
        ({"merge": {"x": "fc"}}, TypeError, r"merge\['x'\]: expected a list of node names, got 'fc'"),
        (
            {"merge": ["fc", "norm"]},
            TypeError,
            r"merge: expected new names with lists of node names, got \['fc', 'norm'\]",
        ),
        ({"merge": {"": ["fc", "norm"]}}, TypeError, "merge: expected new names with lists of node names"),
    ],
)
def test_bad_skip_and_merge(arguments, error, message):
    with pytest.raises(error, match=message):
        Hierarchy.from_model(toy(), **arguments)
