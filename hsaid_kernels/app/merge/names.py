"""How transformers names a model's tensors in files: which tensors of a file hold W0, under which names W is saved.

A file may lack or have the prefix of the base model ("bert."), have names of earlier versions, or a tensor for each
expert where the model has one for all. transformers knows all of that, and is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Unit:
    """What becomes one another: tensors of files, and tensors of the model; most often one of each.

    Attributes:
        sources: {name in the files: the pattern by which `converter` knows it}; empty if W0 is in no file.
        names: those of the model's tensors.
        saved: {name in the merged files: shape}.
        converter: makes the model's tensors of those in the files; None if they are the same.
    """

    sources: dict[str, str]
    names: tuple[str, ...]
    saved: dict[str, tuple[int, ...]]
    converter: Any = None


class Names:
    """The names of a model's tensors in files.

    Args:
        model: a model of transformers, with tensors of any values.
        files: {name: shape} of the tensors in the files of W0.

    Attributes:
        units: the `Unit` of each tensor of the model that is in the files, in the model's shape.
        missing: the first names of the parameters that are not.
    """

    def __init__(self, model: Any, files: Mapping[str, tuple[int, ...]]):
        self._model = model
        self._state: dict[str, Tensor] = model.state_dict()
        known: dict[int, str] = {}
        every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._first = {name: known.setdefault(id(tensor), name) for name, tensor in every}
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # Whether the files have the names that the model has by itself, as they most often do.
        self._plain = all(files.get(name) == shape for name, shape in parameters.items())
        transforms = [] if self._plain else get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        groups: dict[str, dict[str, str]] = {}  # {name in the model: sources}
        for name in sorted(files, key=dot_natural_key):
            own, pattern = self._in_model(name)
            if own in self._state and (pattern or files[name] == tuple(self._state[own].shape)):
                groups.setdefault(own, {})[name] = pattern or ""
        # What was used is what transformers reverses when it saves a model.
        model._weight_conversions = [each for each in transforms if getattr(each, "was_used", lambda: True)()]
        # Of a tied tensor that the files have several times, the first name counts.
        chosen = [own for own in groups if own == self._first[own] or self._first[own] not in groups]
        self.units = [self._unit(own, groups[own], files) for own in chosen]
        found = {name for unit in self.units for name in unit.names}
        self.missing = [name for name in parameters if name not in found]

    def _in_model(self, name: str) -> tuple[str, str | None]:
        """(name in the model, the pattern of a converter or None) of a tensor in the files."""
        if self._plain:
            return name, None
        prefix = self._model.base_model_prefix
        found = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and name in self._state:  # it has the new name already
            return rename_source_key(name, [], [], prefix, self._state)
        return found

    def _unit(self, own: str, sources: dict[str, str], files: Mapping[str, tuple[int, ...]]) -> Unit:
        pattern = next(iter(sources.values()))
        converter = next((each for each in self._converters if pattern in each.source_patterns), None)
        if converter is None:
            names: Iterable[str] = [own]
        else:
            names = self._convert(converter, own, sources, {name: _meta(files[name]) for name in sources})
        return Unit(sources, tuple(self._first[name] for name in names), self.saved(names), converter)

    def saved(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """{name in files: shape} of what transformers saves of these tensors."""
        if self._plain:
            return {name: tuple(self._state[name].shape) for name in names}
        tensors = self.in_files({name: _meta(self._state[name].shape) for name in names})
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def in_model(self, unit: Unit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: the model's tensor}, from those in the files."""
        if unit.converter is None:
            return dict(zip(unit.names, tensors.values(), strict=True))
        return self._convert(unit.converter, unit.names[0], unit.sources, tensors)

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: tensor in the merged files}, from the model's."""
        found: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return found

    def _convert(
        self, converter: Any, own: str, sources: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        converter = deepcopy(converter)
        for name, tensor in tensors.items():
            converter.add_tensor(own, name, sources[name], tensor)
        made = converter.convert(own, model=self._model, config=self._model.config)
        made = made[0] if isinstance(made, tuple) else made  # with a list of errors in transformers 5.0
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _meta(shape: Iterable[int]) -> Tensor:
    return torch.empty(tuple(shape), device="meta")
