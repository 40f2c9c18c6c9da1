"""``vitscale shards``: make shard sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscale.errors import DataError
from vitscale_shards.plan import SplitPlan, make_plan
from vitscale_shards.sources import ImageFolder, Source, open_source

if TYPE_CHECKING:
    from vitscale_shards.writer import SplitResult

SECONDS_BETWEEN_LINES = 10.0

app = typer.Typer(no_args_is_help=True, help="Make shard sets: tar files with an index, ready for training.")


@app.callback()
def shards() -> None:
    """Make shard sets: tar files with an index, ready for training."""


@app.command()
def write(
    source: Annotated[
        str,
        typer.Argument(help="Folder of images as SOURCE/class/name.jpg, or 'digits' (1,797 real images)."),
    ],
    out: Annotated[Path, typer.Argument(help="A shard set is written to OUT/<split> for each split.")],
    split: Annotated[str, typer.Option(help="Shares of the images, such as train=0.8,val=0.2.")] = "train=1",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Most samples in one tar.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    max_failures: Annotated[int, typer.Option(min=0, help="Bad images of a split to leave out before giving up.")] = 0,
) -> None:
    """Write SOURCE as shard sets under OUT. After an interruption, the same command goes on."""
    from vitscale_shards.writer import check_target, write_split

    images = open_source(source)
    _refuse_nested(images, out)
    plans = make_plan(
        images.rows(),
        source=images.name,
        classes=images.classes,
        split=split,
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    _tell_about(images, plans)
    for plan in plans:
        check_target(plan, out / plan.split)
    results = []
    for plan in plans:
        with _progress(plan) as advance:
            result = write_split(plan, images, out / plan.split, max_failures=max_failures, advance=advance)
        results.append(result)
    for result in results:
        typer.echo(_summary(result))


def _refuse_nested(source: Source, out: Path) -> None:
    if isinstance(source, ImageFolder) and out.resolve().is_relative_to(source.folder):
        raise DataError(
            f"{out}: lies inside of {source.folder}, so shards would be taken for images; choose another OUT"
        )


def _tell_about(source: Source, plans: tuple[SplitPlan, ...]) -> None:
    """Say what was left aside, which the user may not expect."""
    if source.ignored.total():
        kinds = ", ".join(f"{count} {kind}" for kind, count in source.ignored.most_common(5) if count)
        typer.echo(f"{source.ignored.total()} files are no images and were left aside ({kinds})", err=True)
    used = {row.label for plan in plans for shard in plan.shards for row in shard.rows}
    empty = [name for label, name in enumerate(source.classes) if label not in used]
    if empty:
        typer.echo(f"{len(empty)} classes have no image: {', '.join(empty[:5])}; they keep their labels", err=True)


@contextmanager
def _progress(plan: SplitPlan) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(plan)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(plan.split, total=plan.num_samples)
        yield lambda samples: bar.advance(task, samples)


def _line_printer(plan: SplitPlan) -> Callable[[int], None]:
    done = 0
    said = time.monotonic()

    def advance(samples: int) -> None:
        nonlocal done, said
        done += samples
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            typer.echo(f"{plan.split}: {done:,} of {plan.num_samples:,} images", err=True)

    return advance


def _summary(result: SplitResult) -> str:
    manifest = result.manifest
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    text = (
        f"{manifest.split}: {manifest.num_samples:,} samples, {shards}, {manifest.num_bytes / 1e6:,.1f} MB, "
        f"{len(manifest.classes or ())} classes -> {manifest.folder}"
    )
    if result.already_complete:
        text += " (was complete already; nothing written, file contents were not compared)"
    if result.failures:
        text += f"; {len(result.failures)} bad images left out, see {manifest.folder / 'failures.jsonl'}"
    return text
