"""``python -m vitscale_launch.before RUN``: the batch script's first act. Prints shell that the script evaluates.

Records that an attempt begins (and what became of one that was killed), checks the nodes if the site wants it,
chooses those that are used, and exports what srun and the ranks need. What the shell says is ``exit`` if the attempt
must not start.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vitscale.errors import LaunchError, VitscaleError
from vitscale_launch import slurm
from vitscale_launch.after import conclude, policy_of
from vitscale_launch.allocation import Allocation, choose_nodes
from vitscale_launch.attempts import (
    CRASHED,
    LOST,
    PREEMPTED,
    TIME_LIMIT,
    Attempt,
    errors_folder,
    last_recorded_step,
    newest_step,
    read_attempts,
    since_submission,
    write_attempt,
)
from vitscale_launch.batch_log import NODE_FAILURE, PREEMPTION, TIMEOUT, batch_log, read_end, size_of
from vitscale_launch.environment import ATTEMPT, ERRORS, LOG_OFFSET, as_shell, shared_environment
from vitscale_launch.failures import STOPPED_ON_REQUEST, Cause, Failure, explain, read_errors
from vitscale_launch.follow import follow, is_passing, patiently, read_patiently, say, undisturbed, wait_for_the_end
from vitscale_launch.health import CheckInterrupted, check_job
from vitscale_launch.requests import cancel_requested
from vitscale_launch.restart import MAX_FRUITLESS, Action, Decision, Queue, delay_after, fruitless, worn_out
from vitscale_launch.submission import Submission

# Of bad nodes; the others are counted.
MAX_NAMED = 8


@dataclass(frozen=True)
class Begun:
    """An attempt that was recorded, and its nodes."""

    attempt: Attempt
    allocation: Allocation
    wrong: LaunchError | None = None
    """Why it cannot go on with these nodes."""


def prepare(submission: Submission, environment: Mapping[str, str]) -> str:
    """Begin an attempt of the job that this batch script belongs to. Returns shell.

    What goes wrong here ends the attempt as a crash would, so that another one follows.
    """
    try:
        begun = patiently(lambda: _begin_or_leave(submission, environment))
    except (LaunchError, OSError) as error:
        say(f"error: {error}")
        if is_passing(error):
            come_back(submission, environment)
        return "exit 1\n"
    if isinstance(begun, str):
        return begun
    attempt, code = begun.attempt, 1
    try:
        shell = _equip(submission, begun, environment)
        if isinstance(shell, str):
            return shell
        failure = shell
    except CheckInterrupted as error:
        failure, code = Failure(Cause.STOPPED, str(error), signal="SIGTERM"), STOPPED_ON_REQUEST
    except (LaunchError, OSError) as error:
        say(f"error: {error}")
        cause = Cause.CONTACT if begun.wrong is None else Cause.CONFIGURATION
        failure = Failure(cause, f"could not start: {error}")
    if failure.cause is Cause.STOPPED:
        code = STOPPED_ON_REQUEST
    conclude(submission, attempt, failure, code)
    return f"exit {code}\n"


def _begin_or_leave(submission: Submission, environment: Mapping[str, str]) -> Begun | str:
    """Record that an attempt begins. Returns shell where none may."""
    job, restart = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    allocated = tuple(slurm.host_names(environment["SLURM_JOB_NODELIST"]))
    attempts = _close(submission, batch_log(submission, environment))
    earlier = since_submission(attempts, submission.first_attempt)
    if (leave := _no_need(submission, earlier, job)) is not None:
        return leave
    micro_batches = None
    if submission.global_batch_size and submission.micro_batch_size:
        micro_batches = submission.global_batch_size // submission.micro_batch_size
    wrong = None
    try:
        allocation = choose_nodes(
            allocated,
            nodes_min=submission.nodes_min,
            nodes_max=submission.nodes_max,
            ranks_per_node=submission.ranks_per_node,
            micro_batches=micro_batches,
        )
    except LaunchError as error:
        allocation, wrong = Allocation(allocated, submission.ranks_per_node), error
    return Begun(begin(submission, attempts, job=job, restart=restart, allocation=allocation), allocation, wrong)


def _equip(submission: Submission, begun: Begun, environment: Mapping[str, str]) -> str | Failure:
    """Shell with what srun and the ranks need, or why they must not start."""
    if begun.wrong is not None:
        raise begun.wrong
    allocation = begun.allocation
    variables = shared_environment(submission.site, allocation, environment, node_address=_node_address)
    variables |= attempt_variables(submission, begun.attempt)
    variables[LOG_OFFSET] = str(size_of(batch_log(submission, environment)))
    if allocation.spared:
        count = len(allocation.nodes) + len(allocation.spared)
        say(f"{len(allocation.spared)} of {count} nodes stay idle: the batch cannot be shared by their ranks")
    if submission.health_check and (bad := check_job(submission, allocation, {**environment, **variables})):
        failure = unhealthy(bad, allocation)
        say(f"the health check failed: {failure.text}")
        return failure
    if cancel_requested(submission.run):
        # Nobody would send the ranks another signal.
        return Failure(Cause.STOPPED, "cancelled before it began")
    return as_shell(variables)


def unhealthy(bad: Mapping[str, str], allocation: Allocation) -> Failure:
    """The failure of a health check. Where every one of several nodes fails, none is to blame."""
    rows = [f"{node}: {problem}" for node, problem in sorted(bad.items())]
    rows = rows if len(rows) <= MAX_NAMED else [*rows[:MAX_NAMED], f"and {len(rows) - MAX_NAMED} more"]
    all_alike = len(bad) == len(allocation.nodes) > 1
    return Failure(Cause.UNHEALTHY, "; ".join(rows), () if all_alike else tuple(sorted(bad)))


def come_back(submission: Submission, environment: Mapping[str, str]) -> None:
    """Requeue a job whose attempt could not even be recorded. Does not return if it was requeued."""
    job, restart = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    try:
        recorded = [attempt.restart for attempt in read_attempts(submission.run) if attempt.job == job]
        in_vain, most = restart - max(recorded, default=-1), submission.max_failures
    except LaunchError:
        in_vain, most = restart + 1, MAX_FRUITLESS
    if not submission.site.requeue or in_vain >= most:
        say(f"start {in_vain} in a row failed; go on with: vitscale launch resume {shlex.quote(str(submission.run))}")
        return
    delay = delay_after(in_vain, policy_of(submission, job))
    decision = Decision(Action.REQUEUE, "", "it could not start", delay)
    say(f"tried again after {delay} s")
    with undisturbed():
        try:
            follow(decision, submission, job, Queue.RUNNING)
        except LaunchError as error:
            say(f"error: it could not be requeued: {error}")
            return
        wait_for_the_end()


def begin(
    submission: Submission, attempts: list[Attempt], *, job: str, restart: int, allocation: Allocation
) -> Attempt:
    """Record that an attempt begins."""
    earlier = since_submission(attempts, submission.first_attempt)
    attempt = Attempt(
        number=attempts[-1].number + 1 if attempts else 1,
        job=job,
        restart=restart,
        nodes=",".join(allocation.nodes),
        ranks=allocation.ranks,
        started_unix_s=int(time.time()),
        started_step=newest_step(submission.run),
        excluded=earlier[-1].excluded if earlier else (),
    )
    write_attempt(submission.run, attempt)
    return attempt


def attempt_variables(submission: Submission, attempt: Attempt) -> dict[str, str]:
    """What tells the ranks which attempt they are of."""
    return {ATTEMPT: str(attempt.number), ERRORS: str(errors_folder(submission.run, attempt.number))}


def _close(submission: Submission, log: Path | None) -> list[Attempt]:
    """All attempts, after writing the end of one that could not write it."""
    attempts = read_attempts(submission.run)
    if not attempts or attempts[-1].reason is not None:
        return attempts
    last = replace(attempts[-1], ended_step=newest_step(submission.run), followed_by=Action.REQUEUE.value)
    said = read_end(log)
    reason = LOST + "its batch script was killed before it could record the end"
    for words, meaning in ((PREEMPTION, PREEMPTED), (TIMEOUT, TIME_LIMIT), (NODE_FAILURE, LOST + "node failure")):
        if words in said:
            reason = meaning
    errors = read_errors(errors_folder(submission.run, last.number))
    if errors and NODE_FAILURE not in said:
        failure = explain(1, errors, "", is_own=submission.array_task is None)
        if failure.cause is Cause.STOPPED:
            reason = TIME_LIMIT if failure.signal == "SIGUSR2" else PREEMPTED
        elif failure.cause is Cause.CONTACT:
            reason = LOST + failure.text
        else:
            reason = CRASHED + failure.text
            last = replace(last, error=failure.signature, error_step=last_recorded_step(submission.run))
    last = replace(last, reason=reason)
    write_attempt(submission.run, last)
    return [*attempts[:-1], last]


def _no_need(submission: Submission, earlier: list[Attempt], job: str) -> str | None:
    """Shell that leaves at once, where this attempt must not be."""
    if cancel_requested(submission.run):
        say("the run was cancelled; nothing is started")
        return f"exit {STOPPED_ON_REQUEST}\n"
    last = earlier[-1] if earlier else None
    if last is not None and last.followed_by == Action.FINISH.value:
        say("the run is finished; nothing is left to do")
        return "exit 0\n"
    # The same job starts again only if somebody has told SLURM so.
    if last is not None and last.followed_by == Action.STOP.value and last.job != job:
        say(f"the run was stopped ({last.reason}: {last.because}); nothing is started")
        return "exit 1\n"
    policy = policy_of(submission, job)
    if (why := worn_out(fruitless(earlier, policy), policy)) is not None:
        write_attempt(submission.run, replace(earlier[-1], followed_by=Action.STOP.value, because=why))
        say(why)
        return "exit 1\n"
    return None


def _node_address(name: str) -> str | None:
    try:
        return next((node.address for node in patiently(slurm.nodes) if node.name == name), None)
    except LaunchError as error:
        say(f"{error}; taking the name of {name} for its address")
        return None


def main() -> None:
    """Entry point."""
    # A failure must not look like an empty script.
    shell = "exit 1\n"
    try:
        shell = prepare(read_patiently(Path(sys.argv[1])), os.environ)
    except (VitscaleError, OSError) as error:
        say(f"error: {error}")
    finally:
        sys.stdout.write(shell)


if __name__ == "__main__":
    main()
