"""``vitscale shards``: make shard sets, check them, mend them, look at them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscale.errors import DataError
from vitscale_shards.check_cli import MovedTo, dedup, index, repair, retry, stats, verify
from vitscale_shards.options import PlanOptions, SourceOptions, spread
from vitscale_shards.progress import counter, progress
from vitscale_shards.words import count, summary, warn

if TYPE_CHECKING:
    from vitscale_shards.place import Place
    from vitscale_shards.planning.plan import Plan
    from vitscale_shards.planning.settings import PlanSettings
    from vitscale_shards.rows import Source
    from vitscale_shards.sources import SourceSpec

app = typer.Typer(no_args_is_help=True, help="Shard sets: tar files with an index, ready for training.")

Workers = Annotated[int, typer.Option(min=1, help="Processes on this node. More may join from other nodes.")]
MaxFailures = Annotated[int, typer.Option(min=0, help="Bad images of a split to leave out before giving up.")]


@app.callback()
def shards() -> None:
    """Shard sets: tar files with an index, ready for training."""


@app.command()
@spread
def plan(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE... OUT", help="Datasets (several are merged), and where the sets are to lie."),
    ],
    source: SourceOptions,
    options: PlanOptions,
) -> None:
    """Decide which image goes into which shard: OUT/<split>/plan.parquet. Opens no image."""
    from vitscale_shards.remote import open_place

    if len(paths) < 2:
        raise DataError("plan: SOURCE and OUT are needed")
    out = open_place(paths[-1])
    for made in _make_plans(source.spec(paths[:-1]), options.settings(), out):
        typer.echo(
            f"{made.head.split}: {made.num_samples:,} images, {count(made.num_shards, 'shard')}, "
            f"{len(made.head.classes or ())} classes -> {made.place.url}"
        )
    typer.echo(f"write them, with any number of workers on any number of nodes: vitscale shards write {out.url}")


@app.command()
@spread
def write(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE...] OUT",
            help="Datasets (several are merged), and where the sets are to lie: a folder or s3://bucket/prefix. "
            "OUT alone follows the plan that is there.",
        ),
    ],
    source: SourceOptions,
    options: PlanOptions,
    workers: Workers = 1,
    max_failures: MaxFailures = 0,
    moved_to: MovedTo = None,
) -> None:
    """Plan SOURCE and write it as shard sets, one in OUT/<split> for each split.

    After an interruption the same command goes on.
    """
    from vitscale_shards.remote import open_place
    from vitscale_shards.sources import SourceSpec

    out = open_place(paths[-1])
    if len(paths) == 1:
        for content, plans in _by_source(_open_plans(out), moved_to):
            _write(plans, SourceSpec.from_json(content).moved(moved_to), workers, max_failures)
    else:
        spec = source.spec(paths[:-1])
        _write(_make_plans(spec, options.settings(), out), spec, workers, max_failures)


def _make_plans(spec: SourceSpec, settings: PlanSettings, out: Place) -> list[Plan]:
    from vitscale_shards.place import LocalPlace
    from vitscale_shards.planning.planner import make_plans

    source = spec.open()
    if isinstance(out, LocalPlace):
        spec.refuse_nested(out.folder)
    with progress("images") as advance:
        plans = make_plans(source, spec.to_json(), settings, out, listed=counter(advance, "listing"))
    _tell_about(source, plans)
    return plans


def _open_plans(out: Place) -> list[Plan]:
    """The plans under OUT, all of them.

    Raises:
        DataError: there is none, or planning was interrupted.
    """
    from vitscale_shards.planning.plan import PLAN_NAME, Plan

    if out.size(PLAN_NAME) is not None:
        return [Plan(out)]
    splits = [name for name in out.folders() if out.child(name).size(PLAN_NAME) is not None]
    if not splits:
        raise DataError(
            f"{out.url}: has no plan to follow; give SOURCE too, or make one: 'vitscale shards plan SOURCE {out.url}'"
        )
    plans = [Plan(out.child(name)) for name in splits]
    for made in plans:
        if missing := sorted(set(made.head.splits) - set(splits)):
            raise DataError(
                f"{out.url}: the plan of {', '.join(missing)} is missing; give the command again that made the others"
            )
    return plans


def _by_source(plans: list[Plan], moved_to: list[str] | None) -> Iterator[tuple[dict[str, Any], list[Plan]]]:
    """The plans of each source: training and validation sets often come from two.

    Raises:
        DataError: several sources cannot all have moved to one place.
    """
    groups = [(content, list(group)) for content, group in groupby(plans, key=lambda plan: plan.head.source)]
    if moved_to and len(groups) > 1:
        raise DataError(
            f"--source: the sets have {len(groups)} sources; write them one by one, as OUT/{plans[0].head.split}"
        )
    yield from groups


def _write(plans: list[Plan], spec: SourceSpec, workers: int, max_failures: int) -> None:
    from vitscale.data.manifest import INDEX_NAME
    from vitscale_shards.writing.workers import write_sets

    complete = [made for made in plans if made.place.size(INDEX_NAME) is not None]
    missing = [made for made in plans if made not in complete]
    unclean = [made for made in complete if not _check_complete(made)]
    if missing or unclean:
        with progress("images") as advance:
            write_sets(
                [*unclean, *missing], spec, workers=workers, max_failures=max_failures, report=advance, warn=warn
            )
    for made in plans:
        typer.echo(summary(made, was_complete=made in complete))


def _check_complete(plan: Plan) -> bool:
    """See that a set that has an index has all its files.

    Returns:
        Whether nothing else is there; else what its writing has left behind needs to be tidied up.

    Raises:
        DataError: it has not.
    """
    from vitscale_shards.checking.verify import format_fault, verify_set

    found = list(verify_set(plan.place, level="sizes", plan=plan.head.digest))
    if faults := [fault for fault in found if fault.kind != "leftover"]:
        raise DataError(
            f"{plan.place.url}: was complete, but is damaged ({count(len(faults), 'fault')}, such as: "
            f"{format_fault(faults[0])}); 'vitscale shards repair {plan.place.url}' mends it"
        )
    return not found


def _tell_about(source: Source, plans: list[Plan]) -> None:
    """Say what was left aside, which the user may not expect."""
    if source.ignored.total():
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in source.ignored.most_common(8) if number)
        warn(f"left aside: {kinds}")
    used = {label for plan in plans for label, images in enumerate(plan.head.label_counts) if images}
    empty = [name for label, name in enumerate(source.classes or ()) if label not in used]
    if empty:
        some = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        warn(
            f"classes without an image, which keep their labels: {len(empty):,} of {len(source.classes or ())}, {some}"
        )


for command in (verify, repair, retry, stats, dedup, index):
    app.command()(command)
