"""`StandIn`: a module that replaces another module, the model, in code written for the model.

Attributes and methods that it does not define itself are the model's. `forward` has the signature of the model's
`forward`, on the class too, because transformers' Trainer reads the names of labels and input columns from the class.
The tree of modules below it is the model's, but its parameters and its `state_dict()` are its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any, SupportsIndex

import torch
from torch import nn

from hsaid_kernels.wrapper.reads.link import plain_type

# Methods of transformers' and peft's base classes that change the model, so that it would no longer be the one that was
# wrapped.
CHANGING = (
    *("add_adapter", "load_adapter", "set_adapter", "enable_adapters", "disable_adapters", "delete_adapter"),
    *("enable_peft_hotswap", "resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"),
    *("set_decoder", "set_encoder", "tie_weights", "init_weights", "initialize_weights", "post_init", "prune_heads"),
    *("dequantize", "kernelize", "use_kernels", "to_bettertransformer", "reverse_bettertransformer"),
    *("resize_position_embeddings", "tensor_parallel", "smart_apply"),
    *("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"),
)


class StandIn(nn.Module):
    """Reads and writes attributes that are not its own on the model. A subclass defines how the model is run."""

    model: nn.Module

    def _stand_in_for(self, model: nn.Module) -> None:
        # Not in `_modules`: state_dict() and load_state_dict() of this module and of those around it recurse by these.
        self.__dict__["model"] = model
        self.__class__ = _class_for(type(self), plain_type(model))  # type: ignore[arg-type]  # classes are hashable

    def _checked(self) -> None:
        """Runs before the model or one of its methods is called."""
        raise NotImplementedError

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        """A context manager for a call of the model, in which its weights do not change. Runs `_checked` first."""
        raise NotImplementedError

    # --- the tree of modules; `modules()`, `buffers()`, `apply()`, `train()` and others rest on these

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield "model", self.model

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            inner = f"{prefix}.model" if prefix else "model"
            yield from self.model.named_modules(memo, inner, remove_duplicate)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name == "model" and module is self.model:  # as code does that converts the modules of a tree in place
            return
        raise TypeError(
            f"{name}: expected a module that is set on the model before it is wrapped, got one for the HSAID, which "
            "would neither train nor save it: unwrap(), set it on the model, and wrap with train_fully="
        )

    def register_module(self, name: str, module: nn.Module | None) -> None:
        self.add_module(name, module)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        raise TypeError(
            f"{name}: expected a buffer that is set on the model, got one for the HSAID: hsaid.model has them"
        )

    # --- attributes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("model")  # not set yet during unpickling
            if model is None or name.startswith("__"):
                raise
        value = getattr(model, name)
        if name == "is_quantized":  # transformers' Trainer would refuse to train what is
            return False
        if not inspect.ismethod(value):
            return value
        module = value.__func__.__module__ or ""
        if module.startswith(("transformers.", "peft.")) and name in CHANGING:

            @functools.wraps(value)
            def refused(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError(
                    f"{name}(): expected a plain model, got one that an HSAID wraps: unwrap() it, call {name}(), and "
                    "wrap the model again"
                )

            return refused
        # Those that transformers' base class defines act on the model itself and are returned as they are.
        if value.__self__ is not model or module == "transformers.modeling_utils":
            return value

        @functools.wraps(value)
        def computing(*args: Any, **kwargs: Any) -> Any:
            if name == "generate":  # which needs no gradients, and trains nothing in between
                with torch.no_grad(), self._computing():
                    return value(*args, **kwargs)
            self._checked()
            return value(*args, **kwargs)

        return computing

    def __setattr__(self, name: str, value: Any) -> None:
        # For example generation_config, which Trainer sets.
        model = self.__dict__.get("model")
        if model is not None and name == "model":
            raise TypeError(
                "model: expected the one that this HSAID wraps to stay: wrap the other one in an HSAID of its own"
            )
        if model is not None and name == "forward":
            self.__dict__["forward"] = self._inside_call(value)
        elif model is None or name in self.__dict__ or hasattr(type(self), name) or name in self._parameters:
            super().__setattr__(name, value)
        elif hasattr(model, name):
            setattr(model, name, value)
        elif isinstance(value, nn.Module):
            self.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            raise TypeError(
                f"{name}: expected a parameter of the model, got one for the HSAID, which would not train it"
            )
        else:
            super().__setattr__(name, value)

    def _inside_call(self, forward: Any) -> Any:
        """`forward`, which somebody sets on this object, as a call of the model.

        TRL's fused heads do so, and Accelerate, which sets the one of before again at the end.
        """
        if not callable(forward) or getattr(forward, "__func__", None) is type(self).forward:
            return forward

        if getattr(forward, "__self__", None) is self:  # a copy of this object then runs itself

            @functools.wraps(forward)
            def method(self: StandIn, *args: Any, **kwargs: Any) -> Any:
                return self._run_inside(forward.__func__, (self, *args), kwargs)

            return types.MethodType(method, self)
        own = weakref.ref(self)  # no circle, which would keep the model until garbage is collected

        @functools.wraps(forward)
        def function(*args: Any, **kwargs: Any) -> Any:
            hsaid = own()
            return forward(*args, **kwargs) if hsaid is None else hsaid._run_inside(forward, args, kwargs)

        return function

    def _run_inside(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self._computing():
            return forward(*args, **kwargs)

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
