"""A module that stands in for another one, so that code written for that one goes on working.

Its attributes and methods are the model's, `forward` has the signature of the model's, and its class says so too:
transformers' Trainer looks there for the names of the labels and of the columns that the model wants.
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
    """Attributes that are not its own are the model's, to read and to write; a subclass says how the model computes."""

    model: nn.Module

    def _stand_in_for(self, model: nn.Module) -> None:
        # Not a submodule: parameters(), state_dict(), apply() and an optimiser must not find the model's own in here.
        self.__dict__["model"] = model
        self.__class__ = _class_for(type(self), type(model))  # type: ignore[arg-type]  # classes are hashable

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model's methods compute what they should."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")  # none yet while this object is being unpickled
            if model is None or name.startswith("__"):
                raise
        value = getattr(model, name)
        # A method computes with the model's weights (generate, encode, get_image_features), so it must find the right
        # ones; those of transformers' base class are about the model (resize_token_embeddings, ...).
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
            # generate() has no use for gradients, and weights that are made without them serve the next call too
            with torch.no_grad() if name == "generate" else contextlib.nullcontext(), self._computing():
                return value(*args, **kwargs)

        return computing

    def __setattr__(self, name: str, value: Any) -> None:
        # generation_config, for one, which Trainer sets
        model = self.__dict__.get("model")
        if model is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(model, name):
            super().__setattr__(name, value)
        elif any(name in own for own in (self._parameters, self._buffers, self._modules)):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def _get_name(self) -> str:
        """The model's: Trainer's label smoothing shifts the labels of a causal language model, known by this name."""
        return type(self.model).__name__

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # A pickle finds a class by its name, and this one's class was made at run time.
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
