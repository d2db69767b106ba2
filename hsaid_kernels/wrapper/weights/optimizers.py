"""Hears every step of every optimizer: a fused one writes to theta without increasing torch's version counter."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hsaid_kernels.wrapper.isolation import runs_eagerly


class Listener(Protocol):
    """What is told of steps. `ProjectedWeights` implements it."""

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes that the optimizer has changed its parameters."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    """From now on, and as long as it lives, `listener` is told of steps."""
    _watch()
    _listeners.add(listener)


@functools.cache
def _watch() -> None:
    hook: Callable[..., Any] = _on_step
    register_optimizer_step_post_hook(hook)


@runs_eagerly
def _on_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step counts versions
        return
    for listener in list(_listeners):
        listener.stepped(optimizer)
