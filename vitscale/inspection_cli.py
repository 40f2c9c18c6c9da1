"""``vitscale inspect``: pictures of what a model has learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption
from vitscale.command_line import (
    BatchSize,
    ImageSize,
    MaxUnreadable,
    ModelFile,
    ModelLocation,
    ReadingSettings,
    Resize,
    Step,
    on_ranks,
    parse_image_size,
)
from vitscale.evaluation.choices import ModelChoice, Reading

if TYPE_CHECKING:
    from vitscale.topology import Topology


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
    settings: ReadingSettings = None,
    batch_size: BatchSize = 16,
    max_unreadable: MaxUnreadable = None,
) -> None:
    """Draw filters, position similarities, attention distances and attention on images, and save the numbers."""

    def work(topology: Topology) -> None:
        from vitscale.inspection.commands import inspect_model

        choice = ModelChoice(
            model, step, weights, model_file, tuple(settings or ()), parse_image_size(image_size), resize
        )
        inspected = inspect_model(
            choice,
            images or [],
            out=out,
            num_images=num_images,
            overlays=overlays,
            reading=Reading(batch_size, max_unreadable),
            topology=topology,
        )
        for path in inspected.files:
            typer.echo(path)
        for reason in inspected.left_out:
            typer.echo(f"left out: {reason}", err=True)
        for reason in inspected.unreadable:
            typer.echo(f"unreadable: {reason}", err=True)
        if inspected.unreadable:
            readable = inspected.images - len(inspected.unreadable)
            typer.echo(f"attention is that of {readable} of {inspected.images} images", err=True)

    on_ranks(None, work)
