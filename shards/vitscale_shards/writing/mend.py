"""Mend a shard set: write again what is broken, and try again the images that were left out.

Both make the complete set one that is being written, with records of the shards that stay. From there on it is the
same work as the first writing, and goes on in the same way after an interruption.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vitscale.data.manifest import INDEX_NAME, Manifest, Member, ShardInfo, format_idx, parse_idx_line
from vitscale.data.stream import LABEL_EXTENSIONS
from vitscale.errors import DataError
from vitscale_shards.checking.faults import SetFault
from vitscale_shards.checking.whole_set import read_index
from vitscale_shards.place import Place
from vitscale_shards.planning.plan import PLAN_NAME, Plan
from vitscale_shards.rows import BadImageError, Row, Source
from vitscale_shards.sources import SourceSpec
from vitscale_shards.tar import TarError, key_of, walk
from vitscale_shards.writing.compose import Failure, ImageOf, compose, from_source
from vitscale_shards.writing.records import PROGRESS, Records, ShardRecord, read_failures
from vitscale_shards.writing.writer import explained, write_set, write_shard

SET_ASIDE = ".set-aside"
# Not "sample": a sample at fault in a tar that is as it was written is the same in the source.
_TAR_FAULTS = frozenset({"missing", "size", "checksum", "swapped", "tar"})


@dataclass
class Repairs:
    """What a repair has done, and what is left to do."""

    notes: list[str] = field(default_factory=list)
    """What was done, a line each."""

    to_write: list[str] = field(default_factory=list)
    """Tars that must be written again; the set is open for that if there is any, or if the index must be."""

    reopened: bool = False


def is_unfinished(place: Place) -> bool:
    """Whether a planned set is still to be written, in contrast to a complete one that has lost its index."""
    if place.size(INDEX_NAME) is not None:
        return False
    return bool(place.names(PROGRESS)) or not any(name.endswith(".tar") for name in place.names())


def not_complete(place: Place) -> str:
    """What to do with a set that is not complete."""
    return f"{place.url}: is not complete; 'vitscale shards write {place.url}' goes on with it"


def check_complete(plan: Plan) -> Manifest:
    """The index of a complete set.

    Raises:
        DataError: the set is not complete.
    """
    if plan.place.size(INDEX_NAME) is None:
        raise DataError(not_complete(plan.place))
    return read_index(plan.place)


def retry(plan: Plan, source: Source, *, advance: Callable[[int], None] = lambda images: None) -> int:
    """Try again the images that were left out of a complete set; nothing else is read from the source.

    A shard that gets an image back is put together anew from its old tar and that image, so that the set becomes what
    it would have been if the image had been good from the start.

    Returns:
        How many images the set got back.

    Raises:
        DataError: the set is not complete, or a tar that is needed is damaged.
    """
    with explained(plan.place):
        manifest, failures = check_complete(plan), read_failures(plan.place)
        image_of = from_source(source, plan.head.treatment)
        wanted: dict[str, set[str]] = {}
        for failure in failures:
            wanted.setdefault(failure.shard, set()).add(failure.key)
        numbers = {plan.shard_name(shard): shard for shard in range(plan.num_shards)}
        good: dict[str, set[str]] = {}
        for name, keys in sorted(wanted.items()):
            rows = [row for row in plan.rows(numbers[name]) if row.key in keys]
            if back := {row.key for row in rows if _readable(image_of, row)}:
                good[name] = back
            advance(len(rows))
        if not good:
            return 0
        old = {name: _OldShard(plan.place, info) for name, info in _by_name(manifest).items() if name in good}
        records = Records(plan)
        records.reopen([record for record in _records(manifest, failures) if record.shard.name not in good])
        records.refresh()
        for name in good:
            reuse = old[name].image_or(image_of) if name in old else image_of
            records.add(write_shard(plan, numbers[name], reuse))
        write_set(plan, source, max_failures=len(failures))
        return sum(map(len, good.values()))


def prepare_repair(
    plan: Plan | None,
    place: Place,
    faults: Sequence[SetFault],
    spec: SourceSpec | None,
    *,
    advance: Callable[[int], None] = lambda shards: None,
) -> Repairs:
    """Mend what can be mended at once, and open the set for the writing of the tars that are broken.

    Args:
        plan: of the set; without one, only files that follow from the tars are mended.
        faults: as :func:`vitscale_shards.checking.verify.verify_set` found them.
        spec: source of the plan; opened if the index is lost, so that what it said must be computed again.
        advance: is told of each shard that is computed for that.

    Raises:
        DataError: tars are broken and there is no plan to write them from, or the set is not complete.
    """
    kinds = {fault.kind for fault in faults}
    broken = {fault.file for fault in faults if fault.kind in _TAR_FAULTS}
    if plan is None and (broken or "index" in kinds):
        what = f"broken tars ({len(broken)})" if broken else f"no {INDEX_NAME} to rely upon"
        raise DataError(
            f"{place.url}: {what}, and no {PLAN_NAME} to write from; copy the set again from where it came, or "
            f"make its index anew with 'vitscale shards index {place.url} --overwrite'"
        )
    if plan is not None and is_unfinished(place):
        raise DataError(not_complete(place))
    # Before anything is changed: without the source, nothing broken can be mended.
    source = None if spec is None or not (broken or "index" in kinds) else spec.open()
    repairs = Repairs()
    with explained(place):
        _tidy(place, faults, repairs)
        for name in sorted({f.file for f in faults if f.kind == "idx"}):
            tar = name.removesuffix(".idx") + ".tar"
            if tar not in broken and "index" not in kinds:
                place.publish_text(name, format_idx(_members_of(place, tar)))
                repairs.notes.append(f"{name}: made anew from {tar}")
        if plan is None or source is None:
            return repairs
        if "index" in kinds:
            repairs.notes.append(f"{INDEX_NAME}: not relied upon; every tar is compared with what the plan gives")
            kept = _compared(plan, from_source(source, plan.head.treatment), advance)
        else:
            kept = [r for r in _records(read_index(place), read_failures(place)) if r.shard.name not in broken]
        Records(plan).reopen(kept)
        names = {plan.shard_name(shard) for shard in range(plan.num_shards)}
        repairs.to_write = sorted(names - {record.shard.name for record in kept})
        repairs.reopened = True
    return repairs


def changed_shards(before: Manifest, after: Manifest) -> list[str]:
    """Tars whose content is not what the former index said, which means that the source has changed since."""
    old = _by_name(before)
    return [s.name for s in after.shards if s.name in old and old[s.name].sha256 not in (None, s.sha256)]


def _tidy(place: Place, faults: Iterable[SetFault], repairs: Repairs) -> None:
    for fault in faults:
        if fault.file == PROGRESS and place.size(INDEX_NAME) is not None:
            place.remove_folder(PROGRESS)
            repairs.notes.append(f"{PROGRESS}: removed; the set is complete")
        elif fault.kind == "leftover" and place.size(fault.file) is not None:
            place.remove(fault.file)
            repairs.notes.append(f"{fault.file}: removed")
        elif fault.kind == "foreign" and place.size(fault.file) is not None:
            with place.open(fault.file) as source, place.published(f"{SET_ASIDE}/{fault.file}") as target:
                shutil.copyfileobj(source, target)
            place.remove(fault.file)
            repairs.notes.append(f"{fault.file}: moved to {place.url}/{SET_ASIDE}")


def _compared(plan: Plan, image_of: ImageOf, advance: Callable[[int], None]) -> list[ShardRecord]:
    """Records of the shards that are what the plan gives; their member indexes are made anew if they are not."""
    kept = []
    for shard in range(plan.num_shards):
        name = plan.shard_name(shard)
        failures: list[Failure] = []

        def note(row: Row, reason: str, name: str = name, failures: list[Failure] = failures) -> None:
            failures.append(Failure(row.key, row.path, reason, name))

        stream = compose(None, plan.rows(shard), image_of, multi_label=plan.head.multi_label, failed=note)
        info = ShardInfo(name, len(stream.members), stream.num_bytes, stream.sha256.hexdigest())
        if not stream.members:
            kept.append(ShardRecord(ShardInfo(name, 0, 0), tuple(failures)))
        elif plan.place.size(name) == info.num_bytes and _sha256(plan.place, name) == info.sha256:
            plan.place.publish_text(info.idx_name, format_idx(stream.members))
            kept.append(ShardRecord(info, tuple(failures)))
        advance(1)
    return kept


def _records(manifest: Manifest, failures: list[Failure]) -> list[ShardRecord]:
    """What is known of the shards of a complete set; those without a file come from their failures."""
    shards = _by_name(manifest)
    left_out: dict[str, list[Failure]] = {name: [] for name in shards}
    for failure in failures:
        left_out.setdefault(failure.shard, []).append(failure)
    return [ShardRecord(shards.get(name, ShardInfo(name, 0, 0)), tuple(some)) for name, some in left_out.items()]


def _by_name(manifest: Manifest) -> dict[str, ShardInfo]:
    return {shard.name: shard for shard in manifest.shards}


def _readable(image_of: ImageOf, row: Row) -> bool:
    try:
        image_of(row)
    except BadImageError:
        return False
    return True


class _OldShard:
    """The images of a finished shard, by their keys."""

    def __init__(self, place: Place, info: ShardInfo) -> None:
        if place.size(info.name) is None or _sha256(place, info.name) != info.sha256:
            raise DataError(
                f"{place.url}/{info.name}: is not what the index says; mend the set first: "
                f"'vitscale shards repair {place.url}'"
            )
        self._place, self._name = place, info.name
        self._images: dict[str, Member] = {}
        for line in place.read_text(info.idx_name).splitlines()[1:]:
            image = next(m for m in parse_idx_line(line, info.idx_name) if m.extension not in LABEL_EXTENSIONS)
            self._images[key_of(image.name)] = image

    def image_or(self, image_of: ImageOf) -> ImageOf:
        """Images from here, and from the source those that are not here."""
        file = self._place.open(self._name)

        def from_tar(row: Row) -> tuple[str, bytes]:
            if row.key not in self._images:
                return image_of(row)
            member = self._images[row.key]
            file.seek(member.offset)
            return member.extension, file.read(member.size)

        return from_tar


def _members_of(place: Place, tar: str) -> list[list[Member]]:
    try:
        with place.open(tar) as file:
            return [list(group) for _, group in itertools.groupby(walk(file), key=lambda member: key_of(member.name))]
    except TarError as error:
        raise DataError(f"{place.url}/{tar}: damaged {error}; verify the set at a higher level") from error


def _sha256(place: Place, name: str) -> str:
    with place.open(name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
