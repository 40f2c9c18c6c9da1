"""The files of a shard set that lies elsewhere: http(s), S3, Google Cloud Storage, the output of a command. No torch.

Every read is tried again until it succeeds, the storage says that it never will, or the time is up; what has come stays
and only the rest is asked for again. Then the storage is looked at once more: if it serves other files, this one is at
fault; if not, no sample is to blame and the run has to stop.

For S3 and Google, the drivers of fsspec say where an object is and sign the request. ranges.py reads it, so nothing of
theirs tries again or waits behind our back.
"""

from __future__ import annotations

import errno
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread

from vitscale.config.schema import StorageConfig
from vitscale.data.manifest import INDEX_NAME
from vitscale.data.storage.drivers import (
    check_prefix,
    is_path,
    open_driver,
    os_errors,
    package_of,
    s3_options,
    without_secrets,
)
from vitscale.data.storage.files import PROBE_S, GivenUp, LocalFiles, ShardFiles, StorageSilentError
from vitscale.data.storage.pipe import Pipe
from vitscale.data.storage.ranges import HttpClient, HttpError, basic_authorization, host_of, quote_name, split_url
from vitscale.data.storage.transfer import Patience, Transfer, record_request
from vitscale.errors import DataError

logger = logging.getLogger(__name__)

Fetch = Callable[[str, Transfer, float], None]
"""One attempt at what is missing of a range of the named file, to be over at a time of the monotonic clock."""
Address = Callable[[str], tuple[str, dict[str, str]]]
"""URL and headers for the named file."""

# A signed URL serves so long for further requests, and is good for so long: clocks differ.
SIGN_AGAIN_S = 60.0
SIGNED_S = 3600
SIGNED_URLS = 4096
# A read that has not succeeded by then is told of.
TELL_AFTER_S = 15.0
# Of a file that is read in parts, pieces that wait to be taken.
PARTS_AHEAD = 64
# Errors after which another attempt is of no use.
_FINAL = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL}


def open_files(location: str, storage: StorageConfig) -> ShardFiles:
    """Where the bytes of a shard set come from. Nothing is asked of the storage yet.

    Args:
        location: a folder, ``file:///FOLDER``, ``http://``, ``https://``, ``s3://`` or ``gs://``, or ``pipe:COMMAND``
            with ``{name}`` in the command.
        storage: how it is read.

    Raises:
        DataError: no set can lie there, the driver's package is missing, or commands are not allowed.
    """
    shown = without_secrets(location)
    if location.startswith("file:///"):
        return LocalFiles(Path(location.removeprefix("file://")), timeout_s=storage.total_timeout_s)
    if location.startswith("pipe:"):
        if not storage.allow_pipe:
            raise DataError(
                f"{shown}: running a command is not allowed; set data.storage.allow_pipe=true if the command is yours"
            )
        command = location.removeprefix("pipe:")
        return RemoteFiles(shown, Pipe(command), storage, host=f"pipe:{command.split()[0]}")
    if location.startswith(("http://", "https://")):
        return _http_files(location.rstrip("/"), storage)
    if package_of(location):
        check_prefix(location)
        return _object_files(location.rstrip("/"), storage)
    if is_path(location):
        return LocalFiles(Path(location), timeout_s=storage.total_timeout_s)
    raise DataError(
        f"{shown}: no shard set can be read there; give a folder, file:///FOLDER, https://HOST/PATH, "
        f"s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or pipe:COMMAND"
    )


class RemoteFiles:
    """The files of a shard set that are fetched over a network, or by a command.

    Args:
        location: of the set, for messages: without passwords and signatures.
        fetch: one attempt at a range.
        storage: the time limits.
        host: under which the requests are counted.
    """

    reads_cheaply = False

    def __init__(self, location: str, fetch: Fetch, storage: StorageConfig, *, host: str) -> None:
        self.location = location
        self._fetch, self._storage, self._host = fetch, storage, host
        # Another file than the index may be the only one that is known to be there.
        self._readable = INDEX_NAME
        self._knows_ranges = True
        self._given_up = GivenUp()

    def read(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: the storage refuses this file, and not others.
            OSError: it could not be read in ``total_timeout_s``, though others can.
            StorageSilentError: the storage as a whole does not answer, or refuses everything.
        """
        return self._complete(name, Transfer(start, length)).data()

    def read_all(self, name: str) -> bytes:
        """All bytes of a file; raises like :meth:`read`."""
        return self._complete(name, Transfer(0, None)).data()

    def parts(self, name: str) -> Iterator[bytes]:
        """All bytes of a file as they come, a few at a time; raises like :meth:`read`."""
        arrived: Queue[bytes | Exception | None] = Queue(PARTS_AHEAD)
        left = Event()

        def hand_on(part: bytes | Exception | None) -> None:
            while not left.is_set():
                with suppress(Full):
                    return arrived.put(part, timeout=0.1)
            raise _LeftError

        def run() -> None:
            with suppress(_LeftError):
                try:
                    self._complete(name, Transfer(0, None, sink=hand_on))
                except (OSError, DataError) as error:
                    hand_on(error)
                else:
                    hand_on(None)

        Thread(target=run, daemon=True, name="parts").start()
        try:
            while (part := arrived.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            left.set()

    def size(self, name: str) -> int | None:
        """Bytes of a file, or ``None`` if it is not there; raises like :meth:`read`.

        One request for one byte, whose answer tells the size. A command tells nothing of the kind, and does not say why
        it failed: its whole output is counted, and a missing file is an OSError.
        """
        try:
            size = self._complete(name, Transfer(0, 1)).file_size
            if size is None:
                size = self._complete(name, Transfer(0, None, keep=False)).position
        except FileNotFoundError:
            return None
        return size

    def _complete(self, name: str, transfer: Transfer) -> Transfer:
        patience, told = Patience(self._storage, total_s=self._given_up.limit_s(name)), False
        last: OSError | None = None
        while not transfer.complete:
            position, retry = transfer.position, patience.attempts > 0
            error = self._attempt(name, transfer, patience.next_deadline(), retry=retry)
            if error is None:
                continue
            if isinstance(error, TimeoutError) and patience.is_over:
                # There was little time for this attempt; the one before says more.
                error = last or error
            last = error
            pause_s = error.retry_after_s if isinstance(error, HttpError) else 0.0
            progress = transfer.position > position
            if not _may_pass(error) or not patience.pause(progress=progress, at_least_s=pause_s):
                raise self._verdict(name, error, patience.waited_s)
            if not told and patience.waited_s > TELL_AFTER_S:
                told = True
                logger.warning(
                    "%s/%s: not read for %.0f s (%s); it is tried for %g s",
                    self.location,
                    name,
                    patience.waited_s,
                    self._reason(error),
                    self._storage.total_timeout_s,
                )
        if transfer.passed_over and self._knows_ranges:
            self._knows_ranges = False
            logger.warning(
                "%s: the server knows no ranges, so every read fetches a file from its start; take another server, or "
                "copy the set",
                self.location,
            )
        if patience.attempts:
            self._readable = name
            self._given_up.forgive(name)
        return transfer

    def _attempt(self, name: str, transfer: Transfer, deadline: float, *, retry: bool) -> OSError | None:
        """One request, counted. Returns what went wrong."""
        began, position = time.monotonic(), transfer.position
        error: OSError | None = None
        try:
            self._fetch(name, transfer, deadline)
            if transfer.position == position and not transfer.complete:
                error = OSError(errno.EIO, "an answer without bytes")
        except OSError as caught:
            error = caught
        record_request(
            self._host,
            num_bytes=transfer.position - position,
            seconds=time.monotonic() - began,
            retry=retry,
            error=None if error is None else _kind(error),
            timeout=isinstance(error, TimeoutError),
        )
        if isinstance(error, ssl.SSLCertVerificationError):
            raise StorageSilentError(
                f"{self.location}: the server's certificate is not accepted ({error.verify_message}); mend the URL, or "
                f"name a file with the certificate of its authority in SSL_CERT_FILE"
            ) from error
        return error

    def _verdict(self, name: str, error: OSError, waited_s: float) -> Exception:
        """What to raise in the end: is it the file, or the storage?"""
        reason = self._reason(error)
        if _may_pass(error):
            reason = f"given up after {waited_s:.0f} s: {reason}"
            self._given_up.note(name)
        number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EIO
        fault = OSError(number, reason, f"{self.location}/{name}")
        fault.__cause__ = error
        if fault.errno == errno.ENOENT:
            return fault
        other = self._readable if self._readable != name else INDEX_NAME
        if name == INDEX_NAME:
            # Before anything else is known to be there, it stands for the storage.
            trouble: OSError | None = error if _may_pass(error) else None
        else:
            trouble = self._probe(other)
        if trouble is None or trouble.errno == errno.ENOENT:
            return fault
        return self._silence(trouble, waited_s)

    def _probe(self, name: str) -> OSError | None:
        """Why the storage does not give out one byte of another file now, if it does not."""
        deadline = time.monotonic() + min(self._storage.request_timeout_s, PROBE_S)
        return self._attempt(name, Transfer(0, 1), deadline, retry=False)

    def _silence(self, trouble: OSError, waited_s: float) -> StorageSilentError:
        if _may_pass(trouble):
            text = (
                f"no file could be read for {waited_s:.0f} s ({self._reason(trouble)}); see that the storage is up and "
                f"the network leads to it"
            )
        else:
            text = f"the storage refuses ({self._reason(trouble)}); see that it is there, and to your rights"
        silence = StorageSilentError(f"{self.location}: {text}; then give the same command again")
        silence.__cause__ = trouble
        return silence

    def _reason(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"no whole answer in {self._storage.request_timeout_s:g} s"
        return error.strerror or str(error) or type(error).__name__


class _LeftError(Exception):
    """Nobody waits for more parts."""


def _may_pass(error: OSError) -> bool:
    """Whether another attempt may go better."""
    return error.passing if isinstance(error, HttpError) else error.errno not in _FINAL


def _kind(error: OSError) -> str:
    status = error.status if isinstance(error, HttpError) else None
    return type(error).__name__ if status is None else str(status)


def _http_files(url: str, storage: StorageConfig) -> RemoteFiles:
    shown = without_secrets(url)
    try:
        parts = split_url(url)
    except ValueError as error:
        raise DataError(f"{shown}: {error}; write http://HOST/PATH or https://HOST/PATH") from None
    login = basic_authorization(parts)
    headers = {} if login is None else {"Authorization": login}
    folder = parts._replace(netloc=host_of(parts), path=parts.path.rstrip("/"))

    def address(name: str) -> tuple[str, dict[str, str]]:
        return folder._replace(path=f"{folder.path}/{quote_name(name)}").geturl(), headers

    return RemoteFiles(shown.rstrip("/"), _over_http(address), storage, host=host_of(parts))


def _object_files(url: str, storage: StorageConfig) -> RemoteFiles:
    on_s3 = package_of(url) == "s3fs"
    try:
        with os_errors(url):
            driver, path = open_driver(url, **(s3_options(signature_version="s3v4") if on_s3 else {}))
    except OSError as error:
        raise DataError(
            f"{url}: cannot be opened ({error.strerror}); see to your rights and the driver's settings"
        ) from error

    # Some ten requests of each signature are enough: to sign takes a millisecond under the interpreter's lock.
    @lru_cache(maxsize=SIGNED_URLS)
    def signed(name: str, age: int) -> str:
        key = f"{path}/{name}"
        url_of_key: str = driver.sign(key, SIGNED_S, timeout=storage.request_timeout_s, **driver.req_kw)
        return url_of_key

    payer = {"x-amz-request-payer": "requester"} if on_s3 and driver.req_kw else {}

    def address(name: str) -> tuple[str, dict[str, str]]:
        try:
            with os_errors(f"{url}/{name}"):
                if on_s3:
                    return signed(name, int(time.monotonic() / SIGN_AGAIN_S)), payer
                headers: dict[str, str] = {}
                driver.credentials.apply(headers)
                return driver.url(f"{path}/{name}"), headers
        except FileNotFoundError as error:
            # Nothing was asked of the storage: what is missing is a file of the credentials.
            raise PermissionError(errno.EACCES, f"no credentials: {error.__cause__}") from error

    return RemoteFiles(url, _over_http(address), storage, host="/".join(url.split("/")[:3]))


def _over_http(address: Address) -> Fetch:
    client = HttpClient()

    def fetch(name: str, transfer: Transfer, deadline: float) -> None:
        url, headers = address(name)
        client.get(url, headers, transfer, deadline)

    return fetch
