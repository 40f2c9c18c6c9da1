"""The bytes of one shard: rows in, a tar out, with its member index, its digest and what could not be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from vitscale.data.manifest import Member
from vitscale_shards import tar
from vitscale_shards.images import Treatment
from vitscale_shards.rows import BadImageError, Row, Source


@dataclass(frozen=True)
class Failure:
    """An image that was left out."""

    key: str
    path: str
    reason: str
    shard: str


class Sink(Protocol):
    """What a shard can be written to."""

    def write(self, data: bytes, /) -> int:
        """Take all of the bytes."""


@dataclass
class TarStream:
    """Writes samples as a tar, and remembers what it wrote. Without a file it only computes."""

    file: Sink | None
    members: list[list[Member]] = field(default_factory=list)
    num_bytes: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """Append a sample; its members come in the order of their extensions, as webdataset writes them."""
        pieces, members, offset = [], [], self.num_bytes
        for extension, data in sorted(parts.items()):
            name = f"{key}.{extension}"
            members.append(Member(extension, offset + tar.BLOCK, len(data), name))
            pieces += [tar.header(name, len(data)), data, tar.padding(len(data))]
            offset += tar.BLOCK + len(data) + -len(data) % tar.BLOCK
        self._write(b"".join(pieces))
        self.members.append(members)

    def finish(self) -> None:
        """Append the end of the archive."""
        self._write(tar.end(self.num_bytes))

    def _write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)
        if self.file is not None:
            self.file.write(data)


def label_member(labels: tuple[int, ...], *, multi_label: bool) -> tuple[str, bytes]:
    """Extension and content of a sample's label."""
    if multi_label:
        return "json", json.dumps({"labels": labels}).encode()
    return "cls", b"%d" % labels[0]


ImageOf = Callable[[Row], tuple[str, bytes]]
"""Gives the extension and bytes of the member that a row's image becomes, or raises BadImageError."""


def from_source(source: Source, treatment: Treatment) -> ImageOf:
    """Images as a source has them, checked and treated."""

    def image_of(row: Row) -> tuple[str, bytes]:
        try:
            data = source.read(row)
        except OSError as error:  # a user's own source may leave it at that
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        if row.num_bytes and len(data) != row.num_bytes:
            raise BadImageError(f"has {len(data)} bytes, {row.num_bytes} when it was planned: the source changed since")
        return treatment.apply(data)

    return image_of


def compose(
    file: Sink | None,
    rows: Iterable[Row],
    image_of: ImageOf,
    *,
    multi_label: bool,
    failed: Callable[[Row, str], None],
    advance: Callable[[], None] = lambda: None,
) -> TarStream:
    """Write one shard.

    Args:
        file: where to; None to compute what would be written.
        failed: is told of each image that is left out, and why; may raise.
        advance: is called after each row.
    """
    stream = TarStream(file)
    for row in rows:
        try:
            extension, image = image_of(row)
        except BadImageError as error:
            failed(row, str(error))
        else:
            stream.add(row.key, dict([label_member(row.labels, multi_label=multi_label), (extension, image)]))
        advance()
    stream.finish()
    return stream
