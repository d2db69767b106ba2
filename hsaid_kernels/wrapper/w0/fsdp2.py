"""W0 in shards: models of which FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps a part on each rank.

FSDP2 gathers the parameters of a block before it runs, in forward and again in backward, and frees them afterwards.
Meanwhile the module holds an ordinary parameter in place of its shard, which is a DTensor. The weights of the block are
made from that one, so a sharded model needs memory="block". Gradients of weights never leave their rank: only those of
theta, the multipliers and the fully trained tensors are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.wrapper.callers import is_inside_module, module_of


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Of one in shards, all ranks must call this together."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def is_gathered(now: object, before: object) -> bool:
    """Whether `now` may be what FSDP2 has gathered from the shard `before`, and put in its place."""
    both = isinstance(now, nn.Parameter) and isinstance(before, nn.Parameter)
    return both and is_sharded(before) and not is_sharded(now) and now.shape == before.shape  # type: ignore


def is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def is_applied(*modules: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to one of these modules itself."""
    return any(map(is_fsdp, modules))


def is_read_by_fsdp2(parameter: Tensor, frame: FrameType) -> bool:
    """Whether FSDP2 itself looks for a shard that it has put into a module. `frame` is the reader's."""
    return is_sharded(parameter) and module_of(frame).startswith("torch.distributed.fsdp")


def check_gathered(name: str | None, parameter: Tensor) -> None:
    """Raises RuntimeError if a weight of a shard is read while no module runs: other ranks may not read it."""
    if is_sharded(parameter) and torch._C._current_graph_task_id() == -1 and not is_inside_module():
        raise RuntimeError(
            f"model: expected weights in shards to be read while the model runs, got a read of {name!r} elsewhere, "
            "which would wait for all ranks: call hsaid.weights() on all of them"
        )


def whole_ones(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Those of which each rank has all values."""
    return {name: parameter for name, parameter in parameters if not is_sharded(parameter)}


def owners_of(model: nn.Module, around: nn.Module | None) -> dict[str, nn.Module | None]:
    """{name: the module with which FSDP2 gathers the parameter}: the closest above it to which fully_shard was applied.

    That may be `around`, which holds the model; None if it is none of these.
    """
    outer = around if around is not None and is_fsdp(around) else None
    found: dict[str, nn.Module | None] = {}
    owners: dict[str, nn.Module | None] = {}
    for prefix, module in model.named_modules():
        above = found[prefix.rpartition(".")[0]] if prefix else outer
        found[prefix] = module if is_fsdp(module) else above
        for key in module._parameters:
            owners[f"{prefix}.{key}" if prefix else key] = found[prefix]
    return owners


def gathering_of(
    model: nn.Module, around: nn.Module | None, w0: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """What FSDP2 gathers at one time, and in which dtype, by its `MixedPrecisionPolicy`.

    Returns ({name: number, equal for what is gathered together}, {name: dtype}).
    """
    owners = owners_of(model, around)
    dtypes = {}
    for name, tensor in w0.items():
        state: Any = None if owners[name] is None or not is_sharded(tensor) else owners[name]._get_fsdp_state()  # type: ignore
        dtypes[name] = tensor.dtype if state is None else state._mp_policy.param_dtype or tensor.dtype
    return {name: id(owners[name]) for name in w0}, dtypes  # by number: these modules are not kept alive by it


class Ranks:
    """The ranks that have shards of the same model.

    Attributes:
        groups: process groups, one for each dimension of the device mesh: a sum over all of them is one over all ranks.
    """

    def __init__(self, shard: Tensor):
        self.mesh: Any = shard.device_mesh  # type: ignore[attr-defined]
        self.groups = self.mesh.get_all_groups()
        self._hooked = WeakTensorKeyDictionary()
        self._versions: dict[str, int] = {}

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Ranks | None:
        """Those that share these tensors; None if no tensor is sharded."""
        shard = next(filter(is_sharded, tensors), None)
        return None if shard is None else cls(shard)

    def average(self, *parameters: nn.Parameter) -> None:
        """Lets backward average the gradients of these parameters over all ranks, from now on."""
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._hooked:
                self._hooked[parameter] = parameter.register_hook(self._averaged)

    def averages(self, parameter: Tensor) -> bool:
        """Whether backward averages the gradient of this parameter, by a hook."""
        return parameter in self._hooked

    def check_unchanged(self, w0: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError if a shard of W0 has been written to.

        What a checkpoint says of W0 was computed when the model was wrapped, by all ranks together.
        """
        for name, tensor in w0.items():
            if is_sharded(tensor) and tensor._version != self._versions.setdefault(name, tensor._version):
                self._versions.clear()  # so that it is refused once
                raise RuntimeError(
                    f"model: expected W0 to stay as it is while the model is sharded, got {name!r} changed: load it "
                    "before HSAID wraps the model, or unwrap() it first"
                )

    def release(self) -> None:
        """Lets backward average nothing any more."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()

    def _averaged(self, grad: Tensor) -> Tensor:
        grad = grad.clone()
        for group in self.groups:
            torch.distributed.all_reduce(grad, group=group)
        return grad.div_(self.mesh.size())


def samples(tensor: Tensor, count: int) -> Tensor:
    """Up to `count` values of a tensor, evenly spaced, as float32. Of a shard: 0 where the value is on another rank."""
    size = tensor.numel()
    at = torch.arange(0, size, max(1, size // count))[:count]
    if not is_sharded(tensor):
        return tensor.detach().reshape(-1)[at.to(tensor.device)].float()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    dtensor: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, dtensor.device_mesh, dtensor.placements)
    own = local(tensor).detach()
    values = torch.zeros(len(at), dtype=torch.float32, device=own.device)
    places = torch.stack(torch.unravel_index(at, tensor.shape), -1) - torch.tensor(offset)
    here = ((places >= 0) & (places < torch.tensor(shape))).all(-1)
    if here.any():
        inside = tuple(places[here].to(own.device).unbind(-1))
        values[here.to(own.device)] = own[inside].float()
    return values


def sampled(tensors: Iterable[Tensor], count: int) -> list[Tensor]:
    """`samples` of each tensor, on the CPU. Of tensors in shards, all ranks must call this together."""
    found, sharded, ranks = [], [], None
    for tensor in tensors:
        found.append(samples(tensor, count))
        sharded.append(torch.full_like(found[-1], is_sharded(tensor), dtype=torch.bool))
        ranks = Ranks(tensor) if ranks is None and is_sharded(tensor) else ranks
    every = torch.cat(found)
    if ranks is not None:
        # Each value is on one of the ranks that share a tensor. As integers: a sum of floats would lose the sign of 0.
        summed = torch.where(torch.cat(sharded), every, 0.0).view(torch.int32)
        torch.distributed.all_reduce(summed, group=ranks.groups[-1])
        every = torch.where(torch.cat(sharded), summed.view(torch.float32), every)
    return list(every.cpu().split([len(values) for values in found]))
