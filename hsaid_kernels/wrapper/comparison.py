"""Whether a configuration is that of an HSAID: its basis, tensors and W0; on one machine or on many ranks."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsaid_kernels.wrapper.configuration import (
    BASIS,
    SHAPES,
    Config,
    Described,
    Shapes,
    decode_state,
    describe,
    w0_checks,
)


def differences(expected: Shapes, got: Shapes, at_most: int = 3) -> str:
    """The first differences between two sets of names and shapes, in words; "" where there are none."""
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
    """Refuses (ValueError) tensors of other names, shapes or order than the configuration's."""
    for key, what in {"tensors": "trained", "full": "trained fully"}.items():
        expected, found = config[key], got[key]
        if list(expected.items()) != list(found.items()):  # the order too: it numbers the multipliers
            reason = differences(expected, found) or "they are in another order"
            raise ValueError(f"model: expected the {len(expected)} tensors that were {what}, got others: {reason}")


def check_config(where: str, config: Config, hsaid: Described) -> None:
    """Refuses a configuration of another basis or of other tensors than this HSAID's; warns of another W0."""
    own = describe(hsaid)
    for key in BASIS:
        if config[key] != own[key]:
            raise ValueError(f"{where}: expected {key} {own[key]!r}, as in this HSAID, got {config[key]!r}")
    check_tensors(config, own)
    check_w0(config, hsaid)


def check_state(state: Tensor, hsaid: Described) -> None:
    """Refuses (ValueError) an encoded configuration of another task, or by which the values mean other weights."""
    config = decode_state(state)
    if config["task"] != hsaid.task:
        raise ValueError(f"state_dict: expected task {hsaid.task!r}, which is set, got {config['task']!r}")
    check_config("state_dict", config, hsaid)


def check_w0(config: Config, hsaid: Described) -> None:
    """Warns of tensors whose W0 is not what was trained from."""
    pairs = zip(config["w0_checks"].split(), w0_checks(hsaid).split(), config["tensors"], strict=True)
    if other := [name for saved, own, name in pairs if saved != own]:
        names = ", ".join(map(repr, other[:3])) + (", ..." if len(other) > 3 else "")
        warnings.warn(
            f"model: W0 is not what was trained from in {len(other)} of {len(config['tensors'])} tensors ({names}), so "
            "their weights will not be the trained ones",
            stacklevel=4,
        )


def check_ranks(configs: Sequence[Config]) -> None:
    """Refuses (ValueError) ranks of a distributed run that do not have the same configuration and W0."""
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
        if other:
            got = ", ".join(f"{config[key]!r} on rank {rank}" for rank, config in enumerate(configs))
            raise ValueError(f"{key}: expected the same on all ranks, got {got}")


def check_active_ranks(hsaid: Described, modules: Collection[nn.Module]) -> bool:
    """Whether DistributedDataParallel is running one of the modules; ValueError for ranks that do not go together."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not set(modules) & set(ddp.module.modules()):
        return False
    found: list[Config] = [{}] * dist.get_world_size(ddp.process_group)
    dist.all_gather_object(found, describe(hsaid), ddp.process_group)
    check_ranks(found)
    return True
