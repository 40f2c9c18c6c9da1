"""What a run is doing, in a word and a sentence: decided from what SLURM and the run folder tell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum

from vitscale.errors import Interrupted
from vitscale_launch.attempts import CANCELLED, Attempt
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.table import clock, duration

# What is decided at the end of an attempt that another one follows.
COMES_BACK = ("requeue", "next link")


class State(Enum):
    """What a run is doing. The first two go on by themselves."""

    RUNNING = "running"
    WAITING = "waiting"
    FINISHED = "finished"
    STOPPED = "stopped"
    """It ended in an orderly way, and nothing will start it again."""
    FAILED = "failed"
    """It ended otherwise, and nothing will start it again."""
    NEW = "new"
    """It was never started."""

    @property
    def is_active(self) -> bool:
        """Whether it runs, or will without being asked."""
        return self in (State.RUNNING, State.WAITING)


def judge(
    jobs: Sequence[SlurmJob],
    attempts: Sequence[Attempt],
    *,
    finished: bool,
    is_alive: bool,
    asked: bool = True,
    cancelled: bool = False,
) -> tuple[State, str]:
    """What a run is doing, and why one thinks so.

    Args:
        jobs: of the run, that SLURM knows.
        attempts: of the run, oldest first.
        finished: whether its last step is committed.
        is_alive: whether its folder tells that it is being trained.
        asked: whether SLURM has answered.
        cancelled: whether the user has asked for an end.
    """
    active = [job for job in jobs if not job.has_ended]
    at_work = next((job for job in active if not job.is_waiting), None)
    if at_work:
        verb = "is ending" if at_work.state == "COMPLETING" else f"is {at_work.state.lower()}"
        where = f" on {at_work.node_list}" if at_work.node_list else ""
        return State.RUNNING, f"job {at_work.job_id} {verb}{where}{_times(at_work)}"
    if is_alive:
        where = f" on {attempts[-1].nodes}" if attempts else ""
        return State.RUNNING, f"it is being trained{where}, not by a job that SLURM knows"
    if finished:
        return (
            State.FINISHED,
            "all steps are done" if not active else "all steps are done; what waits will leave at once",
        )
    if active:
        return State.WAITING, _waiting(active[0])
    if not attempts:
        if not jobs:
            return State.NEW, "it was not started, and SLURM knows no job of it"
        last = jobs[-1]
        state = State.STOPPED if last.state == "CANCELLED" else State.FAILED
        return state, f"job {last.job_id} ended before its first attempt began: {_end_of(last)}"
    if not asked and attempts[-1].followed_by in COMES_BACK:
        return State.WAITING, f"attempt {attempts[-1].number} ended: {attempts[-1].reason}; it went back to the queue"
    return _ended(attempts[-1], jobs, cancelled=cancelled)


def _ended(last: Attempt, jobs: Sequence[SlurmJob], *, cancelled: bool) -> tuple[State, str]:
    told = f"attempt {last.number} ended: {last.reason}" if last.reason else f"attempt {last.number} has ended"
    if last.ended_unix_s is None and cancelled:
        return State.STOPPED, f"attempt {last.number} was cancelled and told of no end, as when it is killed at once"
    if last.ended_unix_s is None:
        of_slurm = f"; SLURM says {_end_of(jobs[-1])}" if jobs else ""
        return State.FAILED, f"attempt {last.number} told of no end, as when its node is lost or it is killed{of_slurm}"
    if last.because and last.reason != CANCELLED:
        told += f"; {last.because}"
    if last.followed_by in COMES_BACK:
        return State.FAILED, f"{told}; but SLURM knows no job of it any more"
    if last.exit_code == Interrupted.exit_code or (last.reason or "").startswith("cancelled"):
        return State.STOPPED, told
    return State.FAILED, told


def _waiting(job: SlurmJob) -> str:
    reason = f" ({job.reason})" if job.reason else ""
    start = ""
    if job.started_unix_s and job.started_unix_s > time.time():
        start = f", expected to start at {clock(job.started_unix_s)}"
    return f"job {job.job_id} waits in {job.partition}{reason}{start}"


def _times(job: SlurmJob) -> str:
    since = f", since {duration(time.time() - job.started_unix_s)}" if job.started_unix_s else ""
    left = "" if job.time_left_s is None else f", {duration(job.time_left_s)} to its time limit"
    return since + left


def _end_of(job: SlurmJob) -> str:
    code = "" if job.exit_code is None else f", exit code {job.exit_code}"
    reason = f", {job.reason}" if job.reason else ""
    return f"{job.state}{reason}{code}"
