"""Calls of hsaid.model that act on W0, and were probably meant for theta: said once, as a warning.

W0 has to be somewhere, so `hsaid.model.parameters()` are W0. Whoever hands over hsaid.model where a model is trained,
averaged or saved trains, averages and saves nothing of what was learned, without an error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from hsaid_kernels.wrapper.callers import module_of, stacklevel
from hsaid_kernels.wrapper.isolation import runs_eagerly
from hsaid_kernels.wrapper.reads.link import link_of

# What is said at the first call; the others only when they are repeated after theta has changed.
AT_ONCE = ("zero_grad()", "save_pretrained()")
# Libraries that look at parameters for other reasons than their values: for dtype and device, to count, to copy.
_LIBRARIES = (
    *("hsaid_kernels.", "torch.nn.modules.", "torch.nn.parallel.", "torch.nn.utils.stateless", "torch.distributed."),
    *("torch._", "torch.fx.", "torch.export.", "transformers.", "accelerate.", "peft.", "lightning.", "contextlib"),
    "pytorch_lightning.",
)
_HANDING_ON = {method.__code__ for method in (nn.Module.parameters, nn.Module.state_dict, nn.Module.zero_grad)}
_CLIPPING = "clip_grad"  # functions of these libraries for what somebody hands over


def use_methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods for a subclass of `cls`, the class of a module in a wrapped model, that tell its source of such calls."""

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for number, found in enumerate(cls.named_parameters(self, *args, **kwargs)):
            yield found
            if number == 0:  # is not reached by those who want a device or a dtype, which the first one has
                _tell(self, "parameters()")

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not args and "destination" not in kwargs:  # not of a module inside, as a part of the whole
            _tell(self, "state_dict()")
        return cls.state_dict(self, *args, **kwargs)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        _tell(self, "zero_grad()")
        cls.zero_grad(self, set_to_none)

    methods: dict[str, Callable[..., Any]]
    methods = {"named_parameters": named_parameters, "state_dict": state_dict, "zero_grad": zero_grad}
    if save := getattr(cls, "save_pretrained", None):

        def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _tell(self, "save_pretrained()")
            return save(self, *args, **kwargs)

        methods["save_pretrained"] = save_pretrained
    return methods


@runs_eagerly
def _tell(module: nn.Module, call: str) -> None:
    if (link := link_of(module)) is None or torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (module_of(frame) == __name__ or frame.f_code in _HANDING_ON):
        frame = frame.f_back  # to the one that iterates over the generator
    where = module_of(frame) if frame is not None else "hsaid_kernels."
    clips = frame is not None and frame.f_code.co_name.startswith(_CLIPPING)
    if call in AT_ONCE or clips or not where.startswith(_LIBRARIES):
        link.source.hear(module, call, frame)


class Hearing:
    """Says once, of one wrapped model, that something acts on W0 in place of theta."""

    def __init__(self) -> None:
        self._said = False
        self._before: tuple[object, ...] | None = None  # theta's state when W0 was last asked for

    def call(self, call: str, of_model: bool, frame: FrameType | None, state: Callable[[], tuple[object, ...]]) -> None:
        """A call, made at `frame`, of the model itself (`of_model`) or of a part. `state` gives theta's."""
        if self._said or (call in (*AT_ONCE, "state_dict()") and not of_model):
            return
        if call not in AT_ONCE:
            before, self._before = self._before, (now := state())
            if before is None or (before[0] is now[0] and before[1:] == now[1:]):
                return
        acts = {"zero_grad()": "zero_grad() acts on", "save_pretrained()": "save_pretrained() saves"}
        self._say(acts.get(call, f"{call} gives"), frame)

    def optimizer(self) -> None:
        """An optimizer has stepped that trains W0, though gradients reach theta."""
        if not self._said:
            self._say("an optimizer has", None)

    def _say(self, what: str, frame: FrameType | None) -> None:
        self._said = True
        message = (
            f"hsaid.model: {what} W0, which is not trained: hand over the HSAID itself, whose parameters() are what is "
            "trained. hsaid.model is for inference and for its modules; W0 is hsaid.w0() (docs/integration.md)"
        )
        if frame is None:
            warnings.warn(message, stacklevel=stacklevel())
        else:
            warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)
