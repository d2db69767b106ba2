"""Fused Fastfood projections for fine-tuning inside a small random subspace (DID, SAID and H-SAID; docs/method.md)."""

import importlib
from typing import TYPE_CHECKING, Any

from hsaid_kernels.version import __version__

if TYPE_CHECKING:
    from hsaid_kernels.fastfood.hadamard import hadamard_transform, hadamard_transform_
    from hsaid_kernels.fastfood.ops import available_backends, empty_cache
    from hsaid_kernels.fastfood.projection import Projection
    from hsaid_kernels.hierarchy import Hierarchy
    from hsaid_kernels.wrapper.checkpoint.files import last_checkpoint
    from hsaid_kernels.wrapper.hsaid import HSAID
    from hsaid_kernels.wrapper.w0.kinds import register_quantized

__all__ = [
    "HSAID",
    "Hierarchy",
    "Projection",
    "__version__",
    "available_backends",
    "empty_cache",
    "hadamard_transform",
    "hadamard_transform_",
    "last_checkpoint",
    "register_quantized",
]

# Imported on first access, so that `hsaid --help` does not wait for torch to load.
_MODULES = {
    "HSAID": "wrapper.hsaid",
    "Hierarchy": "hierarchy",
    "Projection": "fastfood.projection",
    "available_backends": "fastfood.ops",
    "empty_cache": "fastfood.ops",
    "hadamard_transform": "fastfood.hadamard",
    "hadamard_transform_": "fastfood.hadamard",
    "last_checkpoint": "wrapper.checkpoint.files",
    "register_quantized": "wrapper.w0.kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
