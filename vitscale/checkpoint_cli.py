"""``vitscale checkpoint``: look at the checkpoints of a run, verify and tidy them, take weights out of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.checkpoint.choices import Choice, Precision, Weights
from vitscale.text_table import print_table
from vitscale.weights.choices import WeightFormat

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, verify and tidy them, take weights out of them.")

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or folder or URL of its checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StepArgument = Annotated[int | None, typer.Argument(help="Step of the checkpoint; the newest by default.")]
WeightsOption = Annotated[
    Weights, typer.Option(help="Those with which training goes on, or their moving average (optim.ema_decay).")
]
SECONDS_BETWEEN_LINES = 10.0


@app.callback()
def checkpoint() -> None:
    """Look at checkpoints, verify and tidy them, take weights out of them."""


@app.command("list")
def list_command(run: Run, as_json: AsJson = False) -> None:
    """Every checkpoint, newest first, and what is left of others. 'complete' means that no file is missing or short."""
    import json

    from vitscale.checkpoint.commands import find_place, list_entries
    from vitscale.checkpoint.description import COLUMNS, entry_json, entry_row, images_per_epoch

    place = find_place(run)
    images = images_per_epoch(place)
    listed = [entry_json(entry, images) for entry in list_entries(place.folder)]
    if as_json:
        typer.echo(json.dumps(listed))
    elif listed:
        print_table(COLUMNS, [entry_row(data) for data in listed])
    else:
        typer.echo(f"{place.folder.location}: holds no checkpoint")


@app.command()
def show(
    run: Run,
    step: StepArgument = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint's manifest tells."""
    import json

    from vitscale.checkpoint.commands import choose, find_place
    from vitscale.checkpoint.description import description, images_per_epoch

    place = find_place(run)
    chosen = choose(place.folder, step)
    if as_json:
        files = [{"name": record.name, "size": record.size} for record in chosen.records]
        typer.echo(json.dumps({"checkpoint": chosen.shown, **chosen.content, "files": files}))
        return
    told = description(chosen, images_per_epoch(place))
    width = max(map(len, told))
    for name, value in told.items():
        typer.echo(f"{name:<{width}}  {value}")


@app.command()
def verify(
    run: Run,
    step: StepArgument = None,
    every: Annotated[bool, typer.Option("--all", help="Verify all of them.")] = False,
) -> None:
    """Read all of a checkpoint and compare it with its checksums and digests. Exit status 1 if it is damaged."""
    from vitscale.checkpoint.commands import find_place, verify_steps
    from vitscale.errors import ConfigError

    if every and step is not None:
        raise ConfigError(f"step {step} and --all were given; give one of them")
    damaged = 0
    with _progress() as shown:
        for name, fault in verify_steps(find_place(run).folder, step, every=every, advance=shown.advance):
            shown.say(f"{name}: DAMAGED: {fault}" if fault else f"{name}: OK")
            damaged += bool(fault)
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(help="So many of the newest complete ones stay.", min=2)],
    keep_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Besides, the first of each stretch of so many stays.", min=1)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove old checkpoints for good. The run must not be in training."""
    from vitscale.checkpoint.commands import find_place, not_trained, remove, superfluous
    from vitscale.checkpoint.description import shown_bytes
    from vitscale.errors import CheckpointError

    place = find_place(run)
    with nullcontext() if dry_run else not_trained(place, "prune"):
        doomed = superfluous(place.folder, keep=keep, keep_every=keep_every)
        size = shown_bytes(sum(entry.size_bytes or 0 for entry in doomed))
        for entry in doomed:
            typer.echo(f"{entry.name}: {shown_bytes(entry.size_bytes or 0)}")
        if not doomed or dry_run:
            typer.echo(f"would remove {len(doomed)}, {size}" if doomed else "nothing to remove")
            return
        if not yes:
            if not sys.stdin.isatty():
                raise CheckpointError(
                    f"{place.folder.location}: nothing was removed, since nobody is there to be asked; add --yes"
                )
            typer.confirm(f"Remove {len(doomed)} checkpoints, {size}?", abort=True)
        remove(place.folder, doomed)
        typer.echo(f"removed {len(doomed)}, {size}")


@app.command()
def rollback(run: Run, step: Annotated[int, typer.Argument(help="Step of the checkpoint to go on from.")]) -> None:
    """Make an earlier checkpoint the newest: those after it are renamed. The run must not be in training."""
    from vitscale.checkpoint.commands import find_place, not_trained, roll_back

    place = find_place(run)
    with not_trained(place, "rollback"), _progress() as shown:
        aside = roll_back(place.folder, step, shown.advance)
    for name in aside:
        typer.echo(f"set aside: {name}")
    typer.echo(
        f"the next start goes on from step {step}, and moves the records of later steps from metrics.jsonl to "
        f"metrics.rolled_back.jsonl"
    )


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="File to write; with --format hf, a folder.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to take; the newest complete one by default.")] = None,
    weights: WeightsOption = Weights.RAW,
    format: Annotated[
        WeightFormat, typer.Option(help="Names and layout: ours, or those of another library or of a paper's release.")
    ] = WeightFormat.SAFETENSORS,
    precision: Annotated[Precision, typer.Option(help="Of the numbers in the file.")] = Precision.FP32,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint's weights alone, for inference, fine-tuning or another library."""
    from vitscale.checkpoint.commands import choose, find_place
    from vitscale.checkpoint.export import Model
    from vitscale.checkpoint.export import export as export_weights
    from vitscale.models.shapes import resolve_shape

    place = find_place(run)
    chosen, config = choose(place.folder, step), place.config
    with _progress() as shown:
        remarks = export_weights(
            chosen,
            out,
            Choice(weights, format, precision),
            model=None if config is None else Model(config.model, resolve_shape(config.model, config.data.image_hw)),
            run=place.folder.location if place.run is None else str(place.run.absolute()),
            force=force,
            advance=shown.advance,
        )
    for line in remarks:
        typer.echo(line, err=True)
    typer.echo(f"step {chosen.step}, {weights} weights, {precision} -> {out}")


class _Lines:
    """How much is read, on stderr: a line now and then."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def advance(self, name: str, done: int, total: int) -> None:
        """So much of a checkpoint is read."""
        from vitscale.checkpoint.description import shown_bytes

        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            typer.echo(f"{name}: {shown_bytes(done)} of {shown_bytes(total)} read", err=True)

    def say(self, text: str) -> None:
        """A result, on stdout."""
        typer.echo(text)


class _Bars(_Lines):
    """The same on a terminal: a bar for each checkpoint."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def advance(self, name: str, done: int, total: int) -> None:
        """So much of a checkpoint is read."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done)

    def say(self, text: str) -> None:
        """A result, on stdout; above the bars if it is the same terminal."""
        if sys.stdout.isatty():
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            typer.echo(text)


@contextmanager
def _progress() -> Iterator[_Lines]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=False) as bars:
        yield _Bars(bars)
