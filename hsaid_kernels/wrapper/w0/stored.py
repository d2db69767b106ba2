"""Quantized layers of a wrapped model, as the float layers that they stand for.

Such a layer *shows* the parameters of the float layer (`shown_in`): its bias, and a `Stored` tensor as `weight`, which
looks like the float matrix and holds nothing. The rest of the wrapper goes by what is shown, so names, shapes and the
basis are those of the float model. What the library has put into the layer stays there, where `named_parameters()` and
`state_dict()` of the model find it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.w0.kinds import Kind, kind_of

# In the `__dict__` of a quantized layer: {name: parameter} of the float layer; its own while `showing`; what would run
# in the place of the float layer's forward.
SHOWN, _OWN, _ASIDE = "_hsaid_shown", "_hsaid_own", "_hsaid_aside"


class Stored(Tensor):
    """The weight of a quantized layer. Computes as the float matrix does; the layer, not kept alive from here, has it.

    Attributes:
        kind: how the layer is dequantized.
        layer: the layer.
    """

    _layer: weakref.ref[nn.Module]
    _kind: Kind | None

    @staticmethod
    def __new__(
        cls, layer: nn.Module, kind: Kind | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ):
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._layer, made._kind = weakref.ref(layer), kind
        return made

    @property
    def layer(self) -> nn.Module:
        if (layer := self._layer()) is None:
            raise RuntimeError("model: expected the quantized layer of this weight to be in use, but it is gone")
        return layer

    @property
    def kind(self) -> Kind:
        if self._kind is None:  # after unpickling
            self._kind = kind_of(self.layer)
        assert self._kind is not None
        return self._kind

    def dequantize(self) -> Tensor:
        """The float matrix, in this tensor's dtype. Raises RuntimeError if the layer now has one of another shape."""
        with torch.no_grad(), as_stored(self.layer):
            values = self.kind.dequantize(self.layer).detach()
        if values.shape != self.shape:
            raise RuntimeError(
                f"model: expected a {type(self.layer).__name__} with a weight of shape {tuple(self.shape)}, as it was "
                f"when it was wrapped, got {tuple(values.shape)}: unwrap() the model before changing it"
            )
        return values.to(self.dtype)

    def stored(self) -> list[Tensor]:
        """The layer's tensors that the matrix is computed from."""
        with as_stored(self.layer):
            return list(self.kind.stored(self.layer))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"data: expected a tensor that can be written to, got W0 of a {type(self.layer).__name__}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Stored({tuple(self.shape)}, {self.dtype}, of a {type(self.layer).__name__})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The weight of the layer's copy; the float matrix, if the layer is not copied with it."""
        if id(self) not in memo:
            layer = memo.get(id(self.layer))
            values = nn.Parameter(self.dequantize(), False) if layer is None else None
            memo[id(self)] = _weight(layer, self._kind, *_look(self)) if values is None else values
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, _look(self), self.layer, None, None, _belongs_to

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own.layer, own._kind, *_look(own))
        if function._schema.is_mutable:
            raise RuntimeError(
                f"{function}: expected tensors that can be written to, got W0 of a {type(args[0].layer).__name__}"
                if isinstance(args[0], Stored)
                else f"{function}: expected no W0 of a quantized layer among its arguments"
            )
        return function(*map(_floats, args), **{key: _floats(value) for key, value in (kwargs or {}).items()})


def _look(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _floats(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_floats, value))
    return value.dequantize() if isinstance(value, Stored) else value


def _weight(layer: Any, kind: Kind | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    made: Any = Stored(layer, kind, shape, dtype, device)
    made._is_param = True  # as nn.Parameter() sets it
    return made


def _blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    return _weight(nn.Module(), None, shape, dtype, device)


def _belongs_to(stored: Stored, layer: nn.Module) -> None:
    stored._layer = weakref.ref(layer)


# --- what a layer shows


def shown_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """`module._parameters`, or, of a quantized layer of a wrapped model, those of the float layer."""
    shown: dict[str, nn.Parameter | None] = module.__dict__.get(SHOWN) or module._parameters
    return shown


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict(model.named_parameters())`, as of the float model."""
    return dict(model._named_members(lambda module: shown_in(module).items()))


def needs_all(module: nn.Module, answered: Collection[str]) -> bool:
    """Whether all that a module shows has to be given at reads, and not only what the HSAID projects, `answered`.

    A quantized layer runs either as its library has it or as a float layer.
    """
    return SHOWN in module.__dict__ and (bool(answered) or _ASIDE in module.__dict__)


def show(model: nn.Module, known: Iterable[Tensor] = ()) -> None:
    """Lets the quantized layers of a model show the parameters of float layers.

    What they show already may stay, and so may what they have shown before, which is among `known`. Not in a model with
    peft's adapters, which are trained beside weights that stay as they are. Raises TypeError for a layer that cannot be
    dequantized.
    """
    if is_adapted(model):
        return
    kept = {id(weight._layer()): weight for weight in known if isinstance(weight, Stored)}
    tied: dict[tuple[int, ...], Any] = {}
    for name, layer in model.named_modules():
        if (kind := kind_of(layer)) is None:
            continue
        shown = layer.__dict__.get(SHOWN, {})
        with as_stored(layer):
            parts = tuple(map(id, kind.stored(layer)))
            bias = getattr(layer, "bias", None)
            if kind.shape is None and parts in tied:  # which may share a codebook, and hold their codes in objects
                parts = parts if torch.equal(kind.dequantize(layer), tied[parts].dequantize()) else (id(layer),)
            if parts not in tied:
                before = shown.get("weight", kept.get(id(layer)))
                look = _look_of(name, layer, kind, before)
                stays = before is not None and _look(before) == look
                tied[parts] = before if stays else _weight(layer, kind, *look)
        if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter):
            before = shown.get("bias")
            stays = before is not None and before.data_ptr() == bias.data_ptr()
            bias = before if stays else nn.Parameter(bias.detach())
        layer.__dict__[SHOWN] = {"weight": tied[parts], "bias": bias}
        if "forward" in layer.__dict__ and not kind.has_own_forward:
            raise TypeError(
                f"model: expected quantized layers with the forward of their class, got {name!r}, a "
                f"{type(layer).__name__} on which another one is set (accelerate's hooks do so)"
            )
        _put_aside(layer, forward=True)
    _put_aside(model, forward=False)


def _look_of(
    name: str, layer: nn.Module, kind: Kind, before: Tensor | None
) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device of a layer's weight, which was `before`. Dequantizes it if nothing else tells."""
    try:
        device = next(iter(kind.stored(layer))).device
        if kind.shape is not None and kind.dtype is not None:
            return torch.Size(kind.shape(layer)), kind.dtype(layer), device
        if before is not None:  # whose dequantize() finds another shape
            return before.shape, before.dtype, device
        values: object = kind.dequantize(layer)
    except Exception as error:  # whatever the library raises
        raise TypeError(
            f"model: expected layers that can be dequantized, got {name!r}, a {type(layer).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(values, Tensor) and values.is_floating_point() and values.dim() > 1:
        return _look(values)
    got = f"{tuple(values.shape)} in {values.dtype}" if isinstance(values, Tensor) else repr(values)
    raise TypeError(
        f"dequantize: expected the function given to register_quantized() to return the float weight of {name!r}, a "
        f"{type(layer).__name__}, got {got}"
    )


def _put_aside(module: nn.Module, forward: bool) -> None:
    """Takes from a module the hook of compressed-tensors that decompresses all layers for good, and its own forward."""
    own, hooks = module.__dict__.get(_ASIDE, ({}, {}))
    if forward and "forward" in module.__dict__:
        own = {"forward": module.__dict__.pop("forward")}
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "__name__", "") == "ct_decompress_hook":
            hooks = {key: module._forward_pre_hooks.pop(key)}
    if own or hooks:
        module.__dict__[_ASIDE] = own, hooks


def hide(module: nn.Module, for_good: bool = False) -> None:
    """Undoes `show`, of a layer or of a model. `for_good`: what was put aside is not needed again."""
    module.__dict__.pop(SHOWN, None)
    own, hooks = module.__dict__.pop(_ASIDE, ({}, {}))
    if not for_good:
        module.__dict__.update(own)
        module._forward_pre_hooks.update(hooks)


@contextmanager
def showing(model: nn.Module, stay: bool = False) -> Iterator[None]:
    """As `show`, and inside of this context `named_parameters()` too has what is shown.

    At the end the layers show no more than before, unless they are to stay as they are and nothing has been raised.
    """
    if not isinstance(model, nn.Module):  # which is refused where the argument is checked
        yield
        return
    already = {module for module in model.modules() if module.__dict__.keys() & {SHOWN, _ASIDE}}
    try:
        show(model)
        layers = [module for module in model.modules() if SHOWN in module.__dict__ and _OWN not in module.__dict__]
        for layer in layers:
            layer.__dict__[_OWN], layer.__dict__["_parameters"] = layer._parameters, layer.__dict__[SHOWN]
        try:
            yield
        finally:
            for layer in layers:
                layer.__dict__["_parameters"] = layer.__dict__.pop(_OWN)
    except BaseException:
        stay = False
        raise
    finally:
        if not stay:
            for module in set(model.modules()) - already:
                hide(module)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has adapters of peft, other than ours, which are HSAIDs."""
    configs = [config for module in model.modules() for config in getattr(module, "peft_config", {}).values()]
    others = any(getattr(config, "peft_type", None) != "HSAID" for config in configs)
    return others or any("base_layer" in module._modules for module in model.modules())


# --- reading a layer as its library does


class _Thread(threading.local):
    layer: nn.Module | None = None


_thread = _Thread()


@contextmanager
def as_stored(layer: nn.Module) -> Iterator[None]:
    """In this thread, attributes of the layer are what the library has put there."""
    before, _thread.layer = _thread.layer, layer
    shown = layer._parameters
    layer.__dict__["_parameters"] = layer.__dict__.get(_OWN, shown)
    try:
        yield
    finally:
        _thread.layer, layer.__dict__["_parameters"] = before, shown


def is_read_as_stored(layer: nn.Module) -> bool:
    return _thread.layer is layer
