"""Stop a submitted run for good: after a commit, unless there is no time for one, and with no requeue."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from vitscale.errors import LaunchError
from vitscale_launch import slurm
from vitscale_launch.activity import job_ids, local_process, own_jobs
from vitscale_launch.attempts import newest_step, read_attempts
from vitscale_launch.hints import launch_command
from vitscale_launch.requests import request_cancel
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.status import Status, ask_slurm, read_status
from vitscale_launch.submission import Submission, array_folder, read_submission

# SLURM's controller serves many users.
POLL_SLURM_S, POLL_PROCESS_S = 3.0, 0.5
# A request may come before there is a process to take it. Asking twice changes nothing.
ASK_AGAIN_S = 5.0
TELL_S = 30.0


def cancel_run(run: Path, *, now: bool, wait_s: float, say: Callable[[str], None]) -> None:
    """Ask a run to stop, and wait until it has.

    Args:
        run: the run folder, or that of an array.
        now: leave out the commit.
        wait_s: seconds to wait for the end; 0 to ask and leave.
        say: shows a line.

    Raises:
        LaunchError: it was never submitted, neither runs nor waits, or has not stopped in time.
    """
    submission = read_submission(run.absolute())
    status = read_status(run)
    if submission.executor == "slurm" and status.notes and not status.jobs:
        raise LaunchError(f"{run}: nothing was cancelled, for {status.notes[0]}")
    if not status.state.is_active:
        raise LaunchError(f"{run}: neither runs nor waits in the queue ({status.state.value}: {status.why}); leave it")
    if submission.executor == "debug":
        raise LaunchError(f"{run}: runs in a terminal, without SLURM; press Ctrl-C there")
    # Before the job hears of it: what runs at its end must know that nothing is to follow.
    _request(submission)
    is_slurm = submission.executor == "slurm"
    stop, poll_s = (_stop_slurm, POLL_SLURM_S) if is_slurm else (_stop_local, POLL_PROCESS_S)
    say(f"{_shown(submission, status)}: asked to stop {'at once' if now else 'after a commit'}")
    end, told = time.monotonic() + wait_s, time.monotonic()
    for left in stop(submission, now):
        if time.monotonic() >= end:
            if wait_s == 0:
                return
            raise LaunchError(
                f"{run}: has not stopped within {wait_s:.0f} s ({left}); wait longer with --wait, or do without the "
                f"commit: {launch_command('cancel', run, '--now')}"
            )
        if time.monotonic() - told >= TELL_S:
            say(f"waiting: {left}")
            told = time.monotonic()
        time.sleep(min(poll_s, max(0.0, end - time.monotonic())))
    say(_outcome(submission, run))


def _request(submission: Submission) -> None:
    try:
        request_cancel(submission.run)
    except OSError as error:
        raise LaunchError(
            f"{submission.folder}: cannot be written: {error.strerror}, so that a requeue could not be prevented; "
            f"ask the owner of the run, or use scancel"
        ) from error


def _stop_slurm(submission: Submission, now: bool) -> Iterator[str]:
    """Ask SLURM until no job is left; gives what it still waits for."""
    asked: dict[str, float] = {}
    ids = job_ids(submission, read_attempts(submission.run))
    while active := [job for job in own_jobs(submission, ids, ask_slurm) if not job.has_ended]:
        # What has ended stays so.
        ids = tuple(number for number in ids if any(number in job.numbers for job in active))
        # The newest first: what waits for the end of a job must not start meanwhile.
        for job in reversed(active):
            key = _key(job, submission.array_task)
            if time.monotonic() - asked.get(key, -ASK_AGAIN_S) < ASK_AGAIN_S:
                continue
            asked[key] = time.monotonic()
            if job.is_waiting:
                # Of an array, the number of the tasks that wait is also that of those that run.
                slurm.cancel(key, state="PENDING")
            elif job.state != "COMPLETING":
                slurm.cancel(key, signal=None if now else signal.SIGUSR2.name.removeprefix("SIG"))
        yield ", ".join(f"job {_key(job, submission.array_task)} is {job.state.lower()}" for job in active)


def _key(job: SlurmJob, task: int | None) -> str:
    """What scancel takes: for ``task`` only that one. Tasks of an array that wait together are one record."""
    if job.array_task is None:
        return job.job_id
    if task is None and not job.array_task.isdecimal():
        return job.job_id
    return f"{job.array_job}_{job.array_task if task is None else task}"


def _stop_local(submission: Submission, now: bool) -> Iterator[str]:
    """Ask the process until it has ended; gives what it still waits for."""
    asked = -ASK_AGAIN_S
    while (process := local_process(submission)) and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() - asked >= ASK_AGAIN_S:
            asked = time.monotonic()
            with suppress(psutil.NoSuchProcess):
                if now:
                    # The process that watches the ranks ends with them.
                    for child in process.children():
                        child.kill()
                else:
                    process.terminate()
        yield f"process {process.pid} is running"


def _shown(submission: Submission, status: Status) -> str:
    active = [job.job_id for job in status.jobs if not job.has_ended]
    return f"job {', '.join(active)}" if active else f"process {submission.jobs[-1]}"


def _outcome(submission: Submission, run: Path) -> str:
    again = launch_command("resume", run if submission.array_task is None else array_folder(submission.run))
    if submission.array_tasks is not None:
        return f"stopped; go on with: {again}"
    step = newest_step(run)
    if step is None:
        return f"stopped; nothing is committed; begin again with: {again}"
    return f"stopped; committed is step {step:,}; go on with: {again}"
