"""Processes that share a node's cache, are killed or stopped at random moments, and take files from each other."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.cached import RecordedFiles, bytes_on_disk, cached_tars, write_tars
from tests.helpers.runs import environment
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES, PieceFile

GIGABYTE = 10**9
SIZES = [5 * PIECE_BYTES, 3 * PIECE_BYTES + 1, 7 * PIECE_BYTES - 1, 1000, 4 * PIECE_BYTES, 6 * PIECE_BYTES + 77]
PROCESSES = 3
# The longest read of a reader, its ends rounded to pieces.
LONGEST = 5 * PIECE_BYTES

# Reads the first piece and a byte of the next, and waits for a line within the transfer.
HOLD = """
import sys
from pathlib import Path
from tests.helpers.cached import RecordedFiles
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.manifest import ShardInfo
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES

origin, cache, name, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def hold(*_):
    print("holds", flush=True)
    sys.stdin.readline()

files = CachedFiles(RecordedFiles(origin, before=hold), [ShardInfo(name, 1, size)], NodeCache(cache, 10**9))
assert files.read(name, 0, PIECE_BYTES + 1) == (origin / name).read_bytes()[: PIECE_BYTES + 1]
print("right", flush=True)
"""


def start_reader(origin: Path, cache: Path, max_bytes: int, *, seed: int, reads: int) -> subprocess.Popen[str]:
    """Read at random in a process of its own; 0 reads never end."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.cached", *map(str, (origin, cache, max_bytes, seed, reads))],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def holder(origin: Path, cache: Path, name: str, size: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is fetching the first two pieces of a tar without a digest."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(origin), str(cache), name, str(size)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def test_processes_share_a_small_cache(tmp_path: Path) -> None:
    origin, cache, max_bytes = tmp_path / "set", tmp_path / "cache", 10 * PIECE_BYTES
    write_tars(origin, SIZES)
    readers = [start_reader(origin, cache, max_bytes, seed=seed, reads=150) for seed in range(PROCESSES)]
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, bytes_on_disk(cache))
        time.sleep(0.005)
    said = [reader.communicate()[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * PROCESSES, said
    assert "damaged_pieces=0" in said[0]
    assert most <= max_bytes + PROCESSES * LONGEST
    assert most > max_bytes // 2
    # Once nothing is being written, the bound is exact.
    cache_now = NodeCache(cache, max_bytes)
    CachedFiles(RecordedFiles(origin), write_tars(origin, SIZES), cache_now).read("000.tar", 0, 1)
    assert bytes_on_disk(cache) <= max_bytes


def test_processes_fetch_each_piece_once(tmp_path: Path) -> None:
    origin, cache = tmp_path / "set", tmp_path / "cache"
    write_tars(origin, SIZES)
    readers = [start_reader(origin, cache, GIGABYTE, seed=seed, reads=100) for seed in range(PROCESSES)]
    said = [reader.communicate()[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * PROCESSES, said
    recorded = RecordedFiles(origin)
    assert set(Counter(recorded.fetched_pieces()).values()) == {1}
    assert set(Counter(name for name, _, length in recorded.reads() if length < 0).values()) == {1}


@pytest.mark.parametrize("max_bytes", [10 * PIECE_BYTES, GIGABYTE])
def test_killed_processes_leave_a_right_cache(max_bytes: int, tmp_path: Path) -> None:
    origin, cache, chance = tmp_path / "set", tmp_path / "cache", random.Random(0)
    write_tars(origin, SIZES * 5)
    for round_number in range(4):
        readers = [start_reader(origin, cache, max_bytes, seed=chance.randrange(10**6), reads=0) for _ in range(3)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "begins\n"
        # The first rounds end while an empty cache is filled, which takes some tenths of a second.
        time.sleep(chance.random() * 0.04 * 3**round_number)
        for reader in readers:
            assert reader.poll() is None, reader.communicate()
            reader.kill()
            reader.communicate()
    last = start_reader(origin, cache, max_bytes, seed=1, reads=150)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    assert "damaged_pieces=0, mismatches=0" in said
    assert bytes_on_disk(cache) <= max_bytes


def test_pieces_for_a_file_that_was_removed_do_not_count_for_its_successor(tmp_path: Path) -> None:
    (shard,) = write_tars(tmp_path / "set", [4 * PIECE_BYTES], digests=False)
    right = (tmp_path / "set" / shard.name).read_bytes()
    files = CachedFiles(RecordedFiles(tmp_path / "set"), [shard], NodeCache(tmp_path / "cache", GIGABYTE))
    with holder(tmp_path / "set", tmp_path / "cache", shard.name, shard.num_bytes) as process:
        cached_tars(tmp_path / "cache")[shard.name].unlink()
        assert files.read(shard.name, 2 * PIECE_BYTES, 10) == right[2 * PIECE_BYTES :][:10]
        said, _ = process.communicate("\n")
        assert said == "right\n"
        assert process.returncode == 0
    with PieceFile.open(cached_tars(tmp_path / "cache")[shard.name], shard.num_bytes, create=False) as file:
        assert [file.has(range(piece, piece + 1)) for piece in range(4)] == [False, False, True, False]
    assert files.read(shard.name, 0, shard.num_bytes) == right


def test_a_killed_holder_keeps_nobody_waiting_and_a_stopped_one_not_for_long(tmp_path: Path) -> None:
    (shard,) = write_tars(tmp_path / "set", [4 * PIECE_BYTES], digests=False)
    right = (tmp_path / "set" / shard.name).read_bytes()
    for stop, patience_s in ((signal.SIGKILL, 100.0), (signal.SIGSTOP, 0.3)):
        cache = tmp_path / stop.name
        origin = RecordedFiles(tmp_path / "set")
        files = CachedFiles(origin, [shard], NodeCache(cache, GIGABYTE, patience_s=patience_s))
        with holder(tmp_path / "set", cache, shard.name, shard.num_bytes) as process:
            process.send_signal(stop)
            before = len(origin.reads())
            assert files.read(shard.name, PIECE_BYTES, 10) == right[PIECE_BYTES:][:10]
            assert len(origin.reads()) == before + 1


def test_a_process_that_stops_while_it_counts_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscale.data.storage.eviction.LEDGER_PATIENCE_S", 0.2)
    (shard,) = write_tars(tmp_path / "set", [4 * PIECE_BYTES])
    cache = NodeCache(tmp_path / "cache", GIGABYTE)
    files = CachedFiles(RecordedFiles(tmp_path / "set"), [shard], cache)
    keep = (
        "import sys, os; from vitscale.data.storage.pieces import locked\n"
        "with locked(os.open(sys.argv[1], os.O_RDWR), 0, 1, patience_s=0): print('holds', flush=True); input()"
    )
    command = [sys.executable, "-c", keep, str(tmp_path / "cache" / "used")]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        process.send_signal(signal.SIGSTOP)
        assert files.read(shard.name, 0, 10) == (tmp_path / "set" / shard.name).read_bytes()[:10]
        assert cache.counters().unkept_bytes == PIECE_BYTES
        process.kill()
    assert files.read(shard.name, 0, 10) == (tmp_path / "set" / shard.name).read_bytes()[:10]
    assert cache.counters().unkept_bytes == PIECE_BYTES
