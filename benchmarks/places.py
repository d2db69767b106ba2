"""Whether it matters where W0, W or the gradients lie within a page: a scan of places, lines of 64 bytes.

    python benchmarks/places.py                          every fourth line of a page and those beside its beginning
    python benchmarks/places.py --all --out rows.json    all 64; the rows for report.py

A load may have to wait for an older store whose address has the same lowest twelve bits (docs/cpu.md, "Addresses"); how
long depends on the processor. W begins on a page, as the buffers of large weights do, where it is not W that is moved.
Measured is the CPU time of one thread, which others on the machine disturb least; in every round all places take turns,
in an order of its own. The slowest and the fastest of a scan are measured again and compared: the slowest of 64 is also
the one that was disturbed most. `pytest benchmarks` makes a part of the rows, --full all of them.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import report
import results
import torch
from helpers import ISAS, cpu_isa, threads

from hsaid_kernels.fastfood import ops
from hsaid_kernels.fastfood.plan import ALIGNMENT, Plan

WEIGHTS = 2_100 * 4_096  # so many bfloat16 are stored past the caches too
PAGE, LINE = 4096, 64
ALL = range(0, PAGE, LINE)
COARSE = sorted({*range(0, PAGE, 4 * LINE), LINE, 2 * LINE, PAGE - 2 * LINE, PAGE - LINE})
PARTS = {  # and the dtype of the weights or gradients
    "forward": torch.float32,
    "forward in bfloat16": torch.bfloat16,
    "forward, W moved": torch.float32,
    "adjoint": torch.float32,
}
DIAGONALS = ("gaussian", "rademacher")
WIDTHS = tuple(2**q for q in range(8, 15))
ENDS = 4  # places that are measured again: so many of the slowest and of the fastest
ASKED = 1.2

MEASURED = [isa for isa in ISAS if isa != "portable"]

Call = Callable[[], object]


def case(part: str, diagonal: str, width: int, room: torch.Tensor, place: int) -> tuple[Plan, list[torch.Tensor]]:
    """A plan and its W0, or gradients, that begin `place` bytes into a page of `room`; or with W there, and W0 half a
    page into one."""
    moved = part.endswith("W moved")
    before = {"before": (place // room.element_size(),)} if moved and place else {}
    plan = Plan(before | {"w": (WEIGHTS // 4096, 4096)}, width, diagonal=diagonal, width=width)
    first = ((PAGE // 2 if moved else place) - room.data_ptr()) % PAGE // room.element_size()
    return plan, plan.views(room[first : first + plan.numel])


def call(part: str, diagonal: str, width: int, room: torch.Tensor, place: int) -> Call:
    plan, tensors = case(part, diagonal, width, room, place)
    theta = torch.ones(plan.dim)
    if part == "adjoint":
        return lambda: ops.fastfood_adjoint(plan, theta, plan.scales, tensors, "cpu")
    return lambda: ops.fastfood_forward(plan, theta, plan.scales, tensors, room.dtype, "cpu")


def take_turns(calls: dict[int, Call], rounds: int) -> dict[int, list[float]]:
    """CPU time of each place in each round, in ms."""
    taken: dict[int, list[float]] = {place: [] for place in calls}
    for number in range(rounds + 1):
        for place in random.Random(number).sample(list(calls), len(calls)):
            begin = time.thread_time()
            calls[place]()
            if number:  # the first round is for warming up
                taken[place].append(1e3 * (time.thread_time() - begin))
    return taken


def by_round(taken: dict[int, list[float]], places: Iterable[int]) -> list[float]:
    """The median of these places in each round."""
    return [statistics.median(times) for times in zip(*(taken[place] for place in places))]


def over(taken: dict[int, list[float]], place: int, others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(taken[place], others)]


def slowest(calls: dict[int, Call], rounds: int) -> dict[str, float]:
    """Columns of a row: the slowest place, its "ms", the "elsewhere_ms" of the fastest, and the ratio "/elsewhere"."""
    once = take_turns(calls, rounds)
    usual = by_round(once, calls)
    order = sorted(calls, key=lambda place: statistics.median(over(once, place, usual)))
    again = take_turns({place: calls[place] for place in {*order[:ENDS], *order[-ENDS:]}}, 4 * rounds)
    elsewhere = by_round(again, order[:ENDS])
    place = max(order[-ENDS:], key=lambda place: statistics.median(over(again, place, elsewhere)))
    columns = {"place": place, "ms": statistics.median(again[place]), "elsewhere_ms": statistics.median(elsewhere)}
    return columns | results.spread("/elsewhere", over(again, place, elsewhere))


def row(isa: str, part: str, diagonal: str, width: int, places: Iterable[int] = COARSE, rounds: int = 5) -> dict:
    room = torch.zeros(WEIGHTS + 2 * PAGE, dtype=PARTS[part])
    if part.endswith("W moved"):  # to where a tensor may begin in the buffer of all weights
        places = [place for place in places if place % (ALIGNMENT * room.element_size()) == 0]
    with cpu_isa(isa), threads(1):
        columns = slowest({place: call(part, diagonal, width, room, place) for place in places}, rounds)
    which = f"{isa}, {part}, {diagonal}, n = {width:,}, place {columns['place']} / elsewhere"
    columns |= results.remark(which, columns["/elsewhere"], ASKED)
    about = dict(what="place", backend="cpu", isa=isa, part=part, diagonal=diagonal, d=width, width=width)
    return about | {"weights": WEIGHTS, "threads": 1} | columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all 64 lines of a page")
    parser.add_argument("--isa", nargs="+", choices=ISAS, default=MEASURED)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--diagonal", nargs="+", choices=DIAGONALS, default=DIAGONALS)
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the file of the rows")
    options = parser.parse_args()
    about, rows = results.machine(), []
    for case in product(options.isa, options.part, options.diagonal, options.width):
        rows.append(row(*case, ALL if options.all else COARSE, options.rounds))
        print(*case, "place {place}: {/elsewhere:.2f}".format_map(rows[-1]), flush=True)
    if options.out:
        results.save(options.out, about, rows)
    print(report.terminal(rows))


if __name__ == "__main__":
    main()
