"""What goes from a node's cache to make room, and that the bound holds."""

from __future__ import annotations

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.cached import ODD, TAKEN, Reads, RecordedFiles, bytes_on_disk, cached_tars, write_tars
from vitscale.data.storage import eviction
from vitscale.data.storage.cache import CachedFiles
from vitscale.data.storage.eviction import IDLE_S, JUST_READ_S, CachedFile, choose_victims
from vitscale.data.storage.node_cache import NodeCache
from vitscale.data.storage.pieces import PIECE_BYTES

NOW = 1e9


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just read may go at once, and room is looked for each time."""
    monkeypatch.setattr(eviction, "JUST_READ_S", 0.0)
    monkeypatch.setattr(eviction, "FULL_S", 0.0)


@st.composite
def cached_files(draw: st.DrawFn) -> tuple[list[CachedFile], dict[str, float | None]]:
    files, steps = [], {}
    for number in range(draw(st.integers(0, 12))):
        age = draw(st.sampled_from([-5.0, 0.0, 1.0, 3.0, 50.0, IDLE_S - 1, IDLE_S, IDLE_S + 7, 1e6]))
        files.append(CachedFile("set", str(number), draw(st.integers(0, 5)), NOW - age))
        steps[str(number)] = draw(st.sampled_from([None, 0.0, 1.0, 2.0, 7.5, float("inf")]))
    return files, steps


def goes_before(one: CachedFile, other: CachedFile, steps: dict[str, float | None]) -> bool:
    """The rule in words: idle and unknown, then known and far, then unknown; of equals the one unread for longest."""
    ours, theirs = steps[one.name], steps[other.name]
    if ours is None and NOW - one.last_read >= IDLE_S:
        if theirs is not None or NOW - other.last_read < IDLE_S:
            return True
        return (one.last_read, one.name) < (other.last_read, other.name)
    if ours is not None:
        if theirs is None:
            return NOW - other.last_read < IDLE_S
        return ours > theirs or (ours == theirs and (one.last_read, one.name) < (other.last_read, other.name))
    if theirs is not None or NOW - other.last_read >= IDLE_S:
        return False
    return (one.last_read, one.name) < (other.last_read, other.name)


@given(cached_files(), st.integers(0, 20), st.integers(0, 10), st.sampled_from([-1.0, 0.0, 1.0, 7.5, float("inf")]))
def test_victims_are_those_of_the_rule(
    files: tuple[list[CachedFile], dict[str, float | None]], needed: int, more: int, sooner: float
) -> None:
    cached, steps = files
    left = [f for f in cached if f.num_bytes and not (abs(NOW - f.last_read) < JUST_READ_S)]
    left = [f for f in left if (known := steps[f.name]) is None or known > sooner]
    expected: list[CachedFile] = []
    while left and sum(f.num_bytes for f in expected) < needed + more:
        (first,) = [f for f in left if all(f is g or goes_before(f, g, steps) for g in left)]
        expected.append(first)
        left.remove(first)
    if not needed or sum(f.num_bytes for f in expected) < needed:
        expected = []
    found = choose_victims(
        cached, lambda _, name: steps[name], needed=needed, welcome=needed + more, sooner=sooner, now=NOW
    )
    assert found == expected


@pytest.mark.usefixtures("eager")
def test_the_least_recently_read_goes_first_without_an_order(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 5, 3, ordered=False)
    for number in (0, 1, 2):
        reads.read(number)
        reads.age(number, 100 - number)
    assert reads.read(0)  # touched: it is the newest now
    reads.read(3)
    assert reads.held == [0, 2, 3]
    reads.age(3, 500)
    reads.read(4)
    assert reads.held == [0, 2, 4]
    assert reads.cache.counters().evicted_files == 2


@pytest.mark.usefixtures("eager")
def test_of_a_repeated_walk_as_much_is_kept_as_the_order_allows(tmp_path: Path) -> None:
    """Against the rule played through by hand: what is needed last goes. The least recently read would never hit."""
    tars, room = 8, 5
    walk = [*range(tars)] * 5
    reads = Reads(tmp_path, tars, room, ordered=True)
    held: set[int] = set()
    for place, number in enumerate(walk):
        following = [*walk[place:], *range(tars)]
        reads.uses = np.array([following.index(other) for other in range(tars)], dtype=np.float64)
        assert reads.read(number) == (number in held)
        if number not in held and len(held) == room:
            held.remove(max(held, key=following.index))
        held.add(number)
        assert reads.held == sorted(held)


@pytest.mark.usefixtures("eager")
def test_what_is_needed_as_soon_does_not_make_way(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 4, 2, ordered=True)
    reads.uses[:] = 5
    for number in (0, 1, 2, 3):
        assert not reads.read(number)
    assert reads.held == [0, 1]
    assert reads.cache.counters().unkept_bytes == 2 * PIECE_BYTES
    reads.uses[1] = 6
    reads.read(2)
    assert reads.held == [0, 2]


@pytest.mark.usefixtures("eager")
def test_what_nobody_has_read_for_long_goes_before_what_the_order_needs(tmp_path: Path) -> None:
    reads = Reads(tmp_path / "a", 4, 3, ordered=True)
    reads.uses[:] = (3, 9, 1, 2)
    write_tars(tmp_path / "b", [PIECE_BYTES] * 2)
    other_run = NodeCache(reads.cache.folder, 3 * TAKEN + ODD)
    other = CachedFiles(RecordedFiles(tmp_path / "b"), reads.shards[:2], other_run)
    other.read("000.tar", 0, 1)
    path = cached_tars(reads.cache.folder)["000.tar"]
    reads.read(0)
    reads.read(1)
    reads.read(2)
    assert path.exists()  # it was read a moment ago; number 1 is needed last
    assert reads.cache.counters().evicted_files == 1
    other_run.comparisons.finish()
    os.utime(path, (time.time() - IDLE_S - 1,) * 2)
    reads.read(3)
    assert not path.exists()
    assert len(list(reads.files.folder.glob("*.tar-*"))) == 3


@pytest.mark.usefixtures("eager")
def test_the_sets_of_a_process_make_room_for_each_other_by_what_they_need(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 4 * TAKEN + ODD)
    uses = {"a": np.array([1.0, 50.0, 2.0]), "b": np.array([40.0, 3.0, 0.0])}
    sets = {}
    for name in uses:
        shards = write_tars(tmp_path / name, [PIECE_BYTES] * 3)

        def next_uses(name: str = name) -> NDArray[np.float64]:
            return uses[name]

        sets[name] = CachedFiles(RecordedFiles(tmp_path / name), shards, cache, next_uses)
    for name, number in (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("b", 2)):
        sets[name].read(f"{number:03d}.tar", 0, PIECE_BYTES)
    held = {name: sorted(path.name[:3] for path in files.folder.glob("*.tar-*")) for name, files in sets.items()}
    assert held == {"a": ["000", "002"], "b": ["001", "002"]}


@pytest.mark.usefixtures("eager")
def test_of_two_orders_on_a_set_the_sooner_use_counts(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 3, 2, ordered=True)
    reads.uses[:] = (90, 50, 0)
    second = CachedFiles(reads.origin, reads.shards, reads.cache, lambda: np.array([1.0, 60.0, 7.0]))
    for number in range(3):
        reads.read(number)
    assert reads.held == [0, 2]
    del second
    gc.collect()
    reads.read(1)  # what nobody reads any more foresees nothing
    assert reads.held == [1, 2]


@pytest.mark.usefixtures("eager")
def test_a_tar_of_a_former_index_is_not_foreseen(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 3, 2, ordered=True)
    reads.uses[:] = (0, 60, 50)
    former = [replace(shard, sha256=None) for shard in reads.shards]
    CachedFiles(reads.origin, former, reads.cache).read("000.tar", 0, 1)
    reads.age(0, IDLE_S + 1)
    path = cached_tars(tmp_path / "cache")["000.tar"]
    reads.read(1)
    assert path.exists()
    reads.read(2)
    assert not path.exists()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("ordered", [True, False])
def test_a_tar_that_is_larger_than_the_cache_is_kept_in_part(ordered: bool, tmp_path: Path) -> None:
    reads = Reads(tmp_path, 1, 3, ordered=ordered)
    reads.shards = write_tars(tmp_path / "set", [6 * PIECE_BYTES])
    reads.files = CachedFiles(reads.origin, reads.shards, reads.cache, reads.files.next_uses)
    for piece in [*range(6)] * 2:
        reads.files.read("000.tar", piece * PIECE_BYTES, 1)
    assert reads.cache.counters().hits == 3
    assert reads.cache.counters().evicted_files == 0


def test_what_was_just_read_stays(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 3, 1, ordered=False)
    reads.read(0)
    reads.read(1)
    assert reads.held == [0]
    reads.age(0, JUST_READ_S + 0.1)
    reads.read(2)  # found no room a moment ago, and does not look again
    assert reads.held == [0]
    time.sleep(eviction.FULL_S)
    reads.age(0, JUST_READ_S + 0.1)
    reads.read(2)
    assert reads.held == [2]


@pytest.mark.usefixtures("eager")
def test_member_indexes_and_tars_count_alike(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 3, 1, ordered=True)
    reads.uses[:] = (5, 4, 3)
    reads.files.read_all("000.idx")
    reads.read(0)
    reads.read(1)
    names = sorted(path.name.partition("-")[0] for path in reads.files.folder.iterdir())
    assert names == ["001.tar", "locks"]


@pytest.mark.usefixtures("eager")
def test_only_the_caches_own_files_are_counted_and_removed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    digits = "0123456789abcdef"
    strangers = ["big", f"run/0.tar-{digits}", f"a-{digits}/0.tar-{digits}", f"a-{digits}.cached/notes-{digits}"]
    strangers += [f"a-{digits}.cached/{name}" for name in (f"0.tar-{digits}.sha256", "0.tar", "locks")]
    for name in strangers:
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(3 * TAKEN))
        os.utime(path, (0, 0))
    (cache / f"link-{digits}.cached").symlink_to(cache / "run")
    reads = Reads(tmp_path, 4, 2, ordered=False)
    for number in range(4):
        reads.read(number)
    assert len(list(reads.files.folder.glob("*.tar-*"))) == 2
    assert all((cache / name).exists() for name in strangers)


@pytest.mark.usefixtures("eager")
def test_the_empty_files_of_reads_that_found_no_room_go(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 5, 1, ordered=True)
    for number in range(3):
        reads.read(number)
    assert len(cached_tars(tmp_path / "cache")) == 3
    for number in (1, 2):
        reads.age(number, IDLE_S + 1)
    reads.read(3)
    assert sorted(cached_tars(tmp_path / "cache")) == ["000.tar", "003.tar"]
    assert reads.held == [0]
    assert reads.cache.counters().evicted_files == 0


@pytest.mark.usefixtures("eager")
def test_left_overs_of_a_killed_writer_go(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 2, 1, ordered=True)
    left_over = reads.files.folder / f".000.idx-0123456789abcdef.{'0' * 32}.tmp"
    left_over.parent.mkdir()
    left_over.write_bytes(bytes(TAKEN))
    os.utime(left_over, (0, 0))
    reads.cache.room.recount()
    reads.read(0)
    assert not left_over.exists()
    assert reads.held == [0]


def test_a_new_process_counts_what_is_there(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 3, 9, ordered=False)
    for number in range(3):
        reads.read(number)
    (tmp_path / "cache" / "used").write_bytes(b"nonsense")
    assert reads.cache.room.recount() == bytes_on_disk(tmp_path / "cache") >= 3 * PIECE_BYTES
    (tmp_path / "cache" / "used").unlink()
    assert NodeCache(tmp_path / "cache", 10**9).room.recount() >= 3 * PIECE_BYTES


@pytest.mark.usefixtures("eager")
def test_a_lower_bound_is_kept_from_the_next_miss_on(tmp_path: Path) -> None:
    reads = Reads(tmp_path, 8, 8, ordered=False)
    for number in range(6):
        reads.read(number)
        reads.age(number, 9 - number)
    lower = NodeCache(tmp_path / "cache", 3 * TAKEN + ODD)
    files = CachedFiles(reads.origin, reads.shards, lower)
    files.read("007.tar", 0, 1)
    assert reads.held == [4, 5, 7]


@pytest.mark.usefixtures("eager")
def test_threads_keep_within_the_bound(tmp_path: Path) -> None:
    room = 6
    reads = Reads(tmp_path, 30, room, ordered=False)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: reads.files.read(f"{i * 7 % 30:03d}.tar", 0, PIECE_BYTES), range(300)))
    assert bytes_on_disk(tmp_path / "cache") <= (room + 8) * TAKEN + ODD  # one that is being written by each
    assert reads.cache.counters().evicted_files > 0


def test_one_thread_at_a_time_looks_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(tmp_path, 9, 1, ordered=True)
    at_a_time, most = 0, 0
    lock = threading.Lock()

    def next_uses() -> NDArray[np.float64]:
        nonlocal at_a_time, most
        with lock:
            at_a_time += 1
            most = max(most, at_a_time)
        time.sleep(0.01)
        with lock:
            at_a_time -= 1
        return np.zeros(9)

    reads.files.next_uses = next_uses
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: reads.files.read(f"{i:03d}.tar", 0, 1), range(9)))
    assert most == 1
