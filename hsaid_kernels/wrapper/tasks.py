"""The trained parameters of an HSAID: for each task theta, the multipliers and the fully trained tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hsaid_kernels.wrapper.quantized import whole

# Prefix of the parameter name of a fully trained tensor. Parameter names cannot contain dots, so these become slashes.
FULL = "full/"
# Learning rates for AdamW that learn: of theta and the multipliers by `normalize`, and of fully trained tensors
# (docs/integration.md).
RATES = {"global": 0.05, "tensor": 0.01, "full": 0.005}

Own = dict[str, nn.Parameter | None]  # `module._parameters`


class Tasks:
    """The parameters of all tasks, by task name.

    The parameters of the current task are also registered in the HSAID module, where `parameters()`, `state_dict()`
    and DistributedDataParallel find them. Methods that read or change these take them as `own`, the module's
    `_parameters`.

    current  name of the current task
    full     names of the fully trained tensors
    """

    def __init__(self, first: str, full: Sequence[str]):
        self.current, self.full = first, tuple(full)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    def check(self, name: str) -> str:
        """Returns `name`. Raises ValueError if there is no such task, TypeError if it is not a non-empty string."""
        if check_task(name) not in self._parameters:
            raise ValueError(f"task: expected one of {', '.join(map(repr, self._parameters))}, got {name!r}")
        return name

    def full_of(self, own: Own) -> dict[str, nn.Parameter]:
        """{name: parameter} for the fully trained tensors of the current task."""
        present = _present(own)
        return {name: present[key_of(name)] for name in self.full}

    def parameters_of(self, name: str | None, own: Own) -> dict[str, nn.Parameter]:
        """{name: parameter} of a task. `name=None` means the current task. Raises as `check` does."""
        return _present(own) if name is None or name == self.current else self._parameters[self.check(name)]

    def add(self, name: str, parameters: Mapping[str, nn.Parameter], w0: Mapping[str, nn.Parameter], own: Own) -> None:
        """Creates task `name` from `parameters` and copies of W0 for the fully trained tensors.

        The current task stays, also for other threads; only the first one becomes the module's at once. Raises
        ValueError if the task already exists, TypeError if `name` is not a non-empty string.
        """
        if check_task(name) in self._parameters:
            raise ValueError(f"name: expected a new task, got {name!r}, which is there already")
        full = {key_of(tensor): nn.Parameter(whole(w0[tensor].detach()).clone()) for tensor in self.full}
        self._parameters[name] = {**parameters, **full}
        if name == self.current:
            # Written into the dict directly. Attribute assignment and register_parameter() would clash with an
            # attribute of the same name in the model.
            own.update(self._parameters[name])

    def others(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of the tasks that are not set."""
        return [parameters for name, parameters in self._parameters.items() if name != self.current]

    def switch(self, name: str, own: Own) -> None:
        """Makes `name`, which must exist, the current task: its parameters become the module's."""
        self._parameters[self.current] = _present(own)
        own.update(self._parameters[name])
        self.current = name

    def remove(self, name: str) -> None:
        """Deletes a task. Raises ValueError for the current task and for an unknown one."""
        if self.check(name) == self.current:
            raise ValueError(f"name: expected a task that is not set, got {name!r}: set_task() another one first")
        del self._parameters[name]


def groups_of(
    parameters: Mapping[str, nn.Parameter],
    rates: Mapping[str, float | str | None],
    weight_decay: float | None,
    normalize: str,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, see `HSAID.parameter_groups`. `rates` is {group: learning rate}."""
    groups = []
    for name, rate in rates.items():
        if isinstance(rate, str) and rate != "auto":
            raise ValueError(f"lr_{name}: expected a number, 'auto' or None, got {rate!r}")
        lr = RATES["full" if name == "full" else normalize] if rate == "auto" else rate
        chosen = [p for key, p in parameters.items() if key == name or (name == "full" and key.startswith(FULL))]
        if any(p.numel() for p in chosen):
            given = {"lr": lr, "weight_decay": 0.0 if name == "multipliers" else weight_decay}
            group = {"name": name, "params": chosen}
            groups.append(group | {key: value for key, value in given.items() if value is not None})
    return groups


def check_task(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"task: expected a name, got {name!r}")
    return name


def _present(parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in parameters.items() if parameter is not None}


def key_of(name: str) -> str:
    """The name under which the HSAID module registers the fully trained tensor `name`."""
    return FULL + name.replace(".", "/")
