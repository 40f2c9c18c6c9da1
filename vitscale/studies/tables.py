"""A table of results: on the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscale.durable import publish_text


@dataclass(frozen=True)
class Score:
    """Accuracies of repetitions, in percent."""

    values: tuple[float | None, ...]
    """None where training diverged."""

    @property
    def finished(self) -> list[float]:
        """Those that did not diverge."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float:
        """Over the repetitions that did not diverge, of which there is one at least."""
        return statistics.fmean(self.finished)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of a single repetition."""
        return statistics.stdev(self.finished) if len(self.finished) > 1 else None

    def __str__(self) -> str:
        """As the ViT paper writes it: ``99.50 ± 0.06``."""
        if not self.finished:
            return "diverged"
        deviation, missing = self.deviation, len(self.values) - len(self.finished)
        text = f"{self.mean:.2f}" if deviation is None else f"{self.mean:.2f} ± {deviation:.2f}"
        return f"{text}, {missing} diverged" if missing else text


@dataclass(frozen=True)
class Table:
    """Rows under named columns; all cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_csv(self) -> str:
        """Comma-separated values with a header."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table for a README, under its title and above its notes."""
        lines = [_markdown_row(self.columns), _markdown_row(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_markdown_row(row) for row in self.rows]
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"**{self.title}**\n\n" + "\n".join(lines) + f"\n{notes}"

    def print(self) -> None:
        """Show it on standard output; plain columns where that is no terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        console = Console(highlight=False)
        if not console.is_terminal:
            # A file has no width to fit into.
            console = Console(highlight=False, width=max(80, 4 + sum(self._widths()) + 3 * len(self.columns)))
        shown = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            shown.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in self.notes:
            console.print(note)

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write ``name.csv`` and ``name.md`` into a folder. Returns their paths."""
        paths = [folder / f"{name}.csv", folder / f"{name}.md"]
        publish_text(paths[0], self.to_csv())
        publish_text(paths[1], self.to_markdown())
        return paths

    def _widths(self) -> list[int]:
        return [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
