"""The store on one rank: what becomes visible, what is refused, what is kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.vitscale.checkpoint.small_state import (
    RANK_0,
    SHAPES,
    SIZE,
    begin,
    content_of,
    file_of,
    is_state_of,
    latest,
    layouts_on,
    names,
    restored,
    save,
    snapshot_of,
    store_in,
    values_of,
)
from vitscale.checkpoint.digest import part_digest
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import MASTER, step_name
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore, checkpoint_names, open_checkpoint
from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError


def test_a_save_makes_a_complete_checkpoint(store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    save(store, ranks, 10)
    path = folder.path / "step-000000010"
    assert names(folder.path) == {path.name, "latest"}
    assert names(path) == {"manifest.json", RANK_0}
    assert latest(folder.path) == path.name
    data = file_of(10)
    assert (path / RANK_0).read_bytes() == data
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == [{"name": RANK_0, "size": SIZE, "crc32": [zlib.crc32(data)]}]
    digest = sum(part_digest(name, MASTER, 0, values_of(10, name)) for name in SHAPES) % 2**64
    assert manifest["digests"] == {MASTER: f"{digest:016x}"}
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.step, checkpoint.content["note"]) == (10, "kept")
    assert is_state_of(10, read_parameters(checkpoint))
    assert restored(store) == 10


def test_no_checkpoint_is_none(store: CheckpointStore, folder: LocalFolder) -> None:
    assert restored(store) is None
    folder.path.mkdir(parents=True)
    assert restored(store) is None
    assert names(folder.path) == set()


def test_left_overs_are_invisible_and_removed_at_the_next_start(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    save(store, ranks, 10)
    left_overs = [folder.path / f".staging-step-{step:09d}" for step in (5, 20)]
    for left_over in left_overs:
        shutil.copytree(folder.path / "step-000000010", left_over)
    assert open_checkpoint(folder).step == 10
    assert checkpoint_names(folder) == ["step-000000010"]
    # One of the same name is no hindrance either.
    save(store, ranks, 20)
    assert names(folder.path) == {"step-000000010", "step-000000020", left_overs[0].name, "latest"}
    assert restored(store) == 20
    assert names(folder.path) == {"step-000000010", "step-000000020", "latest"}


def test_a_left_over_that_cannot_be_removed_is_no_reason_to_stop(
    store: CheckpointStore,
    folder: LocalFolder,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    save(store, ranks, 10, 20, 30)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(store, ranks, 40, 50)
    assert latest(folder.path) == "step-000000050"
    assert checkpoint_names(folder) == [step_name(step) for step in (50, 40, 30)]
    assert "step-000000010 cannot be removed yet: Directory not empty" in caplog.text
    assert restored(store) == 50
    monkeypatch.undo()
    assert restored(store) == 50
    assert names(folder.path) == {*(step_name(step) for step in (50, 40, 30)), "latest"}


def test_the_newest_are_kept(store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    save(store, ranks, *range(10, 100, 10))
    assert names(folder.path) == {*(step_name(step) for step in (90, 80, 70)), "latest"}
    assert latest(folder.path) == "step-000000090"


def test_multiples_and_the_best_are_kept_too(folder: LocalFolder, ranks: Ranks) -> None:
    store = store_in(folder, ranks, Retention(last=2, every=40, best=1))
    scores: dict[int, float] = {}
    for step, score in ((10, 0.1), (20, 0.5), (30, 0.4), (40, 0.3), (50, 0.5), (60, 0.2)):
        save(store, ranks, step, scores=scores)
        # An evaluation comes after the checkpoint of its step.
        scores = {**scores, step: score}
    assert checkpoint_names(folder) == [step_name(step) for step in (60, 50, 40, 20)]


def test_names_are_ordered_as_numbers(store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    save(store, ranks, 999_999_999, 1_000_000_000)
    assert restored(store) == 1_000_000_000
    assert latest(folder.path) == "step-1000000000"


def test_copies_beside_the_checkpoints_are_left_alone(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    save(store, ranks, 10, 20)
    copies = {"step-000000020.copy", "step-90", "step-000000030 (1)"}
    for copy in copies:
        shutil.copytree(folder.path / "step-000000010", folder.path / copy)
    (folder.path / "step-000000099").write_text("a file")
    assert restored(store) == 20
    save(store, ranks, 40, 50)
    assert copies < names(folder.path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 90; there are: 50, 40, 20$"):
        open_checkpoint(folder, 90)


def test_a_commit_out_of_order_keeps_latest_and_what_it_names(folder: LocalFolder, ranks: Ranks) -> None:
    save(store_in(folder, ranks, Retention(last=2)), ranks, 20, 30, 10)
    assert latest(folder.path) == "step-000000030"
    assert checkpoint_names(folder) == ["step-000000030", "step-000000020"]


def test_a_step_that_is_there_is_not_written_again(store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    save(store, ranks, 10)
    manifest = folder.path / "step-000000010" / "manifest.json"
    before = manifest.stat()
    store.begin({"step": 10, "parameters": {}}, snapshot_of(11), {})
    assert store.pending() == 0
    assert store.wait() is None
    assert manifest.stat() == before
    assert restored(store) == 10


@pytest.mark.parametrize("content", [b"step-000000010\n", b"", b"\xff\xfe", None])
def test_latest_is_mended(content: bytes | None, store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    save(store, ranks, 10, 20)
    pointer = folder.path / "latest"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    assert restored(store) == 20
    assert latest(folder.path) == "step-000000020"


def test_a_checkpoints_folder_that_cannot_be_read_is_an_error(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for empty, the run would start anew."""
    save(store, ranks, 10)

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for ask in (lambda: restored(store), lambda: open_checkpoint(folder)):
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied; mend"):
            ask()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond ``size`` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("part", "limit"), [("fragments", SIZE // 2), ("manifest", SIZE)])
def test_a_full_disk_leaves_the_old_checkpoints(
    part: str, limit: int, store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    save(store, ranks, 10, 20)
    before = names(folder.path)
    note = "" if part == "fragments" else SIZE * "x"
    verb = "write" if part == "fragments" else "commit"
    message = rf"step-000000030.*: cannot {verb}: File too large; .*free space or mend the disk"
    with file_size_limit(limit):
        store.begin(content_of(30, layouts_on(1)) | {"note": note}, snapshot_of(30), {})
        with pytest.raises(CheckpointError, match=message) as raised:
            store.wait()
    assert raised.value.agreed
    assert names(folder.path) == before
    assert latest(folder.path) == "step-000000020"
    assert store.wait() is None
    save(store, ranks, 30)
    assert restored(store) == 30


def test_a_run_folder_that_cannot_be_written_is_an_error(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    store = store_in(tmp_path / "run" / "checkpoints", ranks, Retention(last=2))
    with pytest.raises(CheckpointError, match=r"cannot create: .*; check the run folder"):
        begin(store, 10, ranks)
    assert store.wait() is None
