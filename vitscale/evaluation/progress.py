"""How far a long command is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, *, unit: str = "images", shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show on standard error how much is done, for the length of a ``with`` block, which gets what to tell it by.

    Args:
        what: is done.
        total: units of it.
        unit: name of the units.
        shown: False shows nothing, as on all ranks but one.
    """
    if not shown:
        yield lambda count: None
        return
    if sys.stderr.isatty():
        with _bar(what, total) as advance:
            yield advance
        return
    done, started = 0, time.monotonic()
    told = started

    def advance_in_lines(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES and done < total:
            told = time.monotonic()
            rate = done / (told - started)
            sys.stderr.write(f"{what}: {done:,} of {total:,} {unit}, {rate:,.0f}/s\n")
            sys.stderr.flush()

    yield advance_in_lines


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Results go where standard output goes, and not through the bar's console, which is standard error.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.update(task, advance=count)
