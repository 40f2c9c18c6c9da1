"""Reads through a node's cache give the origin's bytes, each piece comes once, and what is damaged comes again."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.cached import RecordedFiles, cached_tars, write_tars
from vitscale.data.manifest import ShardInfo
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.comparison import compare
from vitscale.data.storage.files import ShardFiles, StorageSilentError
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES, PieceFile
from vitscale.errors import DataError

GIGABYTE = 10**9
SIZE = 4 * PIECE_BYTES + 12_345


class Set:
    """A set of tars at an origin, and a cache before it."""

    def __init__(self, folder: Path, sizes: list[int], *, digests: bool = True) -> None:
        self.folder = folder
        self.shards = write_tars(folder / "set", sizes, digests=digests)
        self.origin = RecordedFiles(folder / "set")
        self.said: list[str] = []
        self.start()

    def start(self) -> None:
        """As a new process does."""
        self.cache = NodeCache(self.folder / "cache", GIGABYTE, patience_s=30, warn=self.said.append)
        self.files = CachedFiles(self.origin, self.shards, self.cache)

    def right(self, name: str, start: int = 0, length: int = GIGABYTE) -> bytes:
        return (self.folder / "set" / name).read_bytes()[start : start + length]

    def check(self, name: str, start: int = 0, length: int = GIGABYTE) -> None:
        assert self.files.read(name, start, length) == self.right(name, start, length)

    def cached(self, name: str = "000.tar") -> Path:
        return cached_tars(self.folder / "cache")[name]


@pytest.fixture
def one(tmp_path: Path) -> Set:
    """A set of one tar of five pieces."""
    return Set(tmp_path, [SIZE])


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_all_ranges_are_right(one: Set) -> None:
    edges = {0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE}
    for start in sorted(edges, reverse=True):
        for end in sorted(edges):
            if end >= start:
                one.check("000.tar", start, end - start)
    assert max(Counter(one.origin.fetched_pieces()).values()) == 1


def test_missing_neighbours_are_one_read_and_what_is_there_is_none(one: Set) -> None:
    one.check("000.tar", PIECE_BYTES + 5, 10)
    assert one.origin.reads() == [("000.tar", PIECE_BYTES, PIECE_BYTES)]
    one.check("000.tar")
    rest = [("000.tar", 0, PIECE_BYTES), ("000.tar", 2 * PIECE_BYTES, SIZE - 2 * PIECE_BYTES)]
    assert one.origin.reads()[1:] == rest
    one.check("000.tar")
    one.start()
    one.check("000.tar")
    assert len(one.origin.reads()) == 3
    assert one.cache.counters().hits == 1


def test_counters(one: Set) -> None:
    one.check("000.tar", 0, 1)
    one.check("000.tar", 0, 1)
    one.check("000.tar", 0, PIECE_BYTES + 1)
    counters = one.cache.counters()
    assert (counters.hits, counters.misses) == (1, 2)
    assert (counters.cached_bytes, counters.origin_bytes) == (2 * PIECE_BYTES, 2 * PIECE_BYTES)
    assert (counters.unkept_bytes, counters.damaged_pieces, counters.mismatches) == (0, 0, 0)


def test_threads_fetch_each_piece_once(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE, 3 * PIECE_BYTES, 100])
    chance = random.Random(0)
    asked = [(f"{chance.randrange(3):03d}.tar", chance.randrange(SIZE), chance.randrange(SIZE)) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda read: sets.check(*read), asked))
    fetched = Counter(sets.origin.fetched_pieces())
    assert set(fetched.values()) == {1}
    counters = sets.cache.counters()
    assert counters.hits + counters.misses == sum(
        start < sets.shards[int(name[:3])].num_bytes for name, start, _ in asked
    )


def test_other_pieces_of_a_tar_do_not_wait_and_the_same_ones_do(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE])
    begun, go_on = threading.Event(), threading.Event()

    def hold(_name: str, start: int, _length: int) -> None:
        if start == 0:
            begun.set()
            assert go_on.wait(30)

    sets.origin = RecordedFiles(tmp_path / "set", before=hold)
    sets.start()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sets.check, "000.tar", 0, 10)
        assert begun.wait(30)
        sets.check("000.tar", PIECE_BYTES, 10)
        second = pool.submit(sets.check, "000.tar", 20, 10)
        assert not second.done()
        go_on.set()
        first.result()
        second.result()
    assert Counter(sets.origin.fetched_pieces()) == {("000.tar", 0): 1, ("000.tar", 1): 1}


def test_nobody_waits_longer_than_patience_allows(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE])
    begun, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        if not begun.is_set():
            begun.set()
            assert go_on.wait(30)

    sets.cache = NodeCache(tmp_path / "cache", GIGABYTE, patience_s=0.05)
    sets.files = CachedFiles(RecordedFiles(tmp_path / "set", before=hold), sets.shards, sets.cache)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sets.check, "000.tar", 0, 10)
        assert begun.wait(30)
        sets.check("000.tar", 5, 10)  # fetches what the other has not brought
        go_on.set()
        first.result()
    assert sets.origin.fetched_pieces() == [("000.tar", 0)] * 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_it_is_right(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vitscale.data.storage.pieces.fcntl.fcntl", refuse)
    sets = Set(tmp_path, [SIZE])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: sets.check("000.tar", start, PIECE_BYTES), range(0, SIZE, 50_000)))
    sets.cache.comparisons.finish()
    assert sets.said == []


def test_a_damaged_piece_is_fetched_again(one: Set) -> None:
    one.check("000.tar")
    one.cache.comparisons.finish()
    flip(one.cached(), 2 * PIECE_BYTES + 77)
    one.start()
    one.check("000.tar", 0, PIECE_BYTES)
    assert one.cache.counters().damaged_pieces == 0
    one.check("000.tar")
    one.check("000.tar")
    assert one.cache.counters().damaged_pieces == 1
    assert one.origin.reads()[1:] == [("000.tar", 2 * PIECE_BYTES, PIECE_BYTES)]


def test_bytes_that_did_not_reach_the_disk_are_fetched_again(one: Set) -> None:
    """After a power cut the journal may be there, and the data not."""
    one.check("000.tar")
    one.cache.comparisons.finish()
    with one.cached().open("r+b") as file:
        file.seek(PIECE_BYTES // 2)
        file.write(bytes(PIECE_BYTES))
    one.check("000.tar")
    assert one.cache.counters().damaged_pieces == 2


def test_a_file_that_was_cut_begins_anew(one: Set) -> None:
    one.check("000.tar")
    for size in (SIZE + 10, SIZE, PIECE_BYTES + 1, 0):
        os.truncate(one.cached(), size)
        one.check("000.tar")
        one.check("000.tar", 10, 10)


def test_a_damaged_record_is_a_missing_piece(one: Set) -> None:
    one.check("000.tar")
    one.cache.comparisons.finish()
    journal = -(-SIZE // 4096) * 4096
    for place in range(journal, journal + 5 * 8, 3):
        flip(one.cached(), place)
    one.check("000.tar")
    assert len(one.origin.fetched_pieces()) == 10


def test_member_indexes_are_kept_and_checked(one: Set) -> None:
    right = one.right("000.idx")
    assert one.files.read_all("000.idx") == right
    one.start()
    assert one.files.read_all("000.idx") == right
    assert one.origin.reads() == [("000.idx", 0, -1)]
    (path,) = (one.folder / "cache").glob("*.cached/*.idx-*")
    flip(path, 3)
    assert one.files.read_all("000.idx") == right
    path.write_bytes(b"")
    assert one.files.read_all("000.idx") == right
    assert one.origin.reads() == [("000.idx", 0, -1)] * 3
    assert one.cache.counters().damaged_pieces == 2


def test_threads_fetch_a_member_index_once(tmp_path: Path) -> None:
    sets = Set(tmp_path, [10] * 3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sets.files.read_all, [f"{i % 3:03d}.idx" for i in range(60)]))
    assert sorted(sets.origin.reads()) == [(f"{i:03d}.idx", 0, -1) for i in range(3)]


def test_what_the_index_does_not_name_is_not_kept(one: Set) -> None:
    (one.folder / "set" / "index.json").write_text("{}")
    for _ in range(2):
        assert one.files.read_all("index.json") == b"{}"
        assert one.files.read("index.json", 1, 1) == b"}"
        assert one.files.size("000.tar") == SIZE
        assert one.files.size("nothing") is None
    assert len(one.origin.reads()) == 4
    assert one.files.read_all("000.tar") == one.right("000.tar")


def test_a_tar_that_is_cut_short_at_the_origin_reads_as_there(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE])
    os.truncate(tmp_path / "set" / "000.tar", 2 * PIECE_BYTES + 100)
    sets.check("000.tar", PIECE_BYTES, SIZE)
    sets.check("000.tar", 2 * PIECE_BYTES + 50, 200)
    assert sets.files.read("000.tar", 2 * PIECE_BYTES + 200, 10) == b""
    assert sets.files.read("000.tar", 4 * PIECE_BYTES, 10) == b""
    assert (sets.cache.counters().hits, sets.cache.counters().damaged_pieces) == (0, 0)


def test_a_gap_within_a_short_tar_ends_the_read(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE])
    sets.check("000.tar", 3 * PIECE_BYTES, PIECE_BYTES)
    before = sets.right("000.tar")
    os.truncate(tmp_path / "set" / "000.tar", PIECE_BYTES + 10)
    assert sets.files.read("000.tar", 0, SIZE) == before[: PIECE_BYTES + 10]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), StorageSilentError("silent")])
def test_what_the_origin_raises_comes_through(error: Exception, tmp_path: Path) -> None:
    fails = True

    def fail(*_: object) -> None:
        if fails:
            raise error

    sets = Set(tmp_path, [SIZE])
    sets.origin = RecordedFiles(tmp_path / "set", before=fail)
    sets.start()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            sets.files.read("000.tar", 0, 10)
        assert caught.value is error
    fails = False
    sets.check("000.tar")
    (tmp_path / "set" / "000.idx").unlink()
    with pytest.raises(FileNotFoundError):
        sets.files.read_all("000.idx")
    assert sets.said == []


def test_another_index_finds_nothing_of_the_former_one(tmp_path: Path) -> None:
    sets = Set(tmp_path, [SIZE])
    sets.check("000.tar")
    assert sets.files.read_all("000.idx")
    sets.shards = write_tars(tmp_path / "set", [SIZE], seed=1)
    sets.start()
    sets.check("000.tar")
    assert sets.files.read_all("000.idx") == sets.right("000.idx")
    assert len(list((tmp_path / "cache").glob("*.cached/*.tar-*"))) == 2


def test_sets_of_one_name_in_two_places_are_two(tmp_path: Path) -> None:
    sets = [Set(tmp_path / "a", [SIZE]), Set(tmp_path / "b", [SIZE])]
    write_tars(tmp_path / "b" / "set", [SIZE], seed=1, digests=False)
    cache = NodeCache(tmp_path / "cache", GIGABYTE)
    files = [CachedFiles(each.origin, sets[0].shards, cache) for each in sets]
    assert [each.read("000.tar", 0, 9) for each in files] == [each.right("000.tar", 0, 9) for each in sets]


@pytest.mark.parametrize("name", ["../000.tar", "/etc/000.tar", "a/b.tar", "a\0.tar"])
def test_a_name_that_is_a_path_is_refused(name: str, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", GIGABYTE)
    with pytest.raises(DataError, match="a plain file name is needed"):
        CachedFiles(RecordedFiles(tmp_path), [ShardInfo(name, 1, 1)], cache)


def test_folders_tell_no_secrets(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", GIGABYTE)
    names = []
    for location in ("s3://bucket/path/train/", "https://user:pass@host", "https://host/val?sig=pass", "pipe:x {name}"):
        origin = RecordedFiles(tmp_path)
        origin.location = location
        names.append(CachedFiles(origin, [], cache).folder.name)
    assert [name.rpartition("-")[0] for name in names] == ["train", "host", "val", "pipe_x_name_"]
    assert "pass" not in "".join(names)


class TestWholeTransfers:
    """An origin that begins at the start of a file whatever is asked of it."""

    def set(self, tmp_path: Path, size: int) -> Set:
        sets = Set(tmp_path, [size])
        sets.files = CachedFiles(sets.origin, sets.shards, sets.cache, read_in_parts=sets.origin.read_in_parts)
        return sets

    @pytest.mark.parametrize("size", [10, PIECE_BYTES, 16 * PIECE_BYTES, 16 * PIECE_BYTES + 1, 40 * PIECE_BYTES - 1])
    def test_one_transfer_brings_all(self, size: int, tmp_path: Path) -> None:
        sets = self.set(tmp_path, size)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda start: sets.check("000.tar", start, size // 3), range(0, size, size // 9)))
        assert sets.origin.reads() == [("000.tar", 0, -1)]
        sets.cache.comparisons.finish()
        assert sets.cache.counters().mismatches == 0

    def test_nobody_waits_for_the_rest_of_a_transfer(self, tmp_path: Path) -> None:
        sets = self.set(tmp_path, 40 * PIECE_BYTES)
        begun, go_on, finish = threading.Event(), threading.Event(), threading.Event()

        def read_in_parts(name: str) -> Iterator[bytes]:
            data = sets.right(name)
            begun.set()
            assert go_on.wait(30)
            yield data[: 20 * PIECE_BYTES]
            assert finish.wait(30)
            yield data[20 * PIECE_BYTES :]

        sets.files = CachedFiles(sets.origin, sets.shards, sets.cache, read_in_parts=read_in_parts)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(sets.check, "000.tar", 0, 10)
            assert begun.wait(30)
            second = pool.submit(sets.check, "000.tar", PIECE_BYTES, 10 * PIECE_BYTES)
            time.sleep(0.1)  # now it waits
            assert not second.done()
            go_on.set()
            second.result(timeout=10)
            assert not first.done()
            finish.set()
            first.result()
        assert sets.origin.reads() == []

    def test_what_cannot_be_kept_is_transferred_as_far_as_it_is_needed(self, tmp_path: Path) -> None:
        sets = self.set(tmp_path, 40 * PIECE_BYTES)
        cache = NodeCache(tmp_path / "cache", 10 * PIECE_BYTES, warn=sets.said.append)
        sets.files = CachedFiles(sets.origin, sets.shards, cache, read_in_parts=sets.origin.read_in_parts)
        sets.check("000.tar", 3, 20 * PIECE_BYTES)
        assert cache.counters().origin_bytes == 32 * PIECE_BYTES
        assert [text.split(":")[0] for text in sets.said] == ["data.storage.cache_gb"]

    def test_a_short_transfer(self, tmp_path: Path) -> None:
        sets = self.set(tmp_path, SIZE)
        os.truncate(tmp_path / "set" / "000.tar", 2 * PIECE_BYTES + 100)
        sets.check("000.tar", PIECE_BYTES, SIZE)
        assert sets.files.read("000.tar", 4 * PIECE_BYTES, 10) == b""


def recorded_comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that are compared from now on."""
    names: list[str] = []

    def record(file: PieceFile, shard: ShardInfo, origin: ShardFiles, note: Path) -> tuple[bool, str | None]:
        names.append(shard.name)
        return compare(file, shard, origin, note)

    monkeypatch.setattr("vitscale.data.storage.cache.compare", record)
    return names


class TestComparison:
    """Whole tars against the index."""

    def mended(self, one: Set) -> ShardInfo:
        shard = one.shards[0]
        return ShardInfo(shard.name, 1, shard.num_bytes, hashlib.sha256(b"something else").hexdigest())

    def test_a_right_tar_is_hashed_once(self, one: Set, monkeypatch: pytest.MonkeyPatch) -> None:
        compared = recorded_comparisons(monkeypatch)
        one.check("000.tar", 0, SIZE - PIECE_BYTES)
        one.cache.comparisons.finish()
        assert not compared
        for _ in range(2):
            one.check("000.tar")
            one.cache.comparisons.finish()
            one.start()
        one.check("000.tar")
        one.cache.comparisons.finish()
        assert len(compared) == 1
        assert one.said == []

    def test_a_tar_that_was_mended_is_compared_again(self, one: Set, monkeypatch: pytest.MonkeyPatch) -> None:
        one.check("000.tar")
        one.cache.comparisons.finish()
        compared = recorded_comparisons(monkeypatch)
        flip(one.cached(), 5)
        one.check("000.tar")
        one.cache.comparisons.finish()
        assert compared == ["000.tar"]

    def test_a_transfer_that_went_wrong_is_made_again(self, one: Set) -> None:
        right = one.right("000.tar")
        flip(one.folder / "set" / "000.tar", 1000)
        assert one.files.read("000.tar", 0, SIZE) != right
        flip(one.folder / "set" / "000.tar", 1000)
        one.cache.comparisons.finish()
        assert one.cache.counters().mismatches == 1
        one.check("000.tar")
        one.cache.comparisons.finish()
        one.check("000.tar")
        assert one.cache.counters().mismatches == 1
        assert len(one.origin.reads()) == 2
        assert one.said == []

    def test_an_origin_that_differs_is_named_once_and_served(self, one: Set) -> None:
        one.shards = [self.mended(one)]
        one.start()
        for expected in (1, 2, 2):
            one.check("000.tar")
            one.cache.comparisons.finish()
            assert one.cache.counters().mismatches == expected
        assert len(one.origin.reads()) == 2
        assert len(one.said) == 1
        assert "two transfers gave the SHA-256" in one.said[0]
        # Remembered even if the tar has had to make room.
        one.cached().unlink()
        one.start()
        one.check("000.tar")
        one.cache.comparisons.finish()
        one.check("000.tar")
        assert one.cache.counters().mismatches == 0
        assert (len(one.origin.reads()), len(one.said)) == (3, 1)

    def test_a_process_that_died_before_it_compared(self, one: Set, monkeypatch: pytest.MonkeyPatch) -> None:
        one.shards = [self.mended(one)]
        with monkeypatch.context() as patch:
            patch.setattr("vitscale.data.storage.comparison.Comparisons.submit", lambda *_: None)
            one.start()
            one.check("000.tar")
        one.start()
        one.check("000.tar", 0, 1)
        one.cache.comparisons.finish()
        assert one.cache.counters().mismatches == 1

    def test_damage_on_the_disk_is_no_mismatch(self, one: Set, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("vitscale.data.storage.comparison.Comparisons.submit", lambda *_: None)
            one.check("000.tar")
        flip(one.cached(), SIZE - 1)
        one.start()
        one.check("000.tar", 0, 1)
        one.cache.comparisons.finish()
        assert (one.cache.counters().damaged_pieces, one.cache.counters().mismatches) == (1, 0)
        one.check("000.tar")
        one.cache.comparisons.finish()
        assert one.cache.counters().mismatches == 0

    @pytest.mark.parametrize("more", [0, 5])
    def test_without_a_digest_the_size_is_compared(self, more: int, tmp_path: Path) -> None:
        sets = Set(tmp_path, [SIZE], digests=False)
        with (tmp_path / "set" / "000.tar").open("ab") as file:
            file.write(bytes(more))
        for _ in range(2):
            assert sets.files.read("000.tar", 0, 2 * SIZE) == sets.right("000.tar", 0, SIZE)
            sets.cache.comparisons.finish()
        assert [f"has {SIZE + more} bytes where the index says {SIZE}" in text for text in sets.said] == [True] * bool(
            more
        )
