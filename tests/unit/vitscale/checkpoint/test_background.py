"""Saves in the background, on one rank and on several: nothing waits, all ranks agree, one error is everybody's."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import vitscale.checkpoint.store as store_module
from tests.helpers.distributed import run_ranks
from tests.unit.vitscale.checkpoint.small_state import (
    RANK_0,
    RANK_1,
    SIZE,
    begin,
    blocks_of,
    content_of,
    file_of,
    latest,
    layouts_on,
    names,
    restored,
    save,
    store_in,
    values_of,
)
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import MASTER, Checkpoint, step_name
from vitscale.checkpoint.fragments import Fragment
from vitscale.checkpoint.reading import Wanted, read_wanted
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.snapshot import Snapshot
from vitscale.checkpoint.store import CheckpointStore, checkpoint_names, open_checkpoint
from vitscale.distributed import Ranks, connect
from vitscale.errors import CheckpointError
from vitscale.topology import Topology

PATIENCE_S = 30.0
SLOW_S = 2.0


class HeldFolder(LocalFolder):
    """A disk that takes a file's first block and then waits to be released; also before it publishes."""

    def __init__(self, path: Path, *, publish_waits: bool = False) -> None:
        super().__init__(path)
        self.released, self.publishing = threading.Event(), threading.Event()
        if not publish_waits:
            self.publishing.set()
        self.writing, self.most_at_once = 0, 0

    def write(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        def held() -> Iterator[memoryview]:
            for number, block in enumerate(blocks):
                if number:
                    assert self.released.wait(PATIENCE_S)
                yield block

        self.writing += 1
        self.most_at_once = max(self.most_at_once, self.writing)
        super().write(name, file, held())
        self.writing -= 1

    def publish(self, name: str, manifest: bytes) -> None:
        assert self.publishing.wait(PATIENCE_S)
        super().publish(name, manifest)


class SlowFolder(LocalFolder):
    """A disk that takes seconds to write on one rank and seconds to publish."""

    def __init__(self, path: Path, write_s: float, publish_s: float) -> None:
        super().__init__(path)
        self.write_s, self.publish_s = write_s, publish_s

    def write(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        time.sleep(self.write_s)
        super().write(name, file, blocks)

    def publish(self, name: str, manifest: bytes) -> None:
        time.sleep(self.publish_s)
        super().publish(name, manifest)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Several for each file."""
    with blocks_of(SIZE // 3):
        yield


@pytest.mark.usefixtures("small_blocks")
def test_training_goes_on_while_a_save_is_written_and_published(ranks: Ranks, tmp_path: Path) -> None:
    folder = HeldFolder(tmp_path / "checkpoints", publish_waits=True)
    store = store_in(folder, ranks, Retention(last=2))
    assert store.pending() == 0
    assert store.advance(0) is None
    begin(store, 10, ranks)
    staged = folder.path / ".staging-step-000000010" / RANK_0
    until(staged.exists)
    for _ in range(3):
        assert store.pending() == 1
        assert store.advance(1) is None
    assert names(folder.path) == {staged.parent.name}

    folder.released.set()
    until(lambda: store.pending() == 0)
    # Written, but nobody may see it before all ranks know.
    assert checkpoint_names(folder) == []
    assert store.advance(0) is None
    for _ in range(3):
        assert store.pending() == 1
        assert store.advance(1) is None
    assert checkpoint_names(folder) == []

    folder.publishing.set()
    until(lambda: store.pending() == 0)
    assert store.advance(0) == "step-000000010"
    assert store.wait() is None
    assert (store.pending(), store.advance(0), store.wait()) == (0, None, None)
    assert latest(folder.path) == "step-000000010"
    assert restored(store_in(folder.path, ranks, Retention(last=2))) == 10


@pytest.mark.usefixtures("small_blocks")
def test_one_save_is_in_flight_at_most(ranks: Ranks, tmp_path: Path) -> None:
    folder = HeldFolder(tmp_path / "checkpoints")
    store = store_in(folder, ranks, Retention(last=3))
    begin(store, 10, ranks)
    threading.Timer(0.3, folder.released.set).start()
    start = time.monotonic()
    for step in (20, 30):
        begin(store, step, ranks)
        assert checkpoint_names(folder)[0] == step_name(step - 10)
    assert time.monotonic() - start > 0.2
    assert store.wait() == "step-000000030"
    assert folder.most_at_once == 1
    assert checkpoint_names(folder) == [step_name(step) for step in (30, 20, 10)]


@pytest.mark.usefixtures("small_blocks")
def test_what_training_changes_meanwhile_is_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    folder = HeldFolder(tmp_path / "checkpoints")
    store = store_in(folder, ranks, Retention(last=2))
    weights = {name: values_of(10, name) for name in ("w", "b")}
    snapshot = Snapshot(pin_memory=False)
    snapshot.take([Fragment(name, MASTER, 0, values) for name, values in weights.items()])
    store.begin(content_of(10, layouts_on(1)), snapshot, {})
    for values in weights.values():
        values.fill_(torch.nan)
    folder.released.set()
    assert store.wait() == "step-000000010"
    assert restored(store_in(folder.path, ranks, Retention(last=2))) == 10


@contextmanager
def watched_collectives() -> Iterator[list[tuple[float, str]]]:
    """Seconds and thread of each collective of this process."""
    calls: list[tuple[float, str]] = []

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.monotonic()
            result = function(*arguments, **keywords)
            calls.append((time.monotonic() - start, threading.current_thread().name))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
            patch.setattr(distributed, name, watch(getattr(distributed, name)))
        yield calls


def _slow_disks(topology: Topology, path: Path) -> None:
    """Rank 1 writes for seconds, then rank 0 publishes for seconds."""
    folder = SlowFolder(path, SLOW_S * (topology.rank == 1), SLOW_S)
    with connect(topology, timeout_s=60) as ranks:
        store = store_in(folder, ranks, Retention(last=2))
        with watched_collectives() as calls:
            start = time.monotonic()
            begin(store, 10, ranks)
            assert time.monotonic() - start < SLOW_S / 2
            assert store.wait() == "step-000000010"
            assert time.monotonic() - start > 2 * SLOW_S
        # As short as without a slow disk, so that no time-out takes it for a rank that is gone.
        assert max(seconds for seconds, _ in calls) < SLOW_S / 2
        assert len(calls) > 20
        assert {thread for _, thread in calls} == {"MainThread"}
        assert restored(store) == 10


def test_waiting_for_a_slow_disk_is_not_waiting_in_a_collective(tmp_path: Path) -> None:
    run_ranks(_slow_disks, 2, tmp_path / "checkpoints")


def _steps(topology: Topology, path: Path) -> None:
    """A training loop: ranks write at different speeds, and the save is taken further by sums that are made anyway."""
    folder = SlowFolder(path, 0.1 * topology.rank, 0.1)
    with connect(topology, timeout_s=60) as ranks:
        store = store_in(folder, ranks, Retention(last=2))
        for first in (1, 501):
            start = time.monotonic()
            begin(store, first, ranks)
            assert time.monotonic() - start < 0.2
            name, steps = None, 0
            while name is None and steps < 500:
                time.sleep(0.01)
                name, steps = store.advance(ranks.sum_ints([store.pending()])[0]), steps + 1
            # Some steps after it began, on all ranks at the same step.
            assert name == step_name(first)
            assert steps > 5
            assert ranks.gather(steps) == [steps] * ranks.world_size
        assert restored(store) == 501


def test_all_ranks_see_a_save_complete_at_the_same_step(tmp_path: Path) -> None:
    run_ranks(_steps, 3, tmp_path / "checkpoints")


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """What the store says on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(store_module.__name__).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(store_module.__name__).removeHandler(handler)


def _ranks_agree(topology: Topology, path: Path) -> None:
    rank = topology.rank
    with log_lines() as lines, connect(topology, timeout_s=60) as ranks:
        store = store_in(path, ranks, Retention(last=4))
        save(store, ranks, 10, 20, 30)
        assert restored(store) == 30
        checkpoint = open_checkpoint(LocalFolder(path))
        assert [record.name for record in checkpoint.records] == [RANK_0, RANK_1]
        for number, record in enumerate(checkpoint.records):
            assert (path / checkpoint.name / record.name).read_bytes() == file_of(30, number, 2)
        ranks.barrier()
        # Each rank reads one file, and finds what is wrong with that one only.
        for step, damaged in ((30, 1), (20, 0)):
            file = (RANK_0, RANK_1)[damaged]
            if rank == 0:
                target = path / step_name(step) / file
                target.write_bytes(bytes(target.stat().st_size))
            ranks.barrier()
            lines.clear()
            loaded: list[int] = []
            found = store.restore(lambda checkpoint: loaded.append(_read_own(checkpoint, rank)))  # noqa: B023
            assert found is not None
            assert found.step == step - 10
            assert loaded == ([step - 10] if rank == damaged else [step, step - 10])
            assert latest(path) == step_name(step - 10)
            moved = f"checkpoint {step_name(step)} is damaged ({file} has other content from byte 0 on); moved to dam"
            assert [line.startswith(moved) for line in lines] == ([True] if rank == 0 else [])


def _read_own(checkpoint: Checkpoint, rank: int) -> int:
    """Read the part of ``w`` that this rank wrote."""
    size = checkpoint.layout("w").size
    start = rank * size
    values = torch.empty(min(size, 600 - start))
    read_wanted(checkpoint, [Wanted("w", MASTER, start, values)])
    assert torch.equal(values, values_of(checkpoint.step, "w")[start : start + values.numel()])
    return checkpoint.step


def test_ranks_agree_whoever_finds_the_fault(tmp_path: Path) -> None:
    run_ranks(_ranks_agree, 2, tmp_path / "checkpoints")
    assert names(tmp_path / "checkpoints") == {
        "step-000000010",
        "damaged-step-000000020",
        "damaged-step-000000030",
        "latest",
    }


def _failures_of_rank_1(topology: Topology, path: Path) -> None:
    rank = topology.rank
    with connect(topology, timeout_s=60) as ranks:
        folder = LocalFolder(path)
        store = store_in(folder, ranks, Retention(last=4))
        save(store, ranks, 10, 20)
        before = names(path)
        ranks.barrier()
        _full_disk_of_rank_1(store, ranks, before)

        def broken_read(checkpoint: Checkpoint) -> None:
            if rank == 1:
                raise CheckpointError("rank 1 has another model")

        with pytest.raises(CheckpointError, match=r"^rank 1 has another model$") as raised:
            store.restore(broken_read)
        assert raised.value.agreed
        _without_the_shared_folder(folder, ranks, before)
        save(store, ranks, 30)
        assert restored(store) == 30


def _full_disk_of_rank_1(store: CheckpointStore, ranks: Ranks, before: set[str]) -> None:
    """The error comes where the ranks agree, at the same step on all of them, and once."""
    path = Path(store.folder.location)
    for step, ask in ((30, store.wait), (35, lambda: _advance_until_committed(store, ranks))):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        begin(store, step, ranks)
        with pytest.raises(CheckpointError, match=f"{RANK_1}: cannot write: File too large; free space") as raised:
            ask()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert raised.value.agreed
        assert ranks.gather(str(raised.value)) == [str(raised.value)] * ranks.world_size
        assert (store.pending(), store.wait()) == (0, None)
        assert names(path) == before
        ranks.barrier()


def _advance_until_committed(store: CheckpointStore, ranks: Ranks) -> None:
    for _ in range(1000):
        pending = ranks.sum_ints([store.pending()])[0]
        if store.advance(pending):
            return
        time.sleep(0.005)


class Unmounted(LocalFolder):
    """A folder of the same name that is empty: that of the other ranks is not mounted here."""

    def __init__(self, path: Path, location: str) -> None:
        super().__init__(path)
        self.location = location


def _without_the_shared_folder(folder: LocalFolder, ranks: Ranks, before: set[str]) -> None:
    """Rank 1 sees none of rank 0's files."""
    mounted = ranks.topology.rank == 0
    own = folder if mounted else Unmounted(folder.path.with_name("elsewhere"), folder.location)
    store = store_in(own, ranks, Retention(last=4))
    begin(store, 30, ranks)
    message = (
        f"^{folder.location}: rank 0 made a folder here, but this rank does not see it; the run folder must be on a "
        f"file system that all ranks share$"
    )
    with pytest.raises(CheckpointError, match=message) as raised:
        store.wait()
    assert raised.value.agreed
    ranks.barrier()
    assert names(folder.path) == before
    ranks.barrier()

    def load(checkpoint: Checkpoint) -> None:
        _read_own(checkpoint if mounted else Checkpoint(own, checkpoint.name, *_rest(checkpoint)), 0)

    with pytest.raises(CheckpointError, match=rf"{RANK_0}: this rank cannot read it: No such file.*; no checkpoint"):
        store.restore(load)
    ranks.barrier()
    assert names(folder.path) == before
    ranks.barrier()


def _rest(checkpoint: Checkpoint) -> tuple[Any, Any]:
    return checkpoint.content, checkpoint.records


def test_a_failure_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    run_ranks(_failures_of_rank_1, 2, tmp_path / "checkpoints")
    assert checkpoint_names(LocalFolder(tmp_path / "checkpoints")) == [step_name(step) for step in (30, 20, 10)]
