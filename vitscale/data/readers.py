"""Threads that read, and the windows that are open at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from vitscale.data.order import WindowId
from vitscale.data.stream import Fault, RawSample

Samples = list[RawSample | Fault]
T = TypeVar("T")


class Readers:
    """A few threads that do one read after another.

    Unlike those of ``concurrent.futures``, nobody waits for them: whoever closes a loader must not wait until a storage
    that does not answer is given up.
    """

    def __init__(self, threads: int) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._open: set[Future[Any]] = set()
        self._lock = Lock()
        self._stopped = False
        self._threads = threads
        for number in range(threads):
            Thread(target=self._work, daemon=True, name=f"read-{number}").start()

    def submit(self, read: Callable[[], T]) -> Future[T]:
        """Ask for a read."""
        future: Future[T] = Future()
        with self._lock:
            if self._stopped:
                future.cancel()
                return future
            self._open.add(future)
        self._asked.put((read, future))
        return future

    def stop(self) -> None:
        """Cancel what is asked for and let the threads end when they can."""
        with self._lock:
            self._stopped = True
            for future in self._open:
                future.cancel()
        for _ in range(self._threads):
            self._asked.put(None)

    def _work(self) -> None:
        # A thread that waits must not hold on to what it read last.
        while self._serve(self._asked.get()):
            pass

    def _serve(self, asked: tuple[Callable[[], Any], Future[Any]] | None) -> bool:
        """Do a read that is asked for. Returns whether to go on."""
        if asked is None:
            return False
        read, future = asked
        if self._stopped:
            return True
        result, error = None, None
        try:
            result = read()
        except Exception as caught:  # handed to whoever waits for the read
            error = caught
        with self._lock:
            self._open.discard(future)
            if future.cancelled():
                return True
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        return True


class OpenWindows:
    """The windows that a rank is walking through: of each lane the newest one. Batches keep older ones they need.

    From one epoch to the next a rank's slots may move to other lanes, so all windows of the old epoch are let go, of
    each set of a mixture in its own time.
    """

    def __init__(self, read: Callable[[WindowId], Future[Samples]]) -> None:
        self._read = read
        self._epochs: dict[int, int] = {}
        self._newest: dict[int, dict[int, tuple[WindowId, Future[Samples]]]] = {}

    def samples_of(self, window: WindowId) -> Future[Samples]:
        """The samples of a window, read or being read."""
        if self._epochs.get(window.part) != window.epoch:
            self._epochs[window.part] = window.epoch
            self._newest[window.part] = {}
        newest = self._newest[window.part]
        known = newest.get(window.lane)
        if known is None or known[0] != window:
            known = newest[window.lane] = (window, self._read(window))
        return known[1]
