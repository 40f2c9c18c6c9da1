"""The commands of ``vitscale shards`` for sets that are there: verify, repair, retry, stats, index, dedup."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitscale.errors import DataError
from vitscale_shards.options import SourceOptions, spread
from vitscale_shards.progress import counter, progress
from vitscale_shards.words import count, summary, warn

if TYPE_CHECKING:
    from vitscale_shards.checking.faults import SetFault
    from vitscale_shards.checking.verify import Level
    from vitscale_shards.place import Place
    from vitscale_shards.planning.plan import Plan
    from vitscale_shards.sources import SourceSpec

MAX_FAULTS_SHOWN = 1000

Out = Annotated[str, typer.Argument(metavar="OUT", help="A shard set, or a folder of sets.")]
LevelOption = Annotated[
    Literal["sizes", "checksums", "headers", "pixels"],
    typer.Option(help="How deep to look; each level includes those before it. All but the first read every byte."),
]
MovedTo = Annotated[
    list[str] | None, typer.Option("--source", help="Where the source of the plan lies now, if it has moved.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]


def verify(out: Out, level: LevelOption = "headers", workers: Workers = 1) -> None:
    """Find everything that is wrong with shard sets; exit code 1 if there is anything."""
    found = 0
    for place in _sets(out):
        faults = _verify(place, level, workers)
        found += len(faults)
        _show(place, faults)
        typer.echo(f"{place.url}: {count(len(faults), 'fault') if faults else 'nothing wrong'} (level {level})")
        if faults:
            warn(_advice(place))
    if found:
        raise typer.Exit(1)


def repair(
    out: Out,
    level: LevelOption = "headers",
    workers: Workers = 1,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Bad images to leave out.  [default: as many as were left out before]")
    ] = None,
    moved_to: MovedTo = None,
) -> None:
    """Verify shard sets and mend them: write again, from the plan, only what is broken; exit code 1 if faults are left.

    After an interruption, 'vitscale shards write OUT' goes on.
    """
    left = 0
    for place in _sets(out):
        faults = _verify(place, level, workers)
        if not faults:
            typer.echo(f"{place.url}: nothing wrong (level {level})")
            continue
        _show(place, faults)
        _mend(place, faults, workers, max_failures, moved_to)
        faults = _verify(place, level, workers)
        left += len(faults)
        _show(place, faults)
        if any(fault.kind == "sample" for fault in faults):
            warn(
                "faults of samples in tars with the right checksum are the same in the source: write another set with "
                "--check decode and --max-failures N, or --exclude them"
            )
        typer.echo(f"{place.url}: {count(len(faults), 'fault') + ' left' if faults else 'mended'} (level {level})")
    if left:
        raise typer.Exit(1)


def retry(out: Out, moved_to: MovedTo = None) -> None:
    """Try again the images that were left out of complete sets, and only these."""
    from vitscale_shards.planning.plan import Plan
    from vitscale_shards.sources import SourceSpec
    from vitscale_shards.writing.mend import retry as retry_set
    from vitscale_shards.writing.records import read_failures

    for place in _sets(out):
        plan, failures = Plan(place), len(read_failures(place))
        if not failures:
            typer.echo(f"{plan.head.split}: nothing was left out")
            continue
        with progress("images") as advance:
            tried = counter(advance, f"{plan.head.split}: trying again", failures)
            back = retry_set(plan, SourceSpec.from_json(plan.head.source).moved(moved_to).open(), advance=tried)
        typer.echo(f"{plan.head.split}: {back} of {count(failures, 'image')} that had been left out came in")
        typer.echo(summary(plan))


def stats(
    out: Out,
    workers: Workers = 1,
    images: Annotated[int, typer.Option(min=1, help="Most images whose headers are looked at.")] = 10_000,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object for each set instead.")] = False,
) -> None:
    """Show classes, label counts, sizes of images, and how well the samples are shuffled."""
    from vitscale_shards.statistics.stats import gather_stats
    from vitscale_shards.statistics.stats_text import format_stats

    for place in _sets(out):
        with progress("samples") as advance:
            gathered = gather_stats(
                place,
                workers=workers,
                max_images=images,
                on_progress=lambda done, total: advance(f"reading {out}", done, total),
            )
        typer.echo(json.dumps(gathered.to_json()) if json_lines else format_stats(gathered))


def index(
    url: Annotated[str, typer.Argument(help="Folder of tars, /data/{000..099}.tar, s3://bucket/prefix, https://...")],
    out: Annotated[Path | None, typer.Option(help="Folder for the index, if it is not to lie beside the tars.")] = None,
    classes: Annotated[Path | None, typer.Option(help="File with class names in the order of their labels.")] = None,
    checksums: Annotated[bool, typer.Option(help="Read all bytes and note the SHA-256 of every tar.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    workers: Workers = 1,
) -> None:
    """Make a foreign WebDataset set ours: write .idx files and index.json. No tar is touched."""
    from vitscale_shards.indexing.foreign import index_set
    from vitscale_shards.planning.settings import read_list

    names = None if classes is None else read_list(classes, "class names")
    with progress("tars") as advance:
        indexed = index_set(
            url,
            out=out,
            classes=names,
            checksums=checksums,
            overwrite=overwrite,
            workers=workers,
            on_progress=lambda done, total: advance("indexing", done, total),
        )
    for note in indexed.notes:
        warn(note)
    manifest = indexed.manifest
    typer.echo(
        f"{manifest.num_samples:,} samples, {count(len(manifest.shards), 'shard')}, {manifest.num_bytes / 1e6:,.1f} MB "
        f"-> {out or url}"
    )


@spread
def dedup(
    paths: Annotated[
        list[str], typer.Argument(metavar="SOURCE... REPORT", help="Datasets, and a folder to report in.")
    ],
    source: SourceOptions,
    against: Annotated[list[str] | None, typer.Option(help="Held-out dataset that no image may come from.")] = None,
    match: Annotated[
        Literal["bytes", "pixels", "near"], typer.Option(help="How alike copies are; each includes those before it.")
    ] = "near",
    radius: Annotated[int, typer.Option(min=0, help="Bits, of 64, that hashes of near copies may differ in.")] = 4,
    within: Annotated[bool, typer.Option(help="Look for copies within SOURCE, too.")] = True,
    workers: Workers = 1,
) -> None:
    """Find images of SOURCE that are held out elsewhere, or there twice: REPORT/exclude.txt is for write --exclude."""
    from vitscale_shards.dedup.find import find_duplicates
    from vitscale_shards.dedup.settings import DedupSettings

    if len(paths) < 2:
        raise DataError("dedup: SOURCE and REPORT are needed")
    folder = Path(paths[-1])
    spec = _without_vain_labels(source, paths[:-1]).spec(paths[:-1])
    spec.refuse_nested(folder)
    held_out = [_held_out(location, source) for location in against or ()]
    with progress("images") as advance:
        report = find_duplicates(
            spec,
            held_out,
            folder,
            DedupSettings(match, radius, within),
            workers=workers,
            advance=advance,
        )
    for name, pairs in report.pairs.items():
        typer.echo(f"{name}: {count(pairs, 'pair')}")
    if unreadable := sum(one.unreadable for one in (report.source, *report.against)):
        warn(f"{count(unreadable, 'image')} could not be read, so not compared: see {folder}/unreadable.jsonl")
    if report.pairs_not_shown:
        warn(f"{count(report.pairs_not_shown, 'pair')} had no room on the {count(report.sheets, 'sheet')}")
    typer.echo(
        f"{report.excluded:,} of {report.source.images:,} images are to be left out ({report.source.matched:,} held "
        f"out elsewhere, {report.repeated:,} there twice)"
    )
    if report.excluded:
        typer.echo(f"look at {folder}/sheet-*.jpg, then give plan or write --exclude {folder}/exclude.txt")


def _held_out(location: str, source: SourceOptions) -> SourceSpec:
    """A held-out dataset: of the options of the source, it takes the ground truth if it needs one."""
    return _without_vain_labels(SourceOptions(labels=source.labels), [location]).spec([location])


def _without_vain_labels(source: SourceOptions, locations: list[str]) -> SourceOptions:
    from vitscale_shards.sources.imagenet_val import is_imagenet_val

    needed = any(is_imagenet_val(Path(location)) for location in locations)
    return source if needed else replace(source, labels=None)


def _advice(place: Place) -> str:
    from vitscale.data.manifest import INDEX_NAME
    from vitscale_shards.planning.plan import PLAN_NAME
    from vitscale_shards.writing.mend import is_unfinished, not_complete

    planned = place.size(PLAN_NAME) is not None
    if planned and is_unfinished(place):
        return not_complete(place)
    if not planned and place.size(INDEX_NAME) is None:
        return f"{place.url}: has no index; 'vitscale shards index {place.url}' makes one"
    return f"'vitscale shards repair {place.url}' mends what can be mended"


def _mend(
    place: Place, faults: list[SetFault], workers: int, max_failures: int | None, moved_to: list[str] | None
) -> None:
    from vitscale_shards.checking.whole_set import read_index
    from vitscale_shards.sources import SourceSpec
    from vitscale_shards.writing.mend import changed_shards, prepare_repair
    from vitscale_shards.writing.records import Records, read_failures
    from vitscale_shards.writing.workers import write_sets

    plan = _plan_of(place)
    before = None if any(fault.kind == "index" for fault in faults) else read_index(place)
    allowed = len(read_failures(place)) if max_failures is None else max_failures
    spec = None if plan is None else SourceSpec.from_json(plan.head.source).moved(moved_to)
    with progress("shards") as advance:
        compared = counter(advance, "comparing", None if plan is None else plan.num_shards)
        repairs = prepare_repair(plan, place, faults, spec, advance=compared)
    for note in repairs.notes:
        typer.echo(f"{place.url}/{note}")
    if not repairs.reopened or plan is None or spec is None:
        return
    try:
        with progress("images") as advance:
            write_sets([plan], spec, workers=workers, max_failures=allowed, report=advance, warn=warn)
    except DataError:
        Records(plan).close_again()  # what is not broken stays of use
        raise
    for name in repairs.to_write:
        typer.echo(f"{place.url}/{name}: written again")
    for name in changed_shards(before, read_index(place)) if before else []:
        warn(f"{place.url}/{name}: is not what it was before: the source has changed since it was first written")


def _plan_of(place: Place) -> Plan | None:
    from vitscale_shards.planning.plan import PLAN_NAME, Plan

    return None if place.size(PLAN_NAME) is None else Plan(place)


def _verify(place: Place, level: Level, workers: int) -> list[SetFault]:
    from vitscale_shards.checking.locate import locate
    from vitscale_shards.checking.verify import verify_set

    plan = _plan_of(place)
    with progress("bytes") as advance:
        faults = list(
            verify_set(
                place,
                level=level,
                workers=workers,
                plan=None if plan is None else plan.head.digest,
                on_progress=lambda done, total: advance(f"reading {place.url}", done, total),
                on_note=warn,
            )
        )
    return faults if plan is None else locate(plan, faults)


def _show(place: Place, faults: list[SetFault]) -> None:
    from vitscale_shards.checking.faults import format_fault

    for fault in faults[:MAX_FAULTS_SHOWN]:
        typer.echo(f"{place.url}/{format_fault(fault)}")
    if len(faults) > MAX_FAULTS_SHOWN:
        typer.echo(f"{place.url}: and {len(faults) - MAX_FAULTS_SHOWN:,} faults more")


def _sets(out: str) -> list[Place]:
    """The set at OUT, or those in its folders.

    Raises:
        DataError: there is none.
    """
    from vitscale.data.manifest import INDEX_NAME
    from vitscale_shards.planning.plan import PLAN_NAME
    from vitscale_shards.remote import open_place

    def is_set(place: Place) -> bool:
        return any(place.size(name) is not None for name in (INDEX_NAME, PLAN_NAME)) or any(
            name.endswith(".tar") for name in place.names()
        )

    place = open_place(out)
    if is_set(place):
        return [place]
    places = [below for below in map(place.child, place.folders()) if is_set(below)]
    if not places:
        raise DataError(f"{out}: no shard set; a folder with {INDEX_NAME} and *.tar files is needed, or one of such")
    return places
