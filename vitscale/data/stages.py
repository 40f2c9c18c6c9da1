"""Where the time of a loader's threads goes, and which stage keeps the model waiting."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

Stage = Literal["read", "decode", "augment", "hand_over"]


@dataclass(frozen=True)
class StageSeconds:
    """Seconds by stage, summed over threads."""

    read: float = 0.0
    """Decoding threads waited for a window."""
    decode: float = 0.0
    """From encoded bytes to pixels."""
    augment: float = 0.0
    """Crop, resize and mirror into the batch."""
    hand_over: float = 0.0
    """From filled slots to the tensors of a batch; the model's own thread does it."""

    def __add__(self, other: StageSeconds) -> StageSeconds:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return StageSeconds(*(mine + theirs for mine, theirs in pairs))

    def shares(self, *, threads: int, seconds: float) -> dict[Stage, float]:
        """What each stage took of ``seconds`` of ``threads`` decoding threads, or of the model's own thread."""
        of_threads = threads * seconds
        return {
            "read": self.read / of_threads,
            "decode": self.decode / of_threads,
            "augment": self.augment / of_threads,
            "hand_over": self.hand_over / seconds,
        }

    def binding(self, *, threads: int) -> Stage:
        """The stage that took the most."""
        shares = self.shares(threads=threads, seconds=1.0)
        return max(shares, key=lambda stage: shares[stage])


class StageClock:
    """Adds up one thread's time by stage."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {"read": 0.0, "decode": 0.0, "augment": 0.0, "hand_over": 0.0}
        self._last = time.perf_counter()

    def lap(self, stage: Stage) -> None:
        """What passed since the last call was spent in ``stage``."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    @property
    def seconds(self) -> StageSeconds:
        """The sums."""
        return StageSeconds(**self._seconds)
