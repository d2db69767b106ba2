"""Finds a model's experts: which values of which parameters belong to which expert of a mixture.

The experts of a layer are either modules of their own, in a list called "experts", or *fused*: one tensor has the
weights of all of them, one behind the other, such as [experts, outputs, inputs] (Mixtral, Qwen3-MoE, DeepSeek-V3),
[experts, inputs, outputs] (gpt-oss, Llama 4, Aria) or blocks of rows (DBRX). In all of these, expert e of E has the
e-th of E equal parts of the tensor.

The first layer of a gated expert computes gate and up together. They are told apart: as halves of the outputs, gate
first, or as every other output (gpt-oss). Routers and shared experts belong to no expert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from hsaid_kernels.fastfood.plan import Segment

COUNT = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
# (parameter that computes gate and up, parameter of the same experts that their product goes to)
GATED = (("gate_up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))
BLOCKS = ("DbrxExpertGLU",)  # classes whose experts are blocks of rows of matrices
SEPARATE = re.compile(r"(?P<list>(?:.*\.)?(?!shared)\w*experts)\.(?:expert_)?(?P<number>\d+)\..+")


@dataclass(frozen=True)
class Gated:
    """Where gate and up lie in the part of an expert: `rows` times `outputs` values, half of which are the gate's."""

    rows: int
    outputs: int
    alternating: bool


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    name      name of the module that holds them ("layers.0.mlp.experts")
    count     number of experts
    fused     the parameters that all experts share, with where gate and up lie in an expert's part, if it has both
    separate  {parameter: expert} of those that one expert has alone
    """

    name: str
    count: int
    fused: dict[str, Gated | None] = field(default_factory=dict)
    separate: dict[str, int] = field(default_factory=dict)

    def pieces(self, experts: Collection[int]) -> set[tuple[str, str]]:
        """(parameter, label) of what belongs to these experts; the label of a segment begins with it."""
        alone = {(tensor, "") for tensor, expert in self.separate.items() if expert in experts}
        return alone | {(tensor, f"expert.{expert}") for tensor in self.fused for expert in experts}

    def split(self, segment: Segment, numel: int) -> Iterator[tuple[Segment, int, str]]:
        """Yields (part, expert, "gate", "up" or "") for the parts of a segment of a fused tensor with `numel` values.

        The segment is the whole tensor or, with a label, the same part of each expert (that of a head).
        """
        size, gated = numel // self.count, self.fused[segment.tensor]
        for expert in range(self.count):
            label, start = f"expert.{expert}", expert * size
            if segment.label:
                rows = segment.rows // self.count
                part = replace(segment, offset=segment.offset + start, rows=rows, label=f"{label}/{segment.label}")
                yield part, expert, ""
            elif gated is None:
                yield Segment(segment.tensor, start, 1, size, size, label), expert, ""
            else:
                inner = size // (gated.rows * gated.outputs)  # values of an output that lie together
                repeats, cols = gated.rows, gated.outputs // 2 * inner
                if gated.alternating:
                    repeats, cols = gated.rows * gated.outputs // 2, inner
                for half, name in enumerate(("gate", "up")):
                    part = Segment(segment.tensor, start + half * cols, repeats, cols, 2 * cols, f"{label}/{name}")
                    yield part, expert, name


def find_experts(model: nn.Module) -> list[Experts]:
    """The experts of each layer of a model on any device, in the order of `model.named_modules()`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fused: dict[str, dict[str, tuple[str, nn.Parameter, nn.Module]]] = defaultdict(dict)
    separate: dict[str, dict[str, int]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in names}
        numbers = [n for key in COUNT if isinstance(n := getattr(module, key, None), int)] if own else []
        blocks = type(module).__name__ in BLOCKS
        if numbers and (blocks or any(p.dim() == 3 and len(p) == numbers[0] for p in own.values())):
            # Layers of all experts, each a module with a weight, belong together.
            holder, _, last = name.rpartition(".")
            holder, prefix = (holder, f"{last}.") if "weight" in own else (name, "")
            counts[holder] = numbers[0]
            for key, parameter in own.items():
                if len(parameter) == numbers[0] or (blocks and len(parameter) % numbers[0] == 0):
                    fused[holder][prefix + key] = (names[id(parameter)], parameter, module)
        for key, parameter in own.items():
            if found := SEPARATE.fullmatch(f"{name}.{key}"):
                separate[found["list"]][names[id(parameter)]] = int(found["number"])
    every = [Experts(name, counts[name], _gated(tensors)) for name, tensors in fused.items()]
    return every + [Experts(name, max(own.values()) + 1, separate=own) for name, own in separate.items()]


def _gated(own: Mapping[str, tuple[str, nn.Parameter, nn.Module]]) -> dict[str, Gated | None]:
    """{parameter: where gate and up lie, or None} for the fused parameters of a layer."""
    found: dict[str, Gated] = {}
    for first, second in GATED:
        if first in own and second in own and own[first][1].dim() == own[second][1].dim() == 3:
            (_, up, module), down = own[first], own[second][1]
            alternating = not getattr(module, "is_concatenated", True)
            if up.shape[1] == 2 * down.shape[2]:  # [experts, outputs, inputs]
                found[first] = Gated(1, up.shape[1], alternating)
            elif up.shape[2] == 2 * down.shape[1]:  # [experts, inputs, outputs]
                found[first] = Gated(up.shape[1], up.shape[2], alternating)
            bias = own.get(f"{first}_bias")
            if first in found and bias is not None:
                found[f"{first}_bias"] = Gated(1, bias[1].shape[1], alternating)
    return {tensor: found.get(key) for key, (tensor, _, _) in own.items()}
