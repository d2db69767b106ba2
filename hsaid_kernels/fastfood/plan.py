"""From tensors to segments to blocks: where every block of n values goes, made once as a static table.

A *segment* is a 2-D strided piece of a tensor (the whole tensor by default); read row by row its values are cut into
*blocks* of n = width values, the last one ragged.  Each segment has a stream id of its own, a hash of its name, so its
random basis depends on nothing else in the plan.  Kernels see the plan's tables and a few numbers, no names.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsaid_kernels.fastfood.limits import DIAGONALS, MAX_DIM, MAX_WIDTH, MIN_WIDTH, NORMALIZATIONS

GENERATOR = "philox4x32-10.v1"
MAX_BLOCKS = 2**28  # the block number shares a counter word with 4 bits of purpose
ALIGNMENT = 64  # elements; every tensor starts on a whole cache line of the flat buffer in any dtype
# The adjoint adds up runs of blocks, then 2^14 / n runs as a group, then the groups of a segment. Groups of 22 tiles of
# 2^14 values keep the groups of mBERT few enough (42 MB of sums) and make two rounds on the 264 places of an H100;
# what is smaller is cut finer, so that a GPU has work everywhere.
MAX_RUN_BLOCKS = 22
RUN_SHARES = 108  # of the plan, at least, where runs are shorter

# Columns of Plan.segments and Plan.holes, in the order of struct Segment in csrc/core/plan.h.
COLUMNS = ("tensor", "offset", "out_offset", "rows", "cols", "row_stride", "stream", "first_block")


@dataclass(frozen=True)
class Segment:
    """`rows` x `cols` values of a tensor (by name), row r starting at its element offset + r * row_stride."""

    tensor: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    label: str = ""  # tells several segments of one tensor apart

    @property
    def numel(self) -> int:
        return self.rows * self.cols


def whole(name: str, shape: Sequence[int]) -> Segment:
    """The segment that is all of a tensor: one row."""
    numel = math.prod(shape)
    return Segment(name, 0, 1, numel, numel)


def stream_id(name: str, label: str = "") -> int:
    """64-bit stream id of a segment: BLAKE2b-64 of its UTF-8 name (docs/rng.md), signed as int64 tables want it."""
    text = f"{name}\0{label}" if label else name
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _runs(name: str, covered: torch.Tensor) -> list[Segment]:
    """The runs of False in a mask [numel], those of equal length and distance joined into pieces of several rows."""
    outside = torch.zeros(1, dtype=torch.int8, device="cpu")
    edges = torch.diff((~covered).to(torch.int8), prepend=outside, append=outside).nonzero().flatten()
    pieces: list[Segment] = []
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    for start, end in zip(starts, ends, strict=True):
        last = pieces[-1] if pieces else None
        if last and last.cols == end - start:
            stride = start - last.offset - (last.rows - 1) * last.row_stride
            if last.rows == 1 or stride == last.row_stride:
                pieces[-1] = Segment(name, last.offset, last.rows + 1, last.cols, stride)
                continue
        pieces.append(Segment(name, start, 1, end - start, end - start))
    return pieces


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; TypeError or ValueError that names the argument otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    number: int = value.__index__()
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def default_width(dim: int) -> int:
    """min(next power of two >= dim, 16384), and at least 32."""
    return min(max(1 << (dim - 1).bit_length(), MIN_WIDTH), MAX_WIDTH)


_known: weakref.WeakSet[Plan] = weakref.WeakSet()


def find_plan(key: str) -> Plan:
    """A living plan with this `Plan.key`, which is how graphs of torch.compile name it, here and in later processes."""
    plan = next((plan for plan in _known if plan.key == key), None)
    if plan is None:
        raise RuntimeError("plan: expected one that is in use, got a compiled graph whose HSAID or Projection is gone")
    return plan


class Plan:
    """Everything about a projection but the values: a static table of segments and the numbers that kernels need.

    Args:
        shapes: tensor name -> shape, in the order of the flat buffer.
        dim: len(theta), 1 to 2**20.
        seed: 0 to 2**64 - 1, the Philox key.
        width: n, a power of two from 32 to 16,384; None for `default_width(dim)`. theta longer than n is cut into
            ceil(dim / n) chunks.
        diagonal: "gaussian" (Fastfood) or "rademacher" (exact isometry on whole blocks).
        normalize: "tensor" (s_i = 1 / sqrt(n D_i)) or "global" (s = 1 / sqrt(n sum D)); D_i is the size of the tensor
            that a segment is of, so the heads of a tensor together move as far as the tensor whole.
        segments: the pieces that are projected, at most one over any element; None for every tensor whole.

    Attributes:
        segments: int64 [S, len(COLUMNS)], on the CPU for every backend.
        holes: int64 [H, len(COLUMNS)], the rest of the flat buffer in the same form: elements of no segment, which are
            W0, and with -1 for the tensor the gaps between tensors, which are 0.
        scales: float32 [S], s_i, on the CPU; `scales_on(device)` has them elsewhere.
        key: a hash of all of this: equal plans have equal keys, in every process.
        offsets: name -> first element of the tensor in the flat buffer;  numel: length of that buffer.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        dim: int,
        seed: int = 0,
        *,
        width: int | None = None,
        diagonal: str = "gaussian",
        normalize: str = "tensor",
        segments: Sequence[Segment] | None = None,
    ):
        self.shapes = {name: tuple(int(s) for s in shape) for name, shape in shapes.items()}
        if not self.shapes:
            raise ValueError("shapes: expected at least one tensor, got none")
        for name, shape in self.shapes.items():
            if math.prod(shape) == 0 or min(shape, default=1) < 0:
                raise ValueError(f"shapes: expected tensors with at least one element, got {name!r} of shape {shape}")
        self.dim = check_int("dim", dim, 1, MAX_DIM)
        self.seed = check_int("seed", seed, 0, 2**64 - 1)
        self.width = default_width(self.dim) if width is None else check_int("width", width, MIN_WIDTH, MAX_WIDTH)
        if self.width & (self.width - 1):
            raise ValueError(f"width: expected a power of two from {MIN_WIDTH} to {MAX_WIDTH}, got {width}")
        self.diagonal = check_choice("diagonal", diagonal, DIAGONALS)
        self.normalize = check_choice("normalize", normalize, NORMALIZATIONS)
        self.names = tuple(self.shapes)
        self.pieces = tuple(whole(n, s) for n, s in self.shapes.items()) if segments is None else tuple(segments)

        self.offsets, end = {}, 0
        for name, shape in self.shapes.items():
            self.offsets[name] = end
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        self.numel = end
        self._check_pieces()
        tiles = sum(piece.numel for piece in self.pieces) // MAX_WIDTH
        self.run_blocks = max(1, min(MAX_RUN_BLOCKS, tiles // RUN_SHARES))
        self.segments = torch.tensor(self._rows(), dtype=torch.int64, device="cpu")
        self.holes = torch.tensor(self._hole_rows(), dtype=torch.int64, device="cpu").view(-1, len(COLUMNS))
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        total = sum(sizes.values())
        self.scales = torch.tensor(
            [1 / math.sqrt(self.width * (sizes[p.tensor] if normalize == "tensor" else total)) for p in self.pieces],
            dtype=torch.float32,
            device="cpu",
        )
        self._scales = {"cpu": self.scales}
        known = (self.shapes, self.pieces, self.dim, self.seed, self.width, diagonal, normalize, GENERATOR)
        self.key = hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()
        _known.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scales": {"cpu": self.scales}}  # a copy may be loaded where there is no such device

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _known.add(self)

    @property
    def chunks(self) -> int:
        """Chunks of theta, each of `width` values (the last one padded with zeros)."""
        return -(-self.dim // self.width)

    @property
    def rademacher(self) -> bool:
        return self.diagonal == "rademacher"

    def blocks(self, piece: Segment) -> int:
        """Blocks of `width` values that cover the piece."""
        return -(-piece.numel // self.width)

    def scales_on(self, device: torch.device) -> torch.Tensor:
        """`scales` on `device`, copied there the first time."""
        key = str(device)
        if key not in self._scales:
            self._scales[key] = self.scales.to(device)
        return self._scales[key]

    def views(self, flat: torch.Tensor, names: Sequence[str] | None = None) -> list[torch.Tensor]:
        """These tensors (all by default) inside a flat buffer [numel], as views."""
        places = [(self.offsets[name], self.shapes[name]) for name in names or self.names]
        return [flat[start : start + math.prod(shape)].view(shape) for start, shape in places]

    def select(self, names: Iterable[str]) -> Plan:
        """The plan of some of the tensors, each on the basis and at the scale that it has here."""
        shapes = {name: self.shapes[name] for name in names}
        rows = [row for row, piece in enumerate(self.pieces) if piece.tensor in shapes]
        selected = Plan(
            shapes,
            self.dim,
            self.seed,
            width=self.width,
            diagonal=self.diagonal,
            normalize=self.normalize,
            segments=[self.pieces[row] for row in rows],
        )
        selected.scales = self.scales[rows]
        selected._scales = {"cpu": selected.scales}
        return selected

    def _check_pieces(self) -> None:
        if not self.pieces:
            raise ValueError("segments: expected at least one, got none")
        seen: dict[int, Segment] = {}
        for p in self.pieces:
            if p.tensor not in self.shapes:
                raise ValueError(f"segments: expected pieces of tensors of the plan, got one of {p.tensor!r}")
            size = math.prod(self.shapes[p.tensor])
            end = p.offset + (p.rows - 1) * p.row_stride + p.cols
            if min(p.rows, p.cols) < 1 or p.offset < 0 or p.row_stride < p.cols or end > size:
                raise ValueError(f"segments: expected pieces inside their tensors, got {p} of {size} elements")
            other = seen.setdefault(stream_id(p.tensor, p.label), p)
            if other is not p:
                names = f"{(p.tensor, p.label)} and {(other.tensor, other.label)}"
                raise ValueError(f"segments: {names} have the same stream id")

    def _hole_rows(self) -> list[list[int]]:
        rows = []
        pieces = {name: [p for p in self.pieces if p.tensor == name] for name in self.names}
        for i, (name, shape) in enumerate(self.shapes.items()):
            size, start = math.prod(shape), self.offsets[name]
            if pieces[name] != [whole(name, shape)]:
                covered = torch.zeros(size, dtype=torch.bool, device="cpu")
                for p in pieces[name]:
                    covered.as_strided((p.rows, p.cols), (p.row_stride, 1), p.offset).fill_(True)
                if covered.count_nonzero() != sum(p.numel for p in pieces[name]):
                    raise ValueError(f"segments: expected at most one over any element, got several in {name!r}")
                rows += [
                    [i, hole.offset, start + hole.offset, hole.rows, hole.cols, hole.row_stride, 0, 0]
                    for hole in _runs(name, covered)
                ]
            gap = -size % ALIGNMENT
            if gap:
                rows.append([-1, 0, start + size, 1, gap, gap, 0, 0])
        return rows

    def _rows(self) -> list[list[int]]:
        index = {name: i for i, name in enumerate(self.names)}
        rows, first_block = [], 0
        for p in self.pieces:
            stream = stream_id(p.tensor, p.label)
            i = index[p.tensor]
            blocks = self.blocks(p)
            if blocks > MAX_BLOCKS:
                raise ValueError(f"width: {p.tensor!r} has {blocks} blocks of {self.width}, at most {MAX_BLOCKS} work")
            start = self.offsets[p.tensor] + p.offset
            rows.append([i, p.offset, start, p.rows, p.cols, p.row_stride, stream, first_block])
            first_block += blocks
        return rows
