"""What the node's cache costs: reads that it answers against plain reads of the same windows, reads that it does not
against the origin alone and plain writes of the windows, and the work of counting and of making room.

    python benchmarks/cache.py [--folder SCRATCH] [--tars 8] [--megabytes 128] [--files 10000] [--repeats 5]

The origin is memory, so that nothing but the cache takes time. Prints rates and seconds; results that are worth
keeping go to benchmarks/results with the command, the versions and the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vitscale.data import eviction
from vitscale.data.manifest import ShardInfo
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.eviction import CachedFile, choose_victims
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES

WINDOW = 7_000_000


class MemoryFiles:
    """Tars that are all the same bytes."""

    location = "memory://set"
    reads_cheaply = False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, name: str, start: int, length: int) -> bytes:
        """Some bytes."""
        return self.data[start : start + length]

    def read_all(self, name: str) -> bytes:
        """All bytes."""
        return self.data

    def size(self, name: str) -> int | None:
        """How many there are."""
        return len(self.data)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what the node's cache costs")
    parser.add_argument("--folder", type=Path, help="where to work; decides which disk is measured")
    parser.add_argument("--tars", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=128, help="size of a tar")
    parser.add_argument("--files", type=int, default=10_000, help="cached tars of a large cache")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        reads(Path(scratch), arguments.tars, arguments.megabytes * 1_000_000, arguments.repeats)
        room(Path(scratch), arguments.files)


def reads(scratch: Path, tars: int, num_bytes: int, repeats: int) -> None:
    """Windows in the order of a walk through all tars, side by side."""
    origin = MemoryFiles(os.urandom(num_bytes))
    shards = [ShardInfo(f"{number:03d}.tar", 1, num_bytes) for number in range(tars)]
    windows = [(shard.name, start) for start in range(0, num_bytes, WINDOW) for shard in shards]
    plain = scratch / "plain"
    plain.mkdir()
    for shard in shards:
        (plain / shard.name).write_bytes(origin.data)

    def fresh(kept: str) -> Callable[[str, int], None]:
        files = CachedFiles(origin, shards, NodeCache(scratch / kept, 1 << 50))
        return lambda name, start: consume(files.read(name, start, WINDOW))

    def pread(name: str, start: int) -> None:
        descriptor = os.open(plain / name, os.O_RDONLY)
        consume(os.pread(descriptor, WINDOW, start))
        os.close(descriptor)

    def pwrite(turn: int) -> Callable[[str, int], None]:
        folder = scratch / f"written-{turn}"
        folder.mkdir()

        def write(name: str, start: int) -> None:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.pwrite(descriptor, origin.read(name, start, WINDOW), start)
            os.close(descriptor)

        return write

    walk(fresh("kept"), windows, 1)
    contestants: dict[str, Callable[[int], Callable[[str, int], None]]] = {
        "plain pread": lambda _: pread,
        "cache, all there": lambda _: fresh("kept"),
        "origin alone (memory)": lambda _: lambda name, start: consume(origin.read(name, start, WINDOW)),
        "origin and plain pwrite": pwrite,
        "cache, nothing there": lambda turn: fresh(f"new-{turn}"),
    }
    print(f"{len(windows)} windows of {WINDOW / 1e6:g} MB in {tars} tars: GB/s, median (least to most) of {repeats}")
    for threads in (1, 2):
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(repeats):
            for name, contestant in contestants.items():
                seconds = walk(contestant(turn), windows, threads)
                rates[name].append(tars * num_bytes / seconds / 1e9)
            for folder in (f"new-{turn}", f"written-{turn}"):
                shutil.rmtree(scratch / folder)
        for name, values in rates.items():
            low, high = min(values), max(values)
            print(f"  {threads} threads  {name:24} {statistics.median(values):6.2f} ({low:.2f} to {high:.2f})")


def consume(data: bytes) -> None:
    """Touch nothing: what a reader does with the bytes is not the question."""
    assert len(data) > 0


def walk(read: Callable[[str, int], None], windows: list[tuple[str, int]], threads: int) -> float:
    """Seconds to read all windows."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda window: read(*window), windows))
    return time.perf_counter() - start


def room(scratch: Path, number: int) -> None:
    """Counting a large cache, as each process does at its start, and one search for room in it."""
    shards = [ShardInfo(f"{i:06d}.tar", 1, PIECE_BYTES) for i in range(number)]
    eviction.JUST_READ_S = 0.0
    cache = NodeCache(scratch / "large", 1 << 50)
    uses = np.random.default_rng(0).random(number)
    files = CachedFiles(MemoryFiles(bytes(PIECE_BYTES)), shards, cache, lambda: uses)
    for shard in shards:
        files.read(shard.name, 0, 1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        used = cache.room.recount()
        seconds.append(time.perf_counter() - start)
    print(f"counting {number} files: {statistics.median(seconds) * 1e3:.0f} ms")
    full, now_and_later = NodeCache(scratch / "large", used), np.append(uses, 0.0)
    shards.append(ShardInfo("new.tar", 1, 1))
    files = CachedFiles(MemoryFiles(bytes(PIECE_BYTES)), shards, full, lambda: now_and_later)
    start = time.perf_counter()
    files.read("new.tar", 0, 1)
    print(
        f"one search for room among {number} files, {full.counters().evicted_files} removed: "
        f"{(time.perf_counter() - start) * 1e3:.0f} ms"
    )
    cached = [CachedFile("set", shard.name, 1, 0.0) for shard in shards[:-1]]
    start = time.perf_counter()
    choose_victims(cached, lambda _, name: float(name[:6]), needed=9, welcome=99, sooner=0.0, now=9.0)
    print(f"of which choosing: {(time.perf_counter() - start) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
