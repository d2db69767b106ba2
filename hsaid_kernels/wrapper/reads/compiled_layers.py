"""Modules inside a wrapped model that are compiled by themselves, as by `layer.compile()`.

A compiled graph takes its weights as inputs, from the attribute `graph` of the module's `Link`. They are put there
before each call, by ordinary Python. torch.compile cannot look into a thread's own storage, so one thread runs such
modules at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hsaid_kernels.wrapper.isolation import calls_eagerly
from hsaid_kernels.wrapper.reads.link import Link, link_of
from hsaid_kernels.wrapper.weight import as_tensor

_one_thread = threading.RLock()


class CurrentWeights:
    """A module's `_compiled_call_impl`, which it calls with the weights of now."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]):
        self.module, self.compiled = module, compiled

    @calls_eagerly
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # inside a larger graph
            return self.compiled(*args, **kwargs)
        inside = [(module, link) for module in self.module.modules() if (link := link_of(module)) is not None]
        with _one_thread:
            return self._call(inside, args, kwargs)

    @calls_eagerly
    def _call(self, inside: list[tuple[nn.Module, Link]], args: Any, kwargs: Any) -> Any:
        before = [link.graph for _, link in inside]
        for module, link in inside:
            now = {key: getattr(module, key) for key in (*link.names, *link.masks)}
            link.graph = {key: as_tensor(weight) for key, weight in now.items()}
        try:
            return self.compiled(*args, **kwargs)
        finally:
            for (_, link), graph in zip(inside, before, strict=True):
                link.graph = graph


def keep_compiled_current(modules: Iterable[nn.Module]) -> None:
    """Lets every module that is compiled by itself run on the weights of now."""
    for module in modules:
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None and not isinstance(compiled, CurrentWeights):
            module.__dict__["_compiled_call_impl"] = CurrentWeights(module, compiled)


def compiled_as_before(module: nn.Module) -> None:
    compiled = module.__dict__.get("_compiled_call_impl")
    if isinstance(compiled, CurrentWeights):
        module.__dict__["_compiled_call_impl"] = compiled.compiled
