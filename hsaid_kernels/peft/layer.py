"""`HSAIDLayer`, the one layer that a model gets; in it, `Adapter`: theta, the multipliers and the subspace of each.

The active adapter is attached to the model, so that every read of a weight gives its weight; the others, and all while
adapters are disabled, are not: the model is then the plain one, with W0. So names and modules of the model stay, and
nothing is between a layer and its input.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hsaid_kernels.peft.tree import Named, SavedModule, is_hidden, without_adapters
from hsaid_kernels.wrapper.basis import Settings
from hsaid_kernels.wrapper.checkpoint.compare import check_config
from hsaid_kernels.wrapper.checkpoint.configuration import Config, decode_state
from hsaid_kernels.wrapper.state import State
from hsaid_kernels.wrapper.w0.checks import check_plain
from hsaid_kernels.wrapper.w0.stored import showing
from hsaid_kernels.wrapper.weights.attachment import unwrapped_before
from hsaid_kernels.wrapper.weights.outside import TRACED

NAME = "hsaid"  # of the layer in the model


class Adapter(State):
    """The trained values of an adapter, and what they mean for the weights of a model, which it does not keep alive.

    Attributes:
        one_graph: whether torch.compile can make one graph of a call, as it can where no tensor has two names.
    """

    one_graph = True

    def __init__(self, model: nn.Module, settings: Settings):
        super().__init__()
        unwrapped_before(model, self)
        with showing(model):
            self._begin(model, settings)
            self._new_task(settings.task)
            self._source.maker.upload()  # raises for incompatible dtypes and devices

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self._source.attachment.model

    def extra_repr(self) -> str:
        m = self._basis.partition.num_multipliers
        return f"{self._basis.plan.dim + m} values ({m} multipliers), {len(self._basis.plan.names)} tensors"

    # --- in and out of the model

    @property
    def attached(self) -> bool:
        return self._source.attachment.attached

    def attach(self) -> None:
        """From now on, reads of the model's weights give this adapter's."""
        everything = {name for name, _ in self.model.named_parameters()}
        with without_adapters():
            plain = {name for name, _ in self.model.named_parameters()}
        self._source.attachment.others = everything - plain
        self._claim()
        saved = [module.original_module for module in self.model.modules() if isinstance(module, SavedModule)]
        inside = {id(parameter) for module in saved for parameter in module.parameters()}
        self.one_graph = not any(id(parameter) in inside for parameter in self._source.attachment.w0().values())

    def leave(self) -> None:
        """Gives the plain model back, but for its buffers, which belong to it."""
        self._source.attachment.note_change()  # what PEFT has taken out of the model stays out
        self._source.attachment.detach(buffers=False)

    def merge(self, name: str, safe: bool) -> None:
        """Puts the weights into the model's own parameters. `safe`: raises ValueError for such that are not finite."""
        hint = "save_pretrained() the adapter, and load it over a model whose weights have been dequantized"
        check_plain("merge", self._source.attachment.w0().values(), "which adapters can be merged into", hint)
        with torch.no_grad():
            values = self._source.now()
        if safe and not all(value.isfinite().all() for value in values.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._source.drop_cache()
        self._source.attachment.merge(values)

    # --- what is saved: of a module of the model, and without the model's buffers, which are saved with the model

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        # Not DID's multipliers, of which there are none: PEFT would let them require gradients, which never come.
        return ((name, parameter) for name, parameter in super().named_parameters(*args, **kwargs) if parameter.numel())

    def configuration(self) -> Config:
        """What a checkpoint says beside its values, see `checkpoint.configuration.describe`."""
        return self._description({}) | {"lr_scale": self._basis.settings.lr_scale}

    _save_to_state_dict = nn.Module._save_to_state_dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        try:
            if any(key.startswith(prefix) for key in state_dict) and self._source.attachment.merged is not None:
                self._source.attachment.check_on_w0("load_state_dict()")
            if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # `set_extra_state` says it
                    self.set_extra_state(state)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))  # which load_state_dict() raises, before anything is loaded here
        else:
            args = state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            nn.Module._load_from_state_dict(self, *args)

    def set_extra_state(self, state: Tensor) -> None:
        """Compares the configuration in a state_dict with this one. transformers' load_adapter() calls this alone."""
        config, own = decode_state(state), self.configuration()
        if config.get("lr_scale") != own["lr_scale"]:
            raise ValueError(f"state_dict: expected lr_scale {own['lr_scale']}, got {config.get('lr_scale')}")
        check_config("state_dict", config, own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        attachment = self._source.attachment
        if attachment.merged is not None:  # then the model has the weights, and its own _apply does not reach W0
            attachment.merged = {name: fn(value) for name, value in attachment.merged.items()}
        self._tasks.apply(fn)
        self._source.drop_cache()
        return self


class HSAIDLayer(nn.Module, BaseTunerLayer):
    """What PEFT finds of the method in a model: one layer, a child of the model itself, that computes nothing."""

    adapter_layer_names = ("hsaid_adapters",)
    weight = bias = None  # those of a base layer
    active_adapters: list[str]
    merged: bool

    def __init__(self) -> None:
        super().__init__()
        self.hsaid_adapters = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Named:
        return iter(()) if is_hidden() else super().named_modules(memo, prefix, remove_duplicate)

    def forward(self, input: Any) -> Any:
        """For models that run all their children in turn, as nn.Sequential does."""
        return input

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self.hsaid_adapters._modules  # type: ignore[return-value]

    @property
    def attached(self) -> Adapter | None:
        """The adapter by which the model's weights are read now."""
        return next((adapter for adapter in self.adapters.values() if adapter.attached), None)

    def show(self, name: str | None) -> None:
        """Lets the model's weights be those of an adapter, or W0."""
        wanted = None if name is None else self.adapters.get(name)
        now = self.attached
        if now is not wanted:
            if now is not None:
                now.leave()
                self.merged_adapters.clear()
            if wanted is not None:
                wanted.attach()
        for other, adapter in self.adapters.items():
            if other not in self.active_adapters:
                adapter._source.drop_cache()  # as large as the model

    def show_active(self) -> None:
        active = None if self._disable_adapters or not self.active_adapters else self.active_adapters[0]
        self.show(active)

    def computing(self) -> AbstractContextManager[None]:
        """A context manager for a call of the model."""
        if torch.jit.is_tracing():
            raise RuntimeError(TRACED)
        adapter = self.attached
        return nullcontext() if adapter is None or self.merged else adapter._computing()

    # --- what PEFT calls

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one("set_adapter()", names)
        if self.merged:
            self.unmerge()
        super().set_adapter(names, inference_mode)
        self.show_active()

    def enable_adapters(self, enabled: bool) -> None:
        if self.merged and not enabled:
            self.unmerge()
        super().enable_adapters(enabled)
        for adapter in list(self.adapters.values())[:1]:
            for module in adapter.model.modules():
                if isinstance(module, SavedModule):
                    module.enable_adapters(enabled)  # which transformers' enable_adapters() forgets
        self.show_active()

    def delete_adapter(self, adapter_name: str) -> None:
        if (adapter := self.adapters.get(adapter_name)) is not None and adapter.attached:
            self.show(None)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.merged:
            warnings.warn(f"All adapters are already merged, nothing to do: {self.merged_adapters}", stacklevel=2)
        elif names := [name for name in names if name in self.adapters]:
            check_one("merge", names)
            self.show(names[0])
            self.adapters[names[0]].merge(names[0], safe_merge)
            self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        assert self.attached is not None
        self.attached._source.attachment.unmerge()
        self.merged_adapters.clear()
        self.show_active()

    def keep_merged(self) -> None:
        """What `merge` has put into the model stays there for good."""
        if self.merged:
            assert self.attached is not None
            self.attached._source.attachment.keep_merged()
            self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Does nothing: theta has always been where W0 is, and is float32 whatever W0 is."""


def layer_of(model: nn.Module) -> HSAIDLayer | None:
    layer: Any = model._modules.get(NAME)
    return layer


def check_one(call: str, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise ValueError(
            f"{call}: expected one adapter, because the weights of a model lie in one subspace, got {list(names)}"
        )


# --- calls of the model, whoever calls it: its weights do not change during one


class _Open(threading.local):
    def __init__(self) -> None:
        self.calls: list[ExitStack] = []


_open = _Open()


def hook(model: nn.Module) -> None:
    """Lets each call of the model be one of the active adapter's."""
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_exit, always_call=True)


def unhook(model: nn.Module) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, own in hooks.items() if own in (_enter, _exit)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _enter(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        _open.calls.append(ExitStack())  # before anything is raised: torch calls `_exit` then, too
        if (layer := layer_of(model)) is not None:
            _open.calls[-1].enter_context(layer.computing())


def _exit(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        _open.calls.pop().close()
