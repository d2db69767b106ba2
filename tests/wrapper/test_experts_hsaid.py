"""An HSAID with a factor for each expert, and experts that are pruned."""

import copy

import pytest
import torch
from models import moved, same
from tiny import tiny_model

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper.experts import pruned_experts

EXPERTS = "layers.1.mlp.experts"


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


@pytest.fixture
def pruned(mixtral):
    model = copy.deepcopy(mixtral)
    with torch.no_grad():
        for parameter in model.get_submodule(EXPERTS).parameters(recurse=False):
            parameter[[1, 3]] = 0
    return model


def test_a_multiplier_reaches_one_expert(mixtral):
    hsaid = HSAID(copy.deepcopy(mixtral), 400, "L1+L6|L3|L4")
    assert hsaid.hierarchy.levels[-1] == "L6"
    moved(hsaid)
    before = {name: weight.clone() for name, weight in hsaid.weights().items()}
    with torch.no_grad():
        hsaid.multipliers[hsaid.partition.components[0].paths.index(("layers.1", "expert.2"))] += 1
    after = hsaid.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for name in changed:
        assert [torch.equal(a, b) for a, b in zip(before[name], after[name])] == [True, True, False, True]


@pytest.mark.parametrize("partition", ["L1+L2|L3|L4", "L1+L6|L3|L4"])
def test_pruned_experts_stay_zero(pruned, partition, tmp_path):
    assert pruned_experts(pruned) == {EXPERTS: [1, 3]}
    hsaid = moved(HSAID(copy.deepcopy(pruned), 400, partition))
    assert hsaid.pruned == {EXPERTS: [1, 3]}
    weights = hsaid.weights()
    for key in ("gate_up_proj", "down_proj"):
        weight = weights[f"{EXPERTS}.{key}"]
        assert [bool(expert.any()) for expert in weight] == [True, False, True, False]
    hsaid.save_pretrained(tmp_path)
    again = HSAID.from_pretrained(tmp_path, copy.deepcopy(pruned))
    assert again.pruned == hsaid.pruned and same(again.weights(), weights)


def test_a_choice_of_pruned_experts(mixtral, pruned):
    assert pruned_experts(mixtral) == {}
    assert HSAID(copy.deepcopy(mixtral), 400).hierarchy.levels == ("L1", "L2", "L3", "L4")
    assert HSAID(copy.deepcopy(pruned), 400, pruned={}).hierarchy.levels == ("L1", "L2", "L3", "L4")
    both = HSAID(copy.deepcopy(mixtral), 400, pruned={EXPERTS: [2], 0: [1]})
    assert both.pruned == {"layers.0.self_attn": [1], EXPERTS: [2]}
    with pytest.raises(ValueError, match=r"experts: expected True or None where experts are pruned"):
        HSAID(pruned, 400, experts=False)
    with pytest.raises(ValueError, match=r"pruned\['layers.1.mlp.experts'\]: expected an integer from 0 to 3, got 4"):
        HSAID(mixtral, 400, pruned={EXPERTS: [4]})
    with pytest.raises(TypeError, match=r"pruned: expected a list of experts for 'layers.1.mlp.experts', got '1'"):
        HSAID(mixtral, 400, pruned={EXPERTS: "1"})
    with pytest.raises(TypeError, match=r"experts: expected True, False or None, got 'yes'"):
        HSAID(mixtral, 400, experts="yes")


def test_pruned_heads_of_experts_stay_zero():
    """JetMoE: a head's queries and outputs are a part of every expert."""
    hsaid = moved(HSAID(tiny_model("jetmoe", groups=2), 800, experts=True, pruned={0: [1]}))
    name = "layers.0.self_attention.experts.input_linear.weight"
    update = hsaid.weights()[name] - hsaid.w0()[name]
    assert update.shape[:2] == (4, 32) and not update[:, 16:].any() and (update[:, :16] != 0).all()
