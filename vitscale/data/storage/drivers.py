"""Object storage through fsspec: which package serves which URL, how it is opened, and what its errors mean.

Where the storage is and who asks comes from the environment, as the drivers read it: ``AWS_ENDPOINT_URL``,
``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE`` ... for s3fs, ``GOOGLE_APPLICATION_CREDENTIALS`` for gcsfs. Options of a driver's
constructor can be given in fsspec's configuration files.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitscale.errors import DataError

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Package to install by the protocol of a URL."""

# fsspec takes them for patterns and for chains of storages.
_REFUSED = ("*", "?", "[", "::")
# "s3:/" is what pathlib leaves of "s3://", "C:\\" a drive, "pipe:" WebDataset's way to name a command.
_NO_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\:]|pipe:")
# What may hold a password or a signature: "//USER:PASSWORD@" and "?QUERY".
_SECRETS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/'\"]*@)?(?P<rest>[^\s?'\"]*)(?:\?[^\s'\"]*)?")


def is_path(text: str) -> bool:
    """Whether a user means a path and not a URL or a command."""
    return _NO_PATH.match(text) is None


def without_secrets(text: str) -> str:
    """A text for messages: the URLs in it lose passwords and queries, which may be signatures."""
    return _SECRETS.sub(r"\g<scheme>\g<rest>", text)


def check_prefix(url: str) -> None:
    """See that a URL names a prefix in a bucket.

    Raises:
        DataError: it names no bucket, or holds what fsspec gives a meaning of its own.
    """
    protocol, _, path = url.partition("://")
    shown = without_secrets(url)
    if not path.strip("/") or path.startswith("/"):
        raise DataError(f"{shown}: names no bucket; write {protocol}://BUCKET/PREFIX")
    if any(text in path for text in _REFUSED):
        raise DataError(f"{shown}: holds one of {' '.join(_REFUSED)}; take a prefix without them")


def package_of(url: str) -> str | None:
    """The package that serves a URL, if it is one of those in :data:`PACKAGES`."""
    protocol, separator, _ = url.partition("://")
    return PACKAGES.get(protocol) if separator else None


def open_driver(url: str, **options: Any) -> tuple[Any, str]:
    """This process's driver for a URL, and what it calls the place. Its listings never come from its memory.

    Args:
        options: of the driver's constructor. They count more than those of fsspec's configuration.

    Raises:
        DataError: its package is not installed.
    """
    try:
        import fsspec

        driver, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        package = package_of(url) or str(error)
        raise DataError(f"{url}: the package {package} is missing; run: pip install {package}") from error
    return driver, path


def s3_options(**settings: Any) -> dict[str, Any]:
    """Options of s3fs's constructor that hold settings of botocore; the user's own, from fsspec's configuration, count
    more."""
    from fsspec.config import conf

    return {"config_kwargs": {**settings, **conf.get("s3", {}).get("config_kwargs", {})}}


@contextmanager
def os_errors(url: str) -> Iterator[None]:
    """Turn what a driver raises into OSError: each has families of errors of its own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise _os_error(error, url) from error


_ERRNOS: list[tuple[type[Exception], int]] = [
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (IsADirectoryError, errno.EISDIR),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
    (NotImplementedError, errno.ENOSYS),
    (Exception, errno.EIO),
]
NO_BUCKET = "there is no such bucket; create it or mend the URL"


def _os_error(error: Exception, url: str) -> OSError:
    """The same in one line that names the object."""
    number = error.errno if isinstance(error, OSError) else None
    number = number or next(number for kind, number in _ERRNOS if isinstance(error, kind))
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    kind = type(error).__name__
    if s3_code(error) == "NoSuchBucket":
        number, text = errno.ENXIO, NO_BUCKET
    elif number == errno.ENOENT:
        text = os.strerror(number)
    elif kind == "NoCredentialsError":
        number = errno.EACCES
        text = f"{text}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    elif kind in ("ParamValidationError", "NoRegionError"):
        number = errno.EINVAL
    return OSError(number, without_secrets(" ".join(text.split())), url)


def s3_code(error: BaseException | None) -> str | None:
    """S3's name of what went wrong, if s3fs tells it anywhere in the chain of causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            code: str | None = response.get("Error", {}).get("Code")
            return code
        error = error.__cause__
    return None
