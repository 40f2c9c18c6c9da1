"""Doing with SLURM what was decided, although its controller may be busy, and a disk may not answer for a while."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vitscale.errors import LaunchError
from vitscale.train.signals import STOP_SIGNALS
from vitscale_launch import slurm
from vitscale_launch.restart import Action, Decision, Queue
from vitscale_launch.submission import Submission, read_submission

ENDING_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
TRIES, BETWEEN_TRIES_S = 6, 10.0
# A job that was requeued is killed within seconds.
WAIT_FOR_THE_END_S = 300.0

T = TypeVar("T")


def follow(decision: Decision, submission: Submission, job: str, queue: Queue) -> None:
    """Do what follows an attempt.

    Args:
        decision: what.
        submission: of the run.
        job: that the attempt was of.
        queue: what SLURM has done already.

    Raises:
        LaunchError: SLURM does not do it.
    """
    if decision.action is Action.REQUEUE:
        if queue is not Queue.REQUEUED:
            patiently(lambda: slurm.requeue(job))
        _postpone(job, decision, submission)
    elif decision.action is Action.NEXT_LINK and (later := later_jobs(submission, job)):
        try:
            _postpone(later[0], decision, submission)
        except LaunchError as error:
            say(f"{error}; the next job of the chain starts at once, wherever SLURM likes")
    elif decision.action is Action.STOP and queue is Queue.REQUEUED:
        slurm.cancel(job)


def later_jobs(submission: Submission, job: str) -> tuple[str, ...]:
    """The jobs of a chain that come after this one."""
    jobs = submission.jobs
    return jobs[jobs.index(job) + 1 :] if job in jobs else ()


def patiently(act: Callable[[], T]) -> T:
    """Try again for a minute what fails for a passing reason: without this a run would end here.

    Raises:
        LaunchError: it failed to the end, or for another reason.
        OSError: the same.
    """
    for left in reversed(range(TRIES)):
        try:
            return act()
        except (LaunchError, OSError) as error:
            if not left or not is_passing(error):
                raise
            say(f"{error}; trying again")
            time.sleep(BETWEEN_TRIES_S)
    raise AssertionError("there is a last try")


def is_passing(error: Exception) -> bool:
    """Whether it may be otherwise in a minute: a disk or SLURM's controller did not answer. What is not there or has
    wrong content stays so."""
    cause = error.__context__ if isinstance(error, LaunchError) else error
    if isinstance(cause, FileNotFoundError):
        return False
    return cause is None or isinstance(cause, (OSError, subprocess.TimeoutExpired))


def read_patiently(run: Path) -> Submission:
    """What was submitted, from a disk that may not answer for a while.

    Raises:
        LaunchError: nothing was, or it cannot be read.
    """
    return patiently(lambda: read_submission(run))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal that asks to stop end this process meanwhile."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def wait_for_the_end() -> None:
    """Leaving now would race with SLURM, which takes a job whose script is over for a finished one."""
    # What it has sent to end this script takes effect now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    time.sleep(WAIT_FOR_THE_END_S)


def say(text: str) -> None:
    """Tell a person, in the log of the batch script."""
    sys.stderr.write(f"vitscale launch: {text}\n")
    sys.stderr.flush()


def _postpone(job: str, decision: Decision, submission: Submission) -> None:
    """Give a job that waits the pause and the nodes to leave out."""
    keys = {"StartTime": f"now+{decision.delay_s}"} if decision.delay_s else {}
    if decision.exclude:
        # What was asked for at the submission would be forgotten.
        keys["ExcNodeList"] = ",".join(dict.fromkeys([*submission.site.exclude, *decision.exclude]))
    if keys:
        # SLURM accepts it at once, and kills this script only then.
        patiently(lambda: slurm.update(job, **keys))
