"""Reading from folders, in time or not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.helpers.hanging import hanging
from vitscale.data.storage.files import LocalFiles, StorageSilentError, absolute


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    (tmp_path / "index.json").write_text("{}")
    return LocalFiles(tmp_path, timeout_s=0.2)


def test_ranges_of_a_file(files: LocalFiles) -> None:
    assert files.read("a.tar", 0, 4) == b"0123"
    assert files.read("a.tar", 7, 100) == b"789"
    assert files.read("a.tar", 20, 5) == b""
    assert files.read_all("a.tar") == b"0123456789"
    assert (files.size("a.tar"), files.size("b.tar")) == (10, None)


def test_a_missing_file(files: LocalFiles) -> None:
    for read in (lambda: files.read("b.tar", 0, 1), lambda: files.read_all("b.tar")):
        with pytest.raises(FileNotFoundError):
            read()


def test_a_file_that_hangs_is_given_up(files: LocalFiles, tmp_path: Path) -> None:
    with hanging(tmp_path / "a.tar"):
        for read in (lambda: files.read("a.tar", 0, 1), lambda: files.read_all("a.tar")):
            with pytest.raises(OSError, match=r"no answer for 0\.2 s") as caught:
                read()
            assert caught.value.errno == errno.ETIMEDOUT
    assert files.read("a.tar", 0, 1) == b"0"


def test_a_file_system_that_hangs_is_told_apart(files: LocalFiles, tmp_path: Path) -> None:
    with (
        hanging(tmp_path / "a.tar", tmp_path / "index.json"),
        pytest.raises(StorageSilentError, match=r"has not answered for 0\.2 s; see that it is mounted"),
    ):
        files.read("a.tar", 0, 1)


@pytest.mark.parametrize(
    ("location", "path"),
    [("/a/b", True), ("a", True), ("s3://a/b", False), ("pipe:cat {name}", False), ("file:///a", False)],
)
def test_paths_become_absolute(location: str, path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(location) == (str(tmp_path / location) if path else location)
