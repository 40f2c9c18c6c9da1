"""``vitscale predict``: the most likely classes of images."""

from __future__ import annotations

import sys
from enum import StrEnum
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
    ReadingSettings,
    Resize,
    Step,
    echo_json,
    on_ranks,
    parse_image_size,
)
from vitscale.evaluation.choices import ModelChoice

if TYPE_CHECKING:
    from vitscale.evaluation.predict import Prediction
    from vitscale.topology import Topology


class Probabilities(StrEnum):
    """How logits become probabilities."""

    SOFTMAX = "softmax"
    """The classes exclude each other: they sum to 1."""
    SIGMOID = "sigmoid"
    """Each class for itself."""


def predict(
    model: ModelLocation,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders (any depth), patterns in quotes ('photos/**/*.jpg'), shard sets (folder or URL)."
        ),
    ],
    top: Annotated[int, typer.Option(help="Classes of each image.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")] = False,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="NAMES.txt", help="Names of the classes, one a line, if the model does not tell them."),
    ] = None,
    probabilities: Annotated[
        Probabilities | None,
        typer.Option(help="softmax: classes exclude each other. Default: as the run was trained; of a file, softmax."),
    ] = None,
    most_unreadable: Annotated[
        int, typer.Option(help="Unreadable images after which the rest is given up.", min=0)
    ] = 100,
    step: Step = None,
    weights: WeightsOption = Weights.RAW,
    model_file: ModelFile = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    settings: ReadingSettings = None,
    batch_size: BatchSize = 64,
) -> None:
    """Tell the most likely classes of images. Exit status 1 if one of them could not be read."""

    def work(topology: Topology) -> None:
        from vitscale.evaluation.predict import predict_images

        choice = ModelChoice(
            model, step, weights, model_file, tuple(settings or ()), parse_image_size(image_size), resize
        )
        predict_images(
            choice,
            images,
            tell=_echo_as_json if as_json else _echo,
            top=top,
            probabilities=None if probabilities is None else probabilities.value,
            class_names=classes,
            most_unreadable=most_unreadable,
            batch_size=batch_size,
            topology=topology,
            # Predictions on the same terminal would be written over a bar, and tell how far it is themselves.
            show_progress=not (sys.stderr.isatty() and sys.stdout.isatty()),
        )

    on_ranks(None, work)


def _echo_as_json(prediction: Prediction) -> None:
    echo_json(prediction.to_json())


def _echo(prediction: Prediction) -> None:
    if prediction.error is not None:
        typer.echo(f"{prediction.image}: unreadable: {prediction.error}", err=True)
        return
    guesses = "  ".join(f"{guess.name} {guess.probability:.1%}" for guess in prediction.guesses)
    typer.echo(f"{prediction.image}: {guesses}")
