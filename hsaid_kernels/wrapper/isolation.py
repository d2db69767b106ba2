"""Steps out of what is active in torch: its compiler, transforms, inference mode, and modes that see every operation.

Weights are made in ordinary Python and outside of all of these, whoever reads them. The obvious decorator,
`torch.compiler.disable`, would import all of torch._dynamo, so the compiler is kept out by the flags that it sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., object])


def runs_eagerly(function: Function) -> Function:
    """A decorator: torch.compile compiles neither the function by itself nor what it calls."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def calls_eagerly(function: Function) -> Function:
    """A decorator: torch.compile does not compile the function by itself, but may compile what it calls."""
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


@contextmanager
def isolated(grad: bool = False) -> Iterator[None]:
    """A context outside of inference mode and of all transforms and modes, in which gradients are enabled if `grad`.

    For transforms of torch.func (vmap, jacrev, ...) the weights are constants. Modes that see every operation, as
    selective activation checkpointing has, do not see how they are made.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        if not is_disturbed():
            yield
            return
        with ExitStack() as stack:
            if torch._C._are_functorch_transforms_active():
                from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

                stack.enter_context(temporarily_clear_interpreter_stack())
            if torch._C._len_torch_dispatch_stack():
                from torch.utils._python_dispatch import _disable_current_modes

                stack.enter_context(_disable_current_modes())
            yield


def is_disturbed() -> bool:
    """Whether transforms of torch.func, or modes that see every operation, are active."""
    return bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())
