"""What runs around an HSAID: uses of its weights that could only train theta wrongly are refused."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.wrapper.reads.link import place_of

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
    if any(str(frame.f_globals.get("__name__")).startswith("torch.distributed.pipelining") for frame in _callers()):
        raise RuntimeError(
            "model: expected a model that each rank runs whole, got a part of hsaid.model as a stage of a pipeline "
            "(torch.distributed.pipelining), where each rank would have a part of theta's gradient: use FSDP2"
        )


def inside_module() -> bool:
    """Whether a module is being called, which all ranks of a sharded model do together."""
    return any(frame.f_code is nn.Module._call_impl.__code__ for frame in _callers())


def other_model(model: nn.Module, owner: nn.Module | None) -> tuple[nn.Module, FrameType] | None:
    """The module of another model that runs a part of `model` now, and its frame; None if that is not so.

    Not where the whole of `model` runs, or where the other one holds its HSAID, `owner`, too.
    """
    found = None
    for frame in _callers():
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            if module is model or module is owner:
                return None
            if place_of(module) is None and not hasattr(type(module), "_hsaid_keys"):  # as slices of ours have
                found = module, frame
    return found if found is not None and (owner is None or owner not in set(found[0].modules())) else None


def warn_of_other_model(module: nn.Module, frame: FrameType, name: str | None) -> None:
    """Warns that `module`, which is not of the wrapped model, runs the weight `name` of it."""
    while frame.f_back is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module":
        frame = frame.f_back
    message = (
        f"model: {name!r} is a weight of the wrapped model, and a {type(module).__name__} that neither is a part of it "
        "nor holds the HSAID runs on it: on the projected weight, and its backward pass gives theta a gradient. Give "
        "it copies (copy.deepcopy of its modules before wrapping), or the HSAID as an attribute, if this is meant"
    )
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


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

    It reduces what arrives first. Of a backward pass inside of another that is a part, and what arrives later in the
    outer one is left out without a word.

    reduces  whether it does so in the backward pass of the last call
    at_end   whether it reduces at the end of backward, as with static_graph=True
    """

    def __init__(self) -> None:
        self.reduces = self.at_end = False
        self._ddp: Callable[[], nn.Module | None] = lambda: None
        self._arrived = WeakTensorKeyDictionary()  # {parameter: whether its gradient has, and by an inner pass}
        self._theirs: set[int] = set()

    def counts(self, parameter: Tensor) -> bool:
        """Whether the parameter has a hook of this object."""
        return parameter in self._arrived

    def step(self) -> None:
        """A new step begins: no gradient has arrived in it."""
        for parameter in list(self._arrived):
            self._arrived[parameter] = None

    def expect(self, owner: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """A part of the HSAID `owner` is called, which trains these parameters.

        Raises RuntimeError if DistributedDataParallel does not have them, because it was made with another task's.
        """
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not _holds(ddp, owner):
            self.reduces, self.at_end, self._ddp = False, False, lambda: None
            return
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
                parameter.register_post_accumulate_grad_hook(self._count)
            self._arrived[parameter] = None

    def _count(self, parameter: Tensor) -> None:
        if not self.reduces or self._ddp() is None:
            return
        before, inner = self._arrived.get(parameter), _inside_backward(parameter)
        self._arrived[parameter] = inner or before is True
        if before is not None and self._arrived[parameter]:
            raise RuntimeError(
                "theta: expected its gradient once in a step, because DistributedDataParallel reduces it when it first "
                "arrives, got another part of it later, from a backward pass inside of backward: checkpoint with "
                "use_reentrant=False, or take DistributedDataParallel(..., static_graph=True)"
            )


def _inside_backward(parameter: Tensor) -> bool:
    """Whether the backward pass that runs now runs inside of another one. The parameter is one that it has reached."""
    passes = sum(frame.f_code is _engine_run_backward.__code__ for frame in _callers())
    return passes > (parameter.device.type == "cpu")  # a device's backward runs in a thread of its own
