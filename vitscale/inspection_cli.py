"""``vitscale inspect``: pictures of what a model has learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption
from vitscale.command_line import (
    BatchSize,
    ImageSize,
    ModelFile,
    ModelLocation,
    Resize,
    Step,
    on_ranks,
    parse_image_size,
)

if TYPE_CHECKING:
    from vitscale.topology import Topology

SECONDS_BETWEEN_LINES = 10.0
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How images are read: data.workers=8, data.storage.cache=null ...; of a file of weights, also how they "
        "are cropped: data.eval_crop_share=1 ...; may be repeated.",
    ),
]


def inspect(
    model: ModelLocation,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, patterns or shard sets that the attention is looked at on; default: the run's "
            "data.eval."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures and arrays; default: inspection/step-... in the run.")
    ] = None,
    num_images: Annotated[
        int, typer.Option(help="Images that attention distances are averaged over, spread evenly.", min=1)
    ] = 128,
    overlays: Annotated[int, typer.Option(help="Images that attention is drawn on.", min=0, max=64)] = 8,
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    settings: Settings = None,
    batch_size: BatchSize = 16,
) -> None:
    """Draw filters, position similarities, attention distances and attention on images, and save the numbers."""

    def work(topology: Topology) -> None:
        from vitscale.inspection.commands import inspect_model

        with image_progress(bar=sys.stderr.isatty()) as advance:
            inspected = inspect_model(
                model,
                images or [],
                out=out,
                num_images=num_images,
                overlays=overlays,
                step=step,
                weights=weights,
                model=model_file,
                image_size=parse_image_size(image_size),
                resize=resize,
                overrides=settings or [],
                batch_size=batch_size,
                topology=topology,
                advance=advance,
            )
        for path in inspected.files:
            typer.echo(path)
        for reason in inspected.left_out:
            typer.echo(f"left out: {reason}", err=True)
        for reason in inspected.unreadable:
            typer.echo(f"unreadable: {reason}", err=True)

    on_ranks(None, work)


@contextmanager
def image_progress(*, bar: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far the images are, on standard error: images done, and of how many.

    Args:
        bar: a bar, which a terminal is needed for; else a line every ten seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not bar:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                typer.echo(f"{done:,} of {total:,} images", err=True)
                last = time.monotonic()

        yield line
        return
    columns = (TextColumn("images"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as bars:
        task = bars.add_task("")
        yield lambda done, total: bars.update(task, completed=done, total=total)
