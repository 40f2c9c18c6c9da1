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

    Whoever starts a rank may block the signals until this is ready for them: one that is pending is noted at once.
    They are blocked again afterwards, so that a late one does not kill a rank that leaves in good order.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._mask: set[signal.Signals] = set()

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        self._mask = set(map(signal.Signals, signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._mask & set(STOP_SIGNALS))
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
