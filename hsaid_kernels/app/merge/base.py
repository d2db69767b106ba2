"""`Base`: the folder of the model that was trained from: the files of W0, and what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsaid_kernels.app.architecture import BESIDE
from hsaid_kernels.app.merge.tensor_files import TensorFile
from hsaid_kernels.files import read_file

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODULES = "modules.json"  # of a SentenceTransformer, whose other modules have folders of their own


class Base:
    """The files of a pretrained model of transformers.

    Attributes:
        folder: where they are.
        files: {file name: `TensorFile`}.
        index: what INDEX says, None if there is a single file.

    Raises ValueError, with a message that begins with "model", if these are not whole safetensors files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index: dict[str, Any] | None = None
        names = [WEIGHTS]
        if not (folder / WEIGHTS).exists():
            self.index = self._read_index()
            names = sorted(set(self.index["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).exists()]:
            raise ValueError(
                f"model: expected the {len(names)} files that {INDEX} names, got a folder {str(folder)!r} without "
                f"{', '.join(missing)}: copy or download what is missing"
            )
        try:
            self.files = {name: TensorFile(folder / name) for name in names}
        except ValueError as error:
            raise ValueError(f"model: {error}") from None

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        if not path.exists():
            found = sorted(path.name for path in self.folder.glob("*.bin"))
            got = f"one with {', '.join(found[:2])}" if found else "one without"
            raise ValueError(
                f"model: expected a folder with {WEIGHTS} or {INDEX}, got {got}: {str(self.folder)!r}; "
                "load the model by from_pretrained() and save it by save_pretrained(), which writes such files"
            )
        try:
            index = json.loads(read_file(path))
            if all(isinstance(name, str) and Path(name).name == name for name in index["weight_map"].values()):
                return dict(index)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(f"model: expected an index of files, got a damaged {str(path)!r}")

    def others(self) -> Iterator[Path]:
        """The paths, relative to the folder, of what belongs to the model beside its weights: a tokenizer, ..."""
        for path in sorted(self.folder.iterdir()):
            written = path.name in (CONFIG, GENERATION_CONFIG) or path.name.endswith(".index.json")
            if path.is_file() and path.name.endswith(BESIDE) and not written:
                yield path.relative_to(self.folder)
        for name in self._modules():
            found = sorted((self.folder / name).rglob("*"))
            yield from (path.relative_to(self.folder) for path in found if path.is_file())

    def _modules(self) -> list[str]:
        """The folders of a SentenceTransformer's other modules."""
        try:
            modules = json.loads(read_file(self.folder / MODULES))
            return [module["path"] for module in modules if Path(module["path"]).name == module["path"] != ""]
        except (OSError, ValueError, KeyError, TypeError):
            return []
