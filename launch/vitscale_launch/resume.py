"""Submit a run again, just as it was submitted before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vitscale.config.loader import load_config
from vitscale.errors import LaunchError
from vitscale_launch.preflight import check_config, fitting_nodes
from vitscale_launch.status import read_status
from vitscale_launch.submission import Submission, read_submission
from vitscale_launch.submit import queue, refuse_if_active
from vitscale_launch.submit_cli import parse_nodes
from vitscale_launch.verdict import State


def resume_run(run: Path, nodes: str | None = None) -> Submission:
    """Queue a run that has stopped or failed, with the code and the configuration that were kept.

    Args:
        run: the run folder, or that of an array.
        nodes: the fewest and the most nodes, as ``8`` or ``8:32``; None as before.

    Returns:
        The submission with its new job.

    Raises:
        VitscaleError: it was never submitted, is finished, waits or runs, or does not fit the nodes.
    """
    run = run.absolute()
    submission = read_submission(run)
    if submission.array_task is not None:
        raise LaunchError(f"{run}: is a task of an array; resume the array: vitscale launch resume {run.parent.parent}")
    status = read_status(run)
    if submission.executor == "slurm" and submission.jobs and status.notes and not status.jobs:
        raise LaunchError(f"{run}: was not submitted, for it may be in the queue: {status.notes[0]}")
    refuse_if_active(run)
    if status.state is State.FINISHED:
        raise LaunchError(f"{run}: is finished ({status.why}); there is nothing to resume")
    if nodes is not None:
        submission = _on_nodes(submission, *parse_nodes(nodes, submission.executor))
    return queue(submission)


def _on_nodes(submission: Submission, nodes_min: int, nodes_max: int) -> Submission:
    if submission.global_batch_size is None:
        raise LaunchError(f"{submission.run}: is an array, each task of which has one node; leave --nodes out")
    config = load_config(submission.config)
    fitting = fitting_nodes(config, submission.ranks_per_node, nodes_min, nodes_max)
    # Refuses with the numbers that would fit.
    check_config(config, world_size=(fitting[-1] if fitting else nodes_max) * submission.ranks_per_node)
    return dataclasses.replace(submission, nodes_min=nodes_min, nodes_max=nodes_max)
