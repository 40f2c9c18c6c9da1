"""``python -m vitscale_launch.before RUN``: the batch script's first act. Prints shell that the script evaluates.

Records that an attempt begins (and what became of one that was killed), checks the nodes if the site wants it,
chooses those that are used, and exports what srun and the ranks need. What the shell says is ``exit`` if the attempt
must not start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vitscale.errors import VitscaleError
from vitscale_launch import slurm
from vitscale_launch.after import conclude
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
from vitscale_launch.restart import MAX_FRUITLESS, Action, fruitless
from vitscale_launch.submission import Submission, read_submission

CANCEL = Path("launch") / "requests" / "cancel"


def prepare(submission: Submission, environment: Mapping[str, str]) -> str:
    """Begin an attempt of the job that this batch script belongs to. Returns shell.

    Raises:
        VitscaleError: the attempt cannot start.
    """
    job, restart = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    allocated = tuple(slurm.host_names(environment["SLURM_JOB_NODELIST"]))
    attempts = _close(submission, batch_log(submission, environment))
    earlier = since_submission(attempts, submission.submitted_unix_s)
    if (leave := _no_need(submission, earlier, job)) is not None:
        return leave
    micro_batches = None
    if submission.global_batch_size and submission.micro_batch_size:
        micro_batches = submission.global_batch_size // submission.micro_batch_size
    allocation = choose_nodes(
        allocated,
        nodes_min=submission.nodes_min,
        nodes_max=submission.nodes_max,
        ranks_per_node=submission.ranks_per_node,
        micro_batches=micro_batches,
    )
    attempt = begin(submission, attempts, job=job, restart=restart, allocation=allocation)
    variables = shared_environment(submission.site, allocation, environment, node_address=_node_address)
    variables |= attempt_variables(submission, attempt)
    variables[LOG_OFFSET] = str(size_of(batch_log(submission, environment)))
    if allocation.spared:
        _say(f"{len(allocation.spared)} of {len(allocated)} nodes stay idle: the batch cannot be shared by their ranks")
    if submission.health_check:
        from vitscale_launch.health import check_job

        bad = check_job(submission, allocation, {**environment, **variables})
        if bad:
            text = "; ".join(f"{node}: {problem}" for node, problem in sorted(bad.items()))
            failure = Failure(Cause.UNHEALTHY, text, tuple(sorted(bad)))
            _say(f"the health check failed: {text}")
            conclude(submission, attempt, failure, 1)
            return "exit 1\n"
    return as_shell(variables)


def begin(
    submission: Submission, attempts: list[Attempt], *, job: str, restart: int, allocation: Allocation
) -> Attempt:
    """Record that an attempt begins."""
    attempt = Attempt(
        number=attempts[-1].number + 1 if attempts else 1,
        job=job,
        restart=restart,
        nodes=",".join(allocation.nodes),
        ranks=allocation.ranks,
        started_unix_s=int(time.time()),
        started_step=newest_step(submission.run),
        excluded=attempts[-1].excluded if attempts else (),
    )
    write_attempt(submission.run, attempt)
    return attempt


def attempt_variables(submission: Submission, attempt: Attempt) -> dict[str, str]:
    """What tells the ranks which attempt they are of."""
    return {ATTEMPT: str(attempt.number), ERRORS: str(errors_folder(submission.run, attempt.number))}


def cancel_requested(run: Path) -> bool:
    """Whether the user has asked for an end."""
    return (run / CANCEL).exists()


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
        failure = explain(1, errors, "")
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
        _say("the run was cancelled; nothing is started")
        return f"exit {STOPPED_ON_REQUEST}\n"
    last = earlier[-1] if earlier else None
    if last is not None and last.followed_by == Action.FINISH.value:
        _say("the run is finished; nothing is left to do")
        return "exit 0\n"
    # The same job starts again only if somebody has told SLURM so.
    if last is not None and last.followed_by == Action.STOP.value and last.job != job:
        _say(f"the run was stopped ({last.reason}: {last.because}); nothing is started")
        return "exit 1\n"
    if len(fruitless(earlier)) >= MAX_FRUITLESS:
        why = f"{MAX_FRUITLESS} attempts in a row left no new checkpoint; save more often, then resume"
        write_attempt(submission.run, replace(earlier[-1], followed_by=Action.STOP.value, because=why))
        _say(why)
        return "exit 1\n"
    return None


def _node_address(name: str) -> str | None:
    return next((node.address for node in slurm.nodes() if node.name == name), None)


def _say(text: str) -> None:
    sys.stderr.write(f"vitscale launch: {text}\n")


def main() -> None:
    """Entry point."""
    # A failure must not look like an empty script.
    shell = "exit 1\n"
    try:
        shell = prepare(read_submission(Path(sys.argv[1])), os.environ)
    except VitscaleError as error:
        _say(f"error: {error}")
        shell = f"exit {error.exit_code}\n"
    finally:
        sys.stdout.write(shell)


if __name__ == "__main__":
    main()
