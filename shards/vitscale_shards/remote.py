"""A shard set under a prefix in object storage (S3 and its kin, Google Cloud Storage), reached through fsspec.

Where the storage is and who asks comes from the environment; see :mod:`vitscale.data.storage.drivers`.

The drivers repeat requests that failed for a passing reason, so nothing here does. botocore makes 5 attempts
(``AWS_MAX_ATTEMPTS``) with growing pauses, and s3fs lets it do so 5 times for what promises to pass. They give up after
10 s if nobody listens at the address, after half a minute if the storage goes on asking for fewer requests, and if it
takes requests and never answers, after 7 minutes (half an hour for an upload).
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vitscale.data.storage.drivers import check_prefix, is_path, open_driver, os_errors, package_of, s3_code
from vitscale.errors import DataError
from vitscale_shards.place import LocalPlace, Place

REMOVE_ATTEMPTS = 3
# To ask for the size of more objects than this one by one takes longer than a listing.
FEW_OBJECTS = 20
READ_AHEAD_BYTES = 8 << 20
# S3's names for "there is one already" and "another caller is changing it at this moment".
_TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


def open_place(text: str | Path, *, scratch: Path | None = None) -> Place:
    """Where a user says that a shard set lies: a folder, or a prefix in object storage.

    Args:
        text: a path, or a URL such as ``s3://BUCKET/PREFIX``.
        scratch: for :class:`RemotePlace`.

    Raises:
        DataError: a URL of a kind that no set can lie at, or without a bucket.
    """
    text = str(text)
    if package_of(text):
        return RemotePlace(text, scratch=scratch)
    if text.startswith("file:///"):
        return LocalPlace(Path(text.removeprefix("file://")))
    if not is_path(text):
        raise DataError(f"{text}: no shard set can lie there; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    return LocalPlace(Path(text).expanduser())


class RemotePlace:
    """A prefix in a bucket. An object is seen there only when all of its bytes have arrived.

    It holds no connection, so that it can be pickled and used after a fork and in threads: fsspec keeps one driver for
    each process.
    """

    def __init__(self, url: str, *, scratch: Path | None = None) -> None:
        """Nothing is asked of the storage yet.

        Args:
            url: ``s3://BUCKET/PREFIX``, or another object storage that fsspec has a driver for.
            scratch: local folder for a file until its upload, with room for one file of each process; the system's
                folder for temporary files if None.

        Raises:
            DataError: the URL names no bucket, or holds what fsspec gives a meaning of its own.
        """
        check_prefix(url)
        self.url = url.rstrip("/")
        self.scratch = scratch

    def child(self, name: str) -> RemotePlace:
        """A prefix below."""
        return RemotePlace(f"{self.url}/{name}", scratch=self.scratch)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the objects."""
        return sorted(self._entries(folder, "file"))

    def folders(self) -> list[str]:
        """Sorted names of the prefixes that lead to an object."""
        return sorted(self._entries("", "directory"))

    def sizes(self, names: Collection[str]) -> dict[str, int]:
        """Bytes of those of the objects that are there; a listing tells many sizes in one request."""
        if len(names) > FEW_OBJECTS:
            return {name: size for name, size in self._entries("", "file").items() if name in names}
        return {name: size for name in names if (size := self.size(name)) is not None}

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None."""
        info = self._info(name)
        return int(info["size"]) if info is not None and info["type"] == "file" else None

    def modified(self, name: str) -> float | None:
        """Time of the last write by the storage's clock, or None. S3 keeps whole seconds."""
        with suppress(FileNotFoundError, IsADirectoryError), self._driver(name) as (driver, path):
            return float(driver.modified(path).timestamp())
        return None

    def open(self, name: str) -> BinaryIO:
        """An object to read. From S3, OSError is raised if it is replaced meanwhile."""
        with self._driver(name) as (driver, path):
            file = driver.open(path, "rb", block_size=READ_AHEAD_BYTES)
        return io.BufferedReader(_Reader(file, self._url(name)), buffer_size=128 << 10)

    def read_text(self, name: str) -> str:
        """A small object's text."""
        with self._driver(name) as (driver, path):
            # s3fs would ask for the size first.
            data: bytes = driver.cat_file(path, **({"max_concurrency": 1} if self._is_s3 else {}))
        return data.decode()

    @contextmanager
    def published(self, name: str) -> Iterator[BinaryIO]:
        """A local file without a name, uploaded when the block ends well. Nothing of it stays, even after a kill."""
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            yield file
            size = file.seek(0, os.SEEK_END)
            # On some systems, /dev/fd opens it at the position where this process is.
            file.seek(0)
            with self._driver(name) as (driver, path):
                driver.put_file(f"/dev/fd/{file.fileno()}", path, **self._upload_options(size))

    def publish_text(self, name: str, text: str) -> None:
        """Write a small object with one request."""
        with self._driver(name) as (driver, path):
            driver.pipe_file(path, text.encode())

    def create(self, name: str, text: str) -> bool:
        """Write a small object unless there is one.

        The storage decides (``If-None-Match: *`` on S3, ``ifGenerationMatch=0`` on Google). Where it refuses to, two
        callers at the same moment may both get True. A caller whose answer was lost on the way may get False for its
        own object.
        """
        try:
            with self._driver(name) as (driver, path):
                driver.pipe_file(path, text.encode(), mode="create")
            return True
        except OSError as error:
            if isinstance(error, FileExistsError) or s3_code(error) in _TAKEN:
                return False
            if error.errno != errno.ENOSYS:
                raise
        if self.size(name) is not None:
            return False
        self.publish_text(name, text)
        return True

    def remove(self, name: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError), self._driver(name) as (driver, path):
            driver.rm_file(path)

    def remove_folder(self, name: str) -> None:
        """Remove all objects below a prefix."""
        kept: set[str] = set()
        for _ in range(REMOVE_ATTEMPTS):
            paths = self._below(name)
            if not paths:
                return
            # Another process may be removing them too.
            with suppress(FileNotFoundError), self._driver(name) as (driver, _driver_path):
                driver.rm(sorted(paths))
            # s3fs passes over what it is not allowed to remove; what came meanwhile is removed in the next round.
            kept = paths & self._below(name)
        if kept:
            text = f"{len(kept)} objects could not be removed, such as {min(kept)}"
            raise PermissionError(errno.EACCES, text, self._url(name))

    def sync(self) -> None:
        """Nothing: what the storage has taken is durable."""

    def _entries(self, folder: str, kind: str) -> dict[str, int]:
        """Names and bytes."""
        # Asked to list a prefix without objects, s3fs would list all of its neighbours.
        if self._info(folder) is None:
            return {}
        with suppress(FileNotFoundError), self._driver(folder) as (driver, path):
            entries = driver.ls(path, detail=True)
            # An object "PREFIX/", with which some programs mark a folder, is left out.
            below = ((entry["name"].rstrip("/"), entry["size"]) for entry in entries if entry["type"] == kind)
            return {name.rpartition("/")[2]: int(size or 0) for name, size in below if name.startswith(f"{path}/")}
        return {}

    def _info(self, name: str) -> dict[str, Any] | None:
        with suppress(FileNotFoundError), self._driver(name) as (driver, path):
            info: dict[str, Any] = driver.info(path)
            return info
        return None

    def _below(self, name: str) -> set[str]:
        with suppress(FileNotFoundError), self._driver(name) as (driver, path):
            return {found for found in driver.find(path) if found.startswith(f"{path}/")}
        return set()

    @property
    def _is_s3(self) -> bool:
        return package_of(self.url) == "s3fs"

    def _upload_options(self, size: int) -> dict[str, int]:
        if not self._is_s3:
            return {}
        from vitscale_shards.s3 import upload_options

        return upload_options(size)

    def _driver_options(self) -> dict[str, Any]:
        if not self._is_s3:
            return {}
        from vitscale_shards.s3 import driver_options

        return driver_options()

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    @contextmanager
    def _driver(self, name: str) -> Iterator[tuple[Any, str]]:
        """The driver of this process, and what it calls an object."""
        with os_errors(self._url(name)):
            yield open_driver(self._url(name), **self._driver_options())


class _Reader(io.RawIOBase):
    """A driver's file, which raises OSError and nothing else."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with os_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
