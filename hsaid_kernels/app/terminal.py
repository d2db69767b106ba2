"""Output and errors of the subcommands."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

SECONDS = 10.0  # between progress lines if stderr is not a terminal


class UsageError(Exception):
    """The user's input is invalid. The message is one sentence with the reason."""


class RunError(Exception):
    """The input was valid, but the run failed."""


@contextmanager
def user_input() -> Iterator[None]:
    """A context manager that turns exceptions of the library into UsageError, for code that handles user input."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout has closed the pipe
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def say(what: str, text: str) -> None:
    print(f"{what:<12} {text}", flush=True)


def num_weights(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(math.prod, shapes.values()))


@contextmanager
def progress(total: int, what: str, unit: str = "steps") -> Iterator[Callable[[str], None]]:
    """A context manager that reports progress on stderr: a bar, or if stderr is not a terminal, a line now and then.

    Yields a function to call after each of `total` steps, with a short text to show. `what` is the label, `unit` what
    the steps are called.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}") as bar:

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
            print(f"{what}: {done} of {total} {unit}, {now - began:.0f} s, {text}", file=sys.stderr, flush=True)

    yield print_line


@contextmanager
def run_progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Like `progress`, for runs whose total number is not known from the beginning.

    Yields a function to call with the number of finished runs, about how many are left, and a short text to show. Runs
    that have finished at the first call are not counted in the speed.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar: tqdm | None = None

        def advance(done: int, left: int, text: str) -> None:
            nonlocal bar
            if bar is None:
                form = "{desc}: {bar} {n_fmt} of about {total_fmt} runs, {elapsed}, about {remaining} left{postfix}"
                bar = tqdm(desc=what, initial=done, total=done + left, bar_format=form, dynamic_ncols=True)
            bar.total = done + left
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        try:
            yield advance
        finally:
            if bar is not None:
                bar.close()
        return
    first, began = None, time.monotonic()
    said = -math.inf

    def print_line(done: int, left: int, text: str) -> None:
        nonlocal first, said
        first = done if first is None else first
        now = time.monotonic()
        if now - said >= SECONDS or not left:
            said = now
            rate = (now - began) / (done - first) if done > first else None
            time_left = "" if rate is None or not left else f", about {duration(rate * left)}"
            text = text and f"; {text}"
            print(f"{what}: {done} runs done, about {left} left{time_left}{text}", file=sys.stderr, flush=True)

    yield print_line


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: "1 h 20 min", "3 min", "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
