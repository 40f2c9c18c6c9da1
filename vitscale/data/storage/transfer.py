"""A range of a file on its way here: what has come, how long it may take, and what it has cost each host."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vitscale.config.schema import StorageConfig

# Full jitter, of which a storage that comes back gets the fewest requests at a time:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
# A generator of its own: pauses must not move anything that is seeded.
_draw = random.Random()


class Transfer:
    """A range of a file, as far as it has come. Whoever fetches it adds to it, in several attempts if need be.

    Args:
        start: first byte.
        length: number of bytes; None for all up to the end of the file.
        keep: whether the bytes are wanted, or only their number.
        sink: takes the bytes as they come, which are not held then.
    """

    def __init__(
        self, start: int, length: int | None, *, keep: bool = True, sink: Callable[[bytes], None] | None = None
    ) -> None:
        self.start, self.length = start, length
        self.position = start
        """The first byte that is still missing."""
        self.ended = False
        """Whether the file ends at :attr:`position` or before."""
        self.file_size: int | None = None
        """Bytes of the whole file, if that became known."""
        self.passed_over = 0
        """Bytes before the range that had to be fetched too."""
        self._keep, self._sink = keep, sink
        self._pieces: list[bytes] = []

    @property
    def missing(self) -> int | None:
        """Bytes that are still to come, if the range has an end."""
        return None if self.length is None else self.start + self.length - self.position

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return self.ended or self.missing == 0

    def add(self, piece: bytes) -> None:
        """Take the next bytes."""
        self.position += len(piece)
        if self._sink is not None:
            self._sink(piece)
        elif self._keep and piece:
            self._pieces.append(piece)

    def data(self) -> bytes:
        """All bytes that have come; without a copy if they came in one piece."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


class Patience:
    """How long one read may go on, all of its attempts together, and when the next one starts.

    Args:
        storage: the time limits.
        total_s: instead of ``storage.total_timeout_s``.
    """

    def __init__(self, storage: StorageConfig, *, total_s: float | None = None) -> None:
        self._storage = storage
        self._total_s = storage.total_timeout_s if total_s is None else min(total_s, storage.total_timeout_s)
        self._began = time.monotonic()
        self._failures = 0
        self.attempts = 0
        """That have started."""

    @property
    def waited_s(self) -> float:
        """Seconds since the read began."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """Whether there is no time left."""
        return self.waited_s >= self._total_s

    def next_deadline(self) -> float:
        """When the attempt that starts now has to be over, by the monotonic clock."""
        self.attempts += 1
        now = time.monotonic()
        return min(now + self._storage.request_timeout_s, self._began + self._total_s)

    def pause(self, *, progress: bool, at_least_s: float = 0.0) -> bool:
        """Wait before another attempt; False at once if there is no time left for one.

        Args:
            progress: whether bytes came with the last attempt.
            at_least_s: what the server asked for.
        """
        self._failures = 0 if progress else self._failures + 1
        seconds = at_least_s + _draw.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._failures))
        if self.waited_s + seconds >= self._total_s:
            return False
        time.sleep(seconds)
        return True


@dataclass
class HostCounters:
    """What this process has asked of a host so far."""

    requests: int = 0
    retries: int = 0
    """Requests that repeat or resume another one."""
    timeouts: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Failed requests by kind: a status such as "503", or the name of an exception."""
    bytes: int = 0
    """Bytes of files that came; those of requests that failed half-way too."""
    seconds: float = 0.0
    """Sum over all requests, also of those that ran at the same time."""

    @property
    def failures(self) -> int:
        """Failed requests of all kinds."""
        return sum(self.errors.values())

    def __add__(self, other: HostCounters) -> HostCounters:
        kinds = self.errors.keys() | other.errors.keys()
        return HostCounters(
            self.requests + other.requests,
            self.retries + other.retries,
            self.timeouts + other.timeouts,
            {kind: self.errors.get(kind, 0) + other.errors.get(kind, 0) for kind in sorted(kinds)},
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )

    def since(self, earlier: HostCounters) -> HostCounters:
        """What was added to an earlier copy."""
        errors = {kind: count - earlier.errors.get(kind, 0) for kind, count in self.errors.items()}
        return HostCounters(
            self.requests - earlier.requests,
            self.retries - earlier.retries,
            self.timeouts - earlier.timeouts,
            {kind: count for kind, count in errors.items() if count},
            self.bytes - earlier.bytes,
            self.seconds - earlier.seconds,
        )


_hosts: dict[str, HostCounters] = {}
_lock = threading.Lock()


def record_request(host: str, *, num_bytes: int, seconds: float, retry: bool, error: str | None, timeout: bool) -> None:
    """Count one request of this process."""
    with _lock:
        counters = _hosts.setdefault(host, HostCounters())
        counters.requests += 1
        counters.retries += retry
        counters.timeouts += timeout
        counters.bytes += num_bytes
        counters.seconds += seconds
        if error is not None:
            counters.errors[error] = counters.errors.get(error, 0) + 1


def host_counters() -> dict[str, HostCounters]:
    """What this process has asked of each host since it started: a copy, to keep or to subtract."""
    with _lock:
        return copy.deepcopy(_hosts)
