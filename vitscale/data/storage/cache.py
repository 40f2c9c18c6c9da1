"""Parts of remote shards on a node's own disk, for all ranks of the node and for all runs on it.

A run walks through hundreds of tars at a time from its first step on, so no tar can be fetched whole before it is
used. A cached tar is filled by the ranges that are asked for and becomes whole as the node walks through it. On disk::

    FOLDER/used                                the bytes in use, see eviction.py
    FOLDER/NAME-HASH.cached/                   a shard set, by the hash of its location
        train-000012.tar-HASH                  a tar and the journal of its pieces, see pieces.py
        train-000012.idx-HASH                  a member index and its checksum
        train-000012.tar-HASH.sha256           wrong digests of the tar, see comparison.py
        locks

The hash of a tar stands for what the index says of it: when the index changes, nothing old is found under the name.
A process may be killed at any moment. Own design.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitscale.data.manifest import ShardInfo
from vitscale.data.storage.comparison import compare
from vitscale.data.storage.files import ShardFiles
from vitscale.data.storage.node_cache import CacheCounters, NextUses, NodeCache
from vitscale.data.storage.pieces import (
    PIECE_BYTES,
    STRIDE,
    DamagedError,
    PieceFile,
    load_small,
    locked,
    open_file,
    store_small,
)
from vitscale.errors import DataError

FORMAT_VERSION = 1
# A file is marked as read at most this often.
TOUCH_S = 1.0

ReadInParts = Callable[[str], Iterator[bytes]]
"""Gives all bytes of a file, one part after another; raises like :meth:`ShardFiles.read`."""


class _OriginError(Exception):
    """Tells what the origin raised from what the cache's own disk raised."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class CachedFiles:
    """The files of one shard set through a node's cache. Implements :class:`vitscale.data.storage.files.ShardFiles`.

    The end of a tar is where the index says. What is neither a tar of the set nor its member index is not kept.

    Args:
        origin: where the files come from.
        shards: the tars.
        cache: of the node.
        next_uses: for what to keep; without it, the least recently read goes first.
        read_in_parts: for an origin that begins at the start of a file whatever is asked of it. The first read of a
            tar then brings all of it.

    Raises:
        DataError: the name of a shard is a path.
    """

    reads_cheaply = False

    def __init__(
        self,
        origin: ShardFiles,
        shards: Sequence[ShardInfo],
        cache: NodeCache,
        next_uses: NextUses | None = None,
        *,
        read_in_parts: ReadInParts | None = None,
    ) -> None:
        self.location = origin.location
        self.folder = cache.folder / _folder_name(origin.location)
        self.next_uses = next_uses
        self._cache, self._origin, self._shards = cache, origin, shards
        self._read_in_parts = read_in_parts
        self._numbers = {shard.name: number for number, shard in enumerate(shards)}
        self._opened: set[int] = set()
        for name in self._numbers:
            if "/" in name or "\0" in name:
                raise DataError(f"{self.location}: shard {name!r}; a plain file name is needed: write the index again")
        if next_uses is not None:
            cache.add(self)

    def read(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end."""
        number = self._numbers.get(name)
        if number is None:
            return self._origin.read(name, start, length)
        length = min(length, self._shards[number].num_bytes - start)
        if length <= 0:
            return b""
        try:
            with self._open(number) as file:
                return self._read(file, number, start, start + length)
        except _OriginError as failure:
            raise failure.error from None
        except OSError as error:
            self._cache.say_unusable(error)
            return self._read_straight(name, start, length)

    def read_all(self, name: str) -> bytes:
        """All bytes of a file."""
        if name in self._numbers:
            return self.read(name, 0, self._shards[self._numbers[name]].num_bytes)
        number = self._numbers.get(name.removesuffix(".idx") + ".tar")
        if number is None or self._shards[number].idx_name != name:
            return self._origin.read_all(name)
        try:
            return self._read_idx(number)
        except _OriginError as failure:
            raise failure.error from None
        except OSError as error:
            self._cache.say_unusable(error)
            return self._origin.read_all(name)

    def size(self, name: str) -> int | None:
        """Bytes of a file, or ``None`` if it is not there."""
        return self._origin.size(name)

    def shard_of(self, file_name: str) -> int | None:
        """The number of the shard that a file in the cache belongs to, if it is one of these."""
        name = file_name.rpartition("-")[0]
        number = self._numbers.get(name.removesuffix(".idx") + ".tar" if name.endswith(".idx") else name)
        if number is None or file_name not in (self._file_name(number), self._idx_file_name(number)):
            return None
        return number

    def _file_name(self, number: int) -> str:
        shard = self._shards[number]
        return f"{shard.name}-{_identity(shard)}"

    def _idx_file_name(self, number: int) -> str:
        shard = self._shards[number]
        return f"{shard.idx_name}-{_identity(shard)}"

    @contextmanager
    def _open(self, number: int) -> Iterator[PieceFile]:
        path, num_bytes = self.folder / self._file_name(number), self._shards[number].num_bytes
        with PieceFile.open(path, num_bytes, create=True) as file:
            if abs(time.time() - file.last_read) > TOUCH_S:
                file.touch()
            if number not in self._opened:
                self._opened.add(number)
                self._compare_if_whole(file, number)  # the process that completed it may have died
            try:
                yield file
            finally:
                self._cache.count(CacheCounters(damaged_pieces=file.num_damaged))

    def _read(self, file: PieceFile, number: int, start: int, stop: int) -> bytes:
        wanted = range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        base = wanted.start * PIECE_BYTES
        view = memoryview(bytearray(file.length(wanted)))
        gaps = file.load(wanted, view)
        if gaps and self._read_in_parts is not None:
            gaps = [range(gaps[0].start, gaps[-1].stop)]
        fetched, whole = 0, True
        for gap in gaps:
            part = view[gap.start * PIECE_BYTES - base :][: file.length(gap)]
            num_bytes, reached = self._fill(file, number, gap, part)
            fetched += num_bytes
            if reached < len(part):  # the tar is cut short
                stop, whole = min(stop, gap.start * PIECE_BYTES + reached), False
                break
        hit = whole and not fetched
        self._cache.count(CacheCounters(hits=hit, misses=not hit, cached_bytes=len(view) - fetched))
        return bytes(view[start - base : max(start, stop) - base])

    def _fill(self, file: PieceFile, number: int, gap: range, into: memoryview) -> tuple[int, int]:
        """Bring missing pieces, unless another does so meanwhile.

        Returns:
            How many bytes the origin gave for them, and up to where ``into`` is filled: the tar may be cut short.
        """
        claim = gap if self._read_in_parts is None else range(file.num_pieces)
        fetched = 0
        with file.claimed(claim, self._cache.patience_s, wanted=gap):
            for missing in file.load(gap, into):
                end = missing.start * PIECE_BYTES + file.length(missing)
                reached = 0
                for first, data in self._parts(file, number, missing):
                    reached = first * PIECE_BYTES + len(data)
                    fetched += _copy(data, first * PIECE_BYTES, into, gap.start * PIECE_BYTES)
                    if not self._keep(file, number, first, data) and reached >= end:
                        break
                if reached < end:
                    return fetched, max(0, reached - gap.start * PIECE_BYTES)
        return fetched, len(into)

    def _parts(self, file: PieceFile, number: int, pieces: range) -> Iterator[tuple[int, bytes]]:
        """Pieces from the origin: by one read, or the whole tar from its start. Each part begins with a piece."""
        shard = self._shards[number]
        try:
            if self._read_in_parts is None:
                yield pieces.start, self._origin.read(shard.name, pieces.start * PIECE_BYTES, file.length(pieces))
                return
            first, pending = 0, bytearray()
            for data in self._read_in_parts(shard.name):
                pending += data
                while len(pending) >= STRIDE * PIECE_BYTES:
                    yield first, bytes(pending[: STRIDE * PIECE_BYTES])
                    del pending[: STRIDE * PIECE_BYTES]
                    first += STRIDE
            yield first, bytes(pending)
        except OSError as error:
            raise _OriginError(error) from error

    def _keep(self, file: PieceFile, number: int, first: int, data: bytes) -> bool:
        """Whether pieces were put into the cache."""
        kept = False
        try:
            kept = self._cache.room.take(len(data), self.folder.name, self._file_name(number))
            if kept:
                file.store(first, data)
                self._compare_if_whole(file, number)
        except OSError as error:
            kept = False
            self._cache.say_unusable(error)
        self._cache.count(CacheCounters(origin_bytes=len(data), unkept_bytes=0 if kept else len(data)))
        return kept

    def _read_straight(self, name: str, start: int, length: int) -> bytes:
        data = self._origin.read(name, start, length)
        self._cache.count(CacheCounters(misses=1, origin_bytes=len(data), unkept_bytes=len(data)))
        return data

    def _read_idx(self, number: int) -> bytes:
        path = self.folder / self._idx_file_name(number)
        content = self._cached_idx(path)
        if content is not None:
            return content
        descriptor = open_file(self.folder / "locks", create=True)
        try:
            with locked(descriptor, number, 1, patience_s=self._cache.patience_s):
                content = self._cached_idx(path)
                return self._fetch_idx(number, path) if content is None else content
        finally:
            os.close(descriptor)

    def _cached_idx(self, path: Path) -> bytes | None:
        try:
            content = load_small(path)
        except DamagedError:
            self._cache.count(CacheCounters(damaged_pieces=1))
            path.unlink(missing_ok=True)
            return None
        if content is not None:
            os.utime(path)
            self._cache.count(CacheCounters(hits=1, cached_bytes=len(content)))
        return content

    def _fetch_idx(self, number: int, path: Path) -> bytes:
        try:
            content = self._origin.read_all(self._shards[number].idx_name)
        except OSError as error:
            raise _OriginError(error) from error
        kept = False
        try:
            kept = self._cache.room.take(len(content), self.folder.name, path.name)
            if kept:
                store_small(path, content)
        except OSError as error:
            kept = False
            self._cache.say_unusable(error)
        self._cache.count(CacheCounters(misses=1, origin_bytes=len(content), unkept_bytes=0 if kept else len(content)))
        return content

    def _compare_if_whole(self, file: PieceFile, number: int) -> None:
        if file.awaits_comparison:
            self._cache.comparisons.submit(lambda: self._compare(number))

    def _compare(self, number: int) -> None:
        path, shard = self.folder / self._file_name(number), self._shards[number]
        try:
            with PieceFile.open(path, shard.num_bytes, create=False) as file, file.claimed_whole() as alone:
                if not (alone and file.awaits_comparison):
                    return
                wrong, warning = compare(file, shard, self._origin, path.with_name(f"{path.name}.sha256"))
                self._cache.count(CacheCounters(mismatches=wrong, damaged_pieces=file.num_damaged))
        except FileNotFoundError:
            return  # it has had to make room
        except OSError as error:
            self._cache.say_unusable(error)
            return
        if warning is not None:
            self._cache.warn_once(str(path), warning)


def _copy(data: bytes, start: int, into: memoryview, into_start: int) -> int:
    """Copy what two stretches of a file have in common; how many bytes that is."""
    first, stop = max(start, into_start), min(start + len(data), into_start + len(into))
    if first >= stop:
        return 0
    into[first - into_start : stop - into_start] = memoryview(data)[first - start : stop - start]
    return stop - first


def _folder_name(location: str) -> str:
    """Tells a set's location from all others, and a person what it is. No passwords or signatures of a URL."""
    last = location.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition("@")[2]
    legible = re.sub(r"[^A-Za-z0-9._-]+", "_", last)[:60]
    return f"{legible}-{hashlib.sha256(location.rstrip('/').encode()).hexdigest()[:16]}.cached"


def _identity(shard: ShardInfo) -> str:
    """Changes with anything that the index says of a tar; the parts of a set share its tars."""
    said = (FORMAT_VERSION, PIECE_BYTES, shard.name, shard.num_in_tar, shard.num_bytes, shard.sha256)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]
