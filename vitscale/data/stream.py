"""Windows of a shard set: one sequential read each, cut into samples by the tar's member index."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from vitscale.data.decode import BadSampleError
from vitscale.data.manifest import Manifest, Member, MemberIndex, ShardInfo, read_idx
from vitscale.data.order import Order, SampleRef, WindowId
from vitscale.errors import DataError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
# Where both are there, the first one counts.
LABEL_EXTENSIONS = ("cls", "json")
TAR_BLOCK = 512
# Open member indexes: a rank walks one shard for each of its lanes at a time. Each takes 8 bytes per sample.
OPEN_INDEXES = 2048


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard. ``sample_id`` counts through the whole set."""

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
    """Reads windows of an order. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, order: Order) -> None:
        self.manifest = manifest
        self.order = order
        self._first_ids = [0]
        for shard in manifest.shards:
            self._first_ids.append(self._first_ids[-1] + shard.num_samples)
        self._open_index = lru_cache(maxsize=OPEN_INDEXES)(self._read_index)

    def read_window(self, window: WindowId) -> list[RawSample | Fault]:
        """Samples of a window in the order of their draws; unreadable ones as faults.

        Raises:
            DataError: a member index is missing or does not fit its tar.
        """
        refs = self.order.window(window)
        samples: dict[SampleRef, RawSample | Fault] = {}
        for shard, group in groupby(sorted(refs), key=lambda ref: ref.shard):
            samples.update(self._read_range(shard, list(group)))
        return [samples[ref] for ref in refs]

    def _read_range(self, shard: int, refs: list[SampleRef]) -> dict[SampleRef, RawSample | Fault]:
        """One read for neighbouring samples of one tar."""
        info = self.manifest.shards[shard]
        index = self._open_index(shard)
        members = index[refs[0].sample : refs[-1].sample + 1]
        start = min(m.offset for m in members[0]) - TAR_BLOCK
        end = min(max(m.offset + m.size for m in members[-1]), info.num_bytes)
        try:
            data = _read_bytes(self.manifest.folder / info.name, start, end - start)
        except OSError as error:
            reason = f"cannot read the shard: {error.strerror or error}"
            return {
                ref: Fault(_key(parts), self._first_ids[shard] + ref.sample, info.name, reason)
                for ref, parts in zip(refs, members, strict=True)
            }
        return {
            ref: self._cut(info, self._first_ids[shard] + ref.sample, parts, data, start)
            for ref, parts in zip(refs, members, strict=True)
        }

    def _cut(
        self, info: ShardInfo, sample_id: int, members: tuple[Member, ...], data: bytes, start: int
    ) -> RawSample | Fault:
        key = _key(members)
        try:
            parts = {m.extension.lower(): _member_bytes(m, data, start) for m in members}
            image = next((parts[ext] for ext in parts if ext in IMAGE_EXTENSIONS), None)
            if image is None:
                raise BadSampleError(f"no image among the members ({', '.join(parts)})")
            return RawSample(key, sample_id, info.name, image, labels_of(parts))
        except BadSampleError as error:
            return Fault(key, sample_id, info.name, str(error))

    def _read_index(self, shard: int) -> MemberIndex:
        info = self.manifest.shards[shard]
        path = self.manifest.folder / info.idx_name
        index = read_idx(path)
        if len(index) != info.num_samples:
            raise DataError(
                f"{path}: lists {len(index)} samples where index.json says {info.num_samples}; "
                f"both must come from one writing: write the shard set again"
            )
        return index


def _key(members: tuple[Member, ...]) -> str:
    return members[0].name.removesuffix("." + members[0].extension)


def _read_bytes(path: Path, start: int, length: int) -> bytes:
    """Up to ``length`` bytes; fewer at the end of a truncated file, which the members then notice."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while length > 0 and (piece := os.pread(descriptor, length, start)):
            pieces.append(piece)
            start += len(piece)
            length -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def _member_bytes(member: Member, data: bytes, start: int) -> bytes:
    """Bytes of a member, after a look at its tar header: a stale index must not yield a neighbour's bytes."""
    begin = member.offset - start
    header, content = data[begin - TAR_BLOCK : begin], data[begin : begin + member.size]
    if len(header) != TAR_BLOCK or len(content) != member.size:
        raise BadSampleError(f"the tar ends within {member.name}: {len(content)} of {member.size} bytes")
    # A header begins with the name of up to 100 bytes; longer ones, and those that are not ASCII, live elsewhere.
    name = member.name.encode()
    if member.name.isascii() and len(name) <= 100 and header[:100].rstrip(b"\0") != name:
        raise BadSampleError(f"the tar has no member {member.name} at byte {member.offset}")
    # Then, at byte 124, the size in octal digits.
    if header[124:136].strip(b" \0").lstrip(b"0") != (b"%o" % member.size).lstrip(b"0"):
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
    if any(label < 0 for label in labels):
        raise BadSampleError(f"negative label among {list(labels)}")
    return labels
