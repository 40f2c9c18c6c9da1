"""A request to stop, from the scheduler or the keyboard."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

# SLURM sends SIGTERM at preemption and, when asked, SIGUSR2 before the time limit; Ctrl-C sends SIGINT.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Notes stop signals for the length of a ``with`` block.

    The handler sets a flag and nothing else: a signal arrives anywhere, also within a collective operation,
    and may reach only some of the ranks. The loop adds up the flags and stops all ranks at one step.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
