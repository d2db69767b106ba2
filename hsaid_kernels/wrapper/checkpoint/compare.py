"""Checks that a configuration agrees with an HSAID in basis, tensors and W0, and that all ranks of a run agree."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsaid_kernels.wrapper.checkpoint.configuration import (
    BASIS,
    SHAPES,
    Config,
    Described,
    Shapes,
    bytes_of,
    decode_state,
    describe,
)
from hsaid_kernels.wrapper.w0.fsdp2 import Ranks, is_sharded


def differences(expected: Shapes, got: Shapes, at_most: int = 3) -> str:
    """Lists the first `at_most` differences between two {name: shape} for an error message; "" if there are none."""
    found = []
    for name, shape in expected.items():
        if name not in got:
            found.append(f"{name!r} of shape {tuple(shape)} is missing")
        elif tuple(got[name]) != tuple(shape):
            found.append(f"{name!r} has shape {tuple(got[name])} in place of {tuple(shape)}")
    found += [f"{name!r} of shape {tuple(shape)} is unexpected" for name, shape in got.items() if name not in expected]
    more = [f"{len(found) - at_most} more"] if len(found) > at_most else []
    return ", ".join([*found[:at_most], *more])


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(config: Config, got: Mapping[str, Shapes]) -> None:
    """Raises ValueError if names, shapes or order of the tensors in `got` differ from the configuration's.

    `got` is {"tensors": projected, "full": fully trained}, each {name: shape}.
    """
    for key, what in {"tensors": "trained", "full": "trained fully"}.items():
        expected, found = config[key], got[key]
        if list(expected.items()) != list(found.items()):  # the order matters too: it determines the multipliers' order
            reason = differences(expected, found) or "they are in another order"
            raise ValueError(f"model: expected the {len(expected)} tensors that were {what}, got others: {reason}")


def check_config(where: str, config: Config, hsaid: Described) -> None:
    """Raises ValueError if the configuration's basis or tensors differ from the HSAID's; warns if its W0 differs.

    Error messages begin with `where`.
    """
    own = describe(hsaid)
    for key in BASIS:
        if config[key] != own[key]:
            # These two are rarely given, and what they are by default has changed.
            changed = key in ("width", "padding_rows")
            hint = f": wrap the model with {key}={config[key]} for that" if changed else ""
            raise ValueError(f"{where}: expected {key} {own[key]!r}, as in this HSAID, got {config[key]!r}{hint}")
    check_tensors(config, own)
    check_w0(config, hsaid)


def check_state(state: Tensor, hsaid: Described) -> None:
    """Raises ValueError if an encoded configuration (`encode_state`) differs in its task, basis or tensors.

    Warns if its W0 differs.
    """
    config = decode_state(state)
    if config["task"] != hsaid.task:
        raise ValueError(f"state_dict: expected task {hsaid.task!r}, which is set, got {config['task']!r}")
    check_config("state_dict", config, hsaid)


def check_w0(config: Config, hsaid: Described) -> None:
    """Warns if the W0 of some tensors is not the W0 of the configuration, from which theta was trained."""
    pairs = zip(config["w0_checks"].split(), hsaid.w0_checks().split(), config["tensors"], strict=True)
    if other := [name for saved, own, name in pairs if saved != own]:
        names = ", ".join(map(repr, other[:3])) + (", ..." if len(other) > 3 else "")
        warnings.warn(
            f"model: W0 is not what was trained from in {len(other)} of {len(config['tensors'])} tensors ({names}), so "
            "their weights will not be the trained ones",
            stacklevel=4,
        )


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


def check_active_ranks(hsaid: Described, modules: Collection[nn.Module]) -> bool:
    """Checks the ranks if DistributedDataParallel is currently running one of `modules`; returns whether it is.

    Raises ValueError as `check_ranks` does. All ranks must call this, because it gathers their configurations.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not set(modules) & set(ddp.module.modules()):
        return False
    found: list[Config] = [{}] * dist.get_world_size(ddp.process_group)
    dist.all_gather_object(found, describe(hsaid), ddp.process_group)
    check_ranks(found)
    return True


def check_sharded_ranks(hsaid: Described, ranks: Ranks, parameters: Mapping[str, Tensor]) -> None:
    """Checks that all ranks of a sharded model have the same configuration, W0, shards, and values to train.

    `parameters` are those of the model. Raises ValueError as `check_ranks` does. All ranks must call this.
    """
    trained = {name: p for name, p in hsaid.named_parameters() if not is_sharded(p)}
    values = [hashlib.blake2b(bytes_of(p.detach().clone().cpu()), digest_size=8).hexdigest() for p in trained.values()]
    layout = {name: str(getattr(p, "placements", "whole")) for name, p in parameters.items()}
    found = [(dist.get_rank(), describe(hsaid) | {"shards": layout, "values": values})]
    for group in ranks.groups:  # after the last one, every rank has those of all
        gathered: list[list[tuple[int, Config]]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group)
        found = [one for some in gathered for one in some]
    check_ranks([config for _, config in sorted(found, key=lambda one: one[0])])
