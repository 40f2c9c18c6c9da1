"""What a person sees of a run: a progress bar on a terminal, plain lines in a log file. Written to stderr."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def announce(text: str) -> None:
    """Print one line before a run's screen is there."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class Screen:
    """The bar, or the lines, of one run."""

    def __init__(self, total_steps: int) -> None:
        self._console = Console(stderr=True)
        self._total = total_steps
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )

    def start(self, step: int) -> None:
        """Show the bar at its place."""
        if self._bar:
            self._task = self._bar.add_task("", total=self._total, completed=step, shown="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def step(self, record: dict[str, Any]) -> None:
        """Show a record: the essentials beside the bar, which has to fit a narrow terminal, or a whole line."""
        utilisation = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        bound_by = "" if record["data_bound_by"] is None else f" ({record['data_bound_by'].replace('_', '-')})"
        wait = f"data wait {record['data_wait_share']:.0%}{bound_by}"
        speed = f"{record['images_per_s']:,.0f} images/s  {wait}{utilisation}"
        loss = f"loss {record['loss']:.4f}"
        if self._bar:
            self._bar.update(self._task, shown=f"{loss}  {speed}")
        else:
            details = f"lr {record['lr']:.2e}  grad {record['grad_norm']:.3f}"
            storage = record.get("storage", {})
            troubles = ", ".join(f"{storage[name]:,} {name}" for name in ("retries", "errors") if storage.get(name))
            trouble = f"  storage {troubles}" if troubles else ""
            self.line(f"step {record['step']}/{self._total}  {loss}  {details}  {speed}{trouble}")

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
