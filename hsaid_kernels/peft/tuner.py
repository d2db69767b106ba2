"""`HSAIDModel`: what PEFT asks of a method: puts adapters into a model, and takes them out of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import _set_adapter, set_additional_trainable_modules
from torch import Tensor, nn

from hsaid_kernels.peft.config import HSAID_TYPE, HSAIDConfig
from hsaid_kernels.peft.layer import NAME, Adapter, HSAIDLayer, check_one, hook, layer_of, unhook
from hsaid_kernels.peft.tree import keep_names, left_out, without_adapters
from hsaid_kernels.wrapper.stand_in import StandIn
from hsaid_kernels.wrapper.w0.checks import plain
from hsaid_kernels.wrapper.w0.fsdp2 import is_sharded
from hsaid_kernels.wrapper.w0.quantized import check_known
from hsaid_kernels.wrapper.w0.stored import showing
from hsaid_kernels.wrapper.weights.traced import call_traced

PREFIX = f"{NAME}_"


class HSAIDModel(BaseTuner):
    """A model with adapters that are HSAIDs; see `HSAIDConfig`."""

    prefix = PREFIX
    tuner_layer_cls = HSAIDLayer
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def layer(self) -> HSAIDLayer:
        layer = layer_of(self.model)
        assert layer is not None
        return layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the model's own __deepcopy__, for which PEFT's model would be copied as the model
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return super().__getattr__(name)

    # --- putting adapters in

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Puts the adapter of this name in `peft_config` into the model. Raises what `HSAID` raises."""
        _check(model, self.peft_config[adapter_name])
        layer, active = layer_of(model), adapter_name in self.active_adapters
        new = layer is None
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        if layer is not None:
            layer.show(None)  # so that the model may be changed
        try:
            adapter, config = self._adapter(model, self.peft_config[adapter_name], warns=new)
            given = dict(model=model, peft_config=config, model_config=self.get_model_config(model))
            set_additional_trainable_modules(**given, adapter_name=adapter_name, activate_adapter=active)
            keep_names(model)
            if layer is None:
                layer = HSAIDLayer()
                model.add_module(NAME, layer)
                hook(model)
            layer.hsaid_adapters[adapter_name] = adapter
            layer.train(model.training)
            self.peft_config[adapter_name] = config
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        except Exception:
            new = False
            raise
        finally:
            if not new:  # whatever was trained before is trained still
                for parameter, required in before:
                    parameter.requires_grad_(required)
                if layer is not None:
                    layer.show_active()

    def _adapter(self, model: nn.Module, config: HSAIDConfig, warns: bool) -> tuple[Adapter, HSAIDConfig]:
        """A new adapter, and its configuration, which says what None means for this model."""
        config = copy.copy(config)  # the user's may be for other models too
        with without_adapters(), showing(model):
            names = left_out(model, config)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            adapter = Adapter(model, config.settings(names))
            if warns and config.target_modules is None:
                check_known(model)
        if not config.init_weights:
            nn.init.normal_(adapter.theta, std=3.0 / config.lr_scale)
        basis = adapter._basis
        self.targeted_module_names = list(dict.fromkeys(name.rpartition(".")[0] for name in basis.plan.names))
        for key in ("width", "chunks", "heads", "experts", "layouts", "pruned", "padding_rows"):
            setattr(config, key, getattr(basis.settings, key))
        return adapter, config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no layer of the model is replaced")

    # --- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.layer.attached
        if torch.compiler.is_compiling() and adapter is not None and adapter.one_graph:
            adapter._traced()
            return call_traced(adapter._source.maker, adapter.training, args, kwargs)
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT opens this context around each call, and around generate()."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: expected None, because a call runs on the weights of one adapter, got "
                f"{kwargs['adapter_names']!r}: set_adapter(), and call the model once for each"
            )
        if torch.compiler.is_compiling():
            yield
            return
        with self.layer.computing():
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        check_one("set_adapter()", [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    # --- taking adapters out

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self.active_adapters:  # of which PEFT does not tell modules_to_save that the other adapter did not have
            _set_adapter(self.model, self.active_adapters)

    def _check_merge_allowed(self) -> None:
        """Tied weights stay tied."""

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer, model = self.layer, self.model
        if merge and not layer.merged:
            layer.merge(safe_merge, adapter_names)
        elif layer.merged and not merge:
            layer.unmerge()
        layer.keep_merged()
        layer.show(None)
        unhook(model)
        del model._modules[NAME]
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def _check(model: nn.Module, config: HSAIDConfig) -> None:
    if any(isinstance(module, StandIn) for module in model.modules()):
        raise TypeError(
            "model: expected a plain module, got one that is or holds an HSAID: hand over what its unwrap() gives"
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if other := next((type(layer).__name__ for layer in layers if not isinstance(layer, HSAIDLayer)), None):
        raise TypeError(f"model: expected one without adapters of other methods, got {other}: unload() them first")
    if plain(model) is not model:
        raise TypeError("model: expected a plain module, got one of torch.compile: compile what get_peft_model() gives")
    if config.modules_to_save and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "modules_to_save: expected None for a model that FSDP2 has sharded, which would not gather the copies, got "
            f"{config.modules_to_save}: call fully_shard() after get_peft_model()"
        )
    if config.trainable_token_indices is not None:
        raise ValueError(
            "trainable_token_indices: expected None, because all rows of an embedding are projected, got "
            f"{config.trainable_token_indices!r}: name the embedding in modules_to_save to train it as it is"
        )


def register() -> None:
    """Makes the method known to PEFT. (Its own `register_peft_method` takes members of its enum alone.)"""
    PEFT_TYPE_TO_CONFIG_MAPPING[HSAID_TYPE] = HSAIDConfig
    PEFT_TYPE_TO_TUNER_MAPPING[HSAID_TYPE] = HSAIDModel
    PEFT_TYPE_TO_PREFIX_MAPPING[HSAID_TYPE] = PREFIX
