"""What an HSAID trains: theta, multipliers and the tensors that are trained fully, one set of them for each task."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.exchange import Cache
from hsaid_kernels.wrapper.stand_in import StandIn

FULL = "full/"  # before the name of a tensor that is trained fully; a parameter's name cannot have dots in it


class Tasks(StandIn):
    """The part of `HSAID` that keeps the parameters of the tasks. Those of the set task are its own parameters."""

    theta: nn.Parameter
    multipliers: nn.Parameter
    plan: Plan
    partition: Partition
    task: str
    _lock: threading.RLock
    _cache: Cache | None
    _full_names: tuple[str, ...]
    _tasks: dict[str, dict[str, nn.Parameter]]  # those of the set one are replaced when it is left

    def _own(self) -> dict[str, nn.Parameter]:
        """The model's own parameters."""
        raise NotImplementedError

    def _refuse_merged(self, call: str) -> None:
        """Raises where the model holds the weights of one task."""
        raise NotImplementedError

    @property
    def full(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the tensors that are trained fully."""
        own = _present(self._parameters)
        return {name: own[_key(name)] for name in self._full_names}

    def parameter_groups(
        self,
        *,
        lr_theta: float | None = None,
        lr_multipliers: float | None = None,
        lr_full: float | None = None,
        weight_decay: float | None = None,
        task: str | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, of `task` or else the set one: "theta", "multipliers", "full", without empty ones.

        What is None is left to the optimizer, but the multipliers get no weight decay: it would draw them to 0, which
        is not where they start.
        """
        own = _present(self._parameters) if task is None or task == self.task else self._tasks[self._known(task)]
        rates = {"theta": lr_theta, "multipliers": lr_multipliers, "full": lr_full}
        groups = []
        for name, lr in rates.items():
            parameters = [p for key, p in own.items() if key == name or (name == "full" and key.startswith(FULL))]
            if any(p.numel() for p in parameters):
                decay = 0.0 if name == "multipliers" else weight_decay
                given = {"lr": lr, "weight_decay": decay}
                group = {"name": name, "params": parameters}
                groups.append(group | {key: value for key, value in given.items() if value is not None})
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they came."""
        return tuple(self._tasks)

    def add_task(self, name: str) -> None:
        """A further task on the same W0 and basis: theta, multipliers and `full` of its own, where training starts.

        The set task stays set. An optimizer is for the parameters of one task, whether that is set or not.
        """
        if check_task(name) in self._tasks:
            raise ValueError(f"name: expected a new task, got {name!r}, which is there already")
        with self._lock:
            self._refuse_merged("add_task()")
            before = self.task
            self._tasks[before] = _present(self._parameters)
            self.task = name
            self._start_task()
            self.set_task(before)

    def set_task(self, name: str) -> None:
        """From now on `theta`, `multipliers`, `full`, `parameters()`, `state_dict()` and all calls are this task's.

        Set a task before wrapping this module into DistributedDataParallel, which keeps the parameters that it found.
        """
        self._known(name)
        with self._lock:
            self._refuse_merged("set_task()")
            self._tasks[self.task] = _present(self._parameters)
            self._parameters.update(self._tasks[name])
            self.task = name
            self._cache = None

    def remove_task(self, name: str) -> None:
        """Forgets what a task has trained, unless it is the set one. An optimizer for it goes on with nothing."""
        if self._known(name) == self.task:
            raise ValueError(f"name: expected a task that is not set, got {name!r}: set_task() another one first")
        del self._tasks[name]

    def _start_task(self) -> None:
        """The parameters of `self.task`, where training starts."""
        own = self._own()
        device = own[self.plan.names[0]].device
        theta = torch.zeros(self.plan.dim, dtype=torch.float32, device=device)
        ones = self.partition.initial().to(device)
        # Not by assignment or registration, where the model may have something of that name. Without multipliers (DID)
        # no gradient reaches them: DistributedDataParallel must not wait for one.
        self._parameters["theta"] = nn.Parameter(theta)
        self._parameters["multipliers"] = nn.Parameter(ones, requires_grad=len(ones) > 0)
        for name in self._full_names:
            self._parameters[_key(name)] = nn.Parameter(own[name].detach().clone())
        self._tasks[self.task] = _present(self._parameters)

    def _known(self, task: str) -> str:
        if check_task(task) not in self._tasks:
            raise ValueError(f"task: expected one of {', '.join(map(repr, self._tasks))}, got {task!r}")
        return task


def check_task(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"task: expected a name, got {name!r}")
    return name


def _present(parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter]:
    return {key: parameter for key, parameter in parameters.items() if parameter is not None}


def _key(name: str) -> str:
    """The name as a parameter of HSAID's."""
    return FULL + name.replace(".", "/")
