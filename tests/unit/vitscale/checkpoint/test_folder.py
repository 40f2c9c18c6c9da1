"""Checkpoints in a folder of this machine: what is on the disk when, and what others may see of it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.vitscale.checkpoint.small_state import latest, names
from vitscale.checkpoint.folder import LocalFolder

NAME = "step-000000010"
STAGING = f".staging-{NAME}"
FILE = "rank-00000.safetensors"
DATA = bytes(range(256)) * 3


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run" / "checkpoints")


def publish(folder: LocalFolder, name: str = NAME) -> Path:
    folder.stage(name)
    folder.write(name, FILE, [memoryview(DATA)[:100], memoryview(DATA)[100:]])
    folder.publish(name, b"{}")
    return folder.path / name


def test_there_is_nothing_before_the_first_checkpoint(folder: LocalFolder) -> None:
    assert folder.names() == []
    folder.remove_left_overs()
    folder.discard(NAME)
    assert not folder.path.exists()
    assert folder.location == str(folder.path)


def test_what_is_staged_is_invisible_until_it_is_published(folder: LocalFolder) -> None:
    folder.stage(NAME)
    folder.write(NAME, FILE, [memoryview(DATA)])
    assert folder.names() == []
    assert folder.read_manifest(NAME) is None
    assert folder.file_size(NAME, FILE) is None
    folder.publish(NAME, b'{"a": 1}')
    assert folder.names() == [NAME]
    assert names(folder.path / NAME) == {FILE, "manifest.json"}
    assert folder.read_manifest(NAME) == b'{"a": 1}'
    assert folder.file_size(NAME, FILE) == len(DATA)


def test_staging_begins_empty_and_can_be_discarded(folder: LocalFolder) -> None:
    for _ in range(2):
        folder.stage(NAME)
        assert names(folder.path / STAGING) == set()
        folder.write(NAME, FILE, [memoryview(DATA)])
    folder.discard(NAME)
    assert names(folder.path) == set()


def test_a_file_is_written_once(folder: LocalFolder) -> None:
    """Two ranks that take themselves for the same one would mix their bytes."""
    folder.stage(NAME)
    folder.write(NAME, FILE, [memoryview(DATA)])
    with pytest.raises(FileExistsError):
        folder.write(NAME, FILE, [memoryview(DATA)])


def test_a_rank_that_does_not_see_the_staging_folder_is_told(folder: LocalFolder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.write(NAME, FILE, [memoryview(DATA)])
    assert not folder.path.exists()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(DATA)), st.integers(0, 2 * len(DATA)))
def test_reads_are_slices(tmp_path_factory: pytest.TempPathFactory, start: int, length: int) -> None:
    folder = LocalFolder(tmp_path_factory.getbasetemp() / "slices")
    if not folder.names():
        publish(folder)
    assert folder.read(NAME, FILE, start, length) == DATA[start : start + length]


def test_a_folder_is_no_file(folder: LocalFolder) -> None:
    path = publish(folder)
    (path / "sub").mkdir()
    assert folder.file_size(NAME, "sub") is None
    assert folder.file_size(NAME, "absent") is None
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    assert folder.read_manifest(NAME) is None


def test_a_manifest_out_of_reach_is_not_a_missing_one(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    publish(folder)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        folder.read_manifest(NAME)


def test_files_are_as_readable_as_the_users_other_files(folder: LocalFolder) -> None:
    before = os.umask(0o027)
    try:
        path = publish(folder)
        folder.point_latest(NAME)
    finally:
        os.umask(before)
    modes = {each.name: oct(each.stat().st_mode & 0o777) for each in (*path.iterdir(), folder.path / "latest")}
    assert modes == {FILE: "0o640", "manifest.json": "0o640", "latest": "0o640"}
    assert oct(path.stat().st_mode & 0o777) == "0o750"


def test_folders_are_synced_where_the_file_system_can(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and folder reaches the disk before the rename that makes it count."""
    events: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def place(path: object) -> str:
        return str(path).removeprefix(str(folder.path.parent)).removeprefix("/")

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(f"sync {place(path)}")
        real_fsync(descriptor)
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {place(a)}"), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {place(a)}"), real_replace(a, b)))
    publish(folder)
    folder.point_latest(NAME)
    staging = f"checkpoints/{STAGING}"
    assert events == [
        "sync ",
        f"sync {staging}/{FILE}",
        f"sync {staging}/.manifest.json.tmp",
        f"rename {staging}/.manifest.json.tmp",
        f"sync {staging}",
        f"rename {staging}",
        "sync checkpoints",
        "sync checkpoints/.latest.tmp",
        "rename checkpoints/.latest.tmp",
        "sync checkpoints",
    ]


@pytest.mark.parametrize("before", [f"{NAME}\n".encode(), b"step-000000001\n", b"", b"\xff\xfe", None])
def test_latest_says_what_it_is_told(before: bytes | None, folder: LocalFolder) -> None:
    publish(folder)
    if before is not None:
        (folder.path / "latest").write_bytes(before)
    folder.point_latest(NAME)
    assert latest(folder.path) == NAME
    folder.point_latest(None)
    folder.point_latest(None)
    assert names(folder.path) == {NAME}


def test_what_is_removed_is_hidden_first(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    publish(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        folder.remove(NAME)
        assert f"{folder.path / NAME} cannot be removed yet: Directory not empty" in caplog.text
        caplog.clear()
        folder.remove_left_overs()
        assert f"{folder.path / STAGING} cannot be removed yet: Directory not empty" in caplog.text
    assert folder.names() == []
    assert names(folder.path) == {STAGING}
    folder.remove_left_overs()
    assert names(folder.path) == set()


def test_a_checkpoint_is_set_aside_under_a_name_of_its_own(folder: LocalFolder) -> None:
    for _ in range(2):
        publish(folder)
        assert folder.set_aside(NAME, "damaged-") == f"damaged-{NAME}"
        assert names(folder.path) == {f"damaged-{NAME}"}
        assert names(folder.path / f"damaged-{NAME}") == {FILE, "manifest.json"}
