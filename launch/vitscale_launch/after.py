"""``python -m vitscale_launch.after RUN CODE``: the batch script's last act, with the exit code of srun.

Finds out why the attempt ended, decides what follows, records both, and does it. Leaves with the code it was given.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from vitscale_launch.environment import ATTEMPT, LOG_OFFSET
from vitscale_launch.failures import Cause, Failure, explain, read_errors
from vitscale_launch.restart import Action, Decision, Policy, Queue, decide
from vitscale_launch.submission import Submission, read_submission

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
# SLURM may send its signal up to a minute early, and looks at time limits every half a minute.
EARLY_S = 90
TRIES, BETWEEN_TRIES_S = 6, 10.0
# A job that was requeued is killed within seconds.
WAIT_FOR_THE_END_S = 300.0


def end(submission: Submission, exit_code: int, environment: Mapping[str, str]) -> None:
    """Conclude the attempt that this batch script has begun."""
    number = int(environment[ATTEMPT])
    attempt = next(each for each in read_attempts(submission.run) if each.number == number)
    log = batch_log(submission, environment)
    said = read_from(log, int(environment.get(LOG_OFFSET, "0")))
    failure = explain(exit_code, read_errors(errors_folder(submission.run, number)), said)
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
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        queue, failure = _look_at_queue(attempt, failure, said, submission.site.signal_delay_s)
        ended = finished_attempt(submission, attempt, failure, exit_code)
        decision = decide(
            failure,
            ended,
            _earlier(submission, attempt),
            _policy(submission),
            queue=queue,
            cancel_requested=(submission.run / "launch" / "requests" / "cancel").exists(),
        )
        ended = record_decision(submission, ended, decision)
        try:
            _follow(decision, attempt.job, queue, submission.site.exclude)
        except LaunchError as error:
            _say(f"error: {error}")
            why = f"it could not be requeued: {error}"
            decision = replace(decision, action=Action.STOP, because=why)
            write_attempt(submission.run, replace(ended, followed_by=decision.action.value, because=why))
        if decision.action is Action.REQUEUE:
            _wait_for_the_end()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
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
    write_attempt(submission.run, ended)
    _say(f"attempt {ended.number} ended ({decision.reason}); {decision.action.value}: {decision.because}")
    return ended


def _look_at_queue(attempt: Attempt, failure: Failure, said: str, signal_delay_s: int) -> tuple[Queue, Failure]:
    """What SLURM has done already, and the failure with what its state tells of it."""
    try:
        job = slurm.job(attempt.job)
    except LaunchError as error:
        _say(f"{error}; taking the job for a running one")
        job = None
    queue = _queue(job, attempt.restart, failure, said)
    if failure.signal == "SIGUSR2" and job is not None and (job.time_left_s or 0) > signal_delay_s + EARLY_S:
        # Some clusters send it at preemption, too.
        failure = replace(failure, signal=None)
    return queue, failure


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
    attempts = since_submission(read_attempts(submission.run), submission.submitted_unix_s)
    return [each for each in attempts if each.number < attempt.number]


def _policy(submission: Submission) -> Policy:
    site = submission.site
    return Policy(submission.max_failures, site.requeue, site.backoff_s, _spare_nodes(submission))


def _spare_nodes(submission: Submission) -> int | None:
    """How many nodes of the partition the run can do without."""
    site = submission.site
    try:
        partition = site.partition or next((p.name for p in slurm.partitions() if p.is_default), None)
        nodes = [node for node in slurm.nodes() if partition in node.partitions and node.name not in site.exclude]
    except LaunchError:
        return None  # nobody is left out for this reason alone
    up = [node for node in nodes if not any(word in node.state for word in ("DOWN", "DRAIN", "FAIL", "*"))]
    return len(up) - submission.nodes_min


def _follow(decision: Decision, job: str, queue: Queue, never: Sequence[str]) -> None:
    if decision.action is Action.REQUEUE:
        if queue is not Queue.REQUEUED:
            _patiently(lambda: slurm.requeue(job))
        keys = {"StartTime": f"now+{decision.delay_s}"} if decision.delay_s else {}
        if decision.exclude:
            # What was asked for at the submission would be forgotten.
            keys["ExcNodeList"] = ",".join(dict.fromkeys([*never, *decision.exclude]))
        if keys:
            # SLURM accepts it at once, and kills this script only then.
            _patiently(lambda: slurm.update(job, **keys))
    elif decision.action is Action.STOP and queue is Queue.REQUEUED:
        slurm.cancel(job)


def _patiently(act: Callable[[], object]) -> None:
    """The controller may be busy or restarting, and without this the run would end here."""
    for left in reversed(range(TRIES)):
        try:
            act()
            return
        except LaunchError as error:
            if not left:
                raise
            _say(f"{error}; trying again")
            time.sleep(BETWEEN_TRIES_S)


def _wait_for_the_end() -> None:
    """Leaving now would race with SLURM, which takes a job whose script is over for a finished one."""
    # What it has sent to end this script takes effect now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    time.sleep(WAIT_FOR_THE_END_S)


def _say(text: str) -> None:
    sys.stderr.write(f"vitscale launch: {text}\n")
    sys.stderr.flush()


def main() -> None:
    """Entry point."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    code = int(sys.argv[2])
    try:
        end(read_submission(Path(sys.argv[1])), code, os.environ)
    except VitscaleError as error:
        _say(f"error: {error}")
        code = code or error.exit_code
    raise SystemExit(code)


if __name__ == "__main__":
    main()
