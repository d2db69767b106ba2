"""Tables on the device that assign the work of a plan to programs, made once for each plan.

Every row is self-contained: it begins with the fields of its segment or hole that a kernel needs. Work is measured in
tiles of 2^T values (tile.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from hsaid_kernels.fastfood import plan

# Columns of all tables. COLS is 0 for a dense piece, SEGMENT -1 for a hole. The last four depend on the table:
#   forward, shares    FIRST, LAST: tiles; FROM: the place of z, or, if each block is made from one chunk, the first
#                      block's chunk
#   adjoint, pieces    FROM: how many blocks come before; if each block is made from one chunk
#   adjoint, items     FIRST, LAST: runs
#   adjoint, parts     FIRST, LAST: the places of their runs' sums; FROM, TO: the places in `carry` of the sum of the
#                      waves before and of the one for the next wave, -1 if there is none
COLUMNS = tl.constexpr(12)
TENSOR, OFFSET, OUT_OFFSET, COUNT, COLS, ROW_STRIDE, STREAM, SEGMENT, FIRST, LAST, FROM, TO = (
    tl.constexpr(i) for i in range(COLUMNS.value)
)

PIECE_COST = 1  # the work of coming to another piece, in tiles
SUMS_FLOATS = 11_000_000  # the most floats of runs' sums, or of z, in a wave, unless one group, or piece, has more


class Runs(NamedTuple):
    """A wave of the forward, whose z are held at a time. Program p processes runs first[p] ... first[p + 1] - 1."""

    rows: Tensor  # int64 [runs, COLUMNS]
    first: Tensor  # int64 [programs + 1]
    pieces: Tensor  # int64 [pieces, COLUMNS], whose z are made first; FROM is as in `rows`


class Wave(NamedTuple):
    """A wave of the adjoint, whose sums are held at a time: items, each a tile wide, and parts of segments of them."""

    items: Tensor  # int64 [items, COLUMNS]
    parts: Tensor  # int64 [parts, COLUMNS]
    finished: int  # the number of parts that are the last of their segments, as all but the wave's last part are


class ListedWave(NamedTuple):
    """A wave for listed blocks. The list differs at every step, so it has no tables: its segment's items are alike."""

    first_item: int
    items: int
    runs: int
    before: int  # as FROM
    after: int  # as TO


class Lists(NamedTuple):
    """Of the adjoint if each block is made from one chunk: the blocks of each chunk, in order."""

    pieces: Tensor  # int64 [segments, COLUMNS]
    places: Tensor  # int64 [blocks], chunk by chunk: segment << 32 | number of the block in the segment
    first: Tensor  # int64 [chunks + 1]: where the places of each chunk begin
    first_chunk: int  # of the first segment
    longest: int  # the most blocks of a chunk


def _column(table: np.ndarray, name: str) -> np.ndarray:
    return table[:, plan.COLUMNS.index(name)]


def _rows(table: Tensor, what: str, at_least: int) -> np.ndarray:
    good = table.device.type == "cpu" and table.dtype == torch.int64 and table.dim() == 2 and table.is_contiguous()
    if not good or table.shape[1] != len(plan.COLUMNS) or len(table) < at_least:
        raise RuntimeError(f"{what}: expected a contiguous int64 table [rows, {len(plan.COLUMNS)}] on the CPU")
    return table.numpy()


def _ends(table: np.ndarray, offset: str) -> np.ndarray:
    rows, cols, stride = (_column(table, name) for name in ("rows", "cols", "row_stride"))
    return _column(table, offset) + (rows - 1) * stride + cols


def _are_pieces(table: np.ndarray) -> np.ndarray:
    rows, cols, stride = (_column(table, name) for name in ("rows", "cols", "row_stride"))
    offset, out_offset = _column(table, "offset"), _column(table, "out_offset")
    end = np.maximum(offset, out_offset) + rows.astype(float) * stride + cols  # a float cannot overflow
    return (rows >= 1) & (cols >= 1) & (stride >= cols) & (offset >= 0) & (out_offset >= 0) & (end < 2.0**62)


def _needed(table: np.ndarray) -> list[int]:
    """The number of elements that each tensor must have to contain its pieces."""
    owner = _column(table, "tensor")
    needed = np.zeros(owner.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(needed, owner[owner >= 0], _ends(table, "offset")[owner >= 0])
    return needed.tolist()


def check_segments(segments: Tensor, width: int, num_tensors: int | None) -> tuple[np.ndarray, list[int]]:
    """(table, number of elements that each tensor must have).

    Raises RuntimeError for a table with which a kernel could reach beyond a tensor.
    """
    table = _rows(segments, "segments", 1)
    blocks = -(-_column(table, "rows") * _column(table, "cols") // width)
    before = np.concatenate([[0], np.cumsum(blocks)[:-1]])
    owner = _column(table, "tensor")
    good = _are_pieces(table) & (owner >= 0) & (_column(table, "first_block") == before) & (blocks <= plan.MAX_BLOCKS)
    if num_tensors is not None:
        good &= owner < num_tensors
    if not good.all():
        raise RuntimeError(f"segments: row {int(np.argmin(good))} is no segment of this plan")
    return table, _needed(table)


def check_holes(
    holes: Tensor, segments: np.ndarray, num_tensors: int | None, numel: int
) -> tuple[np.ndarray, list[int]]:
    """(table of holes, number of elements that each tensor must have for it and the segments). Raises RuntimeError."""
    table = _rows(holes, "holes", 0)
    owner = _column(table, "tensor")
    good = _are_pieces(table) & (owner >= -1)
    if num_tensors is not None:
        good &= owner < num_tensors
    if not good.all():
        raise RuntimeError(f"holes: row {int(np.argmin(good))} is no hole of this plan")
    both = np.concatenate([segments, table])
    end = int(_ends(both, "out_offset").max())
    if end > numel:
        raise RuntimeError(f"numel: expected at least {end}, got {numel}")
    return table, _needed(both)


def _on(device: torch.device, *tables: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(table).to(device) for table in tables]


def pieces_of(segments: np.ndarray, holes: np.ndarray | None = None) -> np.ndarray:
    """The plan's tables as int64 [pieces, COLUMNS], where the last four columns are still empty."""
    table = segments if holes is None else np.concatenate([segments, holes])
    rows, cols, stride = (_column(table, name) for name in ("rows", "cols", "row_stride"))
    dense = (rows == 1) | (cols == stride)
    pieces = np.full((len(table), COLUMNS.value), -1, dtype=np.int64)
    for to, source in ((TENSOR, "tensor"), (OFFSET, "offset"), (OUT_OFFSET, "out_offset"), (STREAM, "stream")):
        pieces[:, to.value] = _column(table, source)
    pieces[:, COUNT.value] = rows * cols
    pieces[:, COLS.value] = np.where(dense, 0, cols)
    pieces[:, ROW_STRIDE.value] = stride
    pieces[: len(segments), SEGMENT.value] = np.arange(len(segments))
    if (large := ~dense & (rows * cols >= 2**32)).any():
        got = (rows * cols)[large][0]
        raise RuntimeError(f"segments: Triton expects strided pieces of less than 2**32 elements, got one of {got}")
    return pieces


def _first_chunks(pieces: np.ndarray, chunks: int) -> np.ndarray:
    """The chunk of each piece's first block, if each block is made from one."""
    return (pieces[:, STREAM.value].astype(np.uint64) % np.uint64(chunks)).astype(np.int64)


def runs_of(pieces: np.ndarray, t: int, programs: int, device: torch.device, chunks: int | None = None) -> Runs:
    """The tiles of the pieces in equal shares for the programs, cut where pieces end.

    `chunks` is their number if each block is made from one.
    """
    pieces = pieces.copy()
    pieces[:, FROM.value] = np.arange(len(pieces)) if chunks is None else _first_chunks(pieces, chunks)
    tiles = -(-pieces[:, COUNT.value] // (1 << t))
    first_tile = np.concatenate([[0], np.cumsum(tiles)])
    cost = first_tile + PIECE_COST * np.arange(len(pieces) + 1)
    programs = min(programs, int(first_tile[-1]))
    at = cost[-1] * np.arange(programs + 1) // programs
    row = np.searchsorted(cost[1:-1], at, side="right")
    shares = first_tile[row] + np.clip(at - cost[row] - PIECE_COST, 0, tiles[row])
    shares[-1] = first_tile[-1]
    cuts = np.unique(np.concatenate([first_tile, shares]))
    begin, end = cuts[:-1], cuts[1:]
    piece = np.searchsorted(first_tile, begin, side="right") - 1
    rows = pieces[piece].copy()
    rows[:, FIRST.value] = begin - first_tile[piece]
    rows[:, LAST.value] = end - first_tile[piece]
    return Runs(*_on(device, rows, np.searchsorted(begin, shares), pieces))


def forward_waves_of(pieces: np.ndarray, t: int, programs: int, chunks: int, device: torch.device) -> list[Runs]:
    """Waves of as many pieces as have at most SUMS_FLOATS values of z, or of one."""
    most = max(1, SUMS_FLOATS // (chunks << t))
    return [runs_of(pieces[i : i + most], t, programs, device) for i in range(0, len(pieces), most)]


def _by_chunk(chunk: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """(numbers of the blocks whose chunks are given, chunk by chunk; where each chunk's begin [chunks + 1])."""
    ordered, order = chunk.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(chunks + 1, device=chunk.device))


def lists_of(pieces: np.ndarray, q: int, chunks: int, device: torch.device) -> Lists:
    blocks = -(-pieces[:, COUNT.value] // (1 << q))
    pieces = pieces.copy()
    pieces[:, FROM.value] = np.cumsum(blocks) - blocks
    segment = np.repeat(np.arange(len(pieces)), blocks)
    block = np.arange(len(segment)) - pieces[segment, FROM.value]
    first_chunks = _first_chunks(pieces, chunks)
    order, first = _by_chunk(torch.from_numpy((first_chunks[segment] + block) % chunks), chunks)
    places = torch.from_numpy(segment << 32 | block)[order]
    made = (table.to(device) for table in (torch.from_numpy(pieces), places, first))
    return Lists(*made, int(first_chunks[0]), int(first.diff().max()))


def listed_of(lists: Lists, listed: Tensor, span: int) -> Lists:
    """The lists of only the listed blocks of a plan's one segment. Only the device knows them: `longest` is a bound."""
    chunks = len(lists.first) - 1
    blocks = (listed[:, None] * span + torch.arange(span, device=listed.device)).flatten()
    places, first = _by_chunk((lists.first_chunk + blocks) % chunks, chunks)
    longest = min(len(blocks), lists.longest + -(-span // chunks))  # the last entry goes on behind the segment's end
    return lists._replace(places=places, first=first, longest=longest)


def waves_of(pieces: np.ndarray, q: int, t: int, run_blocks: int, device: torch.device) -> list[Wave]:
    """Waves of the adjoint. An item has 2^(t-q) runs side by side, whose sums are a tile. Waves end where groups do."""
    side_by_side, of_group = 1 << (t - q), plan.MAX_WIDTH >> q
    most = max(of_group // side_by_side, SUMS_FLOATS >> t)
    waves: list[tuple[list, list]] = []
    free, carries = 0, 0
    for piece in pieces:
        blocks = -(-int(piece[COUNT.value]) // (1 << q))
        whole, rest = divmod(blocks, run_blocks * of_group)  # whole groups, blocks of a last one
        runs, run = whole * of_group + min(rest, of_group), 0
        while run < runs:
            taken = min(runs - run, free * side_by_side // of_group * of_group)
            if taken == 0:
                waves.append(([], []))
                free = most
                continue
            items, parts = waves[-1]
            part = piece.copy()
            part[FIRST.value] = len(items) * side_by_side
            part[LAST.value] = part[FIRST.value] + taken
            part[FROM.value] = carries % 2 if run else -1  # two places, because a wave may read one and write one
            for first in range(run, run + taken, side_by_side):
                item = piece.copy()
                item[FIRST.value], item[LAST.value] = first, min(first + side_by_side, run + taken)
                items.append(item)
                free -= 1
            run += taken
            if run < runs:
                carries += 1
                part[TO.value] = carries % 2
            parts.append(part)
    return [
        Wave(*_on(device, np.stack(items), np.stack(parts)), sum(int(part[TO.value] < 0) for part in parts))
        for items, parts in waves
    ]


def listed_waves_of(count: int, q: int, t: int, run_blocks: int) -> list[ListedWave]:
    """Waves for `count` tiles of 2^14 values, of which every group has all its runs.

    A wave has one part, so one place in `carry` is enough.
    """
    of_group = plan.MAX_WIDTH >> t  # items
    groups, most = -(-count // run_blocks), max(1, SUMS_FLOATS // plan.MAX_WIDTH)
    waves = []
    for first in range(0, groups, most):
        items = min(most, groups - first) * of_group
        before, after = -1 if first == 0 else 0, -1 if first + most >= groups else 0
        waves.append(ListedWave(first * of_group, items, items << (t - q), before, after))
    return waves
