"""How evenly the adjoint's groups fall to the places of a GPU: a model, for choosing how many tiles a group has.

    python benchmarks/schedule.py [--places 264]       264: two blocks of threads on each of an H100's multiprocessors

Groups go to places as csrc/cuda/fastfood_adjoint.cu launches them, whole ones first, each to the place that is free
first. A tile is one unit of time, and beginning and ending a group BESIDE of them. Printed are the time until the last
is done, in units, beside what it would be if the work could be divided at will; and what the groups' sums take.
"""

import argparse
import heapq
import math

import shapes

from hsaid_kernels.fastfood.plan import MAX_RUN_BLOCKS, MAX_WIDTH, Plan

BESIDE = 0.7  # of a tile


def groups_of(sizes: list[int], tiles: int) -> list[int]:
    """Tiles in each group of `tiles`, in the order in which they are launched."""
    whole = [tiles for size in sizes for _ in range(size // (tiles * MAX_WIDTH))]
    rest = [-(-(size % (tiles * MAX_WIDTH)) // MAX_WIDTH) for size in sizes]
    return whole + [group for group in rest if group]


def time_until_done(groups: list[int], places: int) -> float:
    free = [0.0] * places
    for group in groups:
        heapq.heapreplace(free, free[0] + group + BESIDE)
    return max(free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=264)
    places = parser.parse_args().places
    mbert = shapes.mbert()
    for what, names in {"mBERT": list(mbert), "a layer": [name for name in mbert if ".layer.0." in name]}.items():
        sizes = [math.prod(mbert[name]) for name in names]
        plan = Plan({name: mbert[name] for name in names}, MAX_WIDTH)
        print(
            f"{what}: {sum(-(-size // MAX_WIDTH) for size in sizes):,} tiles; the plan takes {plan.run_blocks} a group"
        )
        for tiles in sorted({1, 2, 3, 4, 8, 12, 16, 20, 21, 22, 23, 24, 32, MAX_RUN_BLOCKS}):
            groups = groups_of(sizes, tiles)
            done = time_until_done(groups, places)
            even = sum(group + BESIDE for group in groups) / places
            sums = f"{len(groups) * MAX_WIDTH * 4 / 1e6:7.1f} MB of sums"
            print(f"  {tiles:3} tiles: {len(groups):6,} groups, done after {done:6.1f} (evenly {even:6.1f}), {sums}")


if __name__ == "__main__":
    main()
