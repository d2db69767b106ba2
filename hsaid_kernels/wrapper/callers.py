"""Who is calling: what the Python stack tells, where torch itself does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

# Code between a user's line and what it means to call.
BETWEEN = ("hsaid_kernels.", "torch.nn.modules.", "torch.optim.", "contextlib")
CALL_OF_MODULE = nn.Module._call_impl.__code__


def callers() -> Iterator[FrameType]:
    """The frames of the stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def module_of(frame: FrameType) -> str:
    """The name of the Python module whose code runs in this frame."""
    return str(frame.f_globals.get("__name__"))


def is_inside_module() -> bool:
    """Whether an nn.Module is being called. All ranks that share a model do so together."""
    return any(frame.f_code is CALL_OF_MODULE for frame in callers())


def stacklevel() -> int:
    """The `stacklevel` for a `warnings.warn` beside this call, so that it names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and module_of(frame).startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    return level
