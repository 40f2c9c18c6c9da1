"""Several processes that write the same sets. They share nothing but the folder: others may join on other nodes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from vitscale.errors import DataError, Interrupted, VitscaleError
from vitscale_shards.place import Place
from vitscale_shards.planning.plan import Plan
from vitscale_shards.rows import Source
from vitscale_shards.sources import SourceSpec
from vitscale_shards.writing.writer import Tally, write_set

POLL_S = 0.2
# For a worker that is asked to end, to remove what it has half-written.
GRACE_S = 5.0


Report = Callable[[str, int, int], None]
"""Told the split that is being written, how many of its images are done, and how many there are."""


def write_sets(
    plans: Sequence[Plan],
    spec: SourceSpec,
    *,
    workers: int = 1,
    max_failures: int = 0,
    report: Report = lambda split, done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Write what is missing of the sets, one after the other, with a number of local processes.

    Args:
        max_failures: bad images of each set to leave out before giving up.
        report: is told often how far it is.
        warn: is told of workers that were killed.

    Raises:
        DataError: a worker gave up, or all were killed.
        Interrupted: on SIGTERM or Ctrl-C; finished shards are kept.
    """
    with _stoppable():
        if workers == 1:
            write_here(plans, spec.open(), max_failures=max_failures, report=report)
        else:
            _Crew(plans, spec, workers, max_failures).run(report, warn)


def write_here(plans: Sequence[Plan], source: Source, *, max_failures: int, report: Report) -> None:
    """Write sets in this process."""
    for plan in plans:

        def tell(tally: Tally, plan: Plan = plan) -> None:
            report(plan.head.split, tally.finished + tally.current, plan.num_samples)

        write_set(plan, source, max_failures=max_failures, tell=tell)


class _Crew:
    """The processes, seen from the one that starts them."""

    def __init__(self, plans: Sequence[Plan], spec: SourceSpec, workers: int, max_failures: int) -> None:
        self._plans = plans
        self._spec = spec
        self._max_failures = max_failures
        self._context = multiprocessing.get_context("spawn")
        # For each worker: number of the set it is at, rows of finished shards, rows of its own unfinished one.
        self._counts: Any = self._context.RawArray("q", 3 * workers)
        self._workers = workers
        self._processes: list[SpawnProcess] = []
        self._messages: list[Connection] = []
        self._at = 0

    def run(self, report: Report, warn: Callable[[str], None]) -> None:
        """Start them, and wait for the work to be done."""
        killed = 0
        try:
            for number in range(self._workers):
                self._start(number)
            running = set(range(self._workers))
            while running:
                wait([self._processes[number].sentinel for number in running], timeout=POLL_S)
                self._report(report)
                for number in sorted(running):
                    process = self._processes[number]
                    ended = not process.is_alive()  # before the look at its last words: it ends after them
                    if message := _last_words(self._messages[number]):
                        raise DataError(message)
                    if ended:
                        running.remove(number)
                    if ended and process.exitcode:
                        killed += 1
                        self._counts[3 * number + 2] = 0  # what it had begun is begun anew
                        warn(f"{process.name} ended with exit code {process.exitcode}; the others take over its shard")
        finally:
            self._end()
        if killed == self._workers:
            raise DataError(
                f"all {killed} workers were killed (exit code {self._processes[0].exitcode}; -9 often means: out of "
                f"memory); finished shards are kept: give the same command again, with fewer --workers"
            )
        self._report(report)

    def _start(self, number: int) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        places = [plan.place for plan in self._plans]
        arguments = (number, places, self._spec, self._max_failures, self._counts, sender)
        process = self._context.Process(target=_worker_main, args=arguments, name=f"worker {number}", daemon=True)
        with _without_ctrl_c():
            process.start()
        sender.close()
        self._processes.append(process)
        self._messages.append(receiver)

    def _end(self) -> None:
        """End those that still run, gently at first: they remove what they have half-written."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()

    def _report(self, report: Report) -> None:
        counts = [self._counts[i : i + 3] for i in range(0, len(self._counts), 3)]
        at = max(number for number, _, _ in counts)
        for plan in self._plans[self._at : at]:  # a worker goes on to the next set when one is complete
            report(plan.head.split, plan.num_samples, plan.num_samples)
        self._at = at
        here = [(finished, current) for number, finished, current in counts if number == at]
        plan = self._plans[at]
        done = max(finished for finished, _ in here) + sum(current for _, current in here)
        report(plan.head.split, min(done, plan.num_samples), plan.num_samples)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is started in here does not hear of Ctrl-C: the parent does, and ends its workers.

    A worker could not see to that itself before it has imported much.
    """
    resource_tracker.ensure_running()  # to start that would end what is begun here
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _last_words(messages: Connection) -> str:
    """What a worker said before it ended: empty if it did its work, or was killed."""
    with suppress(EOFError):
        if messages.poll():
            return str(messages.recv())
    return ""


def _worker_main(
    number: int, places: Sequence[Place], spec: SourceSpec, max_failures: int, counts: Any, messages: Connection
) -> None:
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        source = spec.open()
        for at, place in enumerate(places):

            def tell(tally: Tally, at: int = at) -> None:
                counts[3 * number : 3 * number + 3] = [at, tally.finished, tally.current]

            write_set(Plan(place), source, max_failures=max_failures, tell=tell)
    except VitscaleError as error:
        messages.send(str(error))
        raise SystemExit(error.exit_code) from error
    except Exception:
        messages.send(f"a worker failed, which is a bug in vitscale or in the source:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    """End when the parent has died: nobody would see what becomes of the work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGTERM (a scheduler's) and SIGINT (Ctrl-C) into Interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"stopped on {name}; finished shards are kept and the same command goes on")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
