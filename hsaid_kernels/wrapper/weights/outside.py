"""What runs around an HSAID: DistributedDataParallel, traces, pipelines, other models, what is handed hsaid.model.

Uses of its weights that could only train theta wrongly are refused.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.wrapper.callers import CALL_OF_MODULE, callers, module_of
from hsaid_kernels.wrapper.reads.hearing import Hearing
from hsaid_kernels.wrapper.reads.link import link_of
from hsaid_kernels.wrapper.tasks import Tasks
from hsaid_kernels.wrapper.w0.fsdp2 import check_gathered
from hsaid_kernels.wrapper.weights.attachment import Attachment

TRACED = "HSAID: expected a call, got tracing for an export: trace or export hsaid.merge()"

_around: tuple[weakref.ref[nn.Module], weakref.ref[nn.Module]] | None = None  # DDP, and an HSAID in it


def check_outside_of_calls(owner: nn.Module | None, trains: bool) -> None:
    """Raises RuntimeError for a read of a weight that no call of the HSAID `owner` contains, and that cannot be right.

    `trains` says whether theta or the multipliers require gradients.

    Inside of a trace it would be a constant. In a stage of a pipeline, or in DistributedDataParallel around a module
    without the HSAID, each rank would have a theta of its own.
    """
    if torch._C._get_tracing_state() is not None or _is_exporting():
        raise RuntimeError(TRACED)
    if not (trains and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and owner is not None and not _holds(ddp, owner):
        raise RuntimeError(
            "model: expected DistributedDataParallel around the HSAID, or a module that holds it, got it around a part "
            "of hsaid.model, where theta's gradient would not be averaged: hand over hsaid in the place of hsaid.model"
        )
    if any(module_of(frame).startswith("torch.distributed.pipelining") for frame in callers()):
        raise RuntimeError(
            "model: expected a model that each rank runs whole, got a part of hsaid.model as a stage of a pipeline "
            "(torch.distributed.pipelining), where each rank would have a part of theta's gradient: use FSDP2"
        )


def other_model(model: nn.Module, owner: nn.Module | None) -> tuple[nn.Module, FrameType] | None:
    """The module of another model that runs a part of `model` now, and its frame; None if that is not so.

    Not where the whole of `model` runs, or where the other one holds its HSAID, `owner`, too.
    """
    found = None
    for frame in callers():
        if frame.f_code is CALL_OF_MODULE:
            module = frame.f_locals["self"]
            if module is model or module is owner:
                return None
            if link_of(module) is None and not hasattr(type(module), "_hsaid_keys"):  # as slices of ours have
                found = module, frame
    return found if found is not None and (owner is None or owner not in set(found[0].modules())) else None


def warn_of_other_model(module: nn.Module, frame: FrameType, name: str | None) -> None:
    """Warns that `module`, which is not of the wrapped model, runs the weight `name` of it."""
    while frame.f_back is not None and module_of(frame) == "torch.nn.modules.module":
        frame = frame.f_back
    message = (
        f"model: {name!r} is a weight of the wrapped model, and a {type(module).__name__} that neither is a part of it "
        "nor holds the HSAID runs on it: on the projected weight, and its backward pass gives theta a gradient. Give "
        "it copies (copy.deepcopy of its modules before wrapping), or the HSAID as an attribute, if this is meant"
    )
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def _is_exporting() -> bool:
    if torch.compiler.is_exporting():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def _holds(ddp: nn.Module, owner: nn.Module) -> bool:
    global _around
    if _around is not None and _around[0]() is ddp and _around[1]() is owner:
        return True
    if owner not in set(ddp.modules()):
        return False
    _around = weakref.ref(ddp), weakref.ref(owner)
    return True


class ReducedOnce:
    """Sees to it that no gradient of theta reaches DistributedDataParallel after it has reduced theta's gradient.

    It reduces the first gradient that arrives. If that is from a backward pass inside of another, it is only a part,
    and the rest is left out silently.

    Attributes:
        applies: whether DistributedDataParallel was around the last call.
        reduces: whether it does so in the backward pass of the last call.
        at_end: whether it reduces at the end of backward, as with static_graph=True.
    """

    def __init__(self, tasks: Tasks):
        self.tasks = tasks
        self.applies = self.reduces = self.at_end = False
        self._ddp: Callable[[], nn.Module | None] = lambda: None
        # {parameter: (the optimizer's step in which its gradient has arrived last, whether by an inner pass)}
        self._arrived = WeakTensorKeyDictionary()
        self._theirs: set[int] = set()

    def __reduce__(self) -> Any:
        return ReducedOnce, (self.tasks,)  # a copy begins anew

    def counts(self, parameter: Tensor) -> bool:
        """Whether the parameter has a hook of this object."""
        return parameter in self._arrived

    def expect(self, owner: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """A part of the HSAID `owner` is called, which trains these parameters.

        Raises RuntimeError if DistributedDataParallel does not have them, because it was made with another task's.
        """
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not _holds(ddp, owner):
            self.applies = self.reduces = self.at_end = False
            self._ddp = lambda: None
            return
        self.applies = True
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self._ddp() is not ddp:
            self._ddp = weakref.ref(ddp)
            self._theirs = set(map(id, ddp._module_parameters))  # as it found them; ddp.parameters() are those of now
        if not all(id(parameter) in self._theirs for parameter in trained):
            raise RuntimeError(
                "task: expected the one whose parameters DistributedDataParallel has found when it was made, got "
                f"{owner.task!r}, whose gradients would not be averaged: set_task() before wrapping the HSAID in it"
            )
        self.at_end = ddp.static_graph
        self.reduces = ddp.require_backward_grad_sync and not self.at_end
        for parameter in trained:
            if parameter not in self._arrived:
                # torch holds the hook, where the garbage collector sees no circle
                parameter.register_post_accumulate_grad_hook(functools.partial(_count, weakref.ref(self)))
            self._arrived[parameter] = (-1, False)

    def _count(self, parameter: Tensor) -> None:
        if not self.reduces or self._ddp() is None:
            return
        (step, inner), again = self._arrived[parameter], _inside_backward(parameter)
        arrived = step == self.tasks.steps
        self._arrived[parameter] = self.tasks.steps, again or (arrived and inner)
        if arrived and (again or inner):
            raise RuntimeError(
                "theta: expected its gradient once in a step, because DistributedDataParallel reduces it when it first "
                "arrives, got another part of it later, from a backward pass inside of backward: checkpoint with "
                "use_reentrant=False, or take DistributedDataParallel(..., static_graph=True)"
            )


def _count(once: weakref.ref[ReducedOnce], parameter: Tensor) -> None:
    if (counting := once()) is not None:
        counting._count(parameter)


def _inside_backward(parameter: Tensor) -> bool:
    """Whether the backward pass that runs now runs inside of another one. The parameter is one that it has reached."""
    passes = sum(frame.f_code is _engine_run_backward.__code__ for frame in callers())
    return passes > (parameter.device.type == "cpu")  # a device's backward runs in a thread of its own


class Surroundings:
    """Watches what runs around an HSAID: DistributedDataParallel, other models, and code that takes W0 for theta.

    Attributes:
        reduced_once: whether DistributedDataParallel reduces theta's gradient.
        reached: at which step of an optimizer gradients have reached theta last.
    """

    def __init__(self, tasks: Tasks, attachment: Attachment):
        self.tasks, self.attachment = tasks, attachment
        self.reduced_once = ReducedOnce(tasks)
        self._start()

    def _start(self) -> None:
        self.reached: int | None = None
        self._hearing = Hearing()
        self._other_model = False  # whether one that runs parts of this model has been warned of
        self.tasks.hear_others(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "attachment": self.attachment, "reduced_once": self.reduced_once}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def check_read(self, name: str | None, parameter: nn.Parameter) -> None:
        """Raises RuntimeError for a read of the parameter `name`, outside of calls, that cannot be right."""
        attachment, owner = self.attachment, self.attachment.owner
        theta, multipliers = self.tasks.trained()
        trains = theta.requires_grad or multipliers.requires_grad
        check_outside_of_calls(owner, trains)
        if owner is not None and trains and torch._C._current_graph_task_id() == -1:
            self.reduced_once.expect(owner, (theta, multipliers))
        if (model := attachment.model_in_use()) is not None:
            if (link := link_of(model)) is None or link.snapshot is None:  # after a change that was accepted
                with attachment.lock:
                    attachment.snapshot()  # what a refusal of the next one puts back
            if not self._other_model and (other := other_model(model, owner)) is not None:
                self._other_model = True
                warn_of_other_model(*other, name)
        if attachment.merged is None:
            check_gathered(name, parameter)

    def hear(self, module: nn.Module, call: str, frame: FrameType | None) -> None:
        """Notes a call, made at `frame`, that acts on W0, and may have been meant for theta."""
        if self._hears():
            self._hearing.call(call, module is self.attachment.model_in_use(), frame, self._state)

    def _state(self) -> tuple[object, ...]:
        """theta, its version, and the number of steps that have trained it."""
        theta, _ = self.tasks.trained()
        return theta, None if theta.is_inference() else theta._version, self.tasks.steps

    def others_stepped(self, parameters: Sequence[object]) -> None:
        """Warns if an optimizer has changed W0 in place of theta, though gradients reach theta."""
        if self.reached == self.tasks.steps and any(map(self.attachment.owns, parameters)) and self._hears():
            self._hearing.optimizer()

    def _hears(self) -> bool:
        attachment = self.attachment
        # With theta among the model's own parameters, whoever has these has theta.
        return attachment.attached and attachment.merged is None and not attachment.others
