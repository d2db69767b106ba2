"""`Made`: the projected weights of one theta, and what they were computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.ops import WEIGHT_DTYPES
from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.weight import Weight


class Group:
    """The tensors whose weights have the same dtype. They are made by one launch, into one buffer.

    whole   all of them, as a part of the plan
    parts   the same tensors, divided: one node of the autograd graph, and one call of the adjoint, for each
    """

    def __init__(self, whole: Part, parts: Sequence[Part], projection: Projection):
        self.whole, self.parts, self.projection = whole, parts, projection

    def scaled(self, partition: Partition, multipliers: Tensor) -> Tensor:
        """The factors of the group's segments, multiplied by the plan's scales."""
        factors, rows = partition.factors(multipliers), self.whole.rows_on(multipliers.device)
        return (factors if rows is None else factors[rows]) * self.whole.plan.scales_on(multipliers.device)


class Made:
    """Weights, and the tensors they were computed from, to notice when they are out of date.

    theta and the multipliers are compared by value too, because fused optimizers write to them without increasing
    torch's version counter. W0 is compared by address and version counter. References to these tensors are kept, so no
    new tensor can get the same address.

    weights   {name: weight} without a graph, or empty until one is asked for (`weight`)
    nodes     {name: weight} of the same values with a graph, made part by part when a weight of the part is first read;
              emptied before each call of the HSAID, because autograd runs the most recently made nodes first: a node
              made when its first block runs is reached as soon as backward has left that block
    tracked   whether torch counts the versions of all these tensors; it does not for inference tensors
    seen      names read from outside a call since everything was last compared
    """

    def __init__(
        self, theta: nn.Parameter, multipliers: nn.Parameter, w0: Mapping[str, nn.Parameter], groups: Sequence[Group]
    ):
        self.theta, self.multipliers, self.w0, self.groups = theta, multipliers, w0, groups
        self.tracked = not any(tensor.is_inference() for tensor in (theta, multipliers, *w0.values()))
        self.values = [tensor.detach().clone() for tensor in (theta, multipliers)]
        self.versions = [tensor._version if self.tracked else 0 for tensor in (theta, multipliers)]
        self.flats: list[Tensor] = []
        self.weights: dict[str, Weight] = {}
        self.seen: set[str] = set()
        self.forget_nodes()

    def forget_nodes(self) -> None:
        self.nodes: dict[str, Weight] = {}
        self.scaled: dict[Group, Tensor] = {}
        self.wanting = (self.theta.requires_grad, self.multipliers.requires_grad)
        self.wanted = any(self.wanting)

    def finish(self) -> None:
        """Notes what the weights are made of, once they are made."""
        self.written = self.flats[0]._version
        flats = {name: flat for group, flat in self._flats() for name in group.whole.plan.names}
        self.stamps = {
            name: (tensor, tensor.data_ptr(), tensor._version if self.tracked else 0, flats[name])
            for name, tensor in self.w0.items()
        }
        self.quick: dict[Any, Any] = {**self.stamps} if self.tracked else {}
        self.kept = [tensor.detach() for tensor in self.w0.values()]

    def _flats(self) -> Iterator[tuple[Group, Tensor]]:
        return zip(self.groups, self.flats, strict=True)

    def weight(self, name: str) -> Weight:
        """A weight without a graph. The first call makes those of all tensors, which a training step does not need."""
        if not self.weights:
            with torch.inference_mode(False), torch.no_grad(), undisturbed():
                made: dict[str, Weight] = {}
                for group, flat in self._flats():
                    made |= zip(group.whole.plan.names, map(Weight.of, group.whole.plan.views(flat)), strict=True)
            for own, weight in made.items():
                weight.w0 = self.w0[own]
            self.weights = made
        return self.weights[name]

    def has(self, values: list[Tensor]) -> bool:
        """Whether the weights were made from these values of theta and the multipliers."""
        return values is self.values or all(map(torch.equal, values, self.values))

    def equals(self, trained: Sequence[Tensor]) -> bool:
        """Whether theta and the multipliers still have the values that the weights were made from."""
        return all(map(torch.equal, self.values, trained))


class Scaled(torch.autograd.Function):
    """Multipliers [m] -> `Group.scaled`. Saves nothing that one backward would free.

    So the weights of now can be used by several forward passes, each with a backward of its own.
    """

    @staticmethod
    def forward(ctx, multipliers, group, partition):
        ctx.multipliers, ctx.version, ctx.group, ctx.partition = multipliers, version(multipliers), group, partition
        return group.scaled(partition, multipliers)

    @staticmethod
    def backward(ctx, grad):
        if version(ctx.multipliers) != ctx.version:
            raise RuntimeError(
                "the multipliers have been changed in place between forward and backward, which needs them unchanged"
            )
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            multipliers = ctx.multipliers if graph else ctx.multipliers.detach().requires_grad_()
            scaled = ctx.group.scaled(ctx.partition, multipliers)
            (found,) = torch.autograd.grad(scaled, multipliers, grad, create_graph=graph, allow_unused=True)
        return found, None, None


def version(tensor: Tensor) -> int | None:
    """The tensor's version counter; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def check_devices(w0: Mapping[str, Tensor], theta: Tensor) -> None:
    """Raises ValueError if W0 is not on theta's device."""
    if elsewhere := {tensor.device for tensor in w0.values()} - {theta.device}:
        raise ValueError(
            f"model: expected its tensors on {theta.device}, where theta is, got some on {elsewhere.pop()}: "
            "hsaid.to(device) moves both"
        )


def divide(
    plan: Plan, parts: Sequence[Sequence[str]], dtypes: Sequence[torch.dtype], given: torch.dtype | None, backend: str
) -> list[Group]:
    """The tensors of a plan by the dtype of their weights: `given`, or that of W0, one of `dtypes` for each tensor.

    Raises ValueError if W0 has a dtype other than `given` and float32, TypeError for a dtype that cannot be projected.
    """
    found = ", ".join(sorted(set(map(str, dtypes))))
    if not set(dtypes) <= set(WEIGHT_DTYPES):
        raise TypeError(f"model: expected tensors in float32, bfloat16 or float16, got {found}")
    if given is not None and not set(dtypes) <= {given, torch.float32}:
        raise ValueError(f"dtype: expected the dtype of the model's tensors ({found}) or None, got {given}")
    groups = []
    one = given is not None or len(set(dtypes)) == 1
    for dtype in dict.fromkeys(dtypes) if given is None else [given]:
        names = [name for name, own in zip(plan.names, dtypes, strict=True) if one or own == dtype]
        whole = Part(plan, None if one else names)
        chosen = [[name for name in part if name in whole.plan.shapes] for part in parts]
        own_parts = [Part(whole.plan, part) for part in chosen if part]
        groups.append(Group(whole, own_parts, Projection(whole.plan, dtype=dtype, backend=backend)))
    return groups


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context outside of the modes and transforms that are active here.

    Those of torch.func (vmap, jacrev, ...), for which the weights are constants, and those that see every operation, as
    selective activation checkpointing has.
    """
    with ExitStack() as stack:
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        yield
