"""Outside of what is active in torch: its compiler, for functions that must run as ordinary Python, and its transforms.

torch.compile may also compile functions that are called from code it has given up on. `torch.compiler.disable` prevents
that, but it imports all of torch._dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
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


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context outside of the modes and transforms that are active here.

    Those of torch.func (vmap, jacrev, ...), for which the weights are constants, and those that see every operation, as
    selective activation checkpointing has.
    """
    with ExitStack() as stack:
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        yield
