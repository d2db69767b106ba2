"""What an HSAID trains: theta, multipliers and the tensors that are trained fully, one set of them for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

FULL = "full/"  # before the name of a tensor that is trained fully; a parameter's name cannot have dots in it

Own = dict[str, nn.Parameter | None]  # a module's own parameters, `module._parameters`


class Tasks:
    """The parameters of all tasks by name. Those of the current one are also the module's own, where an optimizer,
    DistributedDataParallel and state_dict() look; each method that changes these is given them.

    full  names of the tensors that are trained fully
    """

    def __init__(self, first: str, full: Sequence[str]):
        self.current, self.full = first, tuple(full)
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    def check(self, name: str) -> str:
        """ValueError for a task that is not there."""
        if check_task(name) not in self._parameters:
            raise ValueError(f"task: expected one of {', '.join(map(repr, self._parameters))}, got {name!r}")
        return name

    def full_of(self, own: Own) -> dict[str, nn.Parameter]:
        """{name: parameter} of the tensors that are trained fully, in the current task."""
        present = _present(own)
        return {name: present[_key(name)] for name in self.full}

    def parameters_of(self, name: str | None, own: Own) -> dict[str, nn.Parameter]:
        """Those of a task, or of the current one for None."""
        return _present(own) if name is None or name == self.current else self._parameters[self.check(name)]

    def add(self, name: str, own: Own) -> None:
        """Leaves the current task for a new one, which `start` gives parameters."""
        if check_task(name) in self._parameters:
            raise ValueError(f"name: expected a new task, got {name!r}, which is there already")
        self._parameters[self.current] = _present(own)

    def start(
        self, name: str, parameters: Mapping[str, nn.Parameter], w0: Mapping[str, nn.Parameter], own: Own
    ) -> None:
        """Makes these parameters, and copies of W0 for those trained fully, the module's own and those of the task."""
        # Not by assignment or registration, where the model may have something of that name.
        own.update(parameters)
        own.update({_key(full): nn.Parameter(w0[full].detach().clone()) for full in self.full})
        self.current = name
        self._parameters[name] = _present(own)

    def switch(self, name: str, own: Own) -> None:
        """Makes the parameters of a task the module's own."""
        self._parameters[self.current] = _present(own)
        own.update(self._parameters[name])
        self.current = name

    def remove(self, name: str) -> None:
        """Forgets a task that is not the current one."""
        if self.check(name) == self.current:
            raise ValueError(f"name: expected a task that is not set, got {name!r}: set_task() another one first")
        del self._parameters[name]


def groups_of(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float | None], weight_decay: float | None
) -> list[dict[str, Any]]:
    """Groups for an optimizer, as `HSAID.parameter_groups` says."""
    groups = []
    for name, lr in rates.items():
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


def _key(name: str) -> str:
    """The name as a parameter of HSAID's."""
    return FULL + name.replace(".", "/")
