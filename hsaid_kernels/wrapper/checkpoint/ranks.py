"""Whether all ranks of a distributed run mean the same: torch's parallel wrappers broadcast neither basis nor W0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsaid_kernels.wrapper.checkpoint.configuration import SHAPES, Config, bytes_of
from hsaid_kernels.wrapper.w0.checks import differences
from hsaid_kernels.wrapper.w0.fsdp2 import Ranks, whole_ones


def check_ranks(configs: Sequence[Config]) -> None:
    """Raises ValueError unless all ranks of a distributed run have the same configuration and W0 (by "w0_checks")."""
    for key, first in configs[0].items():
        other = [rank for rank, config in enumerate(configs) if config[key] != first]
        if other and key == "w0_checks":
            pairs = zip(first.split(), configs[other[0]][key].split(), configs[0]["tensors"], strict=True)
            name = next(name for one, two, name in pairs if one != two)
            raise ValueError(
                f"model: expected the same W0 on all ranks, but {name!r} on rank {other[0]} is not that of rank 0: "
                "load the same weights, and call torch.manual_seed(...) with the same seed before making new ones"
            )
        if other and key in SHAPES:
            reason = differences(first, configs[other[0]][key]) or "they are in another order"
            raise ValueError(f"model: expected the same tensors on all ranks, got others on rank {other[0]}: {reason}")
        if other and key == "shards":
            second = configs[other[0]][key]
            name = next(name for name in first if second.get(name) != first[name])
            got = f"{first[name]} on rank 0, {second.get(name)} on rank {other[0]}"
            raise ValueError(f"model: expected the same shards on all ranks, got {name!r} as {got}")
        if other and key == "values":
            raise ValueError(
                f"theta: expected the same values on all ranks, got others on rank {other[0]}: load checkpoints on all "
                "ranks"
            )
        if other:
            got = ", ".join(f"{config[key]!r} on rank {rank}" for rank, config in enumerate(configs))
            raise ValueError(f"{key}: expected the same on all ranks, got {got}")


def check_active_ranks(config: Callable[[], Config], modules: Collection[nn.Module]) -> bool:
    """Checks the ranks if DistributedDataParallel is currently running one of `modules`; returns whether it is.

    `config` gives this rank's configuration. Raises ValueError as `check_ranks`. All ranks must call this, because it
    gathers their configurations.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not set(modules) & set(ddp.module.modules()):
        return False
    found: list[Config] = [{}] * dist.get_world_size(ddp.process_group)
    dist.all_gather_object(found, config(), ddp.process_group)
    check_ranks(found)
    return True


def check_sharded_ranks(
    config: Config, trained: Iterable[tuple[str, nn.Parameter]], ranks: Ranks, parameters: Mapping[str, Tensor]
) -> None:
    """Checks that all ranks of a sharded model have the same configuration, W0, shards, and values to train.

    `config` is this rank's configuration, `trained` are the named parameters of its HSAID, `parameters` those of the
    model. Raises ValueError as `check_ranks` does. All ranks must call this.
    """
    every = [p.detach().clone().cpu() for p in whole_ones(trained).values()]
    values = [hashlib.blake2b(bytes_of(value), digest_size=8).hexdigest() for value in every]
    layout = {name: str(getattr(p, "placements", "whole")) for name, p in parameters.items()}
    found = [(dist.get_rank(), config | {"shards": layout, "values": values})]
    for group in ranks.groups:  # after the last one, every rank has those of all
        gathered: list[list[tuple[int, Config]]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group)
        found = [one for some in gathered for one in some]
    check_ranks([config for _, config in sorted(found, key=lambda one: one[0])])
