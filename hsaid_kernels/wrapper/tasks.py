"""The trained parameters of an HSAID: for each task theta, the multipliers and the fully trained tensors."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hsaid_kernels.wrapper.isolation import runs_eagerly
from hsaid_kernels.wrapper.w0.values import value_of

# Prefix of the parameter name of a fully trained tensor. Parameter names cannot contain dots, so these become slashes.
FULL = "full/"
# Learning rates for AdamW that learn: of theta and the multipliers by `normalize`, and of fully trained tensors
# (docs/integration.md).
RATES = {"global": 0.05, "tensor": 0.01, "full": 0.005}

Own = dict[str, nn.Parameter | None]  # `module._parameters`


# {number of a `Tasks`: the task that this thread, or coroutine, has set}. Never changed, only replaced.
_SET: ContextVar[Mapping[int, str | None]] = ContextVar("hsaid_kernels.tasks", default={})  # noqa: B039
_numbers = itertools.count()


class Listener(Protocol):
    """What hears of steps that train other parameters. `weights.outside.Surroundings` implements it."""

    def others_stepped(self, parameters: Sequence[object]) -> None: ...


class Tasks:
    """The parameters of all tasks, by task name.

    Each thread, and each coroutine, has a current task: the one that it set last itself, or else the registered one.

    Args:
        first: the name of the first task.
        full: names of the fully trained tensors.
        own: `_parameters` of the HSAID, where `parameters()`, `state_dict()` and DistributedDataParallel find the
            parameters of the registered task.

    Attributes:
        registered: the name of the task that was set last, by any thread.
        threaded: whether threads have had different tasks.
        buffers: {task: {name: buffer of the model}} that training changed, of tasks that are not in the model.
        steps: how many steps optimizers have made that train theta or the multipliers of a task.
    """

    def __init__(self, first: str, full: Sequence[str], own: Own):
        self.registered, self.full, self.own = first, tuple(full), own
        self.threaded, self.steps = False, 0
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._start()

    def _start(self) -> None:
        self._number = next(_numbers)
        self._set_by: set[tuple[int, int]] = set()  # the threads and coroutines that have called `switch`
        self._others: weakref.ref[Any] | None = None
        _watch_optimizers()
        _every.add(self)

    def __getstate__(self) -> dict[str, Any]:
        if self.current != self.registered:
            raise RuntimeError(
                f"copy: expected the task of this thread, {self.current!r}, to be the one that was set last, got "
                f"{self.registered!r}: call set_task() in place of use_task()"
            )
        return {key: value for key, value in self.__dict__.items() if key not in ("_number", "_set_by", "_others")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    @property
    def current(self) -> str:
        """The name of this thread's task."""
        return self._own_task() or self.registered

    def _own_task(self) -> str | None:
        return _SET.get().get(self._number)

    def _set(self, name: str | None) -> None:
        _SET.set({**_SET.get(), self._number: name})

    def is_set(self) -> bool:
        """Whether this thread has set a task."""
        return self._own_task() is not None

    def now(self) -> Mapping[str, nn.Parameter | None]:
        """{key: parameter} of this thread's task. Raises RuntimeError if another thread has removed it."""
        name = self._own_task()
        if name is None or name == self.registered:
            return self.own
        if name not in self._parameters:
            raise RuntimeError(f"task: expected {name!r}, which this thread set, to be there still: set_task() another")
        if type(self.own["theta"]) is not nn.Parameter:  # put there by torch.func.functional_call
            raise RuntimeError(
                f"theta: expected to be given to the task that was set last, {self.registered!r}, got a call in a "
                f"thread with task {name!r}: call set_task() in place of use_task()"
            )
        return self._parameters[name]

    def trained(self) -> tuple[nn.Parameter, nn.Parameter]:
        """theta and the multipliers of this thread's task. Raises as `now`."""
        now = self.now()
        theta, multipliers = now["theta"], now["multipliers"]
        assert theta is not None and multipliers is not None
        return theta, multipliers

    def check(self, name: str) -> str:
        """Returns `name`. Raises ValueError if there is no such task, TypeError if it is not a non-empty string."""
        if check_task(name) not in self._parameters:
            raise ValueError(f"task: expected one of {', '.join(map(repr, self._parameters))}, got {name!r}")
        return name

    def full_now(self) -> dict[str, nn.Parameter]:
        """{name: parameter} for the fully trained tensors of this thread's task."""
        present = _present(self.now())
        return {name: present[key_of(name)] for name in self.full}

    def parameters_of(self, name: str | None) -> dict[str, nn.Parameter]:
        """{name: parameter} of a task. `name=None` means this thread's task. Raises as `check` does."""
        name = self.current if name is None else self.check(name)
        return _present(self.own) if name == self.registered else self._parameters[name]

    def add(self, name: str, parameters: Mapping[str, nn.Parameter], full: Mapping[str, Tensor]) -> None:
        """Creates task `name` from `parameters` and copies of `full`, W0 of the fully trained tensors.

        The current tasks stay; only the first one becomes the HSAID's at once. Raises ValueError if the task already
        exists, TypeError if `name` is not a non-empty string.
        """
        if check_task(name) in self._parameters:
            raise ValueError(f"name: expected a new task, got {name!r}, which is there already")
        copies = {key_of(tensor): nn.Parameter(full[tensor].clone()) for tensor in self.full}
        self._parameters[name] = {**parameters, **copies}
        if name == self.registered:
            # Written into the dict directly. Attribute assignment and register_parameter() would clash with an
            # attribute of the same name in the model.
            self.own.update(self._parameters[name])

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts a step if it trains theta or the multipliers of a task: a fused one increases no version."""
        every: list[Mapping[str, object]] = [self.own, *self._parameters.values()]
        trained = {id(own[key]) for own in every for key in ("theta", "multipliers") if key in own}
        changed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(parameter) in trained for parameter in changed):
            self.steps += 1
        elif self._others is not None and (others := self._others()) is not None:
            others.others_stepped(changed)

    def hear_others(self, listener: Listener) -> None:
        """Lets `listener` hear of steps that train other parameters, as long as it lives."""
        self._others = weakref.ref(listener)

    def have_moved(self) -> bool:
        """Whether theta of any task is not 0, and so moves the weights."""
        every: list[Mapping[str, Any]] = [self.own, *self.others()]
        return any(bool(value_of(own["theta"].detach()).any()) for own in every)

    def others(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of the tasks that are not registered."""
        return [parameters for name, parameters in self._parameters.items() if name != self.registered]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """As `nn.Module._apply` for all parameters; theta and the multipliers only move, and always stay float32."""
        every: list[Mapping[str, nn.Parameter | None]] = [self.own, *self.others()]
        for parameters in every:
            kept = [parameters["theta"], parameters["multipliers"]]
            held = nn.Module()
            held.__dict__["_parameters"] = parameters
            held._apply(functools.partial(_apply, fn, kept))

    def switch(self, name: str) -> None:
        """Makes `name`, which must exist, this thread's task and the registered one."""
        self._set_by.add(who := _who())
        self.threaded = self.threaded or (name != self.registered and self._set_by != {who})
        self._parameters[self.registered] = _present(self.own)
        self.own.update(self._parameters[name])
        self.registered = name
        self._set(name)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """For a time, `name`, which must exist, is this thread's task. The registered one stays."""
        before = self._own_task()
        self._set(name)
        self.threaded = self.threaded or name != self.registered
        try:
            yield
        finally:
            self._set(before)

    def remove(self, name: str) -> None:
        """Deletes a task. Raises ValueError for this thread's task, the registered one, and an unknown one."""
        if self.check(name) in (self.current, self.registered):
            raise ValueError(f"name: expected a task that is not set, got {name!r}: set_task() another one first")
        del self._parameters[name]
        self.buffers.pop(name, None)


def _apply(fn: Callable[[Tensor], Tensor], kept: Sequence[Tensor | None], tensor: Tensor) -> Tensor:
    keeps = any(own is not None and (tensor is own or tensor is own.grad) for own in kept)
    return tensor.to(fn(tensor).device) if keeps else fn(tensor)


def _who() -> tuple[int, int]:
    """The thread and the coroutine that run now."""
    asyncio = sys.modules.get("asyncio")
    running = None if asyncio is None or asyncio._get_running_loop() is None else asyncio.current_task()
    return threading.get_ident(), id(running)


_every: weakref.WeakSet[Tasks] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    hook: Callable[..., Any] = _on_step
    register_optimizer_step_post_hook(hook)


@runs_eagerly
def _on_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step counts versions
        return
    for tasks in list(_every):
        tasks.stepped(optimizer)


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
