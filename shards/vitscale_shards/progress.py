"""How far long work is: a bar on a terminal, plain lines in a job's log. Written to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and of how much (None: not known)."""


@contextmanager
def progress(unit: str) -> Iterator[Advance]:
    """Show progress for the length of the block.

    Args:
        unit: what is counted, in the plural: ``images``.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, unit).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bars(bar).advance


def counter(advance: Advance, what: str, total: int | None = None) -> Callable[[int], None]:
    """A function that is told how much more is done, not how much is done."""
    done = 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        advance(what, done, total)

    return add


class _Rate:
    """Units per second since the first look at one piece of work."""

    def __init__(self, done: int) -> None:
        self._first = done
        self._started = time.monotonic()

    def per_s(self, done: int) -> float:
        return (done - self._first) / max(time.monotonic() - self._started, 1e-9)


class _Bars:
    """One bar for each piece of work."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, tuple[object, _Rate]] = {}

    def advance(self, what: str, done: int, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = (self._bar.add_task(what, total=total, rate=""), _Rate(done))
        task, rate = self._tasks[what]
        self._bar.update(task, completed=done, total=total, rate=f"{rate.per_s(done):,.0f}")  # type: ignore[arg-type]


class _Lines:
    """A line now and then."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console = console
        self._unit = unit
        self._said = time.monotonic()
        self._rates: dict[str, _Rate] = {}

    def advance(self, what: str, done: int, total: int | None) -> None:
        rate = self._rates.setdefault(what, _Rate(done))
        if time.monotonic() - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = time.monotonic()
        speed = rate.per_s(done)
        text = f"{what}: {done:,} {self._unit}, {speed:,.0f}/s"
        if total is not None:
            left = f", {_clock((total - done) / speed)} left" if speed > 0 else ""
            text = f"{what}: {done:,} of {total:,} {self._unit}, {speed:,.0f}/s{left}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
