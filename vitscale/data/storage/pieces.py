"""One file of the node's cache: a tar that is filled piece by piece, with a journal of its pieces behind it.

On disk: the bytes of the tar (holes where pieces have not come yet), padding to a block, then one record per piece
and one for the tar as a whole. A record is the CRC-32 of the piece and its complement, both little-endian; zeros, or
anything else that does not match itself, means that the piece is not there. A piece is handed out only if its bytes
have the checksum, so nothing depends on the order in which data and records reach the disk.

Data and journal are one file, so an unlinked file takes its journal along: a process that still has it open goes on
undisturbed, and a new file under the name starts empty. Locks are ranges of open file descriptions (one byte per
piece): they keep threads and processes alike from fetching a piece twice, and the kernel frees them when their holder
dies. They save work; nothing is wrong without them. Own design.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitscale.durable import published

PIECE_BYTES = 256 * 1024
BLOCK_BYTES = 4096
# Pieces that are read at a time where a whole tar is gone through.
STRIDE = 16
_RECORD = struct.Struct("<II")
_ONES = 0xFFFFFFFF
_COMPARED = _RECORD.pack(1, 1 ^ _ONES)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
# What a file system without such locks says; there, nobody can be kept out.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", None)


def open_file(path: Path, *, create: bool) -> int:
    """A descriptor for reading and writing; with ``create``, the file and its folder are made. Raises OSError."""
    try:
        return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        if not create:
            raise
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


@contextmanager
def locked(
    descriptor: int, start: int, length: int, *, patience_s: float, until: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
    """Keep others out of a range of an open file for the time of the block, if they can be kept out.

    Args:
        descriptor: opened for reading and writing; another one of the same file counts as another holder.
        start: first byte of the range, which need not exist.
        length: bytes of the range.
        patience_s: seconds after which waiting for another holder ends.
        until: ends the waiting earlier.

    Yields:
        Whether the lock was taken. Where there are no locks it always is.
    """
    end, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while not (taken := _set_lock(descriptor, fcntl.F_WRLCK, start, length)):
        if time.monotonic() >= end or until():
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    try:
        yield taken
    finally:
        if taken:
            _set_lock(descriptor, fcntl.F_UNLCK, start, length)


def _set_lock(descriptor: int, kind: int, start: int, length: int) -> bool:
    if _SET_LOCK is None:
        return True
    try:
        fcntl.fcntl(descriptor, _SET_LOCK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return True
        raise


class PieceFile:
    """An open file of the cache. Pieces are numbered from 0; all but the last have ``PIECE_BYTES`` bytes."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._descriptor, self.num_bytes = descriptor, num_bytes
        self.num_pieces = -(-num_bytes // PIECE_BYTES)
        self.num_damaged = 0
        self._journal = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        end = self._journal + _RECORD.size * (self.num_pieces + 1)
        status = os.fstat(descriptor)
        self.last_read = status.st_mtime
        if status.st_size < end:
            os.ftruncate(descriptor, end)

    @classmethod
    @contextmanager
    def open(cls, path: Path, num_bytes: int, *, create: bool) -> Iterator[PieceFile]:
        """Open the file of a tar of ``num_bytes`` bytes; raises OSError."""
        descriptor = open_file(path, create=create)
        try:
            yield cls(descriptor, num_bytes)
        finally:
            os.close(descriptor)

    def touch(self) -> None:
        """Note that the file is read now."""
        os.utime(self._descriptor)

    def load(self, pieces: range, into: memoryview) -> list[range]:
        """Read those pieces that are there.

        Args:
            pieces: which ones.
            into: takes the bytes, from the first of ``pieces`` on.

        Returns:
            The runs of pieces that are not there. Damaged ones are dropped and count as such.
        """
        recorded = self._recorded(pieces)
        damaged: list[int] = []
        for run in _runs(recorded):
            part = into[(run.start - pieces.start) * PIECE_BYTES :][: self.length(run)]
            if self._read(part, run.start * PIECE_BYTES):
                views = ((piece, part[(piece - run.start) * PIECE_BYTES :][:PIECE_BYTES]) for piece in run)
                damaged += [piece for piece, view in views if zlib.crc32(view) != recorded[piece]]
            else:
                damaged += run
        for piece in damaged:
            del recorded[piece]
            self._write(bytes(_RECORD.size), self._journal + piece * _RECORD.size)
        if damaged:
            self.num_damaged += len(damaged)
            self._set_comparison(bytes(_RECORD.size))
        return list(_runs(piece for piece in pieces if piece not in recorded))

    def store(self, first: int, data: bytes) -> None:
        """Keep the pieces from number ``first`` on; an incomplete one at the end is left out. Raises OSError."""
        view = memoryview(data)
        stop = min(self.num_pieces, first + -(-len(data) // PIECE_BYTES))
        if len(data) < self.length(range(first, stop)):
            stop -= 1
        view = view[: self.length(range(first, stop))]
        records = [_record(view[i : i + PIECE_BYTES]) for i in range(0, len(view), PIECE_BYTES)]
        self._write(view, first * PIECE_BYTES)
        self._write(b"".join(records), self._journal + first * _RECORD.size)

    def length(self, pieces: range) -> int:
        """Bytes of neighbouring pieces."""
        return max(0, min(self.num_bytes, pieces.stop * PIECE_BYTES) - pieces.start * PIECE_BYTES)

    def has(self, pieces: range) -> bool:
        """Whether all of them are there, as far as the journal knows."""
        records = self._records(pieces)
        return len(records) == len(pieces) and bool(np.all(records[:, 0] ^ records[:, 1] == _ONES))

    @contextmanager
    def claimed(self, pieces: range, patience_s: float, *, wanted: range) -> Iterator[None]:
        """Keep others from fetching ``pieces`` for the time of the block.

        It begins when they can be kept out, when others have brought the ``wanted`` ones, or after ``patience_s``.
        """
        with locked(self._descriptor, pieces.start, len(pieces), patience_s=patience_s, until=lambda: self.has(wanted)):
            yield

    @contextmanager
    def claimed_whole(self) -> Iterator[bool]:
        """Keep others from comparing the tar as a whole; yields whether nobody else is at it."""
        with locked(self._descriptor, self.num_pieces, 1, patience_s=0.0) as taken:
            yield taken

    @property
    def awaits_comparison(self) -> bool:
        """Whether all pieces are there and the tar as a whole has not been compared with anything."""
        record = os.pread(self._descriptor, _RECORD.size, self._journal + self.num_pieces * _RECORD.size)
        return record != _COMPARED and self.has(range(self.num_pieces))

    def set_compared(self) -> None:
        """Remember that the tar as a whole has been compared."""
        self._set_comparison(_COMPARED)

    def sha256(self) -> str | None:
        """SHA-256 of the tar in hexadecimal, or ``None`` if a piece is not there any more."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(STRIDE * PIECE_BYTES))
        for first in range(0, self.num_pieces, STRIDE):
            pieces = range(first, min(first + STRIDE, self.num_pieces))
            if self.load(pieces, buffer):
                return None
            digest.update(buffer[: self.length(pieces)])
        return digest.hexdigest()

    def forget(self) -> None:
        """Drop all pieces."""
        self._write(bytes(_RECORD.size * (self.num_pieces + 1)), self._journal)

    def _recorded(self, pieces: range) -> dict[int, int]:
        """Checksums by piece of those that are there."""
        rows = zip(pieces, self._records(pieces).tolist(), strict=False)
        return {piece: checksum for piece, (checksum, complement) in rows if checksum ^ complement == _ONES}

    def _records(self, pieces: range) -> NDArray[np.uint32]:
        """Records of neighbouring pieces [n, 2]; fewer if something has cut the file."""
        data = os.pread(self._descriptor, len(pieces) * _RECORD.size, self._journal + pieces.start * _RECORD.size)
        return np.frombuffer(data, "<u4", len(data) // _RECORD.size * 2).reshape(-1, 2)

    def _set_comparison(self, record: bytes) -> None:
        self._write(record, self._journal + self.num_pieces * _RECORD.size)

    def _read(self, into: memoryview, start: int) -> bool:
        """Whether all of ``into`` could be read. What a bad disk refuses is fetched again like what is damaged."""
        try:
            while into and (count := os.preadv(self._descriptor, [into], start)):
                into, start = into[count:], start + count
        except OSError:
            return False
        return not into

    def _write(self, data: bytes | memoryview, start: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, start)
            view, start = view[count:], start + count


class DamagedError(Exception):
    """A small file does not hold what was written."""


def load_small(path: Path) -> bytes | None:
    """A small file that was kept as a whole, or ``None`` if it is not there; raises OSError.

    Raises:
        DamagedError: its bytes have not the checksum at its end.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    content = data[: -_RECORD.size]
    if data[-_RECORD.size :] != _record(content):
        raise DamagedError
    return content


def store_small(path: Path, content: bytes) -> None:
    """Keep a small file as a whole; raises OSError."""
    with published(path, writer=f".{uuid.uuid4().hex}") as file:
        file.write(content)
        file.write(_record(content))


def _record(data: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(data)
    return _RECORD.pack(checksum, checksum ^ _ONES)


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Ascending numbers as ranges of neighbours."""
    run = range(0)
    for number in numbers:
        if run and number == run.stop:
            run = range(run.start, number + 1)
            continue
        if run:
            yield run
        run = range(number, number + 1)
    if run:
        yield run
