"""Image folders that behave like a user's own source: slow, watched, or wrong. Workers open them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from vitscale.errors import DataError
from vitscale_shards.rows import Row
from vitscale_shards.sources.folder import ImageFolder

LOG_NAME = "reads.log"
TOGETHER_NAME = "together"


class Folder(ImageFolder):
    """Opened with a location in words."""

    def __init__(self, location: str) -> None:
        super().__init__(Path(location))


class Slow(Folder):
    """Takes 5 ms for an image."""

    def read(self, row: Row) -> bytes:
        time.sleep(0.005)
        return super().read(row)


class Logged(Folder):
    """Tells a file beside the folder which process reads what, and waits at first until so many are at it as another
    file says."""

    pause_s = 0.002

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._log = self.folder.parent / LOG_NAME
        self._together = False

    def read(self, row: Row) -> bytes:
        time.sleep(self.pause_s)
        with self._log.open("a") as log:
            log.write(f"{os.getpid()} {row.path}\n")
        while not self._together:
            at_it = {line.split()[0] for line in self._log.read_text().splitlines()}
            self._together = len(at_it) >= int((self.folder.parent / TOGETHER_NAME).read_text())
            time.sleep(0.01)
        return super().read(row)


class Sluggish(Logged):
    """The same, in no hurry."""

    pause_s = 0.02


class Stuck(Folder):
    """Waits for ever on the first image."""

    def read(self, row: Row) -> bytes:
        time.sleep(600)
        return super().read(row)


class Deaf(Logged):
    """Stays with the first image, whoever asks it to end."""

    def read(self, row: Row) -> bytes:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        super().read(row)
        time.sleep(600)
        raise AssertionError


class _FailsOnce(Slow):
    """All are slow, and one image is more than a source knows what to do with."""

    def read(self, row: Row) -> bytes:
        if row.path == "class0/0.jpg":
            self.fail()
        return super().read(row)

    def fail(self) -> None:
        raise NotImplementedError


class Broken(_FailsOnce):
    def fail(self) -> None:
        raise ZeroDivisionError("a mistake in a source")


class Talkative(_FailsOnce):
    """The message holds more than a pipe does."""

    def fail(self) -> None:
        raise ZeroDivisionError("x" * 1_000_000)


class Contradictory(_FailsOnce):
    def fail(self) -> None:
        raise DataError("the source is gone; mount it again")


class Impolite(_FailsOnce):
    """Raises what opening a file raises, not what :class:`Source` asks for."""

    def fail(self) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/photos/0.jpg")
