"""A name is held by one living worker at a time; what a dead one held is free."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.writing import wait_for
from vitscale_shards.place import LocalPlace
from vitscale_shards.writing import claims as claims_module
from vitscale_shards.writing.claims import BEAT_S, DEAD_AFTER_S, Claims

CLAIM = ".progress/a.claim"
RACERS = 4
together: Barrier


@pytest.fixture
def place(tmp_path: Path) -> LocalPlace:
    return LocalPlace(tmp_path)


def in_child(act: Callable[[], None]) -> int:
    """Do something in a fork of this process. Its wait status."""
    pid = os.fork()
    if not pid:
        try:
            act()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die_holding(place: LocalPlace, *names: str) -> None:
    """Claim names in another process, which is then killed."""

    def claim_and_die() -> None:
        with Claims(place) as claims:
            assert all(map(claims.take, names))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(claim_and_die) == signal.SIGKILL


def holder(place: LocalPlace, name: str = "a") -> str:
    return str(json.loads(place.read_text(f".progress/{name}.claim"))["worker"])


def edit_claim(place: LocalPlace, **changes: Any) -> None:
    content = json.loads(place.read_text(CLAIM)) | changes
    place.publish_text(CLAIM, json.dumps(content))


def age(place: LocalPlace, worker: str, seconds: float) -> None:
    """Let the storage say that a worker gave its last sign so long ago."""
    then = time.time() - seconds
    os.utime(place.folder / f".progress/{worker}.alive", (then, then))


def test_a_name_is_held_until_it_is_released(place: LocalPlace) -> None:
    with Claims(place) as first, Claims(place) as second:
        assert first.take("a")
        assert not second.take("a")
        assert second.take("b")
        first.release("a")
        assert second.take("a")
        assert holder(place) == second.worker


def test_what_is_held_already_may_be_taken_again(place: LocalPlace) -> None:
    """The storage's answer to the first request may have been lost, and the request repeated by the driver."""
    with Claims(place) as claims:
        assert claims.take("a")
        assert claims.take("a")
        claims.release("a")
        assert place.names(".progress") == [f"{claims.worker}.alive"]


def use_barrier(barrier: Barrier) -> None:
    global together
    together = barrier


def race(folder: Path, names: list[str]) -> list[str]:
    """Names got, all going the same way so that they meet at every name."""
    with Claims(LocalPlace(folder)) as claims:
        together.wait()
        got = [name for name in names if claims.take(name)]
        together.wait()  # the others still ask whether this worker lives
    return got


@pytest.fixture(scope="module")
def racers() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RACERS, context, use_barrier, (context.Barrier(RACERS),)) as pool:
        yield pool


@pytest.mark.parametrize("void", [False, True], ids=["free", "of the dead"])
def test_of_many_processes_one_gets_a_name(racers: ProcessPoolExecutor, place: LocalPlace, void: bool) -> None:
    names = [f"shard-{i}" for i in range(100)]
    if void:
        die_holding(place, *names)
    results = [racers.submit(race, place.folder, names) for _ in range(RACERS)]
    got = Counter(name for result in results for name in result.result())
    assert got == Counter(names)


def test_a_dead_process_of_this_machine_holds_nothing(place: LocalPlace) -> None:
    die_holding(place, "a", "b")
    dead = holder(place)
    with Claims(place) as claims:
        assert claims.take("a")
        assert holder(place) == claims.worker
        assert holder(place, "b") == dead
    assert f"{dead}.alive" in place.names(".progress")  # its sign is fresh, and says nothing


def test_a_worker_that_dies_while_it_takes_over_does_not_block_the_name(place: LocalPlace) -> None:
    die_holding(place, "a")
    die_holding(place, f"a.{json.loads(place.read_text(CLAIM))['claim']}")  # its right to replace the claim
    with Claims(place) as claims:
        assert claims.take("a")
        assert holder(place) == claims.worker
        claims.release("a")
    assert [name for name in place.names(".progress") if name.endswith(".claim")] == []


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(place: LocalPlace) -> None:
    with Claims(place) as first, Claims(place) as second:
        assert first.take("a")
        started = json.loads(place.read_text(CLAIM))["started"]
        edit_claim(place, started=started - 60)
        assert second.take("a")


def test_a_zombie_holds_nothing(place: LocalPlace) -> None:
    pid = os.fork()
    if not pid:
        Claims(place).__enter__().take("a")
        os._exit(0)
    with Claims(place) as claims:
        wait_for(lambda: claims.take("a"), at_most_s=10)
    os.waitpid(pid, 0)


def test_a_claim_from_another_machine_holds_while_its_worker_gives_signs(place: LocalPlace) -> None:
    with Claims(place) as far, Claims(place) as near:
        assert far.take("a")
        edit_claim(place, machine="another", pid=1, started=0.0)
        for seconds in (0, BEAT_S, DEAD_AFTER_S - 2 * BEAT_S):
            age(place, far.worker, seconds)
            assert not near.take("a")
        age(place, far.worker, DEAD_AFTER_S + BEAT_S)
        assert near.take("a")
        assert holder(place) == near.worker


def test_only_the_clock_of_the_storage_counts(place: LocalPlace) -> None:
    """The times of both signs are compared, not this node's time with one of them."""
    with Claims(place) as far, Claims(place) as near:
        assert far.take("a")
        edit_claim(place, machine="another")
        for worker in (far.worker, near.worker):
            age(place, worker, 1e6)
        assert not near.take("a")
        age(place, near.worker, 1e6 - DEAD_AFTER_S - 1)
        assert near.take("a")


@pytest.mark.parametrize("machine", ["this", "another"])
def test_a_worker_that_has_left_holds_nothing(place: LocalPlace, machine: str) -> None:
    """Perhaps it was interrupted before it could release what it held, and its process lives on."""
    with Claims(place) as first:
        assert first.take("a")
        if machine == "another":
            edit_claim(place, machine=machine)
    with Claims(place) as second:
        assert second.take("a")


def test_signs_are_given_again_and_again_and_removed_at_the_end(
    place: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "BEAT_S", 0.01)
    with Claims(place) as claims:
        sign = f".progress/{claims.worker}.alive"
        age(place, claims.worker, 1000)
        old = place.modified(sign)
        assert old is not None
        wait_for(lambda: (place.modified(sign) or 0) > old + 500, at_most_s=10)
    assert place.names(".progress") == []


def test_a_slow_worker_far_away_lives_by_its_signs(place: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_S", 0.05)
    monkeypatch.setattr(claims_module, "DEAD_AFTER_S", 0.5)
    with Claims(place) as near:
        with Claims(place) as far:
            assert far.take("a")
            edit_claim(place, machine="another")
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                assert not near.take("a")
                time.sleep(0.02)
        assert near.take("a")


def test_the_claim_of_another_is_not_given_back(place: LocalPlace) -> None:
    """A worker that was taken for dead lives on; what it held is another's now."""
    with Claims(place) as slow, Claims(place) as second:
        assert slow.take("a")
        edit_claim(place, machine="another")
        age(place, slow.worker, DEAD_AFTER_S + BEAT_S)
        assert second.take("a")
        slow.release("a")
        assert holder(place) == second.worker


def test_a_full_disk_does_not_end_the_signs(place: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_S", 0.01)
    with Claims(place) as claims:
        thread = claims._thread
        assert thread is not None
        age(place, claims.worker, 1000)
        folder = place.folder / ".progress"
        aside = folder.rename(place.folder / "aside")
        folder.write_text("no folder: whatever is written below fails")
        time.sleep(0.1)
        assert thread.is_alive()
        folder.unlink()
        aside.rename(folder)
        wait_for(lambda: (place.modified(f".progress/{claims.worker}.alive") or 0) > time.time() - 60, at_most_s=10)


def test_a_claim_that_cannot_be_written_leaves_nothing(place: LocalPlace) -> None:
    with Claims(place) as claims:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                claims.take("a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert place.names(".progress") == [f"{claims.worker}.alive"]
        assert claims.take("a")


def test_who_tidies_up_bears_workers_that_still_give_signs(place: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT_S", 1e-6)
    with Claims(place), Claims(place):
        for _ in range(300):
            place.remove_folder(".progress")
    place.remove_folder(".progress")
    assert place.folders() == []
