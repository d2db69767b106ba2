"""Checkpoints of models whose tensors have other names by now: DINOv2 and Mixtral as transformers 4 had them."""

import ast
import copy
import re

import pytest
import torch
from models import moved
from tiny import tiny_model
from torch import nn

from hsaid_kernels import HSAID
from hsaid_kernels.wrapper import heads
from hsaid_kernels.wrapper.checkpoint.files import read_config


def tree(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


@pytest.fixture(scope="module")
def dinov2():
    return tiny_model("dinov2")


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


def old_dinov2(model: nn.Module) -> nn.Module:
    """The same weights under the names of transformers 4."""
    model = copy.deepcopy(model)
    for layer in model.encoder.layer:
        now, layer.attention = layer.attention, nn.Module()
        own = tree(query=now.q_proj, key=now.k_proj, value=now.v_proj)
        own.num_attention_heads = 4
        layer.attention.attention, layer.attention.output = own, tree(dense=now.o_proj)
        layer._modules = {key: layer._modules[key] for key in ("norm1", "attention", *list(layer._modules)[1:])}
    return model


def old_mixtral(model: nn.Module) -> nn.Module:
    """The same weights, with a module for each expert."""
    model = copy.deepcopy(model)

    def linear(weight):
        layer = nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight = nn.Parameter(weight.detach().clone())
        return layer

    for layer in model.layers:
        fused = layer.mlp.experts
        experts = nn.ModuleList(
            tree(w1=linear(up[: len(up) // 2]), w2=linear(down), w3=linear(up[len(up) // 2 :]))
            for up, down in zip(fused.gate_up_proj, fused.down_proj)
        )
        moe = tree(gate=layer.mlp.gate, experts=experts)
        layer._modules = {
            "block_sparse_moe" if key == "mlp" else key: moe if key == "mlp" else child
            for key, child in layer._modules.items()
        }
    return model


ROLES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
DINOV2 = {rf"(.*\.attention)\.{new}\.(\w+)": rf"\1.{old}.\2" for new, old in ROLES.items()}


def mixtral_names(name: str) -> str | list[str]:
    old = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith("experts.gate_up_proj"):
        return [f"{old.removesuffix('gate_up_proj')}{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")]
    if name.endswith("experts.down_proj"):
        return [f"{old.removesuffix('down_proj')}{e}.w2.weight" for e in range(4)]
    return old


def old_of(name: str) -> str:
    for pattern, replacement in DINOV2.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partition": "said"},
        {"partition": "L1+L5|L3|L4"},
        {"partition": "L1|L2|L3|L4", "train_fully": "query.bias|layernorm"},
        {"pruned": {1: [2]}, "exclude": "mask_token"},
    ],
    ids=str,
)
def test_renamed_tensors_keep_their_basis_and_multipliers(dinov2, tmp_path, options):
    hsaid = moved(HSAID(old_dinov2(dinov2), 800, **options))
    with torch.no_grad():
        for parameter in hsaid.full.values():
            parameter.add_(1)
    expected = hsaid.weights() | hsaid.full
    hsaid.save_pretrained(tmp_path / "old")
    again = HSAID.from_pretrained(tmp_path / "old", copy.deepcopy(dinov2), names=DINOV2)
    weights = again.weights() | again.full
    assert {old_of(name) for name in weights} == set(expected)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[old_of(name)]), name
    again.save_pretrained(tmp_path / "new")  # says the names
    third = HSAID.from_pretrained(tmp_path / "new", copy.deepcopy(dinov2))
    assert all(torch.equal(weight, weights[name]) for name, weight in (third.weights() | third.full).items())
    assert third.load_task(_as_task(third, tmp_path)) == "other"


def _as_task(hsaid: HSAID, folder) -> str:
    hsaid.add_task("other")
    with hsaid.use_task("other"):
        hsaid.save_pretrained(folder / "other")
    hsaid.remove_task("other")
    return str(folder / "other")


@pytest.mark.parametrize("partition", ["said", "L1+L2|L3|L4", "did"])
def test_fused_tensors_keep_the_bases_of_their_pieces(mixtral, tmp_path, partition):
    old = old_mixtral(mixtral)
    hsaid = moved(HSAID(old, 800, partition))
    expected = hsaid.merge()
    hsaid.save_pretrained(tmp_path / "old")
    again = HSAID.from_pretrained(tmp_path / "old", copy.deepcopy(mixtral), names=mixtral_names)
    assert _same_experts(again.merge(), expected)
    again.save_pretrained(tmp_path / "new")
    assert _same_experts(HSAID.from_pretrained(tmp_path / "new", copy.deepcopy(mixtral)).merge(), expected)
    with pytest.raises(ValueError, match=r"experts: expected False where tensors have been fused since, got 'layers.0"):
        HSAID(copy.deepcopy(mixtral), 800, experts=True, names=read_config(tmp_path / "new")["names"])


def _same_experts(new: nn.Module, old: nn.Module) -> bool:
    now, before = dict(new.named_parameters()), dict(old_mixtral(new).named_parameters())
    return len(now) < len(before) and all(torch.equal(value, before[name]) for name, value in old.named_parameters())


def test_the_refusal_proposes_the_names(dinov2, mixtral, tmp_path):
    hsaid = moved(HSAID(old_dinov2(dinov2), 800))
    expected = hsaid.weights()
    hsaid.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="If the library has renamed them, from_pretrained") as refusal:
        HSAID.from_pretrained(tmp_path, copy.deepcopy(dinov2))
    names = ast.literal_eval(str(refusal.value).rpartition("names=")[2])
    assert len(names) == 8  # for all layers together
    again = HSAID.from_pretrained(tmp_path, copy.deepcopy(dinov2), names=names)
    assert all(torch.equal(weight, expected[old_of(name)]) for name, weight in again.weights().items())
    HSAID(old_mixtral(mixtral), 800).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="If the library has renamed them") as refusal:  # but not which
        HSAID.from_pretrained(tmp_path, copy.deepcopy(mixtral))
    assert "names={'" not in str(refusal.value)


def test_another_w0_is_noticed(mixtral, tmp_path, recwarn):
    HSAID(old_mixtral(mixtral), 800).save_pretrained(tmp_path)
    HSAID.from_pretrained(tmp_path, copy.deepcopy(mixtral), names=mixtral_names)
    assert not [warning for warning in recwarn if "W0" in str(warning.message)]
    other = copy.deepcopy(mixtral)
    with torch.no_grad():
        other.layers[0].mlp.experts.gate_up_proj[2] += 1
    with pytest.warns(UserWarning, match=r"W0 is not what was trained from in 1 of .*gate_up_proj"):
        HSAID.from_pretrained(tmp_path, other, names=mixtral_names)


def test_what_does_not_fit_is_refused(dinov2, mixtral, tmp_path):
    HSAID(old_dinov2(dinov2), 800).save_pretrained(tmp_path)

    def load(names):
        return HSAID.from_pretrained(tmp_path, copy.deepcopy(dinov2), names=names)

    with pytest.raises(TypeError, match=r"names: expected \{new: old\} or a function from new to old, got int"):
        load(3)
    with pytest.raises(TypeError, match=r"names: expected a name or several for 'embeddings.cls_token', got 3"):
        load(lambda name: 3)
    with pytest.raises(ValueError, match=r"names: expected each of the \d+ tensors .* 'encoder.layer.0.attention.att"):
        load({})
    swapped = {**DINOV2, r"(.*)fc1\.weight": r"\1fc2.weight", r"(.*)fc2\.weight": r"\1fc1.weight"}
    with pytest.raises(
        ValueError, match=r"names: expected '.*fc1.weight' of shape \(256, 64\) to be '.*fc2.weight' of"
    ):
        load(swapped)


def test_pruned_heads_under_other_names(dinov2, tmp_path):
    hsaid = HSAID(old_dinov2(dinov2), 800, pruned={0: [3]})
    assert hsaid.pruned == {"encoder.layer.0.attention.attention": [3]}
    hsaid.save_pretrained(tmp_path)
    again = HSAID.from_pretrained(tmp_path, copy.deepcopy(dinov2), names=DINOV2)
    assert again.pruned == {"encoder.layer.0.attention": [3]}
    assert heads.pruned_heads(dinov2) == {}
