"""Files appear whole or not at all, and a lock keeps other processes out for as long as its holder lives."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.runs import environment
from vitscale.durable import Lock, publish_text, published, sync_folder

HOLD = """
import sys
from pathlib import Path
from vitscale.durable import Lock

lock = Lock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


def test_text_replaces_text(tmp_path: Path) -> None:
    publish_text(tmp_path / "a", "long text\n")
    publish_text(tmp_path / "a", "short\n")
    sync_folder(tmp_path)
    assert (tmp_path / "a").read_text() == "short\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    publish_text(tmp_path / "a", "before")

    def write_half() -> None:
        with published(tmp_path / "a") as file:
            file.write(b"half of")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_name_is_not_taken_before_the_end(tmp_path: Path) -> None:
    with published(tmp_path / "a") as file:
        file.write(b"text")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"text"


def test_a_folder_that_cannot_be_synced_is_an_error_unless_the_file_system_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in (errno.EINVAL, errno.ENOTSUP):
        fail(number)
        sync_folder(tmp_path)
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has taken the lock. A line to it lets it release the lock and stay."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_held_lock_is_not_taken_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock(path)
    with holder(path) as process:
        start = time.monotonic()
        assert not lock.take()
        assert not lock.take(patience_s=0.0)
        assert time.monotonic() - start < 1
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        # The former holder is still there.
        assert lock.take()
        assert process.poll() is None
    assert not Lock(path).take()
    lock.release()
    lock.release()
    assert Lock(path).take()


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        assert not Lock(path).take()
        process.kill()
        process.wait()
        assert path.exists()
        assert Lock(path).take()


def test_patience_is_as_long_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path):
        start = time.monotonic()
        assert not Lock(path).take(patience_s=0.5)
        assert 0.5 <= time.monotonic() - start < 5


def test_patience_ends_when_the_holder_does(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock(path)
    with holder(path) as process:
        death = threading.Timer(0.4, process.kill)
        death.start()
        start = time.monotonic()
        assert lock.take(patience_s=60)
        assert 0.3 < time.monotonic() - start < 30
        death.join()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        fail(number)
        assert Lock(tmp_path / "lock").take()
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "lock").take()
