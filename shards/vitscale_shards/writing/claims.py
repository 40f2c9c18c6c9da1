"""Who writes which shard: claims as small files in ``.progress``, without a server.

A worker claims a shard by creating a file, which of several workers one alone can do. It also renews a sign of life;
the claim of a worker that has died is void. Claims only keep work from being done twice: a shard's bytes are given by
the plan and it takes its name in one step, so that two workers on one shard would do no harm.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from types import TracebackType
from typing import Any

import psutil

from vitscale_shards.place import Place
from vitscale_shards.writing.records import PROGRESS

BEAT_S = 10.0
# Longer than network file systems keep the times of files (60 s by default on NFS), and some missed beats.
DEAD_AFTER_S = 120.0


class Claims:
    """The claims of one worker in one set; a context in which the worker gives signs of life."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.worker = uuid.uuid4().hex[:12]
        self._sign = f"{PROGRESS}/{self.worker}.alive"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._place.remove(self._sign)

    def take(self, name: str) -> bool:
        """Claim ``name`` unless a living worker has it."""
        path = f"{PROGRESS}/{name}.claim"
        if self._place.create(path, self._text()):
            return True
        text = self._read(path)
        if text is None:  # given back just now: the next round gets it
            return False
        holder = json.loads(text)
        if holder["worker"] == self.worker:  # the storage's answer to the first request was lost
            return True
        return not self._lives(holder) and self._take_over(name, text, holder["claim"])

    def release(self, name: str) -> None:
        """Give ``name`` back, unless it went to another because this worker was taken for dead."""
        path = f"{PROGRESS}/{name}.claim"
        text = self._read(path)
        if text is not None and json.loads(text)["worker"] == self.worker:
            self._place.remove(path)

    def _take_over(self, name: str, text: str, claim: str) -> bool:
        """Replace a void claim. The right to do so is claimed too: else two workers that see the same void claim could
        both replace it, the second removing the first one's."""
        path, right = f"{PROGRESS}/{name}.claim", f"{name}.{claim}"
        if not self.take(right):
            return False
        try:
            if self._read(path) != text:
                return False
            self._place.remove(path)
            return self._place.create(path, self._text())
        finally:
            self.release(right)

    def _text(self) -> str:
        return json.dumps({"worker": self.worker, "claim": uuid.uuid4().hex[:12], **_process()})

    def _read(self, path: str) -> str | None:
        try:
            return self._place.read_text(path)
        except FileNotFoundError:
            return None

    def _lives(self, holder: dict[str, Any]) -> bool:
        sign = self._place.modified(f"{PROGRESS}/{holder['worker']}.alive")
        if sign is None:  # it has left; perhaps it was interrupted before it could give back
            return False
        if holder["machine"] == _machine():
            return _runs(holder["pid"], holder["started"])
        now = self._place.modified(self._sign)
        # Both times are the storage's, so clocks of nodes play no part.
        return now is None or now - sign < DEAD_AFTER_S

    def _beat(self) -> None:
        self._place.publish_text(self._sign, "")

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._beat()
            except OSError:
                # A full disk ends the work with a message of its own. Without signs of life the claims lapse.
                continue


def _process() -> dict[str, str | int | float]:
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _machine() -> str:
    """This system since its start, and this container on it: where a process number means something."""
    with open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 5 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
