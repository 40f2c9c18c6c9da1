"""The cache of a node as one process sees it: its folder and bound, what is counted and said, and what is foreseen."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitscale.data.storage.comparison import Comparisons
from vitscale.data.storage.eviction import Foresight, Room
from vitscale.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT}

NextUses = Callable[[], NDArray[np.float64]]
"""Gives, by number of the shard, in how many steps this node reads it next; infinite if that is not foreseen. Called
by any thread that reads."""


class OrderedSet(Protocol):
    """A shard set in the cache that is read in a known order."""

    folder: Path
    next_uses: NextUses | None

    def shard_of(self, file_name: str) -> int | None:
        """The number of the shard that a file in ``folder`` belongs to, if it is one of the set's."""


@dataclass
class CacheCounters:
    """What a process's reads through the cache came to."""

    hits: int = 0
    """Reads that the cache answered."""
    misses: int = 0
    """Reads for which the origin was needed."""
    cached_bytes: int = 0
    """Bytes read from the cache's disk, in whole pieces."""
    origin_bytes: int = 0
    """Bytes that the origin gave, in whole pieces."""
    unkept_bytes: int = 0
    """Of ``origin_bytes``, those for which there was no room, or that the disk did not take."""
    evicted_files: int = 0
    damaged_pieces: int = 0
    """Pieces that had other bytes on the disk than were written; they were fetched again."""
    mismatches: int = 0
    """Whole tars that had another SHA-256 or size than the index says."""

    def __add__(self, other: CacheCounters) -> CacheCounters:
        return CacheCounters(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def since(self, earlier: CacheCounters) -> CacheCounters:
        """What was added to an earlier copy."""
        return CacheCounters(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


class NodeCache:
    """The cache of a node. One per process is meant for all its shard sets. Safe to use from several threads.

    Args:
        folder: of the cache; other processes may use it too.
        max_bytes: that all sets in it may take together.
        patience_s: seconds to wait for another's transfer of the same bytes: a read may take so much longer than one
            of the origin.
        warn: takes what a person should know, each thing once.

    Raises:
        DataError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        patience_s: float = 60.0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.patience_s = folder, patience_s
        self.comparisons = Comparisons()
        self.room = Room(folder, max_bytes, foresee=self._foresee, warn=self.warn_once)
        self._warn, self._warned = warn, set[str]()
        self._counters, self._lock = CacheCounters(), threading.Lock()
        self._sets: weakref.WeakSet[OrderedSet] = weakref.WeakSet()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.room.recount()
        except OSError as error:
            if error.errno not in _FULL:
                raise DataError(
                    f"data.storage.cache: {folder} cannot be used ({error.strerror or error}); it must be a folder "
                    f"on a disk of the node that you may write to: mend it, name another, or leave the key out"
                ) from error
            self.say_unusable(error)

    def add(self, ordered: OrderedSet) -> None:
        """Let a set say what it needs next, for as long as it is in use."""
        with self._lock:
            self._sets.add(ordered)

    def counters(self) -> CacheCounters:
        """What the reads of this process have come to so far."""
        with self._lock:
            return replace(self._counters, evicted_files=self.room.num_evicted)

    def count(self, more: CacheCounters) -> None:
        """Add to the counters."""
        with self._lock:
            self._counters += more

    def warn_once(self, matter: str, text: str) -> None:
        """Say something unless something of the same matter has been said."""
        with self._lock:
            new = matter not in self._warned
            self._warned.add(matter)
        if new:
            self._warn(text)

    def say_unusable(self, error: OSError) -> None:
        """Say that the disk failed; the origin stands in for it."""
        text = f"data.storage.cache: {self.folder} fails ({error.strerror or error})"
        if error.errno in _FULL:
            text = f"data.storage.cache: the disk of {self.folder} is full"
        self.warn_once(f"errno {error.errno}", f"{text}; what it does not take is read from its origin each time")

    def _foresee(self) -> Foresight:
        """What the sets of this process say of next uses."""
        with self._lock:
            sets = list(self._sets)
        known: dict[str, list[tuple[OrderedSet, NDArray[np.float64]]]] = {}
        for ordered in sets:
            if ordered.next_uses is not None:
                known.setdefault(ordered.folder.name, []).append((ordered, ordered.next_uses()))

        def next_use(folder: str, name: str) -> float | None:
            found = [(ordered.shard_of(name), uses) for ordered, uses in known.get(folder, [])]
            return min((float(uses[number]) for number, uses in found if number is not None), default=None)

        return next_use
