"""Where each rank stands, on the shared disk, for whoever looks for the rank that hangs.

``RUN/heartbeat/rank-00003.json`` tells of rank 3: ``{"rank", "host", "unix_s", "step", "phase", "attempt"}``, where
``unix_s`` is when it came to that place. The loop only notes the place. A thread writes it, so that a slow disk keeps
no step waiting, and so that the last place of a rank that hangs is told although it does nothing any more.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from vitscale.durable import publish_text

T = TypeVar("T")
FOLDER = "heartbeat"
SECONDS_BETWEEN_WRITES = 10.0
# How long the end of a run waits for a last write.
PATIENCE_S = 2.0

logger = logging.getLogger(__name__)


class Phase(Enum):
    """What a rank is doing."""

    START = "start"
    """Building the model and its engine, looking for a checkpoint and reading it."""
    LOAD = "load"
    """Waiting for a batch."""
    TRAIN = "train"
    """Computing a step, or waiting for the other ranks in it."""
    EVALUATE = "evaluate"
    SAVE = "save"


class _Place(NamedTuple):
    phase: Phase
    step: int
    attempt: int | None
    since_unix_s: float


class Heartbeat:
    """Tells where one rank stands, from :meth:`begin` to the end of a ``with`` block. Never fails the run.

    A step's phases follow each other too fast to write each; what is written is the place of the moment, every
    ``SECONDS_BETWEEN_WRITES``, and at once when a longer phase begins or ends.

    Args:
        rank: whose place.
    """

    def __init__(self, rank: int) -> None:
        # The name under which SLURM knows the node, if it has one.
        self._rank, self._host = rank, os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self._place = _Place(Phase.START, 0, None, time.time())
        self._written: _Place | None = None
        self._warned = self._ended = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._wake.set()
        if self._thread:
            # A disk that hangs must not keep a rank from leaving.
            self._thread.join(PATIENCE_S)

    def begin(self, run: Path) -> None:
        """Write into this run folder from now on; it must be this attempt's to write to."""
        file = run / FOLDER / f"rank-{self._rank:05}.json"
        self._thread = threading.Thread(target=self._work, args=(file,), name="heartbeat", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int, attempt: int | None = None) -> None:
        """Note that this rank begins with a phase, after ``step`` finished steps.

        Args:
            phase: which.
            step: finished steps.
            attempt: number of the attempt, once it is known.
        """
        before = self._place
        self._place = _Place(phase, step, before.attempt if attempt is None else attempt, time.time())
        if phase is not before.phase and not {phase, before.phase} <= {Phase.LOAD, Phase.TRAIN}:
            self._wake.set()

    def loading(self, batches: Iterator[T], step: int) -> Iterator[T]:
        """The same batches; while the next one is waited for, the phase is ``load``, and ``train`` from then on."""
        while True:
            self.enter(Phase.LOAD, step)
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.enter(Phase.TRAIN, step)
            yield batch

    def _work(self, file: Path) -> None:
        while not self._ended:
            self._write(file)
            self._wake.wait(SECONDS_BETWEEN_WRITES)
            self._wake.clear()
        self._write(file)

    def _write(self, file: Path) -> None:
        place = self._place
        if place is self._written:
            return
        record = {
            "rank": self._rank,
            "host": self._host,
            "unix_s": round(place.since_unix_s, 3),
            "step": place.step,
            "phase": place.phase.value,
            "attempt": place.attempt,
        }
        try:
            file.parent.mkdir(exist_ok=True)
            publish_text(file, json.dumps(record) + "\n")
            self._written = place
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written: %s; the run goes on", file, error.strerror)
            self._warned = True


@dataclass(frozen=True)
class Beat:
    """What one rank has told last."""

    rank: int
    host: str
    unix_s: float
    step: int
    phase: str
    attempt: int | None


def read_beats(run: Path) -> list[Beat]:
    """What the ranks of a run have told last, by rank; also those of earlier attempts that had more ranks."""
    beats = (_read(path) for path in sorted((run / FOLDER).glob("rank-*.json")))
    return sorted(filter(None, beats), key=lambda beat: beat.rank)


def _read(path: Path) -> Beat | None:
    try:
        record = json.loads(path.read_bytes())
        return Beat(**{field.name: record[field.name] for field in fields(Beat)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is no heartbeat: %s", path, error)
        return None
