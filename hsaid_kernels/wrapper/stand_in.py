"""`StandIn`: a module that replaces another module, the model, in code written for the model.

Attributes and methods that it does not define itself are the model's. `forward` has the signature of the model's
`forward`, on the class too, because transformers' Trainer reads the names of labels and input columns from the class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
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
