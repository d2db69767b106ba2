"""H-SAID by heads: what is pruned stays, masks, checkpoints, backends, importance."""

import copy
import json

import pytest
import torch
from few_bits import quantized
from helpers import assert_same_bits
from models import BACKENDS, IDS, bert, family, moved, same, snapshot
from tiny import tiny_model
from torch import nn

from hsaid_kernels.heads import head_importance, head_slices, prune_heads, pruned_heads, remove_heads
from hsaid_kernels.wrapper import heads
from hsaid_kernels.wrapper.checkpoint import files as checkpoint
from hsaid_kernels.wrapper.hsaid import HSAID


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
    own = snapshot(model)
    hsaid = HSAID(model, 300, partition, backend=backend)
    steps(hsaid)
    weights = hsaid.weights()
    for head in (0, 1):
        for piece in head_slices(model, 0, head):
            now, before = (source[piece.name][piece.slices] for source in (weights, own))
            assert torch.equal(now, before) == (head == 1), piece  # W0 itself, masked or zero; the other one moves
    merged = hsaid.merge().eval()
    assert pruned_heads(merged) == {"bert.encoder.layer.0.attention.self": [1]}
    hsaid.eval()
    assert_same_bits(merged(IDS).logits, hsaid(IDS).logits)
    assert same(own, snapshot(model))


def test_a_masked_model_is_left_as_it_was():
    model = prune_heads(bert(), {0: [1]})
    query = model.bert.encoder.layer[0].attention.self.query
    before, masked = snapshot(model), query.weight
    hsaid = HSAID(model, 300)
    steps(hsaid)
    assert query.__dict__["weight"] is masked  # what the mask made of W0, too, which torch leaves in the module
    assert same(before, snapshot(model))
    copy.deepcopy(hsaid)
    merged = hsaid.merge()
    assert torch.equal(merged.bert.encoder.layer[0].attention.self.query.weight[8:], torch.zeros(8, 16))
    in_place = hsaid.merge(inplace=True).eval()
    assert_same_bits(in_place(IDS).logits, merged.eval()(IDS).logits)
    assert torch.equal(query.weight, merged.bert.encoder.layer[0].attention.self.query.weight)
    hsaid.unmerge()
    assert same(before, snapshot(model))
    hsaid.unwrap()
    assert query.weight is masked


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
    assert model.bert.encoder.layer[0].attention.self.query.__dict__["weight"] is weight
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
    with pytest.raises(TypeError, match=r"pruned: expected \{layer: \[numbers\]\}, got list"):
        HSAID(model, 300, pruned=[0])
    with pytest.raises(TypeError, match=r"heads: expected True, False or None, got 'no'"):
        HSAID(model, 300, heads="no")
    with pytest.raises(ValueError, match=r"L5 is there with heads=True"):
        HSAID(copy.deepcopy(bert()), 300, "L1|L5", heads=False)
    plain = HSAID(bert(), 300)
    assert plain.pruned == {} and plain.hierarchy.levels == ("L1", "L2", "L3", "L4")


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama", "T5"])
def test_bands_have_the_same_bits_on_every_backend(name):
    """Weights after steps of the same gradients, through all backends for models on the CPU."""
    results = []
    for backend in BACKENDS:
        hsaid = HSAID(family(name), 400, "L1+L5|L3|L4", backend=backend)
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
    hsaid = moved(HSAID(model, 400, "L1+L2|L3|L4|L5", normalize="tensor").eval())
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


def test_importance_of_any_w0():
    """Several dtypes, weights that live while their block runs, quantized ones, and nothing to train."""
    torch.manual_seed(0)
    model = bert(num_hidden_layers=2)
    batch, query = dict(input_ids=IDS, labels=torch.tensor([0, 1])), "bert.encoder.layer.1.attention.self"
    hsaid = moved(HSAID(model, 400, heads=True).eval())
    state, (expected, of_query) = hsaid.state_dict(), (head_importance(hsaid, [batch]), None)
    of_query = expected[query]
    hsaid.requires_grad_(False)
    torch.testing.assert_close(head_importance(hsaid, [batch]), expected)
    assert not any(parameter.requires_grad for parameter in hsaid.parameters())
    hsaid.unwrap()
    block = HSAID(model, 400, heads=True, memory="block").eval()
    block.load_state_dict(state)
    torch.testing.assert_close(head_importance(block, [batch]), expected)
    block.unwrap()
    few = quantized(copy.deepcopy(model))
    over = HSAID(few, 400, heads=True, memory="block").eval()
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        over.load_state_dict(state)
    assert torch.allclose(head_importance(over, [batch])[query], of_query, rtol=0.2, atol=1e-3)
    model.bert.encoder.layer[0].bfloat16()
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(), *args[1:]))
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, out: out.float())
    several = HSAID(model, 400, heads=True).eval()
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        several.load_state_dict(state)
    assert torch.allclose(head_importance(several, [batch])[query], of_query, rtol=0.2, atol=1e-3)


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


def test_removed_model_trains_and_loads():
    torch.manual_seed(0)
    model = remove_heads(bert(num_attention_heads=4), {0: [2, 3]})
    layer = model.bert.encoder.layer[0].attention
    assert (layer.self.num_attention_heads, layer.self.all_head_size) == (2, 8)
    assert (layer.self.query.out_features, layer.output.dense.in_features) == (8, 8)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    hsaid = HSAID(model, 300, "L1+L5|L3|L4")
    steps(hsaid)
    hsaid.unwrap()
    fresh = remove_heads(bert(num_attention_heads=4), {0: [2, 3]})
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_heads_of_a_wrapped_model_stay():
    model = prune_heads(bert(num_attention_heads=4), {0: [2]})
    hsaid = HSAID(model, 300)
    before = snapshot(model)
    for call in (lambda: prune_heads(model, {0: [1]}), lambda: heads.remove(model), lambda: remove_heads(hsaid.model)):
        with pytest.raises(
            RuntimeError, match=r"expected a plain model, got one that an HSAID wraps: unwrap\(\) it first"
        ):
            call()
    assert same(before, snapshot(model))
    remove_heads(hsaid.unwrap())
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 3


def test_checkpoints_of_before_divide_as_before(tmp_path):
    """Longformer's heads own more than they did; what says nothing of it is of before."""
    model = tiny_model("longformer")
    old = moved(HSAID(copy.deepcopy(model), 400, "L1+L5|L3|L4", layouts=1))
    assert not any("_global" in piece.tensor and piece.label for piece in old.plan.pieces)
    expected = old.weights()
    old.save_pretrained(tmp_path / "old")
    assert "layouts" not in json.loads((tmp_path / "old" / checkpoint.CONFIG_FILE).read_text())
    again = HSAID.from_pretrained(tmp_path / "old", copy.deepcopy(model))
    assert again._basis.settings.layouts == 1 and same(again.weights(), expected)
    new = HSAID(copy.deepcopy(model), 400, "L1+L5|L3|L4")
    assert any("query_global" in piece.tensor and piece.label == "head.3" for piece in new.plan.pieces)
    with pytest.raises(ValueError, match=r"expected layouts 2, as in this HSAID, got 1: wrap the model with layouts=1"):
        new.load_task(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    assert HSAID.from_pretrained(tmp_path / "new", copy.deepcopy(model))._basis.settings.layouts == 2
    assert HSAID(bert(), 300, "L1+L5|L3|L4")._basis.settings.layouts == 1  # which divides as ever
    with pytest.raises(ValueError, match=r"layouts: expected an integer from 1 to 2, got 3"):
        HSAID(bert(), 300, layouts=3)
