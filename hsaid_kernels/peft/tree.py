"""The model as it is without adapters: which tensors it has, and under which names.

The random basis of a tensor depends on its name, and PEFT changes names: of a module that an adapter trains as it is
(`modules_to_save`), the original moves to "classifier.original_module", also for adapters without such modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hsaid_kernels.peft.config import HSAIDConfig

_without_adapters: ContextVar[bool] = ContextVar("hsaid_kernels.peft.without_adapters", default=False)
Named = Iterator[tuple[str, nn.Module]]


@contextmanager
def without_adapters() -> Iterator[None]:
    """For a time, in this thread, models have no adapters for who lists their modules and parameters."""
    token = _without_adapters.set(True)
    try:
        yield
    finally:
        _without_adapters.reset(token)


def is_hidden() -> bool:
    """Whether adapters are not listed now."""
    return not torch.compiler.is_compiling() and _without_adapters.get()


class SavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper of a module that adapters have copies of. The original is listed under its old name."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Named:
        if torch.compiler.is_compiling():  # functional_call needs the names by which modules are reached
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if not is_hidden() and self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
        yield from self.original_module.named_modules(memo, prefix, remove_duplicate)
        if not is_hidden():
            inner = f"{prefix}.modules_to_save" if prefix else "modules_to_save"
            yield from self.modules_to_save.named_modules(memo, inner, remove_duplicate)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        # transformers sets adapters that have no copy of this module, too: PEFT itself leaves these out
        super().set_adapter([name for name in names if name in self._adapters], inference_mode)


def keep_names(model: nn.Module) -> None:
    """Lets the originals of all modules that PEFT has wrapped keep their names."""
    for module in list(model.modules()):
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = SavedModule


def left_out(model: nn.Module, config: HSAIDConfig) -> list[str]:
    """Names of the parameters that an adapter does not project, in a model without adapters.

    These are what the configuration leaves out, what has no floating-point values or none at all, and what it trains as
    it is. Raises ValueError if a part of the configuration matches nothing.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    wanted, unwanted = _maybe_include_all_linear_layers(config, model).target_modules, config.exclude_modules
    targets = None if wanted is None else _found("target_modules", wanted, modules)
    excluded = set() if unwanted is None else _found("exclude_modules", unwanted, modules)
    # by PEFT's own rule
    saved = {name for name in modules if any(name.endswith(end) for end in config.modules_to_save or ())}
    chosen = set()
    for prefix, module in model.named_modules(remove_duplicate=False):  # of a tied tensor, all places
        above = {"", *(prefix[: dot.start()] for dot in re.finditer(r"\.", prefix)), prefix}
        if (targets is None or above & targets) and not above & (excluded | saved):
            chosen |= {names[id(p)] for p in module._parameters.values() if p is not None and _is_float(p)}
    return [name for name in names.values() if name not in chosen]


def _found(argument: str, wanted: str | Any, modules: list[str]) -> set[str]:
    """Those of the modules that a configuration names, which may be none of a regular expression or of a list."""
    if isinstance(wanted, str):
        found = {name for name in modules if re.fullmatch(wanted, name)}
    else:
        found = {name for name in modules if any(name == end or name.endswith(f".{end}") for end in wanted)}
    if not found:
        raise ValueError(f"{argument}: expected names of modules, got {wanted!r}, which match none of the model")
    return found


def _is_float(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.numel() > 0
