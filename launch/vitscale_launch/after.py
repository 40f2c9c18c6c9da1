"""``python -m vitscale_launch.after RUN CODE``: the batch script's last act, with the exit code of srun.

Finds out why the attempt ended, decides what follows, records both, and does it. Leaves with the code it was given.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from vitscale.errors import LaunchError, VitscaleError
from vitscale_launch import slurm
from vitscale_launch.attempts import (
    Attempt,
    errors_folder,
    last_recorded_step,
    newest_step,
    read_attempts,
    since_submission,
    write_attempt,
)
from vitscale_launch.batch_log import PREEMPTION, TIMEOUT, batch_log, read_from
from vitscale_launch.capacity import usable_nodes
from vitscale_launch.environment import ATTEMPT, LOG_OFFSET
from vitscale_launch.failures import Cause, Failure, explain, read_errors
from vitscale_launch.follow import (
    ENDING_SIGNALS,
    follow,
    later_jobs,
    read_patiently,
    say,
    undisturbed,
    wait_for_the_end,
)
from vitscale_launch.requests import cancel_requested
from vitscale_launch.restart import Action, Decision, Policy, Queue, decide
from vitscale_launch.submission import Submission

# SLURM may send its signal up to a minute early, and looks at time limits every half a minute.
EARLY_S = 90
# How a command may end that is told to make room; the other causes would come again.
_OF_PREEMPTION = {Cause.STOPPED, Cause.ERROR, Cause.KILLED, Cause.CONTACT, Cause.UNHEALTHY}


def end(submission: Submission, exit_code: int, environment: Mapping[str, str]) -> None:
    """Conclude the attempt that this batch script has begun."""
    attempt = _begun_attempt(submission, environment)
    log = batch_log(submission, environment)
    said = read_from(log, int(environment.get(LOG_OFFSET, "0")))
    errors = read_errors(errors_folder(submission.run, attempt.number))
    failure = explain(exit_code, errors, said, is_own=submission.array_task is None)
    conclude(submission, attempt, failure, exit_code, said=said)


def conclude(
    submission: Submission,
    attempt: Attempt,
    failure: Failure,
    exit_code: int,
    *,
    said: str = "",
) -> Decision:
    """Record how an attempt ended and do what follows. Does not return if the job was requeued."""
    with undisturbed():
        queue, failure = _look_at_queue(attempt, failure, said, submission.site.signal_delay_s)
        ended = finished_attempt(submission, attempt, failure, exit_code)
        policy = policy_of(submission, attempt.job)
        cancelled = cancel_requested(submission.run)
        decision = decide(
            failure, ended, _earlier(submission, attempt), policy, queue=queue, cancel_requested=cancelled
        )
        ended = record_decision(submission, ended, decision)
        try:
            follow(decision, submission, attempt.job, queue)
        except LaunchError as error:
            say(f"error: {error}")
            why = f"it could not be requeued: {error}"
            decision = replace(decision, action=Action.STOP, because=why)
            _record(submission, replace(ended, followed_by=decision.action.value, because=why))
        if decision.action is Action.REQUEUE:
            wait_for_the_end()
    return decision


def finished_attempt(submission: Submission, attempt: Attempt, failure: Failure, exit_code: int) -> Attempt:
    """The attempt with its end, but for what follows."""
    is_error = failure.cause not in (Cause.FINISHED, Cause.STOPPED)
    return replace(
        attempt,
        ended_unix_s=int(time.time()),
        exit_code=exit_code,
        ended_step=newest_step(submission.run),
        error=failure.signature if is_error else None,
        error_step=last_recorded_step(submission.run) if is_error else None,
    )


def record_decision(submission: Submission, ended: Attempt, decision: Decision) -> Attempt:
    """Write the end of an attempt, and say it."""
    ended = replace(
        ended,
        reason=decision.reason,
        followed_by=decision.action.value,
        because=decision.because,
        excluded=decision.exclude or ended.excluded,
    )
    _record(submission, ended)
    say(f"attempt {ended.number} ended ({decision.reason}); {decision.action.value}: {decision.because}")
    return ended


def _record(submission: Submission, attempt: Attempt) -> None:
    """What is decided counts for more than that it is written down."""
    try:
        write_attempt(submission.run, attempt)
    except (LaunchError, OSError) as error:
        say(f"error: the end of attempt {attempt.number} could not be recorded: {error}")


def _begun_attempt(submission: Submission, environment: Mapping[str, str]) -> Attempt:
    """The attempt of this job, as it was recorded, or else what is known of it here."""
    number = int(environment[ATTEMPT])
    try:
        found = next((each for each in read_attempts(submission.run) if each.number == number), None)
    except LaunchError as error:
        say(f"error: {error}")
        found = None
    return found or Attempt(
        number=number,
        job=environment["SLURM_JOB_ID"],
        restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST", ""),
        ranks=int(environment.get("SLURM_NTASKS", "1")),
        started_unix_s=int(time.time()),
        started_step=newest_step(submission.run),
    )


def _look_at_queue(attempt: Attempt, failure: Failure, said: str, signal_delay_s: int) -> tuple[Queue, Failure]:
    """What SLURM has done already, and the failure with what its state tells of it."""
    try:
        job = slurm.job(attempt.job)
    except LaunchError as error:
        say(f"{error}; taking the job for a running one")
        job = None
    queue = _queue(job, attempt.restart, failure, said)
    if failure.cause in _OF_PREEMPTION and _is_preempted(job, said):
        # It may have left with a code of its own, or have been stopped before it could listen.
        failure = Failure(Cause.STOPPED, "preempted")
    elif failure.signal == "SIGUSR2" and job is not None and (job.time_left_s or 0) > signal_delay_s + EARLY_S:
        # Some clusters send it at preemption, too.
        failure = replace(failure, signal=None)
    return queue, failure


def _is_preempted(job: slurm.SlurmJob | None, said: str) -> bool:
    return PREEMPTION in said or (job is not None and (job.is_preempted or job.state == "PREEMPTED"))


def _queue(job: slurm.SlurmJob | None, restart: int, failure: Failure, said: str) -> Queue:
    if job is None:
        return Queue.RUNNING
    if job.restarts > restart:
        return Queue.REQUEUED
    if job.state != "COMPLETING" and not job.has_ended:
        return Queue.RUNNING
    # SLURM has ended the job, and its state does not say why.
    if job.reason == "TimeLimit" or job.state == "TIMEOUT" or TIMEOUT in said:
        return Queue.TIMED_OUT
    if job.state in ("PREEMPTED", "NODE_FAIL") or PREEMPTION in said or failure.cause is Cause.NODE:
        return Queue.RUNNING
    return Queue.CANCELLED


def _earlier(submission: Submission, attempt: Attempt) -> list[Attempt]:
    try:
        attempts = since_submission(read_attempts(submission.run), submission.first_attempt)
    except LaunchError as error:
        say(f"error: {error}")
        return []
    return [each for each in attempts if each.number < attempt.number]


def policy_of(submission: Submission, job: str) -> Policy:
    """What the site and the submission allow to follow an attempt of a job."""
    return Policy(
        max_failures=submission.max_failures,
        requeue=submission.site.requeue,
        backoff_s=submission.site.backoff_s,
        spare_nodes=partial(_spare_nodes, submission),
        next_link=bool(later_jobs(submission, job)),
        leaves_checkpoints=submission.array_task is None,
    )


def _spare_nodes(submission: Submission) -> int | None:
    """How many of the nodes that would do the run can spare."""
    try:
        return usable_nodes(submission.site, slurm.partitions(), slurm.nodes()) - submission.nodes_min
    except LaunchError:
        return None  # nobody is left out for this reason alone


def main() -> None:
    """Entry point."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    code = int(sys.argv[2])
    try:
        end(read_patiently(Path(sys.argv[1])), code, os.environ)
    except (VitscaleError, OSError) as error:
        say(f"error: {error}")
        code = code or 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
