"""What the commands share: how they speak, and how they end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

SECONDS = 10.0  # between the lines of progress where nobody watches


class UsageError(Exception):
    """What was asked for cannot be done; the message is the one sentence that says why."""


class RunError(Exception):
    """What was asked for was done, and went wrong."""


@contextmanager
def user_input() -> Iterator[None]:
    """What the library refuses in here is the user's to change."""
    try:
        yield
    except BrokenPipeError:  # of what is printed
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def say(what: str, text: str) -> None:
    print(f"{what:<12} {text}", flush=True)


def num_weights(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A function to call after each of so many steps, with what to say of it: a bar on stderr, or now and then a line
    where stderr is no terminal."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=" steps") as bar:

            def advance(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            yield advance
        return
    done, began = 0, time.monotonic()
    said = began

    def print_line(text: str) -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= SECONDS or done == total:
            said = now
            print(f"{what}: {done} of {total} steps, {now - began:.0f} s, {text}", file=sys.stderr, flush=True)

    yield print_line
