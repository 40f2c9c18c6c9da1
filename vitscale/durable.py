"""Files that are complete on the disk before anyone can see them under their name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A hidden neighbour of ``path`` to write to; it takes the name when it is complete and on the disk.

    The rename itself is durable after :func:`sync_folder` of the folder.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
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
