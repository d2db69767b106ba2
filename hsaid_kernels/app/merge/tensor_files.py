"""Safetensors files larger than memory: `TensorFile` is read piece by piece, `NewFiles` are written so.

The library safetensors reads and writes whole tensors, and writes a file all at once. Here a file is mapped into
memory, and what has been read of it is given back. A new file has the bytes that the library would write.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
# The order of tensors in a file is by dtype, and then by name.
ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
HELD = 2**25  # bytes that are read of a file before its memory is given back


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as safetensors calls it, its shape, and the bytes from `begin` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


About = tuple[str, Sequence[int], int]  # of a tensor: its dtype as safetensors calls it, its shape, its bytes


class TensorFile:
    """A safetensors file, mapped into memory.

    Attributes:
        entries: {name: `Entry`}, in the order of the file.
        metadata: {key: text}, or None.

    Raises OSError if the file cannot be read, ValueError if it is not a whole safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt") as checked:
                self.metadata: dict[str, str] | None = checked.metadata()
        except SafetensorError as error:
            raise ValueError(f"expected a whole safetensors file, got {str(path)!r}: {error}") from None
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:start])
        header.pop("__metadata__", None)
        found = {
            name: Entry(item["dtype"], tuple(item["shape"]), *(start + place for place in item["data_offsets"]))
            for name, item in header.items()
        }
        self.entries = dict(sorted(found.items(), key=lambda item: item[1].begin))
        self._held = 0

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as a view of the file, which must not be written to; one that is not float as bytes."""
        entry = self.entries[name]
        if not entry.size:
            return torch.empty(entry.shape, dtype=FLOATS.get(entry.dtype, torch.uint8))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.size, offset=entry.begin)
        if (dtype := FLOATS.get(entry.dtype)) is None:
            return flat
        aligned = flat if entry.begin % dtype.itemsize == 0 else flat.clone()
        return aligned.view(dtype).view(entry.shape)

    def used(self, size: int) -> None:
        """Notes that so many bytes have been read one after another, of which now and then it calls `forget`."""
        self._held += size
        if self._held >= HELD:
            self.forget()

    def forget(self) -> None:
        """Gives back the memory that holds what has been read."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._held = 0


class NewFiles:
    """Safetensors files whose tensors are written piece by piece, in any order. A context manager.

    Several threads may write, a tensor each.

    Args:
        files: {path: {name: what the tensor is}}; none of these files exists.
        metadata: {path: {key: text}, or None}.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, About]], metadata: Mapping[Path, Mapping[str, str] | None]):
        self._files, self._metadata = files, metadata
        self._next: dict[str, tuple[int, int]] = {}  # {name: (handle, offset) of what is written next}

    def __enter__(self) -> NewFiles:
        with contextlib.ExitStack() as stack:
            for path, tensors in self._files.items():
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                stack.callback(os.close, handle)
                self._begin(handle, tensors, self._metadata[path])
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _begin(self, handle: int, tensors: Mapping[str, About], metadata: Mapping[str, str] | None) -> None:
        """Writes the header of a file."""
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape, size) in sorted(tensors.items(), key=lambda item: (_rank(item[1][0]), item[0])):
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._next |= {name: (handle, start + header[name]["data_offsets"][0]) for name in tensors}
        _write(handle, 0, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, piece: Tensor) -> None:
        """Writes the next values of the tensor `name`."""
        handle, at = self._next[name]
        view = memoryview(piece.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # has a buffer
        _write(handle, at, view)
        self._next[name] = handle, at + len(view)


def _write(handle: int, at: int, view: memoryview) -> None:
    while len(view):
        written = os.pwrite(handle, view, at)
        at, view = at + written, view[written:]


def _rank(dtype: str) -> int:
    return ORDER.index(dtype) if dtype in ORDER else len(ORDER)
