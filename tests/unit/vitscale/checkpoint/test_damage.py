"""What is damaged is found, named, moved aside and replaced by an older one; what is out of reach is left alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vitscale.checkpoint.small_state import RANK_0, SIZE, latest, names, restored, save, store_in
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import Checkpoint
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.store import CheckpointStore, checkpoint_names, open_checkpoint
from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError


def cut_short(path: Path) -> None:
    os.truncate(path / RANK_0, SIZE - 1)


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / RANK_0).read_bytes())
    data[SIZE // 2] ^= 1
    (path / RANK_0).write_bytes(data)


def delete_file(path: Path) -> None:
    (path / RANK_0).unlink()


def swap_file(path: Path) -> None:
    shutil.copy(path.with_name("step-000000010") / RANK_0, path / RANK_0)


def folder_for_file(path: Path) -> None:
    delete_file(path)
    (path / RANK_0).mkdir()


def delete_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def folder_for_manifest(path: Path) -> None:
    delete_manifest(path)
    (path / "manifest.json").mkdir()


def manifest_text(text: str | bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def manifest_of_another_step(path: Path) -> None:
    shutil.copy(path.with_name("step-000000010") / "manifest.json", path / "manifest.json")


def edit_manifest(path: Path, *, sign: bool, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    if sign:
        del manifest["manifest_sha256"]
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        manifest["manifest_sha256"] = digest
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_of_the_state(path: Path) -> None:
    edit_manifest(path, sign=False, note="kepu")


def files_of_manifest(*files: Any) -> Callable[[Path], None]:
    return lambda path: edit_manifest(path, sign=True, files=list(files))


def escape(name: str) -> Callable[[Path], None]:
    """The right file with the right checksum, but outside the checkpoint."""

    def damage(path: Path) -> None:
        shutil.copy(path / RANK_0, path.parent / "outside")
        crc = zlib.crc32((path / RANK_0).read_bytes())
        files_of_manifest({"name": name.format(folder=path), "size": SIZE, "crc32": [crc]})(path)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, f"{RANK_0} has {SIZE - 1} of {SIZE} bytes"),
    "flipped byte": (flip_a_byte, f"{RANK_0} has other content from byte 0 on"),
    "swapped file": (swap_file, f"{RANK_0} has other content from byte 0 on"),
    "deleted file": (delete_file, f"{RANK_0} is missing"),
    "folder for file": (folder_for_file, f"{RANK_0} is missing"),
    "deleted manifest": (delete_manifest, "it has no manifest"),
    "folder for manifest": (folder_for_manifest, "it has no manifest"),
    "empty manifest": (manifest_text(""), "unreadable manifest (JSONDecodeError"),
    "binary manifest": (manifest_text(bytes(range(128, 256))), "unreadable manifest (UnicodeDecodeError"),
    "nested manifest": (manifest_text("[" * 200_000), "unreadable manifest (RecursionError"),
    "list for manifest": (manifest_text("[]"), "unreadable manifest (TypeError"),
    "number for manifest": (manifest_text("1"), "unreadable manifest (AttributeError"),
    "other manifest": (manifest_text("{}"), "unreadable manifest (KeyError"),
    "changed state": (change_of_the_state, "its manifest was changed"),
    "another step": (manifest_of_another_step, "its manifest is of step 10"),
    "no files": (files_of_manifest(), "its manifest names no files"),
    "endless file": (files_of_manifest({"name": RANK_0, "size": float("inf"), "crc32": []}), "unreadable manifest (Ov"),
    "number for checksums": (files_of_manifest({"name": RANK_0, "size": SIZE, "crc32": 5}), "unreadable manifest (Ty"),
    "no checksums": (files_of_manifest({"name": RANK_0, "size": SIZE, "crc32": []}), f"0 checksums for {SIZE} bytes"),
    "more checksums": (files_of_manifest({"name": RANK_0, "size": SIZE, "crc32": [1, 2]}), "has 2 checksums for"),
    "number for a name": (files_of_manifest({"name": 5, "size": 1, "crc32": []}), "5 is missing"),
    "path above": (escape("../outside"), "../outside is missing"),
    "path through itself": (escape("../step-000000030/" + RANK_0), f"../step-000000030/{RANK_0} is missing"),
    "absolute path": (escape("{folder}/" + RANK_0), f"{RANK_0} is missing"),
    "the folder above": (files_of_manifest({"name": "..", "size": 4096, "crc32": [1]}), ".. is missing"),
    "no name": (files_of_manifest({"name": "", "size": 4096, "crc32": [1]}), " is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_skipped(
    kind: str, store: CheckpointStore, folder: LocalFolder, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, ranks, 10, 20, 30)
    damage, said = DAMAGES[kind]
    damage(folder.path / "step-000000030")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder, 30)
    assert said in str(raised.value)
    assert open_checkpoint(folder).step == 20
    caplog.clear()

    assert restored(store) == 20
    assert latest(folder.path) == "step-000000020"
    moved = {"step-000000010", "step-000000020", "damaged-step-000000030", "latest"}
    assert names(folder.path) - {"outside"} == moved
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("checkpoint step-000000030 is damaged (")
    assert said in line
    assert line.endswith("; moved to damaged-step-000000030")

    caplog.clear()
    assert restored(store) == 20
    assert not caplog.records
    save(store, ranks, 30)
    assert restored(store) == 30


def test_a_load_that_stopped_halfway_is_done_again_with_an_older_one(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    save(store, ranks, 10, 20)
    flip_a_byte(folder.path / "step-000000020")
    tried = []

    def load(checkpoint: Checkpoint) -> None:
        tried.append(checkpoint.step)
        read_parameters(checkpoint)

    checkpoint = store.restore(load)
    assert checkpoint is not None
    assert (checkpoint.step, tried) == (10, [20, 10])


def test_every_damaged_checkpoint_is_moved_aside(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        save(store, ranks, 10, 20)
        flip_a_byte(folder.path / "step-000000010")
        delete_file(folder.path / "step-000000020")
        caplog.clear()
        assert restored(store) is None
        assert names(folder.path) == {"damaged-step-000000010", "damaged-step-000000020"}
        assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
            f"none of the 2 checkpoints in {folder.path} is complete",
            "checkpoint step-000000020 is damaged",
            "checkpoint step-000000010 is damaged",
        ]
    save(store, ranks, 10)
    assert latest(folder.path) == "step-000000010"


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_not_damage(
    version: int, store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    save(store, ranks, 10, 20)
    edit_manifest(folder.path / "step-000000020", sign=True, format_version=version)
    before = names(folder.path)
    message = rf"has format vitscale-checkpoint version {version}; this vitscale reads .* 2: use"
    with pytest.raises(CheckpointError, match=message):
        restored(store)
    assert names(folder.path) == before


class OutOfReach(LocalFolder):
    """One where a method fails for the checkpoint of step 20."""

    def __init__(self, path: Path, method: str, number: int) -> None:
        super().__init__(path)
        self.method, self.number = method, number

    def _fail(self, method: str, name: str) -> None:
        if (method, name) == (self.method, "step-000000020"):
            raise OSError(self.number, os.strerror(self.number))

    def read_manifest(self, name: str) -> bytes | None:
        self._fail("read_manifest", name)
        return super().read_manifest(name)

    def file_size(self, name: str, file: str) -> int | None:
        self._fail("file_size", name)
        return super().file_size(name, file)

    def read(self, name: str, file: str, start: int, length: int) -> bytes:
        self._fail("read", name)
        return super().read(name, file, start, length)


@pytest.mark.parametrize("method", ["read", "read_manifest", "file_size"])
@pytest.mark.parametrize(("number", "moved"), [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)])
def test_a_checkpoint_out_of_reach_is_not_damaged(
    number: int, moved: bool, method: str, store: CheckpointStore, folder: LocalFolder, ranks: Ranks
) -> None:
    """A disk that lost the content is; a mount or permission that a person can mend is not."""
    save(store, ranks, 10, 20)
    before = names(folder.path)
    unlucky = store_in(OutOfReach(folder.path, method, number), ranks, Retention(last=3))
    if moved:
        assert restored(unlucky) == 10
        assert "damaged-step-000000020" in names(folder.path)
    else:
        with pytest.raises(CheckpointError, match=r"this rank cannot read it: .*; no checkpoint was changed"):
            restored(unlucky)
        assert names(folder.path) == before


def test_a_folder_that_cannot_be_tidied_is_an_error(
    store: CheckpointStore, folder: LocalFolder, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, ranks, 10, 20)
    delete_file(folder.path / "step-000000020")

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="cannot move damaged checkpoints aside or write latest: Permission de"):
        restored(store)


def test_open_checkpoint_says_what_there_is(store: CheckpointStore, folder: LocalFolder, ranks: Ranks) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoints: holds no checkpoint; train first$"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: none$"):
        open_checkpoint(folder, 5)
    save(store, ranks, 10, 20)
    assert open_checkpoint(folder).step == 20
    assert open_checkpoint(folder, 10).step == 10
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: 20, 10$"):
        open_checkpoint(folder, 5)
    cut_short(folder.path / "step-000000010")
    flip_a_byte(folder.path / "step-000000020")
    message = (
        rf"no complete checkpoint \(step-000000020: {RANK_0} has other content from byte 0 on; "
        rf"step-000000010: {RANK_0} has {SIZE - 1} of {SIZE} bytes\); train again or restore a copy$"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
    # What is verified later is not read now.
    assert open_checkpoint(folder, verify=False).step == 20
    assert checkpoint_names(folder) == ["step-000000020", "step-000000010"]
