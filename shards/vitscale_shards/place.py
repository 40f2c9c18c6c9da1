"""Where a shard set lies: a folder on disk, or a prefix in object storage. Files appear there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from vitscale.durable import published, sync_folder


def process_name() -> str:
    """Name of this process among all that share a file system."""
    return f"{os.uname().nodename}-{os.getpid()}"


class Place(Protocol):
    """A folder of files. Names are plain: ``train-000000.tar``, ``.progress/train-000000.tar.json``.

    Every method raises OSError if the storage fails, FileNotFoundError if a file that it needs is not there.
    """

    @property
    def url(self) -> str:
        """How a user names it."""

    def child(self, name: str) -> Place:
        """A folder below."""

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files (not folders) directly in here or in a folder below; none if that is missing."""

    def folders(self) -> list[str]:
        """Sorted names of the folders directly in here."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of those of the files that are directly in here."""

    def modified(self, name: str) -> float | None:
        """When a file was last written, in seconds of the storage's own clock, or None if there is none."""

    def open(self, name: str) -> BinaryIO:
        """A file to read, seekable."""

    def read_text(self, name: str) -> str:
        """A small file's text."""

    def published(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to write and read back, which takes its name, replacing another, when the block ends well."""

    def publish_text(self, name: str, text: str) -> None:
        """Write a small file, replacing another, in one step."""

    def create(self, name: str, text: str) -> bool:
        """Write a small file unless there is one; of several callers at a time one alone gets True."""

    def remove(self, name: str) -> None:
        """Remove a file; fine if it is gone already."""

    def remove_folder(self, name: str) -> None:
        """Remove a folder below with all that is in it; fine if it is gone already."""

    def sync(self) -> None:
        """Make the names of published files survive a crash of the machine."""


REMOVE_ATTEMPTS = 100


class LocalPlace:
    """A folder on a local or shared file system; created with the first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def child(self, name: str) -> LocalPlace:
        """A folder below."""
        return LocalPlace(self.folder / name)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files."""
        return self._entries(folder, files=True)

    def folders(self) -> list[str]:
        """Sorted names of the folders."""
        return self._entries("", files=False)

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None."""
        status = self._status(name)
        return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of those of the files that are there."""
        return {name: size for name in names if (size := self.size(name)) is not None}

    def modified(self, name: str) -> float | None:
        """Time of the last write by the file server's clock, or None."""
        status = self._status(name)
        return None if status is None else status.st_mtime

    def open(self, name: str) -> BinaryIO:
        """A file to read."""
        return (self.folder / name).open("rb")

    def read_text(self, name: str) -> str:
        """A small file's text."""
        return (self.folder / name).read_text(encoding="utf-8")

    @contextmanager
    def published(self, name: str) -> Iterator[BinaryIO]:
        """A hidden neighbour that is synced to the disk and renamed."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with published(path, writer=f".{process_name()}") as file:
            yield file

    def publish_text(self, name: str, text: str) -> None:
        """Write a small file."""
        with self.published(name) as file:
            file.write(text.encode())

    def create(self, name: str, text: str) -> bool:
        """Write a small file unless there is one.

        A hard link is used, which all shared file systems make or refuse in one step, with the content in place.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f".{path.name}.{process_name()}-{threading.get_ident()}.tmp")
        try:
            mine.write_text(text, encoding="utf-8")
            os.link(mine, path)
        except FileExistsError:
            # NFS says so too if its first answer was lost, see open(2).
            return mine.stat().st_nlink == 2
        finally:
            mine.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """Remove a folder below."""
        folder = self.folder / name
        for attempt in range(REMOVE_ATTEMPTS):
            try:
                shutil.rmtree(folder)
                return
            except FileNotFoundError:  # another process may be removing it too
                if not folder.exists():
                    return
            except OSError as error:  # or still write into it
                if error.errno != errno.ENOTEMPTY or attempt == REMOVE_ATTEMPTS - 1:
                    raise

    def sync(self) -> None:
        """Sync the folder and its entry in the folder above."""
        sync_folder(self.folder)
        sync_folder(self.folder.parent)

    def _entries(self, folder: str, *, files: bool) -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() != files)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return (self.folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
