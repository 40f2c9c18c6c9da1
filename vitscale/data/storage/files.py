"""Where the bytes of a shard set come from: a folder here, other places in :mod:`vitscale.data.storage.fetch`."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from vitscale.data.manifest import INDEX_NAME
from vitscale.data.storage.drivers import is_path
from vitscale.errors import DataError

T = TypeVar("T")
# For one more look at a storage whose read has timed out.
PROBE_S = 10.0
# So long, a file that was given up gets no more than a short look.
GIVEN_UP_S = 600.0
SHORT_LOOK_S = 10.0


def absolute(location: str) -> str:
    """The same location, seen from any folder."""
    return str(Path(location).absolute()) if is_path(location) else location


class StorageSilentError(DataError):
    """A storage does not answer at all. No sample is to blame, so nothing is put in anyone's place: the run stops."""


class GivenUp:
    """Files that were given up lately. They have many more windows, which must not keep the run waiting one after
    another: for a while such a file gets no more than a short look."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def note(self, name: str) -> None:
        """A read of it took all the time that it had."""
        self._since[name] = time.monotonic()

    def forgive(self, name: str) -> None:
        """It was read."""
        self._since.pop(name, None)

    def limit_s(self, name: str) -> float | None:
        """Seconds that the next read of it may take, if it is one of them."""
        since = self._since.get(name)
        return SHORT_LOOK_S if since is not None and time.monotonic() < since + GIVEN_UP_S else None


class ShardFiles(Protocol):
    """The files of one shard set. Safe to use from several threads."""

    location: str
    """The folder or URL, for messages."""
    reads_cheaply: bool
    """Whether a small read costs no request over a network."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end.

        Raises:
            OSError: they cannot be read, and trying again now is of no use.
            StorageSilentError: the storage as a whole cannot be reached.
        """

    def read_all(self, name: str) -> bytes:
        """All bytes of a file; raises like :meth:`read`."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or ``None`` if it is not there; raises like :meth:`read`."""


class LocalFiles:
    """The files of a folder.

    Args:
        folder: where they lie.
        timeout_s: seconds after which a read is given up. A network file system that has lost its server answers
            neither with bytes nor with an error.
    """

    reads_cheaply = True

    def __init__(self, folder: Path, *, timeout_s: float = 240.0) -> None:
        self.location = str(folder)
        self._folder, self._timeout_s = folder, timeout_s
        self._given_up = GivenUp()

    def read(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end."""
        return self._in_time(lambda: _read(self._folder / name, start, length), name)

    def read_all(self, name: str) -> bytes:
        """All bytes of a file."""
        return self._in_time((self._folder / name).read_bytes, name)

    def size(self, name: str) -> int | None:
        """Bytes of a file, or ``None`` if it is not there."""
        try:
            return self._in_time((self._folder / name).stat, name).st_size
        except FileNotFoundError:
            return None

    def _in_time(self, work: Callable[[], T], name: str) -> T:
        limit_s = self._given_up.limit_s(name)
        timeout_s = self._timeout_s if limit_s is None else min(limit_s, self._timeout_s)
        try:
            result = _in_time(work, timeout_s)
            self._given_up.forgive(name)
            return result
        except _NoAnswerError:
            self._given_up.note(name)
            index = self._folder / INDEX_NAME
            try:
                _in_time(lambda: _read(index, 0, 1), min(self._timeout_s, PROBE_S))
            except _NoAnswerError:
                raise StorageSilentError(
                    f"{self._folder}: the file system has not answered for {timeout_s:g} s; see that it is "
                    f"mounted and its server is up, then give the same command again"
                ) from None
            raise OSError(errno.ETIMEDOUT, f"no answer for {timeout_s:g} s", name) from None


class _NoAnswerError(Exception):
    """The time is up."""


def _in_time(work: Callable[[], T], timeout_s: float) -> T:
    """The result of ``work``, or what it raises, or _NoAnswerError.

    What hangs in the kernel goes on to hang, in a thread of its own.
    """
    outcomes: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((work(), None))
        except Exception as error:  # raised where the result is waited for
            outcomes.put((None, error))

    Thread(target=run, daemon=True, name="local-read").start()
    try:
        result, error = outcomes.get(timeout=timeout_s)
    except Empty:
        raise _NoAnswerError from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _read(path: Path, start: int, length: int) -> bytes:
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
