"""Whole tars of the node's cache against the index: once per tar, in a thread of its own, so that no batch waits.

The checksums of the pieces speak for the disk; this speaks for the transfer and for the origin. A tar that is wrong
is dropped and comes again as it is needed. If it is then wrong in the same way, it lies like that at the origin: that
is said, and the tar is served, for bad samples are found and replaced one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from vitscale.data.manifest import ShardInfo
from vitscale.data.storage.files import ShardFiles, StorageSilentError
from vitscale.data.storage.pieces import PieceFile
from vitscale.durable import publish_text


class Comparisons:
    """Runs comparisons one after another. Safe to use from several threads; nobody waits for it at the end."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def submit(self, comparison: Callable[[], None]) -> None:
        """Ask for one."""
        with self._lock:
            if not self._started:
                threading.Thread(target=self._work, daemon=True, name="cache-compare").start()
                self._started = True
        self._asked.put(comparison)

    def finish(self) -> None:
        """Wait for all that were asked for."""
        done = threading.Event()
        self.submit(done.set)
        done.wait()

    def _work(self) -> None:
        while True:
            self._asked.get()()


def compare(file: PieceFile, shard: ShardInfo, origin: ShardFiles, note: Path) -> tuple[bool, str | None]:
    """Compare a tar whose pieces are all there with what the index says of it. Raises OSError if the disk fails.

    Args:
        file: the tar.
        shard: what the index says.
        origin: where it came from.
        note: keeps the wrong digests that were seen, also when the tar has to make room.

    Returns:
        Whether it was found to be wrong now, and what a person should know.
    """
    if shard.sha256 is None:
        return _compare_size(file, shard, origin)
    wrong = note.read_text(errors="replace").split() if note.exists() else []
    if len(wrong) > len(set(wrong)):  # known to lie like that at the origin
        file.set_compared()
        return False, None
    digest = file.sha256()
    if digest is None or digest == shard.sha256:
        if digest is not None:
            file.set_compared()
        return False, None
    publish_text(note, "\n".join([*wrong, digest]))
    if digest not in wrong:
        file.forget()
        return True, None
    file.set_compared()
    return True, (
        f"{origin.location}/{shard.name}: two transfers gave the SHA-256 {digest}, the index says {shard.sha256}: the "
        f"tar was changed after the index was written, or damaged where it lies; its samples are used as far as they "
        f"are whole: put the right tar there, or write the index again"
    )


def _compare_size(file: PieceFile, shard: ShardInfo, origin: ShardFiles) -> tuple[bool, str | None]:
    try:
        size = origin.size(shard.name)
    except (OSError, StorageSilentError):
        return False, None  # whoever reads will say it
    file.set_compared()
    if size == shard.num_bytes:
        return False, None
    return True, (
        f"{origin.location}/{shard.name}: has {size} bytes where the index says {shard.num_bytes}; put the tar back "
        f"that the index was written for, or write the index again"
    )
