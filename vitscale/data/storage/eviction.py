"""The bound of the node's cache: how many bytes all processes have put into it, and what goes to make room.

On disk: ``used`` in the cache's folder, a number that every process adds to before it writes. Who finds the bound
passed counts the folder anew, which also heals the number after a crash, and lets whole files go. Only names that the
cache itself gives to folders and files are counted or removed. Own design; farthest next use first is Belady's
(IBM Systems Journal 5, 1966).
"""

from __future__ import annotations

import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitscale.data.storage.pieces import BLOCK_BYTES, locked, open_file

# Unread for this long, a file of which no next use is known goes before all others.
IDLE_S = 600.0
# Read no longer ago, a file stays: whoever reads it now may be about to read on.
JUST_READ_S = 2.0
# For so long nobody looks for room again after there was none to make: looking takes time that the readers wait.
FULL_S = 1.0
# Room is made for more than is wanted, so that it is seldom looked for.
MARGIN = 1 / 64
LEDGER_NAME = "used"
LEDGER_PATIENCE_S = 5.0
_LEDGER, _CHECKSUM, _UNKNOWN = struct.Struct("<qd"), struct.Struct("<I"), 1 << 62
# Files that are being written have the last part too.
_OWN_FOLDER = re.compile(r".*-[0-9a-f]{16}\.cached")
_OWN_FILE = re.compile(r".*\.(tar|idx)-[0-9a-f]{16}(\.[0-9a-f]{32}\.tmp)?")

Foresight = Callable[[str, str], float | None]
"""Steps until a file is read next, by the names of its folder and its own; ``None`` if that is not known."""


@dataclass(frozen=True)
class CachedFile:
    """A file that may be removed."""

    folder: str
    name: str
    num_bytes: int
    """What it takes on the disk."""
    last_read: float
    """Seconds since 1970."""


def choose_victims(
    cached: Sequence[CachedFile], next_use: Foresight, *, needed: int, welcome: int, sooner: float, now: float
) -> list[CachedFile]:
    """What to remove, in order, to make room: nothing if none is needed, or if that cannot make enough.

    First what nobody has read for a while and of which no next use is known (other runs, sets without an order), the
    oldest first; then what is needed last by the order; then the rest that no next use is known of.

    Args:
        cached: what there is.
        next_use: when it is read again.
        needed: bytes that must become free.
        welcome: bytes that should become free, at least as many.
        sooner: steps until that is read which the room is for: what is needed as soon, or sooner, stays.
        now: seconds since 1970.
    """
    ranked = []
    for file in cached:
        if not file.num_bytes or abs(now - file.last_read) < JUST_READ_S:
            continue
        steps = next_use(file.folder, file.name)
        if steps is None:
            ranked.append((0.0 if now - file.last_read >= IDLE_S else 2.0, 0.0, file.last_read, file.name, file))
        elif steps > sooner:
            ranked.append((1.0, -steps, file.last_read, file.name, file))
    victims, freed = [], 0
    for *_, file in sorted(ranked, key=lambda row: row[:-1]):
        if freed >= welcome:
            break
        victims.append(file)
        freed += file.num_bytes
    return victims if 0 < needed <= freed else []


class Room:
    """The room in a cache's folder, shared by the processes that use it. Safe to use from several threads.

    Args:
        folder: of the cache.
        max_bytes: that all sets in it may take together. It is passed at most by what is being written at the time.
        foresee: gives what is known of next uses, when room has to be made.
        warn: takes a word for the matter, and what a person should know of it.
    """

    def __init__(
        self, folder: Path, max_bytes: int, *, foresee: Callable[[], Foresight], warn: Callable[[str, str], None]
    ) -> None:
        self._folder, self._max_bytes, self._foresee, self._warn = folder, max_bytes, foresee, warn
        self._making_room = threading.Lock()
        self.num_evicted = 0

    def recount(self) -> int:
        """Count the bytes in the folder and write them down; raises OSError."""
        with self._ledger() as ledger:
            used = sum(file.num_bytes for file in self._scan())
            if ledger is not None:
                ledger.write(used)
            return used

    def take(self, num_bytes: int, folder: str, name: str) -> bool:
        """Take room for bytes of a file, of which others may have to make way.

        Returns:
            Whether there is room; raises OSError.
        """
        wanted = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES  # a block for the journal
        if wanted > self._max_bytes:
            self._warn(
                "too small",
                f"data.storage.cache_gb: {self._folder} may fill {self._max_bytes} bytes, but a single read brings "
                f"{wanted}; it is not kept: raise data.storage.cache_gb, or leave data.storage.cache out",
            )
            return False
        taken = self._take(wanted)
        if taken is None:
            with self._making_room:
                taken = self._take(wanted)  # another thread may have made room
                if taken is None:
                    taken = self._make_room(wanted, folder, name, self._foresee())
        return taken

    def _take(self, wanted: int) -> bool | None:
        """Whether there is room; ``None`` if some may be made."""
        with self._ledger() as ledger:
            if ledger is None:
                return False
            if ledger.add(wanted, self._limit(ledger.used)):
                return True
            return False if abs(time.time() - ledger.searched) < FULL_S else None

    def _make_room(self, wanted: int, folder: str, name: str, next_use: Foresight) -> bool:
        """Whether there is room now, if need be after removing files."""
        with self._ledger() as ledger:
            if ledger is None:
                return False
            cached = list(self._scan())
            ledger.used = sum(file.num_bytes for file in cached)
            limit = self._limit(ledger.used)
            if limit < self._max_bytes:
                self._warn(
                    "disk",
                    f"data.storage.cache: the disk of {self._folder} has no room for the {self._max_bytes} bytes that "
                    f"data.storage.cache_gb allows; the cache goes on with what there is: free some, or lower it",
                )
            needed, now = ledger.used + wanted - limit, time.time()
            steps = next_use(folder, name)
            others = [file for file in cached if (file.folder, file.name) != (folder, name)]
            # Reads that found no room leave empty files.
            victims = [file for file in others if not file.num_bytes and now - file.last_read >= IDLE_S]
            victims += choose_victims(
                others,
                next_use,
                needed=needed,
                welcome=needed + int(limit * MARGIN),
                sooner=-1.0 if steps is None else steps,
                now=now,
            )
            for file in victims:
                if self._remove(file):
                    ledger.used -= file.num_bytes
            return ledger.add(wanted, limit) or ledger.give_up()

    def _remove(self, file: CachedFile) -> bool:
        try:
            (self._folder / file.folder / file.name).unlink()
        except FileNotFoundError:
            return True
        except OSError as error:
            self._warn(
                "remove",
                f"data.storage.cache: files in {self._folder} cannot be removed ({error.strerror or error}), so there "
                f"is no room to make: let all its users write to it, or give each a folder of their own",
            )
            return False
        self.num_evicted += bool(file.num_bytes)
        return True

    def _limit(self, used: int) -> int:
        status = os.statvfs(self._folder)
        return min(self._max_bytes, used + status.f_bavail * status.f_frsize)

    def _scan(self) -> Iterator[CachedFile]:
        """The cache's own files. What vanishes meanwhile is left out."""
        with os.scandir(self._folder) as folders:
            own = [f for f in folders if _OWN_FOLDER.fullmatch(f.name) and f.is_dir(follow_symlinks=False)]
        for folder in own:
            with suppress(FileNotFoundError), os.scandir(folder.path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        if _OWN_FILE.fullmatch(entry.name):
                            status = entry.stat(follow_symlinks=False)
                            yield CachedFile(folder.name, entry.name, status.st_blocks * 512, status.st_mtime)

    @contextmanager
    def _ledger(self) -> Iterator[_Ledger | None]:
        """The shared number, for one process at a time; ``None`` if another keeps it for too long."""
        descriptor = open_file(self._folder / LEDGER_NAME, create=True)
        try:
            with locked(descriptor, 0, 1, patience_s=LEDGER_PATIENCE_S) as taken:
                yield _Ledger(descriptor) if taken else None
        finally:
            os.close(descriptor)


class _Ledger:
    """Bytes that are used, and when room was last looked for in vain; on disk with a checksum."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # A number that cannot be trusted passes every bound, so that the folder is counted.
        self.used, self.searched = _UNKNOWN, 0.0
        content = os.pread(descriptor, _LEDGER.size + _CHECKSUM.size, 0)
        if content[_LEDGER.size :] == _CHECKSUM.pack(zlib.crc32(content[: _LEDGER.size])):
            self.used, self.searched = _LEDGER.unpack_from(content)

    def add(self, num_bytes: int, limit: int) -> bool:
        """Add to the number, unless it would pass the limit."""
        if self.used + num_bytes > limit:
            return False
        self.write(self.used + num_bytes)
        return True

    def write(self, used: int) -> None:
        """Replace the number."""
        self.used = used
        content = _LEDGER.pack(self.used, self.searched)
        os.pwrite(self._descriptor, content + _CHECKSUM.pack(zlib.crc32(content)), 0)

    def give_up(self) -> bool:
        """Note that there is no room to make; always false."""
        self.searched = time.time()
        self.write(self.used)
        return False
