"""``vitscale transfer`` and ``vitscale study``: many trainings that answer one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitscale.checkpoint.choices import Weights
from vitscale.checkpoint_cli import WeightsOption

Nproc = Annotated[int | None, typer.Option(help="Ranks of each training on this machine; one by default.", min=1)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changed key of the file; may be repeated.")
]


def transfer(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="Datasets and recipe, see configs/transfer/.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Run folders or files of weights.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; the newest by default.")] = None,
    weights: WeightsOption = Weights.RAW,
    overrides: Overrides = None,
    nproc: Nproc = None,
) -> None:
    """Fine-tune models on every dataset of a suite, and tell the table of the ViT paper.

    The same command goes on with what is left; several of them, on any machines that share the folder, share the work.
    """
    from vitscale.config.loader import load_section
    from vitscale.studies.models import starting_points
    from vitscale.studies.transfer import SuiteConfig, run_suite
    from vitscale.train.signals import StopRequest

    with StopRequest() as stop:
        settings = load_section(SuiteConfig, suite, overrides or [])
        table = run_suite(
            settings, starting_points(models, step=step, weights=weights), nproc=nproc, stop=stop, say=typer.echo
        )
    table.print()
    typer.echo(f"table -> {settings.folder / 'table.csv'}, {settings.folder / 'table.md'}")


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Models, parts and seeds, see configs/study/.")],
    overrides: Overrides = None,
    nproc: Nproc = None,
) -> None:
    """Pre-train models on nested parts of a shard set, and draw accuracy against the number of images.

    The same command goes on with what is left; several of them, on any machines that share the folder, share the work.
    """
    from vitscale.config.loader import load_section
    from vitscale.studies.scaling import StudyConfig, run_study
    from vitscale.train.signals import StopRequest

    with StopRequest() as stop:
        settings = load_section(StudyConfig, file, overrides or [])
        table = run_study(settings, nproc=nproc, stop=stop, say=typer.echo)
    table.print()
    typer.echo(f"figure -> {settings.folder / 'figure.png'}; table -> {settings.folder / 'table.csv'}, .md")
