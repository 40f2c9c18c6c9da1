"""Files whose readers wait for ever, as on a network file system that has lost its server."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hanging(*paths: Path) -> Iterator[None]:
    """Put a pipe that nobody writes to in the place of each file: opening it hangs until the block ends."""
    for path in paths:
        path.rename(path.with_name(path.name + ".aside"))
        os.mkfifo(path)
    try:
        yield
    finally:
        for path in paths:
            assert stat.S_ISFIFO(path.stat().st_mode)
            # A writer lets all readers in.
            descriptor = os.open(path, os.O_RDWR)
            path.with_name(path.name + ".aside").replace(path)
            os.close(descriptor)
