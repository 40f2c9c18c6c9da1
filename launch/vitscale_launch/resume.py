"""Submit a run again, with the code and the configuration that it was submitted with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import TypeAdapter

from vitscale.config.loader import load_config, parse_section
from vitscale.errors import LaunchError
from vitscale_launch.hints import launch_command
from vitscale_launch.preflight import check_config, fitting_nodes
from vitscale_launch.queueing import queue
from vitscale_launch.site import Site
from vitscale_launch.status import read_status
from vitscale_launch.submission import Submission, array_folder, read_submission, submission_path
from vitscale_launch.submit import check_again, refuse_if_active
from vitscale_launch.submit_cli import parse_nodes
from vitscale_launch.verdict import State


def resume_run(
    run: Path, nodes: str | None = None, *, changes: Sequence[str] = (), chain: int = 1
) -> tuple[Submission, tuple[str, ...]]:
    """Queue a run that has stopped or failed, with the code and the configuration that were kept.

    Args:
        run: the run folder, or that of an array.
        nodes: the fewest and the most nodes, as ``8`` or ``8:32``; None as before.
        changes: changed keys of the site profile that was kept, ``key=value``.
        chain: jobs that follow one another, for sites that do not requeue.

    Returns:
        The submission, and its new jobs.

    Raises:
        VitscaleError: it was never submitted, is finished, waits or runs, or does not fit the nodes.
    """
    run = run.absolute()
    submission = read_submission(run)
    if submission.array_task is not None:
        array = launch_command("resume", array_folder(run))
        raise LaunchError(f"{run}: is a task of an array; resume the array: {array}")
    status = read_status(run)
    if submission.executor == "slurm" and submission.jobs and status.notes and not status.jobs:
        raise LaunchError(f"{run}: was not submitted, for it may be in the queue: {status.notes[0]}")
    refuse_if_active(run)
    if status.state is State.FINISHED:
        raise LaunchError(f"{run}: is finished ({status.why}); there is nothing to resume")
    before = submission.jobs
    if changes:
        submission = _with_profile(submission, changes)
    if nodes is not None or changes:
        low, high = parse_nodes(nodes, submission.executor) if nodes else (submission.nodes_min, submission.nodes_max)
        submission = _on_nodes(submission, low, high)
    check_again(submission)
    submission = queue(submission, chain=chain)
    return submission, submission.jobs[len(before) :]


def _with_profile(submission: Submission, changes: Sequence[str]) -> Submission:
    # JSON is YAML: a mistake is told as it is of a profile.
    text = TypeAdapter(Site).dump_json(submission.site, indent=1).decode()
    site = parse_section(Site, text, f"{submission_path(submission.run)}: site", changes)
    is_array = submission.array_tasks is not None
    return dataclasses.replace(submission, site=site, ranks_per_node=1 if is_array else site.ranks_on_node)


def _on_nodes(submission: Submission, nodes_min: int, nodes_max: int) -> Submission:
    if submission.global_batch_size is None:
        if nodes_max > 1:
            raise LaunchError(f"{submission.run}: is an array, each task of which has one node; leave --nodes out")
        return submission
    config = load_config(submission.config)
    fitting = fitting_nodes(config, submission.ranks_per_node, nodes_min, nodes_max)
    # Refuses with the numbers that would fit.
    world_size = (fitting[-1] if fitting else nodes_max) * submission.ranks_per_node
    meant = [key for word, key in pairwise(submission.command) if word == "--allow-change"]
    check_config(config, world_size=world_size, allow_change=meant)
    # Fewer than fit would start nothing, and more would stay idle.
    return dataclasses.replace(submission, nodes_min=fitting[0], nodes_max=fitting[-1])
