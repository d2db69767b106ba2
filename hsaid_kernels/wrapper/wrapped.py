"""The model that an HSAID wraps: a plain module, and of one HSAID only."""

from __future__ import annotations

import weakref

from torch import nn

# Wrappers that split a model's parameters or make replicas of them. By name: importing them takes a second.
PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def plain(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`, so that parameters have the names of the plain model; or the model.

    Raises TypeError if the model is or contains a parallel wrapper or has sharded parameters. These must be applied to
    the HSAID instead, because they would synchronize W0 and not theta.
    """
    if not isinstance(model, nn.Module):
        return model  # which is refused where the argument is checked
    if type(model).__name__ == "OptimizedModule" and isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        return plain(inside)
    for name in (kind.__name__ for module in model.modules() for kind in type(module).__mro__):
        if name in PARALLEL:
            raise TypeError(
                f"model: expected a plain module, got one in {name}, which would not synchronize theta: wrap the plain "
                "model in HSAID, and that in DistributedDataParallel"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise TypeError(f"model: expected parameters that are not sharded, got {name!r}, which is a DTensor")
    return model


# The wrapper of each wrapped model. Weak on both sides: neither keeps the other alive.
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def claim(model: nn.Module, wrapper: nn.Module) -> None:
    """Records that `wrapper` wraps `model`. Raises ValueError if another wrapper that still exists does."""
    other = _wrappers.get(model, lambda: None)()
    if other is not None and other is not wrapper:
        raise ValueError(
            f"model: expected one that no HSAID wraps, got a {type(model).__name__} that already is: "
            "wrap copy.deepcopy(model), or delete the first wrapper before"
        )
    _wrappers[model] = weakref.ref(wrapper)
