"""Tables and times for people: drawn on a terminal, aligned lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import typer


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if sys.stdout.isatty():
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(line[column]) for line in (columns, *rows)) for column in range(len(columns))]
    for line in (columns, *rows):
        typer.echo("  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)).rstrip())


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and their values, one below the other."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        typer.echo(f"{name:<{width}}  {value}")


def duration(seconds: float) -> str:
    """``3 h 02 min``."""
    whole = max(0, round(seconds))
    for unit, size, lesser, lesser_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lesser_size:02} {lesser}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def clock(unix_s: float) -> str:
    """Local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
