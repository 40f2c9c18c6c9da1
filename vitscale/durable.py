"""Files that are complete on the disk before anyone can see them under their name."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

# What flock says on a file system without locks; there, nobody can be kept out.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def published(path: Path, *, writer: str = "") -> Iterator[BinaryIO]:
    """A hidden neighbour of ``path`` to write and read back; it takes the name when it is complete and on the disk.

    The rename itself is durable after :func:`sync_folder` of the folder.

    Args:
        writer: keeps the neighbours of several processes apart that may publish the same file at a time.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with temporary.open("wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    with published(path) as file:
        file.write(text.encode())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep no state of folders to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class Lock:
    """Keeps a second process out. It is free again when its holder releases it or dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def take(self, *, patience_s: float = 0.0) -> bool:
        """Take the lock, or give up after ``patience_s`` seconds of another's holding it.

        Returns:
            Whether it was taken. On a file system without locks it always is.
        """
        self._file = self._path.open("w")
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= end:
                    self.release()
                    return False
                time.sleep(0.1)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return True
                raise

    def fileno(self) -> int:
        """Of the lock while it is held: a child that inherits it holds the lock, too, and keeps it after its parent."""
        assert self._file is not None
        return self._file.fileno()

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None
