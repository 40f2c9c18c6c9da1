"""Fingerprints of all images of a source, kept in files so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.durable import published, sync_folder
from vitscale.errors import DataError
from vitscale_shards.dedup.fingerprints import VERSION, Fingerprint, decoder_versions, fingerprint
from vitscale_shards.parallel import in_order
from vitscale_shards.progress import Advance
from vitscale_shards.rows import Row, Source
from vitscale_shards.sources import SourceSpec

ROWS_PER_CHUNK = 5_000

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("labels", pa.list_(pa.int64())),
        ("path", pa.binary()),  # may hold bytes that are no text
        ("num_bytes", pa.int64()),
        ("bytes_sha256", pa.binary(32)),
        ("pixels_sha256", pa.binary(32)),
        ("dct_hash", pa.uint64()),
        ("reason", pa.string()),
    ]
)
_DIGEST, _UNREADABLE = b"digest", b"unreadable"


def path_of(row: dict[str, Any]) -> str:
    """Path of an image, of a row of one of the tables."""
    return bytes(row["path"]).decode("utf-8", "surrogatepass")


class FingerprintSet:
    """The fingerprints of one source, on disk."""

    def __init__(self, name: str, source: Source, folder: Path, num_chunks: int = 0) -> None:
        self.name = name
        """What reports call the source; no two sets have the same."""

        self.source = source
        self._folder = folder
        self._num_chunks = num_chunks

    def tables(self, *, only: list[str] | None = None) -> Iterator[pa.Table]:
        """Tables of :data:`SCHEMA`, or some of its columns, one per file; the order is that of the source.

        Raises:
            DataError: a file cannot be read.
        """
        for number in range(self._num_chunks):
            path = self._path(number)
            try:
                yield pq.ParquetFile(path).read(only)
            except (OSError, pa.ArrowInvalid) as error:
                reason = " ".join(str(error).split())
                raise DataError(
                    f"{path}: cannot be read ({reason}); remove it and give the same command again, which makes it anew"
                ) from error

    def compute(self, spec: SourceSpec, *, decode: bool, workers: int, advance: Advance) -> None:
        """Compute what is not there yet.

        Raises:
            DataError: the source cannot be listed, or a worker was killed.
            OSError: the fingerprints cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(".*.tmp"):
            left_over.unlink()
        _open_again.cache_clear()
        num_images = 0
        for number in in_order(partial(_compute_chunk, spec, decode), self._chunks(decode), workers):
            num_images += number
            advance(self.name, num_images, None)
        for path in self._folder.glob("chunk-*.parquet"):
            if int(path.stem.removeprefix("chunk-")) >= self._num_chunks:
                path.unlink()
        sync_folder(self._folder)

    def _chunks(self, decode: bool) -> Iterator[_Chunk]:
        self._num_chunks = 0
        rows = self.source.rows()
        while chunk := list(islice(rows, ROWS_PER_CHUNK)):
            path, digest = self._path(self._num_chunks), _digest(chunk, decode)
            self._num_chunks += 1
            yield _Chunk(path, digest, () if _is_complete(path, digest) else chunk, len(chunk))

    def _path(self, number: int) -> Path:
        return self._folder / f"chunk-{number:06d}.parquet"


@dataclass(frozen=True)
class _Chunk:
    path: Path
    digest: bytes
    rows: Sequence[Row]
    """Empty if there is nothing to do."""

    num_rows: int


def _digest(rows: Sequence[Row], decode: bool) -> bytes:
    """Of all that the fingerprints depend on but the images themselves. Another decoder may give other pixels."""
    decoder = decoder_versions() if decode else None
    content = repr((VERSION, decoder, [tuple(row) for row in rows]))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def _is_complete(path: Path, digest: bytes) -> bool:
    """Whether a chunk's file is there, and no image in it should be tried again."""
    stated = _metadata(path)
    return stated.get(_DIGEST) == digest and stated.get(_UNREADABLE) == b"0"


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return dict(pq.read_schema(path).metadata or {})
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}


@lru_cache(maxsize=1)
def _open_again(spec: SourceSpec) -> Source:
    """The source as a worker sees it, opened once per process."""
    return spec.open()


def _compute_chunk(spec: SourceSpec, decode: bool, chunk: _Chunk) -> int:
    """Write a chunk's file unless it is complete; returns its number of images."""
    if chunk.rows:
        source = _open_again(spec)
        known = _known(chunk)
        prints = [known.get(i) or fingerprint(source, row, decode=decode) for i, row in enumerate(chunk.rows)]
        _publish_chunk(chunk, prints)
    return chunk.num_rows


def _known(chunk: _Chunk) -> dict[int, Fingerprint]:
    """Fingerprints in the chunk's file, by place. Those of unreadable images are not among them: what could not be read
    yesterday may have been mended."""
    if _metadata(chunk.path).get(_DIGEST) != chunk.digest:
        return {}
    rows = pq.ParquetFile(chunk.path).read(list(Fingerprint._fields)).to_pylist()
    return {i: Fingerprint(**row) for i, row in enumerate(rows) if row["reason"] is None}


def _publish_chunk(chunk: _Chunk, prints: Sequence[Fingerprint]) -> None:
    columns = [
        [row.key for row in chunk.rows],
        [row.labels for row in chunk.rows],
        [row.path.encode("utf-8", "surrogatepass") for row in chunk.rows],
        [row.num_bytes for row in chunk.rows],
        *zip(*prints, strict=True),
    ]
    unreadable = sum(print.reason is not None for print in prints)
    schema = SCHEMA.with_metadata({_DIGEST: chunk.digest, _UNREADABLE: str(unreadable)})
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    with published(chunk.path) as file:
        file.write(buffer.getbuffer())
