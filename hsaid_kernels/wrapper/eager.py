"""Keeps torch.compile out of functions that must run as ordinary Python, because they look at what it cannot guard.

torch.compile may also compile functions that are called from code it has given up on. `torch.compiler.disable` prevents
that, but it imports all of torch._dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., object])


def runs_eagerly(function: Function) -> Function:
    """A decorator: the function and all that it calls are not compiled by themselves."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def calls_eagerly(function: Function) -> Function:
    """A decorator: the function is not compiled by itself, but what it calls may be."""
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function
