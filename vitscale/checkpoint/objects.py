"""Checkpoints on object storage: S3, or Google Cloud Storage, through fsspec.

URL/
    step-000001000/manifest.json           written last, in one request: from then on it is a checkpoint
    step-000001000/rank-00000.safetensors  under its final name at once, since nothing can be renamed
    step-000002000/damaged-manifest.json   was found changed: not taken any more; its files stay
    latest                                 name of the newest complete checkpoint, for people and scripts

Reads go over vitscale.data.storage.fetch, everything else over the driver. All requests but the parts of an upload to
Google, which gcsfs repeats, are tried again for as long as a read is, with jitter.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from vitscale.checkpoint.folder import DAMAGED, LATEST, MANIFEST
from vitscale.checkpoint.format import step_name, step_of
from vitscale.config.schema import StorageConfig
from vitscale.data.storage.drivers import (
    check_prefix,
    open_driver,
    os_errors,
    package_of,
    s3_options,
    without_secrets,
)
from vitscale.data.storage.fetch import open_files
from vitscale.data.storage.transfer import Patience
from vitscale.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# S3 takes 10,000 parts: a rank's file may have 312 GiB. About three parts are in memory at a time.
PART_BYTES = 32 << 20
# Seconds for one request, and for all attempts at it.
STORAGE = StorageConfig(request_timeout_s=60, total_timeout_s=240)
CONNECT_S = 10
# A request that has not succeeded by then is told of.
TELL_AFTER_S = 15.0
# Written and removed at the start of a run.
PROBE = ".write-test"

_STEPS = step_name(0).rstrip("0")
# Errors after which another attempt is of no use.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL, errno.EEXIST, errno.ENOSYS}


class ObjectFolder:
    """The checkpoints under a prefix of a bucket. Safe to use from several threads.

    A name is a checkpoint if and only if its manifest is there. So a process that is killed at any moment leaves
    either the complete checkpoint or objects that nobody takes for one, which the next start removes. At that time the
    run's lock keeps all other attempts out, so nothing of what is removed is still being written.

    Args:
        url: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``. The drivers take credentials from the environment.

    Raises:
        ConfigError: the URL holds credentials.
        DataError: the URL names no bucket, or the driver's package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.location = without_secrets(url).rstrip("/")
        if without_secrets(url) != url:
            raise ConfigError(
                f"checkpoint.folder: {self.location}: is given with a password or a query; leave it out, and let the "
                f"environment say who asks (AWS_PROFILE, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS)"
            )
        check_prefix(url)
        self._on_s3 = package_of(url) == "s3fs"
        options = s3_options(
            retries={"total_max_attempts": 1}, connect_timeout=CONNECT_S, read_timeout=STORAGE.request_timeout_s
        )
        self._driver, root = open_driver(self.location, **(options if self._on_s3 else {}))
        if self._on_s3:
            # Requests are repeated here and nowhere else, so that the time has an end that is known.
            self._driver.retries = 1
        self._root = root.rstrip("/")
        self._files = open_files(self.location, STORAGE)
        self._listed: tuple[str, dict[str, int]] = ("", {})
        """The checkpoint whose manifest was read last, with the sizes of its files."""

    def __reduce__(self) -> tuple[type[ObjectFolder], tuple[str]]:
        """Connections stay where they are; the rank that gets a checkpoint opens its own."""
        return ObjectFolder, (self._url,)

    def names(self) -> list[str]:
        """Names of the prefixes that have a manifest."""
        return [name for name, files in self._list(_STEPS).items() if MANIFEST in files]

    def read_manifest(self, name: str) -> bytes | None:
        """The manifest of a checkpoint; None if there is none."""
        # One request for the sizes of all files that will be asked for next, instead of one each.
        self._listed = (name, self._sizes(name))
        try:
            with _reading():
                return self._files.read_all(f"{name}/{MANIFEST}")
        except FileNotFoundError:
            return None

    def file_size(self, name: str, file: str) -> int | None:
        """Bytes of a file of a checkpoint, when its manifest was read; None if it was not there."""
        listed, sizes = self._listed
        return (sizes if listed == name else self._sizes(name)).get(file)

    def read(self, name: str, file: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end."""
        with _reading():
            return self._files.read(f"{name}/{file}", start, length)

    def stage(self, name: str) -> None:
        """Remove what an earlier attempt left under this name, so that the prefix is empty."""
        files = self._sizes(name)
        if DAMAGED + MANIFEST in files:
            logger.warning("%s/%s was set aside as damaged; it is written anew", self.location, name)
        self._delete(files, name)

    def write(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Upload a file in parts. It is there with its full size when this returns; if not, nothing of it is."""
        key, size = f"{name}/{file}", 0

        def counted() -> Iterator[bytearray]:
            nonlocal size
            for part in _parts(blocks):
                yield part
                size += len(part)

        try:
            (self._upload_to_s3 if self._on_s3 else self._upload)(key, counted())
        except FileNotFoundError as error:
            # Completed already, if the answer to that got lost and it was asked for once more.
            if self._size(key) != size:
                text = "the upload is gone; see that no lifecycle rule or other program ends uploads"
                raise OSError(errno.ESTALE, text, self._shown(key)) from error
        if (arrived := self._size(key)) != size:
            raise OSError(errno.ECONNABORTED, f"{arrived} of {size} bytes arrived", self._shown(key))

    def publish(self, name: str, manifest: bytes) -> None:
        """Make a checkpoint visible, by one request."""
        self._put(f"{name}/{MANIFEST}", manifest)

    def discard(self, name: str) -> None:
        """Remove what was staged, as far as that is possible. What has its manifest is complete, and stays."""
        with self._as_far_as_possible(name):
            files = self._sizes(name)
            if MANIFEST not in files:
                self._delete(files, name)

    def point_latest(self, name: str | None) -> None:
        """Let ``latest`` name a checkpoint."""
        if name is None:
            self._delete([LATEST])
        else:
            self._put(LATEST, f"{name}\n".encode())

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first."""
        with self._as_far_as_possible(name):
            others = [file for file in self._sizes(name) if file != MANIFEST]
            self._delete([MANIFEST, *others], name)

    def set_aside(self, name: str, prefix: str) -> str:
        """Rename the manifest of a checkpoint, so that it is not taken any more. Returns where it is now.

        Its files stay where they are until a checkpoint of the same step is written.
        """
        aside = f"{name}/{prefix}{MANIFEST}"
        self._put(aside, self.read_manifest(name) or b"")
        self._delete([MANIFEST], name)
        return aside

    def remove_left_overs(self) -> None:
        """Remove what dead attempts have uploaded, and see that this one can write: now, not at the first save."""
        self._put(PROBE, b"")
        with self._as_far_as_possible("what dead attempts left"):
            self._delete([PROBE])
            for name, files in self._list(_STEPS).items():
                # One that was set aside has a manifest too, by another name.
                if step_of(name) is not None and not any(file.endswith(MANIFEST) for file in files):
                    self._delete(files, name)
            if self._on_s3:
                self._abort_uploads()

    def _upload_to_s3(self, key: str, parts: Iterable[bytearray]) -> None:
        bucket, path, _ = self._driver.split_path(self._path(key))

        def call(method: str, **more: Any) -> dict[str, Any]:
            answer: dict[str, Any] = self._driver.call_s3(method, Bucket=bucket, Key=path, **more)
            return answer

        upload = self._tried(key, lambda: call("create_multipart_upload"))["UploadId"]
        done: list[dict[str, Any]] = []
        try:
            for number, part in enumerate(parts, start=1):
                sent = self._tried(key, lambda: call("upload_part", UploadId=upload, PartNumber=number, Body=part))  # noqa: B023 (called at once)
                done.append({"PartNumber": number, "ETag": sent["ETag"]})
            self._tried(
                key, lambda: call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": done})
            )
        except BaseException:
            # The next start does it if this cannot.
            with self._as_far_as_possible(key), suppress(FileNotFoundError), os_errors(self._shown(key)):
                call("abort_multipart_upload", UploadId=upload)
            raise

    def _upload(self, key: str, parts: Iterable[bytearray]) -> None:
        """By the driver's own means, as Google knows them. What is not completed is forgotten by the storage."""
        with os_errors(self._shown(key)):
            upload = self._driver.open(self._path(key), "wb", block_size=PART_BYTES)
        try:
            for part in parts:
                with os_errors(self._shown(key)):
                    upload.write(part)
            with os_errors(self._shown(key)):
                upload.close()
        except BaseException:
            with self._as_far_as_possible(key), os_errors(self._shown(key)):
                upload.discard()
            # Or its finalizer would complete it.
            upload.closed = True
            raise

    def _abort_uploads(self) -> None:
        """Parts of uploads that nobody will complete: they are invisible, but have their price."""
        bucket, prefix, _ = self._driver.split_path(self._path(_STEPS))
        # At most 1,000; more go with the next start.
        page = self._tried("", lambda: self._driver.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
        for upload in page.get("Uploads", []):
            with suppress(FileNotFoundError):
                self._tried("", lambda: self._driver.abort_mpu(bucket, upload["Key"], upload["UploadId"]))  # noqa: B023 (called at once)

    def _list(self, prefix: str) -> dict[str, dict[str, int]]:
        """Sizes of the files by the names of the checkpoints, of all keys that start with ``prefix``."""
        found = self._tried("", lambda: self._driver.find(self._root, prefix=prefix, detail=True))
        listed: dict[str, dict[str, int]] = {}
        for path, info in found.items():
            name, _, file = path.removeprefix(f"{self._root}/").partition("/")
            if file:
                listed.setdefault(name, {})[file] = int(info["size"])
        return listed

    def _sizes(self, name: str) -> dict[str, int]:
        return self._list(f"{name}/").get(name, {})

    def _size(self, key: str) -> int | None:
        try:
            return int(self._tried(key, lambda: self._driver.info(self._path(key)))["size"])
        except FileNotFoundError:
            return None

    def _put(self, key: str, data: bytes) -> None:
        self._tried(key, lambda: self._driver.pipe_file(self._path(key), data))

    def _delete(self, files: Iterable[str], name: str = "") -> None:
        """One after the other: not all storages that speak S3 know how to remove many at a time."""
        for file in files:
            key = f"{name}/{file}" if name else file
            with suppress(FileNotFoundError):
                self._tried(key, lambda: self._driver.rm_file(self._path(key)))  # noqa: B023 (called at once)

    def _tried(self, key: str, request: Callable[[], T]) -> T:
        """What a request gives that may be repeated: until it succeeds, cannot succeed, or the time is up."""
        patience, told = Patience(STORAGE), False
        while True:
            try:
                with os_errors(self._shown(key)):
                    return request()
            except OSError as error:
                if error.errno in _FINAL:
                    raise
                if not patience.pause(progress=False):
                    text = f"given up after {patience.waited_s:.0f} s: {error.strerror}"
                    raise OSError(errno.ETIMEDOUT, text, self._shown(key)) from error
                if not told and patience.waited_s > TELL_AFTER_S:
                    told = True
                    logger.warning(
                        "%s: no success for %.0f s (%s); it is tried for %g s",
                        self._shown(key),
                        patience.waited_s,
                        error.strerror,
                        STORAGE.total_timeout_s,
                    )

    @contextmanager
    def _as_far_as_possible(self, key: str) -> Iterator[None]:
        """For what the next start does again."""
        try:
            yield
        except OSError as error:
            logger.warning("%s cannot be removed yet: %s", self._shown(key), error.strerror)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _shown(self, key: str) -> str:
        return f"{self.location}/{key}" if key else self.location


@contextmanager
def _reading() -> Iterator[None]:
    """What is out of reach is not damaged, of which EIO would be the sign."""
    try:
        yield
    except DataError as error:
        cause = error.__cause__
        text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        raise OSError(errno.ETIMEDOUT, text) from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise OSError(errno.ETIMEDOUT, error.strerror, error.filename) from error


def _parts(blocks: Iterable[memoryview]) -> Iterator[bytearray]:
    """The same bytes in pieces of one size, the last of which may be shorter, and at least one."""
    part, count = bytearray(), 0
    for block in blocks:
        while block:
            taken = block[: PART_BYTES - len(part)]
            part += taken
            block = block[len(taken) :]
            if len(part) == PART_BYTES:
                yield part
                part, count = bytearray(), count + 1
    if part or not count:
        yield part
