"""`MultiTask`: the trained parameters of an HSAID, of the current task and of the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.hierarchy import Partition
from hsaid_kernels.wrapper.state import Saved
from hsaid_kernels.wrapper.tasks import groups_of


class MultiTask(Saved):
    """Tasks of a class with the attributes of `HSAID`.

    Each thread has a current task: the one that it set last, by `set_task` or `use_task`, or, of a thread that has set
    none, the one that any thread set last by `set_task`.
    """

    plan: Plan
    partition: Partition

    @property
    def task(self) -> str:
        """The name of the current task, to which `theta`, `multipliers` and `full` belong."""
        return self._tasks.current

    @property
    def theta(self) -> nn.Parameter:
        """float32 [d - m], initially zeros: the parameter of the current task."""
        return self._trained("theta")

    @property
    def multipliers(self) -> nn.Parameter:
        """float32 [m], initially ones: the parameter of the current task."""
        return self._trained("multipliers")

    def _trained(self, key: str) -> nn.Parameter:
        parameter = self._tasks.now()[key]
        assert parameter is not None
        return parameter

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._tasks.now().items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_registered(f"{name}: expected it to be set")
        super().register_parameter(name, param)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they were added."""
        return self._tasks.names

    @property
    def full(self) -> dict[str, nn.Parameter]:
        """{name: parameter} for the tensors that are trained fully in the current task."""
        return self._tasks.full_now()

    def parameter_groups(
        self,
        *,
        lr_theta: float | str | None = "auto",
        lr_multipliers: float | str | None = "auto",
        lr_full: float | str | None = "auto",
        weight_decay: float | None = None,
        task: str | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: "theta", "multipliers" and "full", in this order, empty groups omitted.

        Args:
            lr_theta, lr_multipliers, lr_full: learning rate of each group. "auto" is a rate that learns with AdamW and
                its like: 0.05 for theta and the multipliers (0.01 with normalize="tensor"), 0.005 for `full`; see
                docs/integration.md. None leaves the rate to the optimizer.
            weight_decay: of theta and the fully trained tensors. None leaves it to the optimizer. The multipliers
                always get 0, because weight decay would pull them towards 0 and their neutral value is 1.
            task: the task whose parameters are grouped. None means the current task.

        Raises ValueError for an unknown task and for a rate that is a string but not "auto".
        """
        rates = {"theta": lr_theta, "multipliers": lr_multipliers, "full": lr_full}
        return groups_of(self._tasks.parameters_of(task), rates, weight_decay, self.plan.normalize)

    def add_task(self, name: str) -> None:
        """Adds a task: a separate theta, multipliers and `full` with their initial values, on the same W0 and basis.

        The current task does not change. Use one optimizer per task: it keeps the parameters of the task it was created
        for, also while another task is current.

        Raises TypeError if name is not a non-empty string, ValueError if the task exists, RuntimeError while merged in
        place and after `unwrap()`.
        """
        self._projected.check_on_w0("add_task()")
        self._new_task(name)

    def set_task(self, name: str) -> None:
        """Makes `name` the current task, which `theta`, `multipliers`, `full`, `parameters()` and all calls refer to.

        `state_dict()` too is that of the current task, and the buffers that training changed. Set the task before
        wrapping this module in DistributedDataParallel, which keeps the parameters it finds at construction.

        Other threads that have set a task of their own keep it. So threads can serve different tasks at the same time,
        unless training changed buffers of the model (BatchNorm's statistics), which they share: a call then raises
        RuntimeError.

        Raises ValueError for an unknown task, RuntimeError while merged in place, after `unwrap()`, and inside a call
        of the HSAID, which runs on one theta.
        """
        self._tasks.check(name)
        self._projected.check_on_w0("set_task()")
        self._projected.check_outside("set_task()")
        with self._projected.lock:
            changed, others = self._projected.buffers.changed(self.model), self._buffers_of.get(name, {})
            if (changed or others) and name != self._tasks.registered and self._projected.runs_elsewhere():
                raise RuntimeError(
                    "set_task(): expected no other thread inside a call, because training has changed buffers of the "
                    "model, which threads share, got one: run one task at a time"
                )
            self._buffers_of[self._tasks.registered] = changed
            self._tasks.switch(name)
            self._projected.buffers.put(self.model, self._buffers_of.pop(name, {}))

    @contextlib.contextmanager
    def use_task(self, name: str) -> Iterator[None]:
        """A context manager for the time of which `name` is the current task, in this thread or coroutine only.

        Parameters registered in this module, which DistributedDataParallel and torch.compile see, stay those of
        `set_task`. Raises as `set_task` does.
        """
        self._tasks.check(name)
        self._projected.check_on_w0("use_task()")
        self._projected.check_outside("use_task()")
        with self._tasks.using(name):
            yield
            if self.task != name:
                raise RuntimeError(
                    f"use_task(): expected {name!r} to be the current task until the end, got {self.task!r}: leave it "
                    "before set_task() or an earlier use_task() ends, and do not yield inside of it"
                )

    def remove_task(self, name: str) -> None:
        """Deletes a task and its parameters. Raises ValueError for the current task and for an unknown one."""
        self._tasks.remove(name)
        self._agreed.discard(name)
        self._buffers_of.pop(name, None)

    def _new_task(self, name: str) -> None:
        """Creates the parameters of a new task with their initial values."""
        own = self._projected.own()
        device = own[self.plan.names[0]].device
        theta = torch.zeros(self.plan.dim, dtype=torch.float32, device=device)
        ones = self.partition.initial().to(device)
        # DID has no multipliers, so this parameter is empty and gets no gradient. requires_grad=False keeps
        # DistributedDataParallel from waiting for one.
        parameters = {"theta": nn.Parameter(theta), "multipliers": nn.Parameter(ones, requires_grad=len(ones) > 0)}
        self._tasks.add(name, parameters, own)
