"""A process that dies at any of its writes leaves the old checkpoint or the new one, and the next start goes on."""

from __future__ import annotations

import io
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.unit.vitscale.checkpoint.small_state import SIZE, blocks_of, latest, names, restored, save, store_in
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import step_name, step_of
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore, checkpoint_names, open_checkpoint
from vitscale.distributed import Ranks, connect
from vitscale.topology import Topology

WRITES = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class _Death:
    """Kills this process at the n-th of the calls that change the disk, before it or after it, in whatever thread."""

    def __init__(self, point: int, *, after: bool) -> None:
        self._left, self._after = point, after

    def plant(self) -> None:
        for name in WRITES:
            setattr(os, name, self._deadly(getattr(os, name)))
        harmless, deadly = io.open, self._deadly(io.open)

        def open_file(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            if not set(mode) & set("wx"):
                return harmless(file, mode, *arguments, **keywords)
            opened = deadly(file, mode, *arguments, **keywords)
            return _DeadlyFile(opened, self._deadly(opened.write))

        io.open = open_file  # type: ignore[assignment]

    def _deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            self._left -= 1
            if self._left == -1 and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*arguments, **keywords)
            finally:
                if self._left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapper


class _DeadlyFile:
    def __init__(self, opened: Any, write: Callable[..., Any]) -> None:
        self._opened, self.write = opened, write

    def __enter__(self) -> _DeadlyFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def _in_child(function: Callable[[], None]) -> int:
    """Exit status of a forked process."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _store_in_child(path: Path) -> tuple[CheckpointStore, Ranks]:
    # Not left in an orderly way: the process ends right after.
    ranks = connect(Topology(), timeout_s=60).__enter__()
    return store_in(path, ranks, Retention(last=2)), ranks


def _save(path: Path, *steps: int) -> None:
    save(*_store_in_child(path), *steps)


def _save_and_die(path: Path, point: int, after: bool) -> None:
    store, ranks = _store_in_child(path)
    _Death(point, after=after).plant()
    save(store, ranks, 20, 30)


def _look_and_go_on(path: Path, progress: Path) -> None:
    folder = LocalFolder(path)
    pointed = open_checkpoint(folder, step_of(latest(path)))
    for name in checkpoint_names(folder):
        open_checkpoint(folder, step_of(name))
    store, ranks = _store_in_child(path)
    step = restored(store)
    assert step in {10, 20, 30}
    assert pointed.step in {10, 20, 30}
    assert pointed.step <= step
    assert step >= int(progress.read_text())
    progress.write_text(str(step))
    # No later point loses what an earlier one had, and nothing is left over.
    assert names(path) - {".latest.tmp"} == {*checkpoint_names(folder), "latest"}
    assert latest(path) == step_name(step)
    save(store, ranks, 40)
    assert latest(path) == "step-000000040"
    assert checkpoint_names(folder) == ["step-000000040", step_name(step)]


def _die_at_every_write(topology: Topology, tmp_path: Path, after: bool) -> None:
    first, path, progress = tmp_path / "first", tmp_path / "checkpoints", tmp_path / "progress"
    progress.write_text("10")
    # Several writes for a file, so that some are in its middle.
    with blocks_of(SIZE // 3):
        assert _in_child(lambda: _save(first, 10)) == 0
        for point in range(1000):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(first, path)
            status = _in_child(lambda point=point: _save_and_die(path, point, after))
            assert status in (0, -signal.SIGKILL), (point, status)
            assert _in_child(lambda: _look_and_go_on(path, progress)) == 0, (point, after)
            if status == 0:
                break
    # Fewer would mean that the calls are not seen any more.
    assert point >= 35
    assert progress.read_text() == "30"
    print(f"killed {'after' if after else 'before'} each of {point} writes")


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"])
def test_death_at_any_write_leaves_the_old_or_the_new_checkpoint(after: bool, tmp_path: Path) -> None:
    run_ranks(_die_at_every_write, 1, tmp_path, after)
