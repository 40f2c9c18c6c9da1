"""Shard sets of random bytes, an origin that records what is read from it, and processes that read through a cache.

``python -m tests.helpers.cached ORIGIN CACHE MAX_BYTES SEED READS`` reads at random, and ends with 1 at the first wrong
byte. ``READS`` of 0 never ends.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from vitscale.data.manifest import ShardInfo
from vitscale.data.storage import eviction
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.files import LocalFiles
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES

LOG_NAME = "reads.log"
# What a cached tar of one piece takes: the piece, and a block for its journal.
TAKEN = PIECE_BYTES + 4096
# More than a number of tars, so that no second one goes for a margin.
ODD = TAKEN // 2


class RecordedFiles(LocalFiles):
    """The files of a folder. Each read is a line of ``reads.log`` beside them, also from other processes."""

    reads_cheaply = False

    def __init__(self, folder: Path, *, before: Callable[[str, int, int], None] = lambda *_: None) -> None:
        super().__init__(folder)
        self._before = before
        self._log = folder / LOG_NAME

    def read(self, name: str, start: int, length: int) -> bytes:
        self._record(name, start, length)
        self._before(name, start, length)
        return super().read(name, start, length)

    def read_all(self, name: str) -> bytes:
        self._record(name, 0, -1)
        return super().read_all(name)

    def read_in_parts(self, name: str) -> Iterator[bytes]:
        """A whole file, in parts of an odd size."""
        self._record(name, 0, -1)
        data = super().read_all(name)
        for start in range(0, len(data), 100_003):
            yield data[start : start + 100_003]

    def reads(self) -> list[tuple[str, int, int]]:
        """Name, first byte and length of every read so far; a length of -1 for a whole file."""
        if not self._log.exists():
            return []
        rows = (line.split() for line in self._log.read_text().splitlines())
        return [(name, int(start), int(length)) for name, start, length in rows]

    def fetched_pieces(self) -> list[tuple[str, int]]:
        """Name of the tar and number of every piece that was read, as often as it was."""
        return [
            (name, piece)
            for name, start, length in self.reads()
            if length > 0
            for piece in range(start // PIECE_BYTES, -(-(start + length) // PIECE_BYTES))
        ]

    def _record(self, name: str, start: int, length: int) -> None:
        with self._log.open("a") as file:
            file.write(f"{name} {start} {length}\n")


def write_tars(folder: Path, sizes: list[int], *, seed: int = 0, digests: bool = True) -> list[ShardInfo]:
    """Files of random bytes that are called tars, each with some text as its member index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, size in enumerate(sizes):
        data = np.random.default_rng([seed, number]).bytes(size)
        shard = ShardInfo(f"{number:03d}.tar", 1, size, hashlib.sha256(data).hexdigest() if digests else None)
        (folder / shard.name).write_bytes(data)
        (folder / shard.idx_name).write_text(f"{shard.name} {seed}\n" * (number + 1))
        shards.append(shard)
    return shards


def bytes_on_disk(folder: Path) -> int:
    """What the cached files below a folder take on the disk."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512 if path.is_file() and path.parent != folder else 0
    return total


def cached_tars(folder: Path) -> dict[str, Path]:
    """The cached tars below a folder by their names at the origin."""
    return {path.name.rpartition("-")[0]: path for path in folder.glob("*.cached/*.tar-*") if path.suffix != ".sha256"}


class Reads:
    """Reads of whole tars of one piece each through a cache that holds some of them."""

    def __init__(self, folder: Path, tars: int, room: int, *, ordered: bool) -> None:
        self.folder = folder
        self.shards = write_tars(folder / "set", [PIECE_BYTES] * tars)
        self.origin = RecordedFiles(folder / "set")
        self.uses = np.zeros(tars)
        self.said: list[str] = []
        self.cache = NodeCache(folder / "cache", room * TAKEN + ODD, warn=self.said.append)
        self.files = CachedFiles(self.origin, self.shards, self.cache, (lambda: self.uses) if ordered else None)

    def read(self, number: int) -> bool:
        """Whether the cache had it."""
        before = len(self.origin.reads())
        name = self.shards[number].name
        assert self.files.read(name, 0, PIECE_BYTES) == (self.folder / "set" / name).read_bytes()
        return len(self.origin.reads()) == before

    def age(self, number: int, seconds: float) -> None:
        self.cache.comparisons.finish()  # they note what they find
        path = cached_tars(self.folder / "cache")[self.shards[number].name]
        os.utime(path, (time.time() - seconds,) * 2)

    @property
    def held(self) -> list[int]:
        tars = cached_tars(self.folder / "cache")
        return sorted(int(name[:3]) for name, path in tars.items() if path.stat().st_blocks)


def main(origin: Path, folder: Path, max_bytes: int, seed: int, reads: int) -> int:
    """Read at random and compare."""
    # No rest for what was just read, so that as much as possible happens.
    eviction.JUST_READ_S = eviction.FULL_S = 0.0
    tars = sorted(origin.glob("*.tar"))
    content = {path.name: path.read_bytes() for path in tars}
    shards = [ShardInfo(name, 1, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()]
    chance, uses = random.Random(seed), np.random.default_rng(seed)
    cache = NodeCache(folder, max_bytes, warn=lambda text: print(text, flush=True))
    files = CachedFiles(RecordedFiles(origin), shards, cache, lambda: uses.random(len(shards)))
    print("begins", flush=True)
    done = 0
    while not reads or done < reads:
        name = chance.choice(tars).name
        start = chance.randrange(len(content[name]))
        length = chance.randrange(1, 4 * PIECE_BYTES)
        if files.read(name, start, length) != content[name][start : start + length]:
            print(f"wrong bytes: {name} {start} {length}", flush=True)
            return 1
        if files.read_all(name.replace(".tar", ".idx")) != (origin / name.replace(".tar", ".idx")).read_bytes():
            print(f"wrong index: {name}", flush=True)
            return 1
        done += 1
    cache.comparisons.finish()
    print(cache.counters(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])))
