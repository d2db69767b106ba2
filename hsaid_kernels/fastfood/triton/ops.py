"""The ops of the Triton backend: tables, kernel launches. For any GPU that Triton supports.

The schemas of the ops are defined and explained in fastfood/ops.py. Every op is opaque to torch.compile: the host code
looks up tables by plan and takes addresses of tensors, which fake tensors do not have.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.fastfood import plan
from hsaid_kernels.fastfood.triton import arguments, memory, paley, streams, tables, tile
from hsaid_kernels.fastfood.triton import fastfood_adjoint as adjoint_kernels
from hsaid_kernels.fastfood.triton import fastfood_adjoint_one_chunk as one_chunk_kernels
from hsaid_kernels.fastfood.triton import hadamard_transform as hadamard_kernels
from hsaid_kernels.fastfood.triton.arguments import INTERPRETED
from hsaid_kernels.fastfood.triton.fastfood_forward import fastfood_forward_kernel, forward_z_kernel
from hsaid_kernels.fastfood.triton.stream_values import stream_values_kernel

SIZE = 256  # values of a program, in the kernels that add up sums
SEGMENT_PROGRAMS = 128  # the most programs that transform sums: each has a scratch of two tiles

Made = TypeVar("Made")
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a plan's table -> what was made from it
_lines: dict[torch.device, Tensor] = {}


def _once(table: Tensor, key: tuple, make: Callable[[], Made]) -> Made:
    """The result of `make` for a plan's table, kept for as long as the table lives.

    `make` copies to the device and waits for it, which a CUDA graph cannot capture. So a step must run once before it
    is captured, as PyTorch asks anyway, and its plan must live as long as the graph.
    """
    made = _made.setdefault(table, {})
    key = (*key, None if table.is_inference() else table._version)
    if key not in made:
        made[key] = make()
    return made[key]


def _normal_lines(device: torch.device) -> Tensor:
    if device not in _lines:
        _lines[device] = streams.normal_lines(device)
    return _lines[device]


@functools.cache  # asking the driver is slow
def _is_cuda() -> bool:
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"


@functools.cache
def _options(threads: int, registers: int | None = None) -> dict:
    """The options to compile a kernel with. No multiplication is fused with an addition (docs/rng.md)."""
    if INTERPRETED:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    options = dict(num_warps=max(1, threads // target.warp_size), enable_fp_fusion=False)
    return options | dict(maxnreg=registers) if registers and _is_cuda() else options


def _programs(device: torch.device, q: int) -> int:
    """How many programs a device has room for: 512 threads a multiprocessor, at 128 registers each."""
    if INTERPRETED:
        return 3
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"] * (512 // tile.threads(q))


def _on(device: torch.device):
    """A context in which `device` is the current one: Triton launches on the current device's current stream."""
    return contextlib.nullcontext() if INTERPRETED else torch.get_device_module(device).device(device)


def _workspace(floats: int, device: torch.device) -> Tensor:
    return torch.empty(floats, dtype=torch.float32, device=device)


class _Forward(NamedTuple):
    needed: list[int]
    waves: list[tables.Runs]
    programs: int  # at most, in a launch


def _forward_tables(
    device: torch.device,
    segments: Tensor,
    holes: Tensor,
    q: int,
    chunks: int,
    one_chunk: bool,
    num_base: int,
    numel: int,
) -> _Forward:
    def make() -> _Forward:
        rows, _ = tables.check_segments(segments, 1 << q, num_base or None)
        hole_rows, needed = tables.check_holes(holes, rows, num_base or None, numel)
        pieces = tables.pieces_of(rows, hole_rows)
        t, programs = tile.tile_bits(q), _programs(device, q)
        if one_chunk:
            waves = [tables.runs_of(pieces, t, programs, device, chunks)]
        else:
            waves = tables.forward_waves_of(pieces, t, programs, chunks, device)
        return _Forward(needed, waves, programs)

    key = (device, q, chunks, one_chunk, num_base, numel, holes.shape, holes.numpy().tobytes())
    return _once(segments, key, make)


def prepare(of: plan.Plan, device: torch.device) -> None:
    """Makes a plan's tables on a device before the first call would.

    With torch.compile(mode="reduce-overhead"), memory that is allocated in that call is taken back afterwards.
    """
    q = arguments.width_bits(of.width)
    _normal_lines(device)
    _forward_tables(device, of.segments, of.holes, q, of.chunks, of.one_chunk, len(of.names), of.numel)
    if of.one_chunk:
        _adjoint_lists(device, of.segments, q, of.chunks, len(of.names), of.run_blocks)
    else:
        _adjoint_tables(device, of.segments, q, len(of.names), of.run_blocks)


def fastfood_forward(
    theta: Tensor,
    factors: Tensor,
    base: Sequence[Tensor],
    segments: Tensor,
    seed: int,
    width: int,
    rademacher: bool,
    holes: Tensor,
    numel: int,
    dtype: torch.dtype,
    listed: Tensor | None = None,
    span: int = 1,
    one_chunk: bool = False,
) -> Tensor:
    theta, q, t = arguments.theta_of(theta), arguments.width_bits(width), tile.tile_bits(arguments.width_bits(width))
    device, chunks = theta.device, arguments.num_chunks(theta, width)
    one_chunk = one_chunk and chunks > 1
    arguments.check(dtype in memory.CODES, f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    made = _forward_tables(device, segments, holes, q, chunks, one_chunk, len(base), numel)
    factors = arguments.floats(factors, theta, len(segments), "factors")

    waves, tiles, most = made.waves, 0, max(len(wave.pieces) for wave in made.waves)
    if listed is not None:
        arguments.check_listed(listed, span, theta, segments, width)
        # The only segment is the first piece. A program computes which tiles it takes: no table is made for a list.
        waves, tiles, most = waves[:1], len(listed) << (plan.MAX_WIDTH.bit_length() - 1 - t), 1
        numel = tiles << t
    out = torch.empty(numel, dtype=dtype, device=device)
    if listed is not None and tiles == 0:
        return out
    zs = _workspace(chunks << q if one_chunk else most * chunks << t, device)
    scratch = _workspace(made.programs << t, device)
    options = _options(tile.threads(q), 128)
    with _on(device):
        bases = memory.table_of(base or [None] * len(made.needed), made.needed, device, "base")
        allowed = 1 | 1 << memory.CODES[dtype]
        arguments.check(bases.codes & ~allowed == 0, "base: expected tensors in float32 or in the dtype of the weights")
        for rows, first, pieces in waves:
            programs = len(first) - 1 if listed is None else min(made.programs, tiles)
            count = (len(pieces) if listed is None and not one_chunk else 1) * chunks
            of_z = None if one_chunk else pieces
            forward_z_kernel[(min(made.programs, count),)](
                theta, theta.numel(), chunks, seed, of_z, count, zs, scratch, Q=q, T=t, **options
            )
            fastfood_forward_kernel[(programs,)](
                chunks,
                factors,
                seed,
                rows if listed is None else pieces,
                first,
                listed,
                0 if listed is None else len(listed),
                bases.words,
                out,
                _normal_lines(device),
                zs,
                scratch,
                OUT=memory.CODES[dtype],
                BASES=bases.codes,
                PREFETCH=_is_cuda(),
                RADEMACHER=rademacher,
                ONE_CHUNK=one_chunk,
                Q=q,
                T=t,
                **options,
            )
    return out


def _adjoint_pieces(segments: Tensor, q: int, num_grads: int, run_blocks: int) -> tuple[list[int], np.ndarray]:
    """(number of elements that each gradient must have, `tables.pieces_of` the segments)."""
    t = tile.tile_bits(q)
    good = 1 <= run_blocks <= plan.MAX_BLOCKS
    arguments.check(good, f"run_blocks: expected 1 to {plan.MAX_BLOCKS}, got {run_blocks}")
    # Kernels count the values of a group in 32 bits.
    arguments.check(run_blocks << t < 2**31, f"run_blocks: Triton expects at most {(2**31 - 1) >> t}, got {run_blocks}")
    rows, needed = tables.check_segments(segments, 1 << q, num_grads)
    return needed, tables.pieces_of(rows)


def _adjoint_tables(
    device: torch.device, segments: Tensor, q: int, num_grads: int, run_blocks: int
) -> tuple[list[int], list[tables.Wave]]:
    def make() -> tuple[list[int], list[tables.Wave]]:
        needed, pieces = _adjoint_pieces(segments, q, num_grads, run_blocks)
        return needed, tables.waves_of(pieces, q, tile.tile_bits(q), run_blocks, device)

    return _once(segments, (device, q, num_grads, run_blocks), make)


def _adjoint_lists(
    device: torch.device, segments: Tensor, q: int, chunks: int, num_grads: int, run_blocks: int
) -> tuple[list[int], tables.Lists]:
    def make() -> tuple[list[int], tables.Lists]:
        needed, pieces = _adjoint_pieces(segments, q, num_grads, run_blocks)
        return needed, tables.lists_of(pieces, q, chunks, device)

    return _once(segments, (device, q, num_grads, run_blocks, chunks), make)


def fastfood_adjoint(
    theta: Tensor,
    factors: Tensor,
    grads: Sequence[Tensor | None],
    segments: Tensor,
    seed: int,
    width: int,
    rademacher: bool,
    run_blocks: int,
    listed: Tensor | None = None,
    span: int = 1,
    one_chunk: bool = False,
) -> tuple[Tensor, Tensor]:
    theta, q, t = arguments.theta_of(theta), arguments.width_bits(width), tile.tile_bits(arguments.width_bits(width))
    device, dim = theta.device, theta.numel()
    if one_chunk and arguments.num_chunks(theta, width) > 1:
        return _adjoint_of_one_chunk(theta, factors, grads, segments, seed, q, rademacher, run_blocks, listed, span)
    needed, of_plan = _adjoint_tables(device, segments, q, len(grads), run_blocks)
    factors = arguments.floats(factors, theta, len(segments), "factors")

    dtheta, dfactors, num_listed = torch.zeros_like(theta), torch.zeros_like(factors), 0
    # Of a wave: number of items, first item, three arguments of adjoint_sums_kernel, items, parts, finished parts.
    waves = [(len(wave.items), 0, (None, None, None), *wave) for wave in of_plan]
    if listed is not None:
        arguments.check_listed(listed, span, theta, segments, width)
        num_listed, (items, parts, _) = len(listed), of_plan[0]  # whose first rows are the only segment's
        needed = [*needed[:-1], num_listed * plan.MAX_WIDTH]
        waves = [
            (wave.items, wave.first_item, wave[2:], items, parts, int(wave.after < 0))
            for wave in tables.listed_waves_of(num_listed, q, t, run_blocks)
        ]
    if all(tensor is None for tensor in grads) or not waves:
        return dtheta, dfactors
    sums = _workspace(max(wave[0] for wave in waves) << t, device)
    carry = _workspace(2 << q if len(waves) > 1 else 1, device)
    scratch = _workspace(min(SEGMENT_PROGRAMS, max(wave[-1] for wave in waves)) << (t + 1), device)
    lines, small = _normal_lines(device), _options(128)
    size, runs = min(SIZE, width), plan.MAX_WIDTH // width
    with _on(device):
        table = memory.table_of(grads, needed, device, "grads")
        for chunk in range(-(-dim // width)):
            part_of_dtheta = dtheta[chunk * width : (chunk + 1) * width]
            count = len(part_of_dtheta)
            for num_items, first_item, of_listed, items, parts, finished in waves:
                adjoint_kernels.adjoint_groups_kernel[(num_items,)](
                    table.words,
                    seed,
                    chunk,
                    items,
                    listed,
                    num_listed,
                    first_item,
                    sums,
                    lines,
                    run_blocks,
                    GRADS=table.codes,
                    RADEMACHER=rademacher,
                    RUNS=runs,
                    Q=q,
                    T=t,
                    **_options(tile.threads(q)),
                )
                adjoint_kernels.adjoint_sums_kernel[(len(parts), width // size)](
                    table.words, parts, *of_listed, sums, carry, RUNS=runs, Q=q, SIZE=size, **small
                )
                if finished == 0:
                    continue
                adjoint_kernels.adjoint_segments_kernel[(min(SEGMENT_PROGRAMS, finished),)](
                    theta,
                    dim,
                    factors,
                    table.words,
                    seed,
                    chunk,
                    parts,
                    finished,
                    sums,
                    scratch,
                    dfactors,
                    Q=q,
                    T=t,
                    **_options(tile.threads(q), 128),
                )
                adjoint_kernels.adjoint_gradients_kernel[(-(-count // size),)](
                    parts, sums, part_of_dtheta, count, finished, Q=q, SIZE=size, **small
                )
    return dtheta, dfactors


def _adjoint_of_one_chunk(
    theta: Tensor,
    factors: Tensor,
    grads: Sequence[Tensor | None],
    segments: Tensor,
    seed: int,
    q: int,
    rademacher: bool,
    run_blocks: int,
    listed: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor]:
    """`fastfood_adjoint` if each block is made from one of several chunks."""
    device, dim, width, t = theta.device, theta.numel(), 1 << q, tile.tile_bits(q)
    chunks, programs = arguments.num_chunks(theta, width), _programs(device, q)
    needed, lists = _adjoint_lists(device, segments, q, chunks, len(grads), run_blocks)
    factors = arguments.floats(factors, theta, len(segments), "factors")
    if listed is not None:
        arguments.check_listed(listed, span, theta, segments, width)
        if len(listed) == 0:
            return torch.zeros_like(theta), torch.zeros_like(factors)
        needed = [*needed[:-1], len(listed) * plan.MAX_WIDTH]
        lists = tables.listed_of(lists, listed, span)

    dtheta, dfactors = torch.empty_like(theta), torch.empty_like(factors)
    zs, scratch = _workspace(chunks << q, device), _workspace(programs << t, device)
    totals = torch.zeros(chunks << q, dtype=torch.float32, device=device)
    dots = torch.zeros(len(lists.places), dtype=torch.float32, device=device)  # those of missing gradients stay 0
    runs = plan.MAX_WIDTH // width
    most = max(runs, tables.SUMS_FLOATS >> t)  # runs of a wave
    groups = -(-lists.longest // (run_blocks * runs))
    groups_of_wave = min(groups, most // runs)
    runs_of_wave = min(groups_of_wave * runs, lists.longest)  # of a chunk
    chunks_of_wave = min(chunks, most // runs_of_wave)
    sums = _workspace(chunks_of_wave * runs_of_wave << t, device)
    of_tiles, shape = _options(tile.threads(q), 128), dict(Q=q, T=t)
    with _on(device):
        table = memory.table_of(grads, needed, device, "grads")
        forward_z_kernel[(min(programs, chunks),)](
            theta, dim, chunks, seed, None, chunks, zs, scratch, **shape, **of_tiles
        )
        for chunk in range(0, chunks, chunks_of_wave):
            for group in range(0, groups, groups_of_wave):
                some = min(chunks_of_wave, chunks - chunk)
                one_chunk_kernels.adjoint_lists_kernel[(runs_of_wave, some)](
                    table.words,
                    factors,
                    seed,
                    chunks,
                    lists.pieces,
                    lists.places,
                    lists.first,
                    listed,
                    0 if listed is None else len(listed),
                    chunk,
                    group,
                    zs,
                    sums,
                    dots,
                    _normal_lines(device),
                    run_blocks,
                    GRADS=table.codes,
                    RADEMACHER=rademacher,
                    RUNS=runs,
                    **shape,
                    **_options(tile.threads(q)),
                )
                size = min(SIZE, width)
                one_chunk_kernels.adjoint_lists_sums_kernel[(some, width // size)](
                    lists.first,
                    chunk,
                    group,
                    runs_of_wave,
                    run_blocks,
                    sums,
                    totals,
                    RUNS=runs,
                    SIZE=size,
                    **shape,
                    **_options(128),
                )
        one_chunk_kernels.adjoint_chunks_kernel[(min(programs, chunks),)](
            seed, dim, chunks, totals, scratch, dtheta, **shape, **of_tiles
        )
        one_chunk_kernels.adjoint_factors_kernel[(len(segments),)](
            lists.pieces, None if listed is None else len(listed), dots, dfactors, RUNS=runs, Q=q, **_options(128)
        )
    return dtheta, dfactors


def _in_memory(x: Tensor) -> Tensor:
    """The tensor as kernels take it: bfloat16 as 16-bit integers."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def hadamard_transform(x: Tensor, scale: float, order: int = 1) -> Tensor:
    if order != 1:  # of whole rows in float32: hadamard_transform_of_order in fastfood/ops.py makes them
        return hadamard_transform(_paley(x, order).unflatten(-1, (order, -1)), scale).view(x.shape)
    arguments.check(x.dtype in memory.CODES, f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    arguments.check(x.dim() >= 1 and x.shape[-1] >= 1, "x: expected a last dimension of at least 1")
    arguments.check_place(x, "x")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    dim = x.shape[-1]
    rows, q, code = x.numel() // dim, (dim - 1).bit_length(), memory.CODES[x.dtype]
    source, target = _in_memory(x.contiguous()), _in_memory(out)
    with _on(x.device):
        if q <= plan.MAX_WIDTH.bit_length() - 1:
            t = tile.tile_bits(q)
            programs = -(-rows // (1 << (t - q)))
            hadamard_kernels.hadamard_rows_kernel[(programs,)](
                source,
                target,
                rows,
                dim,
                dim,
                1,
                scale,
                IN=code,
                OUT=code,
                FINISH=True,
                Q=q,
                T=t,
                **_options(tile.threads(q)),
            )
            return out
        first = plan.MAX_WIDTH.bit_length() - 1
        between = _workspace(rows << q, x.device)
        hadamard_kernels.hadamard_rows_kernel[(rows << (q - first),)](
            source,
            between,
            rows,
            dim,
            1 << q,
            1 << (q - first),
            scale,
            IN=code,
            OUT=0,
            FINISH=False,
            Q=first,
            T=first,
            **_options(tile.threads(first)),
        )
        for bit in range(first, q, hadamard_kernels.COLUMN_BITS):
            stages = min(hadamard_kernels.COLUMN_BITS, q - bit)
            last = bit + stages == q
            hadamard_kernels.hadamard_columns_kernel[(rows << (q - 12),)](
                between,
                target if last else between,
                1 << q,
                dim if last else 1 << q,
                scale,
                OUT=code if last else 0,
                FINISH=last,
                BIT=bit,
                M=stages,
                T=12,
                **_options(tile.threads(12)),
            )
    return out


def _paley(x: Tensor, order: int) -> Tensor:
    """Paley's matrix over rows of x, order * 2^k floats each."""
    arguments.check_order(order, x)
    total, source, out = x.numel() // order, x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if total:
        with _on(x.device):
            paley.paley_kernel[(triton.cdiv(total, SIZE),)](
                source,
                out,
                x.shape[-1] // order,
                total,
                ORDER=order,
                PLUS=paley.plus_bits(order),
                SIZE=SIZE,
                **_options(SIZE),
            )
    return out


def stream_values(
    like: Tensor, seed: int, stream: int, purpose: int, block: int, chunk: int, width: int, rademacher: bool
) -> Tensor:
    arguments.check_stream(purpose, block, chunk)
    q = arguments.width_bits(width)
    arguments.check_place(like, "like")
    out = _workspace(width, like.device)
    with _on(like.device):
        stream_values_kernel[(1,)](
            out,
            seed,
            stream,
            block,
            chunk,
            _normal_lines(like.device),
            PURPOSE=purpose,
            RADEMACHER=rademacher,
            Q=q,
            T=tile.tile_bits(q),
            **_options(tile.threads(q)),
        )
    return out
