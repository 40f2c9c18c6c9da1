"""Work out which image goes into which shard: a pure function of the source's rows and the settings.

Rows are listed once and scattered over files by a hash, so that memory grows with 1/256 of their number
(see :mod:`vitscale_shards.planning.spool`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace, Place, process_name
from vitscale_shards.planning.lists import EXCLUDED, Lists
from vitscale_shards.planning.plan import COLUMNS, METADATA, PLAN_NAME, PLAN_VERSION, Plan, PlanHead
from vitscale_shards.planning.row_tables import row_tables
from vitscale_shards.planning.settings import HASH_RANGE, PlanSettings, parse_split, parse_subset, upper_limits
from vitscale_shards.planning.spool import Spool
from vitscale_shards.rows import Source
from vitscale_shards.tar import sample_bytes

SAMPLES_PER_SHARD = 10_000
_SCRATCH = ".planning-"
Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class _Side:
    """The rows of one split on their way into its plan."""

    spool: Spool
    num_rows: int = 0
    weight: int = 0
    last_listed: int = 0
    label_counts: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    """Images with each label."""

    stratum_sizes: Counts = field(default_factory=lambda: np.zeros(1, np.int64))
    """Images without a label, and then those whose first label is 0, 1, ..."""


def make_plans(
    source: Source,
    spec: dict[str, Any],
    settings: PlanSettings,
    out: Place,
    *,
    listed: Callable[[int], None] = lambda rows: None,
) -> list[Plan]:
    """Plan a source: divide its rows into splits, shuffle each, cut it into shards of almost equal size.

    The side of an image depends on its key and the shares alone, so it stays when images are added or the seed
    changes. The order depends on the seed and the key. A plan that is there already must be the same.

    Args:
        spec: how workers open the source again.
        out: a folder with one folder per split. While planning, about 150 bytes per image lie there (in the system's
            folder for temporary files if it is no local folder).
        listed: is told how many rows more were listed.

    Raises:
        DataError: two rows with one key, a split that gets no image, a wrong setting, or ``out`` holds a plan of other
            images or settings, or something else; the disk is full or fails.
    """
    splits = sorted({*parse_split(settings.split), *(name for name, _ in settings.lists)})
    try:
        with _scratch(out) as scratch:
            sides = {name: _Side(Spool(scratch / f"{name}.spool")) for name in splits}
            _scatter(source, settings, sides, listed)
            heads = []
            for name, side in sides.items():
                head = PlanHead(
                    split=name,
                    splits=tuple(splits),
                    source_name=source.name,
                    source=spec,
                    classes=source.classes,
                    multi_label=source.multi_label,
                    settings=settings.to_json(),
                )
                heads.append(_write_draft(scratch / f"{name}.parquet", head, side, settings, scratch))
            for head in heads:
                check_folder(head, out)
            return [_publish(scratch / f"{head.split}.parquet", head, out.child(head.split)) for head in heads]
    except OSError as error:
        raise DataError(
            f"{error.filename or out.url}: {error.strerror or error}; make room or mend the permissions, then give the "
            f"same command again"
        ) from error


@contextmanager
def _scratch(out: Place) -> Iterator[Path]:
    """A folder of this process for temporary files; those of dead processes of this machine are removed."""
    if not isinstance(out, LocalPlace):
        with tempfile.TemporaryDirectory(prefix="vitscale-plan-") as folder:
            yield Path(folder)
        return
    scratch = out.folder / f"{_SCRATCH}{process_name()}"
    prefix = scratch.name.removesuffix(str(os.getpid()))
    for leftover in out.folder.glob(f"{_SCRATCH}*"):
        process = leftover.name.removeprefix(prefix)
        # In containers, a process often has the number of the one that died before it.
        if process.isdecimal() and (leftover == scratch or not psutil.pid_exists(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_folder(head: PlanHead, out: Place) -> None:
    """See that a split's folder is empty or follows this very plan.

    Raises:
        DataError: it does not.
    """
    place = out.child(head.split)
    _check_siblings(head, out)
    files = place.names()
    if PLAN_NAME in files:
        there = Plan(place).head
        if there.digest != head.digest:
            raise DataError(
                f"{place.url}: follows a plan of other {_difference(there, head)}; 'vitscale shards "
                f"write {out.url}' goes on with that one; choose another OUT for this one, or remove {place.url}"
            )
    elif others := [name for name in [*files, *place.folders()] if not name.startswith(".")]:
        raise DataError(
            f"{place.url}: holds {len(others)} other files, such as {others[0]}, and no plan; one folder holds one "
            f"set: choose another OUT, or remove {place.url} first"
        )


def _difference(there: PlanHead, head: PlanHead) -> str:
    before, now = _options(there), _options(head)
    changed = [f"{name} {value} there, {now.get(name)} now" for name, value in before.items() if value != now.get(name)]
    if changed:
        return f"settings ({'; '.join(changed)})"
    if there.classes != head.classes:
        return f"classes ({len(there.classes or ())} there, {len(head.classes or ())} now)"
    if there.source_name != head.source_name:
        return f"images ({there.source_name!r} there, {head.source_name!r} now)"
    return f"images (the source {head.source_name!r} or one of the lists has changed since)"


def _options(head: PlanHead) -> dict[str, str]:
    """The settings as a user gives them."""
    settings = {**head.settings, **head.settings.get("treatment", {})}
    settings.pop("treatment", None)
    names = {name: f"--{name.replace('_', '-')}" for name in settings} | {"lists": "--split-list"}
    return {names[name]: "not given" if value in (None, "", []) else str(value) for name, value in settings.items()}


def _check_siblings(head: PlanHead, out: Place) -> None:
    """Sets under one OUT are used together, so their labels must mean the same."""
    for name in out.folders():
        if name == head.split or out.child(name).size(PLAN_NAME) is None:
            continue
        there = Plan(out.child(name)).head
        if there.classes != head.classes:
            raise DataError(
                f"{out.child(head.split).url}: its classes would differ from those of {out.child(name).url}, a label "
                f"would mean two things; give both the same --classes FILE, or choose another OUT"
            )


def _scatter(source: Source, settings: PlanSettings, sides: dict[str, _Side], listed: Callable[[int], None]) -> None:
    """Send every row of the source to its split."""
    shares = parse_split(settings.split)
    limits = np.array([min(limit, HASH_RANGE - 1) for limit in upper_limits(shares)[:-1]], np.uint64)
    subset = {name: ceil(share * HASH_RANGE) for name, share in parse_subset(settings.subset, list(sides)).items()}
    lists = Lists(settings, list(sides))
    names = list(sides)
    by_share = np.array([names.index(name) for name in sorted(shares)])
    total = 0
    for table in row_tables(source):
        keys = table["key"].to_pylist()
        side = (
            by_share[np.searchsorted(limits, _hashes(keys), side="right")]
            if len(shares) > 1
            else (np.full(len(keys), by_share[0]))
        )
        lists.apply(side, keys, table["path"])
        if subset:
            chances = _hashes(keys, "subset:")
            for name, limit in subset.items():
                if limit < HASH_RANGE:
                    side[(side == names.index(name)) & (chances >= np.uint64(limit))] = EXCLUDED
        table = table.append_column("order", pa.array(_hashes(keys, f"{settings.seed}:")))
        if settings.order == "source":
            table = table.append_column("listed", pa.array(np.arange(total, total + len(keys))))
        for number, name in enumerate(names):
            _take(sides[name], table.filter(pa.array(side == number)), settings)
        total += len(keys)
        listed(len(keys))
    lists.check_all_found()
    for name, one in sides.items():
        if not one.num_rows:
            raise DataError(f"split {name!r} gets none of {total} images; give it a larger share or leave it out")


def _take(side: _Side, rows: pa.Table, settings: PlanSettings) -> None:
    side.num_rows += len(rows)
    side.weight += int(_weights(rows, settings).sum())
    side.label_counts = _added(side.label_counts, pc.list_flatten(rows["labels"]).to_numpy())
    side.stratum_sizes = _added(side.stratum_sizes, _first_labels(rows) + 1)
    if settings.order == "source" and len(rows):
        side.last_listed = rows["listed"][-1].as_py()
    side.spool.add(rows)


def _added(counts: Counts, labels: Counts) -> Counts:
    more = np.bincount(labels, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _write_draft(path: Path, head: PlanHead, side: _Side, settings: PlanSettings, scratch: Path) -> PlanHead:
    """Write a plan to a file of its own.

    Returns:
        The head with the digest.
    """
    ordered = _refuse_equal_keys(side.spool.tables())
    if settings.order == "stratified":
        ordered = _stratified(ordered, side, settings.seed, Spool(scratch / f"{head.split}.second"))
    elif settings.order == "source":
        ordered = _as_listed(ordered, side, Spool(scratch / f"{head.split}.second"))
    known = [head.split, head.source_name, head.classes, head.multi_label, settings.to_json()["treatment"]]
    digest = hashlib.sha256(json.dumps(known).encode())
    with pq.ParquetWriter(
        path, COLUMNS, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    ) as file:
        for shard in _cut(ordered, side, settings):
            digest.update(_digest(shard))
            file.write_table(shard, row_group_size=len(shard))
        head = replace(head, digest=digest.hexdigest(), label_counts=tuple(side.label_counts.tolist()))
        file.add_key_value_metadata({METADATA: json.dumps({"version": PLAN_VERSION, **asdict(head)})})
    return head


def _publish(draft: Path, head: PlanHead, place: Place) -> Plan:
    if place.size(PLAN_NAME) is None:
        with draft.open("rb") as source, place.published(PLAN_NAME) as target:
            shutil.copyfileobj(source, target)
        place.sync()
    return Plan(place)


def _hashes(keys: list[str], before: str = "") -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 64 bits of the SHA-256 of every key."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256((before + key).encode()).digest()[:8] for key in keys])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _first_labels(rows: pa.Table) -> Counts:
    """The first label of every row, -1 where there is none."""
    labels = rows["labels"].combine_chunks()
    first = np.full(len(rows), -1, np.int64)
    some = pc.list_value_length(labels).to_numpy(zero_copy_only=False) > 0
    first[some] = pc.list_element(labels.filter(pa.array(some)), 0).to_numpy(zero_copy_only=False)
    return first


def _refuse_equal_keys(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Equal keys have equal hashes, so they stand side by side after the shuffle, in one table."""
    for table in tables:
        same = pc.equal(table["key"].slice(1), table["key"].slice(0, max(0, len(table) - 1)))
        if pc.any(same).as_py():
            place = pc.index(same, True).as_py()
            first, second = sorted(table["path"].slice(place, 2).to_pylist())
            raise DataError(
                f"{first} and {second} both get the key {table['key'][place].as_py()!r}; keys must differ: rename one "
                f"of them, or prefix the keys of merged sources"
            )
        yield table


def _stratified(tables: Iterator[pa.Table], side: _Side, seed: int, spool: Spool) -> Iterator[pa.Table]:
    """Spread every class evenly over the split: systematic sampling with a random start for each class.

    The j-th of a class's n images, in the order of the shuffle, comes to the place (j + u) / n of the split.
    """
    counts = side.stratum_sizes
    starts = _hashes([str(label) for label in range(-1, len(counts) - 1)], f"{seed}:class ") / HASH_RANGE
    seen = np.zeros_like(counts)
    for table in tables:
        labels = _first_labels(table) + 1
        by_label = np.argsort(labels, kind="stable")
        here = np.bincount(labels, minlength=len(counts))
        ranks = np.empty(len(labels), np.int64)
        ranks[by_label] = np.arange(len(labels)) - np.repeat(np.cumsum(here) - here, here)
        places = (seen[labels] + ranks + starts[labels]) / counts[labels]
        seen += here
        spool.add(_reordered(table.append_column("shuffled", pa.array(_halves_swapped(table["order"]))), places))
    return spool.tables()


def _halves_swapped(order: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """An order for the rows of a stratified shard.

    There, the hashes of a class are all close to each other, and further from those of other classes: the larger the
    split, the more so. Sorted by them, a shard would be a list of classes. Their lower halves know nothing of that.
    """
    hashes: np.ndarray[Any, np.dtype[np.uint64]] = order.to_numpy()
    return (hashes << np.uint64(32)) | (hashes >> np.uint64(32))


def _as_listed(tables: Iterator[pa.Table], side: _Side, spool: Spool) -> Iterator[pa.Table]:
    """Back to the order in which the source lists the rows."""
    for table in tables:
        places = table["listed"].to_numpy() / (side.last_listed + 1)
        spool.add(_reordered(table, places))
    return spool.tables()


def _reordered(table: pa.Table, places: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Table:
    """A table with other places in the whole, from 0 to below 1."""
    order = (np.minimum(places, np.nextafter(1.0, 0.0)) * HASH_RANGE).astype(np.uint64)
    return table.set_column(table.schema.get_field_index("order"), "order", pa.array(order))


def _weights(rows: pa.Table, settings: PlanSettings) -> Counts:
    """What a row counts towards a full shard: 1, or its bytes in the tar."""
    if settings.bytes_per_shard is None:
        return np.ones(len(rows), np.int64)
    sizes: Counts = rows["num_bytes"].to_numpy()
    if not sizes.all():
        path = rows["path"][int(np.argmin(sizes))].as_py()
        raise DataError(
            f"bytes per shard: the size of {path} is 0, or not known before it is read; give samples per shard, or "
            f"--exclude it"
        )
    return sample_bytes(sizes)


def _cut(tables: Iterator[pa.Table], side: _Side, settings: PlanSettings) -> Iterator[pa.Table]:
    """The rows of one shard after another. A shard ends where the sum of the weights passes its part of the whole."""
    limit = settings.bytes_per_shard or settings.samples_per_shard or SAMPLES_PER_SHARD
    num_shards = -(-side.weight // limit)
    ends = np.array([side.weight * (shard + 1) // num_shards for shard in range(num_shards)], np.int64)
    held: list[pa.Table] = []
    held_shard, passed = -1, 0
    for table in tables:
        sums = passed + np.cumsum(_weights(table, settings))
        passed = int(sums[-1])
        shards, starts = np.unique(np.searchsorted(ends, sums, side="left"), return_index=True)
        for shard, (start, stop) in zip(shards, pairwise([*starts, len(table)]), strict=True):
            if shard != held_shard and held:
                yield _shard_table(held)
                held = []
            held_shard = shard
            held.append(table.slice(start, stop - start))
    if held:
        yield _shard_table(held)


def _shard_table(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    if "shuffled" in table.column_names:  # neighbours of a stratum's order would come in the classes' order
        table = table.take(pc.sort_indices(table, [("shuffled", "ascending"), ("key", "ascending")]))
    return table.select(COLUMNS.names).combine_chunks()


def _digest(shard: pa.Table) -> bytes:
    columns = [shard[name].to_pylist() for name in COLUMNS.names]
    return hashlib.sha256(json.dumps(columns, separators=(",", ":")).encode()).digest()
