"""`Merging`: reads W0 tensor by tensor, and writes W0 + factor * P theta into files of the same layout.

This takes the memory of a few pieces, and of the largest tensor where a file has another dtype than training had, or
divides tensors otherwise than the model does: whatever the size of the model is.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsaid_kernels.app.architecture import fresh_tensors
from hsaid_kernels.app.merge.base import CONFIG, GENERATION_CONFIG, INDEX, Base
from hsaid_kernels.app.merge.names import Names, Unit
from hsaid_kernels.app.merge.tensor_files import FLOATS, NAMES, About, NewFiles, TensorFile
from hsaid_kernels.app.merge.weights import Trained, Weights, check_together
from hsaid_kernels.files import replaced_folder
from hsaid_kernels.wrapper.checkpoint.configuration import SAMPLES
from hsaid_kernels.wrapper.w0.values import samples_of

MAPPED = 2**21  # bytes that the system may map around one that is read
THREADS = 2  # each makes and writes a tensor: where one waits to write, the other computes
STALE = "model*.safetensors*"  # files of an older merge, which would be loaded in place of the new ones


class Merging:
    """A merge of checkpoints into the files of W0: checked by the constructor, done by `write`.

    Args:
        trained: the checkpoints; of several, the weighted sum of their updates is added to W0.
        model: the architecture that was trained, a model of transformers with tensors of any values.
        base: the files of W0.
        seed: with which `hsaid train` initialized what is in no file; None if that is not known.
        dtype: of all float tensors; None means those that `HSAID.merge()` gives.

    Attributes:
        units: what is written one after another.

    Raises ValueError if the checkpoints do not fit the model, each other or W0, or if the files lack a tensor of W0.
    """

    def __init__(
        self, trained: Sequence[Trained], model: nn.Module, base: Base, seed: int | None, dtype: torch.dtype | None
    ):
        check_together(trained)
        self._model: Any = model
        self._base, self._dtype = base, dtype
        self._weights = Weights(trained, model)
        self._file_of = {name: file for file in base.files.values() for name in file.entries}
        self._entries = {name: file.entries[name] for name, file in self._file_of.items()}
        self._names = Names(model, {name: entry.shape for name, entry in self._entries.items()})
        self._check_floats()
        self._fresh = self._make_fresh([name for name in self._names.missing if name not in self._weights.full], seed)
        self._weights.find_dtypes(dict(self._samples()))
        added = [Unit({}, (name,), self._names.saved([name])) for name in self._names.missing]
        self.units = [*self._names.units, *added]

    def _check_floats(self) -> None:
        trained = self._weights.projected | self._weights.full
        for unit in self._names.units:
            for source in unit.sources:
                if (dtype := self._entries[source].dtype) not in FLOATS and not trained.isdisjoint(unit.names):
                    raise ValueError(
                        f"model: expected trained tensors in {', '.join(FLOATS)}, got {source!r} in {dtype} in "
                        f"{str(self._base.folder)!r}"
                    )

    def _make_fresh(self, missing: Sequence[str], seed: int | None) -> dict[str, Tensor]:
        """W0 of the tensors that are in no file. Raises ValueError if it is not known."""
        if not missing:
            return {}
        if seed is None:
            names = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"model: expected W0 of all tensors in {str(self._base.folder)!r}, got none of {names}, which were "
                "initialized for training: train such tensors fully (train_fully=), or save the model before wrapping "
                "it, and name that folder here"
            )
        return fresh_tensors(self._model, missing, seed)

    # --- W0

    def _samples(self) -> Iterator[tuple[str, Tensor]]:
        """(name, some values) of each projected tensor that is its own file's, or fresh."""
        for unit in self._names.units:
            if unit.converter is None and unit.names[0] in self._weights.projected:
                tensors = self._in_files(unit).values()
                yield unit.names[0], samples_of(tensors, SAMPLES)[0]
                for file in self._files(unit):
                    file.used(min(SAMPLES * MAPPED, sum(tensor.nbytes for tensor in tensors)))
        for name in self._weights.projected & self._fresh.keys():
            yield name, samples_of([self._fresh[name]], SAMPLES)[0]

    def _in_files(self, unit: Unit) -> dict[str, Tensor]:
        return {source: self._file_of[source].tensor(source) for source in unit.sources}

    def _files(self, unit: Unit) -> set[TensorFile]:
        return {self._file_of[source] for source in unit.sources}

    def _w0(self, unit: Unit) -> dict[str, Tensor]:
        """{name: tensor of W0}, in the dtype of training. Raises ValueError if it is not what was trained from."""
        dtype = self._weights.w0_dtype(unit.names[0])
        if not unit.sources:
            return {name: self._fresh[name].to(dtype) for name in unit.names if name in self._fresh}
        tensors = self._in_files(unit).items()
        w0 = self._names.in_model(unit, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors})
        if unit.converter is not None:
            chosen = [name for name in unit.names if name in self._weights.projected]
            samples = samples_of([w0[name] for name in chosen], SAMPLES)
            self._weights.check(dict(zip(chosen, samples, strict=True)))
        return w0

    # --- writing

    def write(self, out: Path, advance: Callable[[str], None]) -> None:
        """Writes the merged model; `out` has all of it, or what it had before. Calls `advance` after each unit.

        Raises OSError if it cannot be written, ValueError if `dtype` cannot hold a weight.
        """
        with replaced_folder(out, CONFIG, STALE) as folder:
            for path in self._base.others():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._base.folder / path, folder / path)
            files: dict[Path, dict[str, About]] = {}
            for unit in self.units:
                for name, about in self._about(unit).items():
                    files.setdefault(folder / self._place(name, unit), {})[name] = about
            with NewFiles(files, {path: self._base.files[path.name].metadata for path in files}) as new:
                self._write_all(new, advance)
            if self._base.index is not None:
                self._write_index(folder, files)
            self._write_config(folder)

    def _write_all(self, new: NewFiles, advance: Callable[[str], None]) -> None:
        units = sorted(self.units, key=self._order)
        pool = ThreadPoolExecutor(THREADS)
        try:
            for unit, done in zip(units, [pool.submit(self._write, unit, new) for unit in units], strict=True):
                done.result()
                advance(self._place(unit.names[0], unit))
        finally:
            pool.shutdown(cancel_futures=True)

    def _place(self, name: str, unit: Unit) -> str:
        """The name of the file that gets a tensor: the one that has it, or its W0; the last one for what is new."""
        found = (self._file_of[own].path.name for own in (name, *unit.sources) if own in self._file_of)
        return next(found, max(self._base.files))

    def _order(self, unit: Unit) -> tuple[str, int]:
        """As tensors follow one another in the files, so that these are read from the beginning to the end."""
        places = ((self._file_of[source].path.name, self._entries[source].begin) for source in unit.sources)
        return min(places, default=(max(self._base.files), sys.maxsize))

    def _about(self, unit: Unit) -> dict[str, About]:
        """What is saved of a unit, by name."""
        entries = [self._entries[source] for source in unit.sources]
        if entries and entries[0].dtype not in FLOATS:
            return {name: (entries[0].dtype, shape, entries[0].size) for name, shape in unit.saved.items()}
        dtype = self._dtype or self._weights.dtype(unit.names[0])
        return {name: (NAMES[dtype], shape, math.prod(shape) * dtype.itemsize) for name, shape in unit.saved.items()}

    def _write(self, unit: Unit, new: NewFiles) -> None:
        w0 = self._w0(unit)
        if unit.converter is None:
            (name,), (saved,), files = unit.names, unit.saved, self._files(unit)
            for piece in self._weights.pieces(name, w0.get(name)):
                new.write(saved, self._cast(name, piece))
                for file in files:
                    file.used(piece.nbytes)
            return
        shapes = {name: tensor.shape for name, tensor in w0.items()}
        made = {name: torch.cat([*self._weights.pieces(name, w0.pop(name))]).view(shapes[name]) for name in unit.names}
        for saved, tensor in self._names.in_files(made).items():
            new.write(saved, self._cast(saved, tensor.contiguous()))
        for file in self._files(unit):
            file.forget()

    def _cast(self, name: str, piece: Tensor) -> Tensor:
        if self._dtype is None or piece.dtype == self._dtype or not piece.is_floating_point():
            return piece
        cast = piece.to(self._dtype)
        if not torch.equal(cast.isfinite(), piece.isfinite()):
            raise ValueError(
                f"dtype: expected one that holds all weights, got {self._dtype}, where {name!r} has {piece.abs().max()}"
            )
        return cast

    def _write_index(self, folder: Path, files: Mapping[Path, Mapping[str, About]]) -> None:
        index = self._base.index or {}
        places = {name: path.name for path, tensors in files.items() for name in tensors}
        size = sum(size for tensors in files.values() for _, _, size in tensors.values())
        metadata = {**index.get("metadata", {}), "total_size": size}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(parameter.numel() for parameter in self._model.parameters())
        text = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")

    def _write_config(self, folder: Path) -> None:
        """Writes the configurations as transformers does when it saves a model."""
        model = self._model
        first = next(iter(dict(model.named_parameters())))
        model.config.dtype = str(self._dtype or self._weights.dtype(first)).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            from transformers import GenerationConfig

            generation = model.generation_config
            if (self._base.folder / GENERATION_CONFIG).exists():
                generation = GenerationConfig.from_pretrained(self._base.folder)
            generation.save_pretrained(folder)
