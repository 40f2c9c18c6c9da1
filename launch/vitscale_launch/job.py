"""The callable that submitit queues. On each task it sets up the environment and becomes the command.

It does not stay: submitit's handlers of signals, which save nothing, go with it. Stop signals are blocked until the
command is ready for them, so that none is lost while Python and torch start.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vitscale.errors import VitscaleError
from vitscale.ranks import STARTED_BY_US
from vitscale.train.signals import STOP_SIGNALS
from vitscale_launch.after import finished_attempt, record_decision
from vitscale_launch.allocation import Allocation
from vitscale_launch.attempts import errors_folder, read_attempts, since_submission, write_attempt
from vitscale_launch.before import attempt_variables, begin
from vitscale_launch.environment import ATTEMPT, ERRORS, free_port, rank_environment, task_environment
from vitscale_launch.failures import STOPPED_ON_REQUEST, Cause, explain, read_errors
from vitscale_launch.local_ranks import cannot_start, run_ranks, write_error
from vitscale_launch.requests import cancel_requested
from vitscale_launch.restart import Action, Policy, decide
from vitscale_launch.submission import Submission, read_submission

ATTEMPT_LINE = "vitscale launch: attempt {attempt} of job {job}, rank {rank} on {host}"
"""What every task writes first to both of its logs, to which all attempts append."""


@dataclass(frozen=True)
class CommandJob:
    """Runs what was submitted for a run folder, or for the folder of an array's task."""

    run: Path

    def __call__(self) -> int:
        """Be one task. Under SLURM this does not return; elsewhere it returns the exit code."""
        submission = read_submission(self.run)
        if submission.executor != "slurm":
            return run_on_this_machine(submission)
        environment = {**os.environ, **task_environment(submission, os.environ)}
        _announce(environment)
        if submission.array_task is not None:
            # A command of the user's own, which may know nothing of blocked signals.
            return _become(submission.command, environment)
        command = command_of(submission)
        if submission.site.tasks_per_node == "node":
            raise SystemExit(_run_ranks(command, _node_environments(submission, environment)))
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return _become(command, environment)


def command_of(submission: Submission) -> tuple[str, ...]:
    """The words of the command that a rank runs."""
    if submission.array_task is not None:
        return submission.command
    return (*submission.rank_python, "-m", "vitscale", *submission.command)


def run_on_this_machine(submission: Submission) -> int:
    """The same job without SLURM: attempts, restarts and records, with all ranks on this machine.

    Returns:
        The exit code of the last attempt.
    """
    code = STOPPED_ON_REQUEST
    while not cancel_requested(submission.run):
        attempts = read_attempts(submission.run)
        ranks = submission.nodes_max * submission.ranks_per_node
        allocation = Allocation((socket.gethostname(),), ranks)
        attempt = begin(submission, attempts, job="local", restart=0, allocation=allocation)
        environment = {**os.environ, **task_environment(submission, os.environ)}
        environment |= attempt_variables(submission, attempt)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(os.getpid(), attempt.number))}
        environment |= _launcher(submission)
        each = [{**environment, **rank_environment(0, 1, rank, ranks)} for rank in range(ranks)]
        code = _run_ranks(command_of(submission), each)

        failure = explain(code, read_errors(errors_folder(submission.run, attempt.number)), "")
        earlier = since_submission(attempts, submission.first_attempt)
        policy = Policy(submission.max_failures, requeue=True, backoff_s=submission.site.backoff_s)
        ended = finished_attempt(submission, attempt, failure, code)
        # Nobody preempts here: whoever stopped it has meant it.
        cancelled = failure.cause is Cause.STOPPED or cancel_requested(submission.run)
        decision = replace(decide(failure, ended, earlier, policy, cancel_requested=cancelled), exclude=())
        ended = record_decision(submission, ended, decision)
        if decision.action is not Action.REQUEUE:
            return code
        end = time.monotonic() + decision.delay_s
        while time.monotonic() < end and not cancel_requested(submission.run):
            time.sleep(1)
        if cancel_requested(submission.run):
            stopped = replace(ended, followed_by=Action.STOP.value, because="it was cancelled before the next attempt")
            write_attempt(submission.run, stopped)
    return code


def _node_environments(submission: Submission, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Of the ranks that this task starts on its node."""
    node, num_nodes = int(environment["SLURM_NODEID"]), int(environment["SLURM_STEP_NUM_NODES"])
    common = {**environment, **_launcher(submission)}
    ranks = submission.ranks_per_node
    return [{**common, **rank_environment(node, num_nodes, rank, ranks)} for rank in range(ranks)]


def _launcher(submission: Submission) -> dict[str, str]:
    """What lets ranks die with this process. In a container they may not be its children, and would not start."""
    return {} if submission.site.container else {STARTED_BY_US: str(os.getpid())}


def _run_ranks(command: tuple[str, ...], environments: list[dict[str, str]]) -> int:
    try:
        return run_ranks(command, environments)
    except VitscaleError as error:
        return _tell(error, environments[0], int(environments[0]["RANK"]))


def _announce(environment: Mapping[str, str]) -> None:
    line = ATTEMPT_LINE.format(
        attempt=environment.get(ATTEMPT, "?"),
        job=environment.get("SLURM_JOB_ID", "?"),
        rank=environment.get("SLURM_PROCID", "?"),
        host=environment.get("SLURMD_NODENAME", socket.gethostname()),
    )
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"{line}\n")
        stream.flush()


def _become(command: tuple[str, ...], environment: Mapping[str, str]) -> int:
    try:
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        told = cannot_start(command[0], error)
        raise SystemExit(_tell(told, environment, int(environment.get("SLURM_PROCID", "0")))) from error


def _tell(error: VitscaleError, environment: Mapping[str, str], rank: int) -> int:
    """Say why there is no rank, to people and to what decides about another attempt. Returns the exit code."""
    sys.stderr.write(f"vitscale: error: {error}\n")
    if folder := environment.get(ERRORS):
        write_error(Path(folder), rank, type(error).__name__, str(error), error.exit_code)
    return error.exit_code
