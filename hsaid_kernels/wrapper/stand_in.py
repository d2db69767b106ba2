"""`StandIn`: a module that replaces another module, the model, in code written for the model.

Attributes and methods that it does not define itself are the model's. `forward` has the signature of the model's
`forward`, on the class too, because transformers' Trainer reads the names of labels and input columns from the class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any, SupportsIndex

import torch
from torch import nn


class StandIn(nn.Module):
    """Reads and writes attributes that are not its own on the model. A subclass defines how the model is run."""

    model: nn.Module

    def _stand_in_for(self, model: nn.Module) -> None:
        # Not registered as a submodule, so that parameters(), state_dict() and apply() do not reach the model's own
        # parameters through this module.
        self.__dict__["model"] = model
        self.__class__ = _class_for(type(self), type(model))  # type: ignore[arg-type]  # classes are hashable

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        """A context manager inside which the model's methods run on the right weights."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")  # not set yet during unpickling
            if model is None or name.startswith("__"):
                raise
        value = getattr(model, name)
        # The model's methods (generate, encode, get_image_features, ...) compute with its weights, so they run inside
        # `_computing`. Those that transformers' base class defines act on the model itself (resize_token_embeddings,
        # ...) and are returned as they are.
        about = "transformers.modeling_utils"
        if not inspect.ismethod(value) or value.__self__ is not model or value.__func__.__module__ == about:
            return value

        if inspect.isgeneratorfunction(value):

            @functools.wraps(value)
            def generating(*args: Any, **kwargs: Any) -> Iterator[Any]:
                with self._computing():
                    yield from value(*args, **kwargs)

            return generating

        @functools.wraps(value)
        def computing(*args: Any, **kwargs: Any) -> Any:
            # generate() needs no gradients, and weights computed without gradients are cached for the next call
            with torch.no_grad() if name == "generate" else contextlib.nullcontext(), self._computing():
                return value(*args, **kwargs)

        return computing

    def __setattr__(self, name: str, value: Any) -> None:
        # For example generation_config, which Trainer sets.
        model = self.__dict__.get("model")
        if model is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(model, name):
            super().__setattr__(name, value)
        elif any(name in own for own in (self._parameters, self._buffers, self._modules)):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def _get_name(self) -> str:
        """The model's class name, by which Trainer's label smoothing recognizes causal language models."""
        return type(self.model).__name__

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # pickle looks a class up by its name, but this object's class is created at run time.
        return object.__new__, (type(self).__bases__[0],), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stand_in_for(state["model"])


@functools.cache
def _class_for(base: type[StandIn], model: type[nn.Module]) -> type[StandIn]:
    """The subclass of `base` whose forward has the signature of the model's."""

    def forward(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    forward.__dict__["__signature__"] = inspect.signature(model.forward)
    forward.__doc__ = model.forward.__doc__
    return type(f"{base.__name__}{model.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


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
                f"model in HSAID, and that in DistributedDataParallel"
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
