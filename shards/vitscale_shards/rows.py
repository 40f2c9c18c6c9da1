"""What a dataset is to the planner and the writer: rows to list, and images to read one at a time.

Implement :class:`Source` to shard a dataset of another kind; shards/README.md has an example of 30 lines.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Protocol

MAX_KEY_CHARS = 90  # a USTAR name holds 100 bytes: key, dot, extension
MAX_IMAGE_BYTES = 1 << 30  # encoded
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


class BadImageError(Exception):
    """One image cannot go into a shard; the message is the reason. The writer has a budget of these."""


class Row(NamedTuple):
    """One image, without its bytes."""

    key: str
    """Name in the tar: unique in the source, of ``A-Z a-z 0-9 _ -``, at most 90 characters (see :func:`image_key`)."""

    labels: tuple[int, ...]
    """Positions in the source's ``classes``; exactly one unless the source is ``multi_label``."""

    path: str
    """Where the source finds the image, in the source's own words. Users read it in messages and reports."""

    num_bytes: int = 0
    """Size of the encoded image if it is known without reading it, else 0. Another size later means that the source
    has changed since; it is also what ``--bytes-per-shard`` counts."""


class Source(Protocol):
    """A dataset that can be sharded. Workers in other processes open the same source again and only ``read``."""

    @property
    def name(self) -> str:
        """Short description that goes into the index; the same on every machine."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, or None if only numbers are known; a label is a position in this tuple."""

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of labels, not exactly one."""

    @property
    def ignored(self) -> Counter[str]:
        """What was left aside while listing, and how often; complete when ``rows`` has ended."""

    def rows(self) -> Iterator[Row]:
        """Every image once, always in the same order, in memory that does not grow with their number.

        Raises:
            DataError: the source is empty, unreadable or contradicts itself; one line with the place and the cure.
        """

    def read(self, row: Row) -> bytes:
        """The encoded image, as it lies in the source. Called in any order, from several processes.

        Raises:
            BadImageError: it cannot be read.
        """


def image_key(path: str) -> str:
    """Key of the image at ``path`` (relative, with forward slashes): no dot, no slash, at most 90 characters.

    A path that cannot be kept as it is gets a piece of its hash, so that two of them do not fall together.
    """
    stem = path.rpartition(".")[0] if "." in path.rpartition("/")[2] else path
    raw = "__".join(stem.split("/"))
    safe = _NOT_IN_KEYS.sub("_", raw)
    if safe == raw and len(raw) <= MAX_KEY_CHARS:
        return raw
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{safe[: MAX_KEY_CHARS - 17]}_{digest}"
