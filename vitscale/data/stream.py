"""Windows of a shard set: one sequential read each, cut into samples by the tar's member index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate, groupby
from threading import Lock
from typing import NamedTuple

from vitscale.data.decode import BadSampleError
from vitscale.data.manifest import Member, MemberIndex, ShardInfo, parse_idx
from vitscale.data.order import Order, Place, SampleRef, WindowId
from vitscale.data.shard_set import ShardSource
from vitscale.data.storage.files import StorageSilentError
from vitscale.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
# Where both are there, the first one counts.
LABEL_EXTENSIONS = ("cls", "json")
TAR_BLOCK = 512
# A window may take so many times the bytes of its members; foreign tars hold members that are not of the sample.
MOST_SLACK = 16
# Of open member indexes: a rank walks one shard for each of its lanes at a time. One takes 8 bytes per sample if it can
# be read again from the disk, else some 90.
OPEN_INDEX_BYTES = 256 << 20


class RawSample(NamedTuple):
    """One sample as it lies in the shard. ``sample_id`` counts through the whole set, or the whole part of one."""

    key: str
    sample_id: int
    shard: str
    image: bytes
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """A sample that cannot be used, and why."""

    key: str
    sample_id: int
    shard: str
    reason: str


class ShardStream:
    """Reads windows of an order. Safe to use from several threads.

    Args:
        sources: the shard sets; the order numbers their shards through.
        order: which samples a window holds.
    """

    def __init__(self, sources: Sequence[ShardSource], order: Order) -> None:
        self.order = order
        self._shards = [
            _Shard(source, info, info.name if len(sources) == 1 else f"{source.tars.location}/{info.name}")
            for source in sources
            for info in source.manifest.shards
        ]
        self._first_ids = list(accumulate((shard.info.num_samples for shard in self._shards), initial=0))
        self._indexes = _OpenIndexes(OPEN_INDEX_BYTES)

    def read_window(self, window: WindowId) -> list[RawSample | Fault]:
        """Samples of a window in the order of their draws; unreadable ones as faults.

        Raises:
            StorageSilentError: the storage as a whole cannot be reached.
        """
        refs = self.order.window(window)
        samples: dict[SampleRef, RawSample | Fault] = {}
        for shard, group in groupby(sorted(refs), key=lambda ref: ref.shard):
            samples.update(self._read_range(shard, list(group)))
        return [samples[ref] for ref in refs]

    def read_sample(self, place: Place) -> RawSample | Fault:
        """The sample of one draw, without the rest of its window; raises like :meth:`read_window`."""
        ref = self.order.window(place.window)[place.offset]
        return self._read_range(ref.shard, [ref])[ref]

    def _read_range(self, number: int, refs: list[SampleRef]) -> dict[SampleRef, RawSample | Fault]:
        """One read for neighbouring samples of one tar."""
        shard, first_id = self._shards[number], self._first_ids[number]
        try:
            members = self._members(number, refs[0].sample, refs[-1].sample + 1)
        except BadSampleError as error:
            # Without the member index, the keys are not known either.
            name, first = shard.info.name.removesuffix(".tar"), shard.info.first_sample
            return {r: Fault(f"{name}[{first + r.sample}]", first_id + r.sample, shard.label, str(error)) for r in refs}
        by_ref = {ref: members[ref.sample - refs[0].sample] for ref in refs}
        start = min(m.offset for parts in members for m in parts) - TAR_BLOCK
        end = min(max(m.offset + m.size for parts in members for m in parts), shard.info.num_bytes)
        if not 0 <= start < end or end - start > MOST_SLACK * sum(m.size + 3 * TAR_BLOCK for p in members for m in p):
            reason = "the member index does not fit the tar: neighbouring samples lie far apart"
            return {r: Fault(_key(parts), first_id + r.sample, shard.label, reason) for r, parts in by_ref.items()}
        try:
            data = shard.source.tars.read(shard.info.name, start, end - start)
        except OSError as error:
            reason = f"cannot read the shard: {error.strerror or error}"
            return {r: Fault(_key(parts), first_id + r.sample, shard.label, reason) for r, parts in by_ref.items()}
        return {r: _cut(shard, first_id + r.sample, parts, data, start) for r, parts in by_ref.items()}

    def _members(self, number: int, first: int, stop: int) -> list[tuple[Member, ...]]:
        """What the member index says of some samples of a tar, counted through those that belong to the set.

        Raises:
            BadSampleError: it cannot be used.
        """
        begin = self._shards[number].info.first_sample
        try:
            return self._indexes.of(self._shards[number])[begin + first : begin + stop]
        except StorageSilentError:
            raise
        except OSError as error:
            name = self._shards[number].info.idx_name
            raise BadSampleError(f"cannot read the member index {name}: {error.strerror or error}") from error
        except DataError as error:
            raise BadSampleError(f"cannot use the member index: {error}") from error


@dataclass(frozen=True, eq=False, slots=True)
class _Shard:
    """A tar, the set that it belongs to, and what it is called in records."""

    source: ShardSource
    info: ShardInfo
    label: str


class _OpenIndexes:
    """The member indexes that were used last, as many as a number of bytes holds. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._lock = Lock()
        # In the order of their last use.
        self._open: dict[_Shard, Future[MemberIndex]] = {}

    def of(self, shard: _Shard) -> MemberIndex:
        """The member index of a shard; threads that want the same one wait for the first of them."""
        with self._lock:
            future = self._open.pop(shard, None)
            mine = future is None
            if future is None:
                future = Future()
            self._open[shard] = future
        if not mine:
            return future.result()
        try:
            index = _read_index(shard)
        except Exception as error:
            with self._lock:
                self._open.pop(shard, None)
            future.set_exception(error)
            raise
        future.set_result(index)
        with self._lock:
            self._bytes += index.held_bytes
            for other, opened in list(self._open.items()):
                if self._bytes <= self._max_bytes:
                    break
                if other is not shard and opened.done():
                    self._bytes -= self._open.pop(other).result().held_bytes
        return index


def _read_index(shard: _Shard) -> MemberIndex:
    files, info = shard.source.indexes, shard.info
    path = f"{files.location}/{info.idx_name}"
    again = (lambda start, end: files.read(info.idx_name, start, end - start)) if files.reads_cheaply else None
    index = parse_idx(files.read_all(info.idx_name), path, again)
    if len(index) != info.num_in_tar:
        raise DataError(f"{path} lists {len(index)} samples where index.json says {info.num_in_tar}")
    return index


def _cut(shard: _Shard, sample_id: int, members: tuple[Member, ...], data: bytes, start: int) -> RawSample | Fault:
    """A sample out of the bytes of a tar from ``start`` on."""
    key = _key(members)
    try:
        parts = {m.extension.lower(): _member_bytes(m, data, start) for m in members}
        image = next((parts[ext] for ext in parts if ext in IMAGE_EXTENSIONS), None)
        if image is None:
            raise BadSampleError(f"no image among the members ({', '.join(parts)})")
        labels, classes = labels_of(parts), shard.source.manifest.classes
        if classes is not None and labels and max(labels) >= len(classes):
            raise BadSampleError(f"label {max(labels)}, where the set has {len(classes)} classes")
        return RawSample(key, sample_id, shard.label, image, labels)
    except BadSampleError as error:
        return Fault(key, sample_id, shard.label, str(error))


def _key(members: tuple[Member, ...]) -> str:
    return members[0].name.removesuffix("." + members[0].extension)


def _member_bytes(member: Member, data: bytes, start: int) -> bytes:
    """Bytes of a member, after a look at its tar header: a stale index must not yield a neighbour's bytes."""
    begin = member.offset - start
    header, content = begin - TAR_BLOCK, data[begin : begin + member.size]
    if header < 0 or begin > len(data) or len(content) != member.size:
        raise BadSampleError(f"the tar ends within {member.name}: {len(content)} of {member.size} bytes")
    # A header begins with the name of up to 100 bytes; longer ones, and those that are not ASCII, live elsewhere.
    name = member.name.encode()
    if member.name.isascii() and len(name) <= 100 and data[header : header + 100].rstrip(b"\0") != name:
        raise BadSampleError(f"the tar has no member {member.name} at byte {member.offset}")
    # Then, at byte 124, the size in octal digits.
    if data[header + 124 : header + 136].strip(b" \0").lstrip(b"0") != (b"%o" % member.size).lstrip(b"0"):
        raise BadSampleError(f"{member.name} has not {member.size} bytes in the tar, as the index says")
    return content


def labels_of(parts: dict[str, bytes]) -> tuple[int, ...]:
    """Dense class indices from a ``cls`` (one integer) or ``json`` (key ``labels``) member.

    Args:
        parts: content of a sample's members by extension.

    Raises:
        BadSampleError: there is no such member, or it does not hold class indices.
    """
    try:
        if "cls" in parts:
            labels: tuple[int, ...] = (int(parts["cls"]),)
        elif "json" in parts:
            labels = tuple(json.loads(parts["json"])["labels"])
            if any(type(label) is not int for label in labels):
                raise ValueError(f"whole numbers are needed, found {list(labels)}")
        else:
            raise BadSampleError(f"no label: a cls or json member is needed, found {', '.join(parts)}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSampleError(f"unreadable label: {error!r}") from error
    if labels and min(labels) < 0:
        raise BadSampleError(f"negative label among {list(labels)}")
    return labels
