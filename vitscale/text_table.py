"""A table for people: drawn on a terminal, aligned lines in a pipe."""

from __future__ import annotations

import sys
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
