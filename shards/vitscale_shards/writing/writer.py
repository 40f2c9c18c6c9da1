"""Put a plan on disk: OUT/<split>/{*.tar,*.idx,index.json}. What has no leading dot is a finished file.

Any number of workers write one set: each claims a shard, writes it, and leaves a record. Whoever finds a record of
every shard publishes ``index.json``, which comes last: a folder with an index is complete.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from vitscale.data.manifest import INDEX_NAME, Manifest, ShardInfo, format_idx
from vitscale.errors import DataError
from vitscale_shards.place import Place
from vitscale_shards.planning.plan import Plan
from vitscale_shards.rows import Row, Source
from vitscale_shards.writing.claims import Claims
from vitscale_shards.writing.compose import Failure, ImageOf, compose, from_source
from vitscale_shards.writing.records import FAILURES_NAME, PROGRESS, Records, ShardRecord, publish_failures

WAIT_S = 1.0
_INDEX_CLAIM = "index"


@dataclass
class Tally:
    """How far a worker is: rows of the shards that are finished, by whomever, and of its own that is not."""

    finished: int = 0
    current: int = 0


def write_set(
    plan: Plan,
    source: Source,
    *,
    max_failures: int = 0,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Write what is missing of a set, beside any other workers that do; returns when the set is complete.

    Args:
        max_failures: bad images of this set, in all workers, to leave out before giving up.
        tell: is told after every image, and while waiting for other workers.

    Raises:
        DataError: too many bad images, or the disk is full; finished shards are kept.
    """
    place = plan.place
    with explained(place):
        if place.size(INDEX_NAME) is None:
            try:
                with Claims(place) as claims:
                    _Worker(plan, source, claims, max_failures, tell).work()
            except OSError:  # others may have finished the set and tidied up, which a worker can meet at any point
                if place.size(INDEX_NAME) is None:
                    raise
        tell(Tally(finished=plan.num_samples))
        for name in _leftovers(place, "."):
            place.remove(name)
        place.remove_folder(PROGRESS)


def _leftovers(place: Place, beginning: str) -> list[str]:
    """Temporary files, by workers that write or have died."""
    return [name for name in place.names() if name.startswith(beginning) and name.endswith(".tmp")]


def write_shard(
    plan: Plan,
    shard: int,
    image_of: ImageOf,
    *,
    failed: Callable[[Failure], None] = lambda failure: None,
    advance: Callable[[], None] = lambda: None,
) -> ShardRecord:
    """Write one tar and its member index.

    Args:
        failed: is told of each image that is left out; may raise.
        advance: is called after each image.

    Raises:
        OSError: the disk is full or broken; nothing is left under a final name that is not complete.
    """
    place, name = plan.place, plan.shard_name(shard)
    failures: list[Failure] = []

    def note(row: Row, reason: str) -> None:
        failures.append(Failure(row.key, row.path, reason, name))
        failed(failures[-1])

    try:
        with place.published(name) as file:
            multi_label = plan.head.multi_label
            stream = compose(file, plan.rows(shard), image_of, multi_label=multi_label, failed=note, advance=advance)
            if not stream.members:
                raise _EmptyShardError
    except _EmptyShardError:
        empty = ShardInfo(name, 0, 0)
        for file_name in (name, empty.idx_name):  # of an attempt that found good images, and left no record
            place.remove(file_name)
        return ShardRecord(empty, tuple(failures))
    info = ShardInfo(name, len(stream.members), stream.num_bytes, stream.sha256.hexdigest())
    place.publish_text(info.idx_name, format_idx(stream.members))
    place.sync()
    return ShardRecord(info, tuple(failures))


class _EmptyShardError(Exception):
    """All images of a shard are bad, so there is nothing to publish."""


class _Worker:
    """One worker on one set."""

    def __init__(
        self, plan: Plan, source: Source, claims: Claims, max_failures: int, tell: Callable[[Tally], None]
    ) -> None:
        self._plan = plan
        self._place = plan.place
        self._image_of = from_source(source, plan.head.treatment)
        self._claims = claims
        self._max_failures = max_failures
        self._tell = tell
        self._records = Records(plan)
        self._tally = Tally()
        # Workers that go different ways seldom meet.
        self._way = list(range(plan.num_shards))
        random.Random(claims.worker).shuffle(self._way)

    def work(self) -> None:
        self._remove_leftovers()
        while self._place.size(INDEX_NAME) is None:
            others = self._records.refresh()
            self._note_progress()
            self._check_budget([])
            self._way = [shard for shard in self._way if self._records.get(self._plan.shard_name(shard)) is None]
            if not self._way:
                if self._claim_and(_INDEX_CLAIM, self._finish):
                    return
            else:
                free = [shard for shard in self._way if f"{self._plan.shard_name(shard)}.claim" not in others]
                # Then the claimed ones: perhaps by workers that have died.
                if self._write_first_of(free) or self._write_first_of(self._way):
                    continue
            time.sleep(WAIT_S)

    def _remove_leftovers(self) -> None:
        """Make room: remove what dead workers have left half-written."""
        for name in _leftovers(self._place, f".{self._plan.head.split}-"):
            shard = f"{name[1:].partition('.')[0]}.tar"
            self._claim_and(shard, partial(self._place.remove, name))

    def _write_first_of(self, shards: list[int]) -> bool:
        return any(self._claim_and(self._plan.shard_name(shard), partial(self._write, shard)) for shard in shards)

    def _claim_and(self, name: str, act: Callable[[], None]) -> bool:
        """Do something under a claim; False if another worker has that."""
        if not self._claims.take(name):
            return False
        try:
            act()
        finally:
            self._claims.release(name)
        return True

    def _write(self, shard: int) -> None:
        # It may have been finished since the look that led here, and its record removed behind a complete set.
        self._records.refresh()
        if self._records.get(self._plan.shard_name(shard)) or self._place.size(INDEX_NAME) is not None:
            return
        failures: list[Failure] = []

        def failed(failure: Failure) -> None:
            failures.append(failure)
            self._check_budget(failures)

        record = write_shard(self._plan, shard, self._image_of, failed=failed, advance=self._advance)
        if failures:  # others may have had some meanwhile, and a record beyond the budget would outlive their mending
            self._records.refresh()
            self._check_budget(failures)
        self._records.add(record)
        self._note_progress()

    def _advance(self) -> None:
        self._tally.current += 1
        self._tell(self._tally)

    def _note_progress(self) -> None:
        self._tally.finished, self._tally.current = self._records.num_done, 0
        self._tell(self._tally)

    def _check_budget(self, more: list[Failure]) -> None:
        """See that the bad images of all finished shards, and those of the shard at hand, are within the budget."""
        if self._records.num_failures + len(more) <= self._max_failures:
            return
        failures = self._records.failures() + more
        publish_failures(self._place, failures)
        last = failures[-1]
        raise DataError(
            f"{last.path}: {last.reason}; bad image {len(failures)}, allowed are {self._max_failures} (all are listed "
            f"in {self._place.url}/{FAILURES_NAME}); mend the file and plan anew, or leave bad images out with "
            f"--max-failures N"
        )

    def _finish(self) -> None:
        """Publish the index of a set all of whose shards are there."""
        records = self._records.all()
        if len(records) < self._plan.num_shards:  # another worker has just done it, and cleaned up
            return
        publish_index(self._plan, records)


def publish_index(plan: Plan, records: list[ShardRecord]) -> None:
    """Write ``failures.jsonl`` and ``index.json`` of a complete set.

    Raises:
        DataError: all images are bad.
    """
    place, head = plan.place, plan.head
    publish_failures(place, [failure for record in records for failure in record.failures])
    shards = tuple(record.shard for record in records if record.shard.num_samples)
    if not shards:
        raise DataError(
            f"{place.url}: all {plan.num_samples} images are bad (see {place.url}/{FAILURES_NAME}); mend the source, "
            f"remove {place.url}, then give the same command again"
        )
    manifest = Manifest(
        location=place.url,
        shards=shards,
        classes=head.classes,
        multi_label=head.multi_label,
        split=head.split,
        source=head.source_name,
        plan=head.digest,
        order=head.settings["order"],
    )
    place.publish_text(INDEX_NAME, json.dumps(manifest.to_json(), indent=1) + "\n")
    place.sync()


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Tell a failing disk or store as an error that a user understands."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or place.url}: cannot be written ({error.strerror or error}); finished shards are "
            f"kept: make room or mend the permissions, then give the same command again"
        ) from error
