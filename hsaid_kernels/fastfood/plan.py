"""`Plan`: divides tensors into segments and blocks, and describes them in static tables for the kernels.

A *segment* is a 2-D strided piece of a tensor, by default the whole tensor. It has its own factor and random basis. Its
values, read row by row, are divided into *blocks* of n = `width` consecutive values; the last block may be shorter.
Each segment has a stream id, a hash of the tensor's name and the segment's label, which selects its random streams. Its
basis therefore does not depend on the other segments of the plan. All tensors are stored in one *flat buffer*. Kernels
get the plan's tables and a few numbers, but no names.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsaid_kernels.fastfood.limits import CHUNKS, DIAGONALS, MAX_DIM, MAX_WIDTH, MIN_WIDTH, NORMALIZATIONS

GENERATOR = "philox4x32-10.v1"
MAX_BLOCKS = 2**28  # limited by the random generator: block number and a 4-bit purpose share a 32-bit counter word
MAX_CHUNKS = 2**16  # likewise: chunk and call number share one
ALIGNMENT = 64  # elements; in the flat buffer every tensor starts at a cache line, for every dtype
# The adjoint sums the blocks of each *run*, then 2^14 / n runs as a *group*, then the groups of a segment. A group
# covers run_blocks tiles of 2^14 values. 22 tiles keep the number of groups of mBERT small (42 MB of sums) and occupy
# an H100, which runs 264 thread blocks at a time, for two rounds. Smaller plans use shorter runs, so that there are
# enough groups to occupy a GPU.
MAX_RUN_BLOCKS = 22
RUN_SHARES = 108  # about the least number of groups of a plan whose runs are shorter than MAX_RUN_BLOCKS

# The least n by default. Narrower blocks give no better basis and cost more (docs/cpu.md): the CPU kernels draw most of
# them value by value, and the faster CUDA kernels begin here.
MIN_DEFAULT_WIDTH = 256

# Columns of Plan.segments and Plan.holes, in the order of the fields of struct Segment in csrc/core/plan.h.
COLUMNS = ("tensor", "offset", "out_offset", "rows", "cols", "row_stride", "stream", "first_block")


@dataclass(frozen=True)
class Segment:
    """`rows` x `cols` values of the tensor named `tensor`. Row r starts at its element offset + r * row_stride."""

    tensor: str
    offset: int
    rows: int
    cols: int
    row_stride: int
    label: str = ""  # distinguishes the segments of one tensor
    stream: str = ""  # the name in the stream id, "" for that of the tensor

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def stream_id(self) -> int:
        return stream_id(self.stream or self.tensor, self.label)


def whole(name: str, shape: Sequence[int]) -> Segment:
    """The segment that covers a whole tensor, as a single row."""
    numel = math.prod(shape)
    return Segment(name, 0, 1, numel, numel)


def stream_id(name: str, label: str = "") -> int:
    """The 64-bit stream id of a segment: BLAKE2b-64 of its name and label in UTF-8 (docs/rng.md), as a signed int64."""
    text = f"{name}\0{label}" if label else name
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _uncovered(name: str, size: int, pieces: Sequence[Segment]) -> list[tuple[int, int]]:
    """The intervals [start, end) of a tensor with `size` elements that no piece covers.

    Raises ValueError if two pieces overlap.
    """
    if all(p.rows == 1 or p.row_stride == p.cols for p in pieces):  # thousands of experts, in tensors of a billion
        spans = sorted((p.offset, p.offset + p.numel) for p in pieces)
        twice = any(end > start for (_, end), (start, _) in itertools.pairwise(spans))
        edges = [0, *itertools.chain(*spans), size]
        found = [(end, start) for end, start in zip(edges[::2], edges[1::2], strict=True) if start > end]
    else:
        covered = torch.zeros(size, dtype=torch.bool, device="cpu")
        for p in pieces:
            covered.as_strided((p.rows, p.cols), (p.row_stride, 1), p.offset).fill_(True)
        twice = int(covered.count_nonzero()) != sum(p.numel for p in pieces)
        outside = torch.zeros(1, dtype=torch.int8, device="cpu")
        changes = torch.diff((~covered).to(torch.int8), prepend=outside, append=outside).nonzero().flatten().tolist()
        found = list(zip(changes[::2], changes[1::2], strict=True))
    if twice:
        raise ValueError(f"segments: expected at most one over any element, got several in {name!r}")
    return found


def _runs(name: str, intervals: Iterable[tuple[int, int]]) -> list[Segment]:
    """Intervals as segments. Neighbours of equal length and distance form one `Segment` with rows."""
    pieces: list[Segment] = []
    for start, end in intervals:
        last = pieces[-1] if pieces else None
        if last and last.cols == end - start:
            stride = start - last.offset - (last.rows - 1) * last.row_stride
            if last.rows == 1 or stride == last.row_stride:
                pieces[-1] = Segment(name, last.offset, last.rows + 1, last.cols, stride)
                continue
        pieces.append(Segment(name, start, 1, end - start, end - start))
    return pieces


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int. Raises TypeError if it is not an integer, ValueError if it is not in [low, high].

    The message begins with `name`, the argument's name.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    number: int = value.__index__()
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """`value`. Raises ValueError if it is not one of `choices`. The message begins with `name`, the argument's name."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def default_width(dim: int) -> int:
    """The default block size n for len(theta) = dim: min(next power of two >= dim, 16384), and at least 256."""
    return min(max(1 << (dim - 1).bit_length(), MIN_DEFAULT_WIDTH), MAX_WIDTH)


def default_chunks(dim: int) -> str:
    """`Plan`'s choice of chunks for len(theta) = dim: "all" up to 16,384, beyond that "one"."""
    return "all" if dim <= MAX_WIDTH else "one"


_known: weakref.WeakSet[Plan] = weakref.WeakSet()


def find_plan(key: str) -> Plan:
    """An existing plan with this `Plan.key`, which may have other `scales`. Raises RuntimeError if there is none.

    Graphs of torch.compile refer to plans by key, because keys are the same in every process.
    """
    plan = next((plan for plan in _known if plan.key == key), None)
    if plan is None:
        raise RuntimeError("plan: expected one that is in use, got a compiled graph whose HSAID or Projection is gone")
    return plan


class Plan:
    """All static information about a projection: the segments and the numbers that kernels need, but no tensor values.

    Args:
        shapes: {tensor name: shape}, in the order of the flat buffer.
        dim: len(theta), 1 to 2**24.
        seed: 0 to 2**64 - 1, the key of the Philox random generator.
        width: n, a power of two from 32 to 16,384. None means `default_width(dim)`. A theta longer than n is divided
            into ceil(dim / n) *chunks*.
        chunks: from which chunks of theta each block is made: "all", their sum, or "one" of them, in turn from block to
            block, at the cost of a single chunk however long theta is (docs/method.md). With a single chunk both are
            the same. None means `default_chunks(dim)`.
        diagonal: "gaussian" (as in Fastfood) or "rademacher" (random signs; an isometry on whole blocks).
        normalize: "tensor" (s_i = 1 / sqrt(n D_i)) or "global" (s_i = 1 / sqrt(n sum D)). D_i is the size of the whole
            tensor of segment i, so the segments of a tensor together move as far as the undivided tensor would.
        scale: multiplies all s_i. A power of two changes no digit: theta / scale makes the same weights to the bit.
        segments: the segments to project, in order. No two may overlap or have the same stream id. None means one
            segment for each tensor.
        part: whether the plan is for some of the tensors of a larger one, so that others may use what these do not.

    Attributes:
        pieces: the S segments, as `Segment` objects.
        segments: int64 [S, len(COLUMNS)], the same as a table, on the CPU for every backend.
        holes: int64 [H, len(COLUMNS)], a table of the rest of the flat buffer: elements of tensors that are in no
            segment, which keep W0, and gaps between tensors, which are 0 and have -1 in column "tensor".
        chunks: the number of chunks of theta. Each has `width` values, the last one fewer; if `one_chunk`, all have the
            same number, or the last one fewer. Missing values are zeros.
        one_chunk: whether each block is made from one of several chunks.
        scales: float32 [S], the s_i, on the CPU; `scales_on` has them on other devices.
        key: a hash of all the arguments, the same in every process. `scales`, which `select` replaces, are not in it:
            no op reads them, because its factors are already multiplied by them.
        offsets: {name: index of the tensor's first element in the flat buffer}.
        numel: length of the flat buffer in elements, including gaps.

    Raises:
        TypeError: dim, seed or width is not an integer.
        ValueError: an argument is out of range or not one of the choices, a tensor is empty, the segments do not fit
            their tensors, or with one chunk a block some chunk of theta is used by none.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        dim: int,
        seed: int = 0,
        *,
        width: int | None = None,
        chunks: str | None = None,
        diagonal: str = "gaussian",
        normalize: str = "tensor",
        scale: float = 1.0,
        segments: Sequence[Segment] | None = None,
        part: bool = False,
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
        self.chunks = -(-self.dim // self.width)
        if self.chunks > MAX_CHUNKS:
            raise ValueError(f"width: expected at least {self.dim / MAX_CHUNKS:.0f} with dim {self.dim}, got {width}")
        chosen = default_chunks(self.dim) if chunks is None else check_choice("chunks", chunks, CHUNKS)
        self.one_chunk = chosen == "one" and self.chunks > 1
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
        if not part:
            self._check_chunks()
        lists = self.chunks if self.one_chunk else 1  # of blocks that are divided into groups by themselves
        tiles = sum(piece.numel for piece in self.pieces) // MAX_WIDTH // lists
        self.run_blocks = max(1, min(MAX_RUN_BLOCKS, tiles // max(1, RUN_SHARES // lists)))
        self.segments = torch.tensor(self._rows(), dtype=torch.int64, device="cpu")
        self.holes = torch.tensor(self._hole_rows(), dtype=torch.int64, device="cpu").view(-1, len(COLUMNS))
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        total = sum(sizes.values())
        self.scales = torch.tensor(
            [1 / math.sqrt(self.width * (sizes[p.tensor] if normalize == "tensor" else total)) for p in self.pieces],
            dtype=torch.float32,
            device="cpu",
        ).mul_(scale * (math.sqrt(self.chunks) if self.one_chunk else 1.0))
        self._scales = {"cpu": self.scales}
        known = (self.shapes, self.pieces, self.dim, self.seed, self.width, diagonal, normalize, GENERATOR)
        self.key = hashlib.blake2b(
            repr((*known, "one") if self.one_chunk else known).encode(), digest_size=16
        ).hexdigest()
        _known.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scales": {"cpu": self.scales}}  # the loading machine may lack the other devices

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _known.add(self)

    @property
    def rademacher(self) -> bool:
        return self.diagonal == "rademacher"

    def blocks(self, piece: Segment) -> int:
        """The number of blocks of `width` values in a segment."""
        return -(-piece.numel // self.width)

    def first_chunk(self, piece: Segment) -> int:
        """The chunk from which block 0 of a segment is made if `one_chunk`. Block b is made from the b-th after it."""
        return piece.stream_id % 2**64 % self.chunks

    def spread(self, theta: torch.Tensor) -> torch.Tensor:
        """theta [dim] as kernels take it: if `one_chunk`, [chunks * width], chunks of equal length padded with zeros.

        Otherwise theta itself, whose last chunk alone is shorter.
        """
        if not self.one_chunk:
            return theta
        length = -(-self.dim // self.chunks)
        even = torch.nn.functional.pad(theta, (0, length * self.chunks - self.dim)).view(self.chunks, length)
        return torch.nn.functional.pad(even, (0, self.width - length)).flatten()

    def gathered(self, spread: torch.Tensor) -> torch.Tensor:
        """The inverse of `spread`: [dim]."""
        if not self.one_chunk:
            return spread
        length = -(-self.dim // self.chunks)
        return spread.view(self.chunks, self.width)[:, :length].flatten()[: self.dim].clone()

    def chunks_reached(self) -> int:
        """From how many chunks some block is made. The other chunks have no effect on the weights."""
        if not self.one_chunk:
            return self.chunks
        ends = torch.zeros(2 * self.chunks + 1, dtype=torch.int64, device="cpu")
        for piece in self.pieces:
            first = self.first_chunk(piece)
            ends[first] += 1
            ends[first + min(self.blocks(piece), self.chunks)] -= 1
        covered = ends.cumsum(0)[:-1].view(2, -1).sum(0)  # segments that go on from the first chunk after the last
        return int(covered.count_nonzero())

    def scales_on(self, device: torch.device) -> torch.Tensor:
        """`scales` on `device`. The copy is made once per device and kept."""
        key = str(device)
        if key not in self._scales:
            self._scales[key] = self.scales.to(device)
        return self._scales[key]

    def views(self, flat: torch.Tensor, names: Sequence[str] | None = None) -> list[torch.Tensor]:
        """The tensors `names` (None means all) as views of a flat buffer [numel], each with its shape."""
        places = [(self.offsets[name], self.shapes[name]) for name in names or self.names]
        return [flat[start : start + math.prod(shape)].view(shape) for start, shape in places]

    def select(self, names: Iterable[str]) -> Plan:
        """The plan for some of the tensors, which keep the random basis and the scales that they have in this plan."""
        shapes = {name: self.shapes[name] for name in names}
        rows = [row for row, piece in enumerate(self.pieces) if piece.tensor in shapes]
        selected = Plan(
            shapes,
            self.dim,
            self.seed,
            width=self.width,
            chunks="one" if self.one_chunk else "all",
            diagonal=self.diagonal,
            normalize=self.normalize,
            segments=[self.pieces[row] for row in rows],
            part=True,
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
            other = seen.setdefault(p.stream_id, p)
            if other is not p:
                names = f"{(p.tensor, p.label)} and {(other.tensor, other.label)}"
                raise ValueError(f"segments: {names} have the same stream id")

    def _check_chunks(self) -> None:
        reached = self.chunks_reached()
        if reached < self.chunks:
            blocks = sum(map(self.blocks, self.pieces))
            raise ValueError(
                f"chunks: expected blocks that use each of {self.chunks} chunks of theta, got {blocks} blocks of "
                f"{self.width} weights, which use {reached}: take chunks='all', a smaller width or a smaller dim"
            )

    def _hole_rows(self) -> list[list[int]]:
        rows = []
        pieces: dict[str, list[Segment]] = {name: [] for name in self.names}
        for p in self.pieces:
            pieces[p.tensor].append(p)
        for i, (name, shape) in enumerate(self.shapes.items()):
            size, start = math.prod(shape), self.offsets[name]
            if pieces[name] != [whole(name, shape)]:
                rows += [
                    [i, hole.offset, start + hole.offset, hole.rows, hole.cols, hole.row_stride, 0, 0]
                    for hole in _runs(name, _uncovered(name, size, pieces[name]))
                ]
            gap = -size % ALIGNMENT
            if gap:
                rows.append([-1, 0, start + size, 1, gap, gap, 0, 0])
        return rows

    def _rows(self) -> list[list[int]]:
        index = {name: i for i, name in enumerate(self.names)}
        rows, first_block = [], 0
        for p in self.pieces:
            stream = p.stream_id
            i = index[p.tensor]
            blocks = self.blocks(p)
            if blocks > MAX_BLOCKS:
                raise ValueError(f"width: {p.tensor!r} has {blocks} blocks of {self.width}, at most {MAX_BLOCKS} work")
            start = self.offsets[p.tensor] + p.offset
            rows.append([i, p.offset, start, p.rows, p.cols, p.row_stride, stream, first_block])
            first_block += blocks
        return rows
