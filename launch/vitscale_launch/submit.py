"""Submit a run or an array: refuse what cannot work, keep code and configuration as they are, and queue the job."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.durable import Lock
from vitscale.errors import LaunchError
from vitscale.run_config import with_absolute_paths
from vitscale_launch import slurm
from vitscale_launch.batch import batch_text, queue_slurm, start_local
from vitscale_launch.capacity import check_capacity
from vitscale_launch.preflight import Rows, check_config, check_signal_delay, check_writable, fitting_nodes
from vitscale_launch.site import Site
from vitscale_launch.snapshot import freeze_config, snapshot_code
from vitscale_launch.submission import (
    FOLDER,
    Submission,
    read_submission,
    submission_path,
    task_folder,
    write_submission,
)

Executor = Literal["slurm", "local", "debug"]
MAX_ARRAY_TASKS = 100_000


@dataclass(frozen=True)
class Prepared:
    """A submission that nothing speaks against. Nothing was written yet."""

    submission: Submission
    plan: Rows
    config: TrainConfig | None = None

    def text(self) -> str:
        """The batch script."""
        return batch_text(self.submission)


def prepare_run(
    config_file: Path,
    overrides: Sequence[str],
    site: Site,
    *,
    nodes: tuple[int, int],
    executor: Executor = "slurm",
    allow_change: Sequence[str] = (),
    max_failures: int = 3,
    health_check: bool | None = None,
    dry: bool = False,
) -> Prepared:
    """Plan the submission of a training run.

    Args:
        config_file: YAML file of the run.
        overrides: changed values, ``key.path=value``.
        site: the cluster.
        nodes: fewest and most nodes of an attempt.
        executor: who starts the ranks.
        allow_change: keys whose change is meant, in a run that was begun already.
        max_failures: attempts without progress after which the run is given up.
        health_check: whether nodes are checked first; None for what the site says.
        dry: whether it is only to be looked at, which can be done where there is no SLURM, too.

    Raises:
        VitscaleError: the run cannot work like this.
    """
    config = with_absolute_paths(load_config(config_file, overrides))
    check_name(config.run)
    fitting = fitting_nodes(config, site.ranks_on_node, *nodes)
    # Without a fitting number, the plan's own refusal names those that would fit.
    used = fitting[-1] if fitting else nodes[1]
    rows = check_config(config, world_size=used * site.ranks_on_node, allow_change=allow_change)
    rows += [("nodes", _nodes_text(nodes, fitting, site))]
    if executor == "slurm":
        rows += check_signal_delay(config, site)
    refuse_if_active(config.run)
    frozen = config.run / FOLDER / "config.yaml"
    changes = [word for key in allow_change for word in ("--allow-change", key)]
    submission = Submission(
        run=config.run,
        command=("train", str(frozen), *changes),
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        nodes_min=nodes[0],
        nodes_max=nodes[1],
        ranks_per_node=site.ranks_on_node,
        site=site,
        python=sys.executable,
        submitted_unix_s=int(time.time()),
        jobs=_jobs_before(config.run),
        executor=executor,
        max_failures=max_failures,
        health_check=site.health_check if health_check is None else health_check,
    )
    if executor == "slurm":
        rows += [("partition", _ask_slurm(site, nodes[0], dry=dry))]
    return Prepared(submission, rows, config)


def prepare_array(
    command: Sequence[str],
    site: Site,
    *,
    folder: Path,
    tasks: int,
    max_failures: int = 3,
    dry: bool = False,
) -> Prepared:
    """Plan an array whose tasks run ``command`` with ``{task}`` and ``{tasks}`` replaced.

    Args:
        command: what each task runs; the word ``vitscale`` at its start is the one of this Python.
        site: the cluster; one task gets what it gives a node.
        folder: for logs, code and the state of each task.
        tasks: how many.
        max_failures: attempts without progress after which a task is given up.
        dry: as in :func:`prepare_run`.

    Raises:
        LaunchError: it cannot work like this.
    """
    if not 1 <= tasks <= MAX_ARRAY_TASKS:
        raise LaunchError(f"--tasks is {tasks}; allowed is 1 to {MAX_ARRAY_TASKS}")
    folder = folder.absolute()
    check_name(folder)
    check_writable(folder)
    refuse_if_active(folder)
    submission = Submission(
        run=folder,
        command=(),
        global_batch_size=None,
        micro_batch_size=None,
        nodes_min=1,
        nodes_max=1,
        ranks_per_node=1,
        site=site,
        python=sys.executable,
        submitted_unix_s=int(time.time()),
        jobs=_jobs_before(folder),
        max_failures=max_failures,
        array_tasks=tasks,
    )
    first = [*submission.rank_python, "-P", "-m", "vitscale"] if command[0] == "vitscale" else [command[0]]
    submission = dataclasses.replace(submission, command=(*first, *command[1:]))
    rows = [("tasks", str(tasks)), ("command", shlex.join(submission.command)), ("folder", str(folder))]
    rows += [("partition", _ask_slurm(site, 1, tasks=tasks, dry=dry))]
    return Prepared(submission, rows)


def submit(prepared: Prepared, *, chain: int = 1) -> Submission:
    """Write code, configuration and submission into the run folder, and queue the job.

    Args:
        prepared: what is to run.
        chain: jobs that follow one another, for sites that do not requeue.

    Raises:
        LaunchError: the folder cannot be written, or SLURM does not take the job.
    """
    submission = prepared.submission
    _check_chain(submission, chain)
    try:
        submission.logs.mkdir(parents=True, exist_ok=True)
        snapshot_code(submission.code)
        if prepared.config is not None:
            freeze_config(prepared.config, submission.config)
        for task in range(submission.array_tasks or 0):
            write_submission(_of_task(submission, task))
    except OSError as error:
        raise LaunchError(f"{submission.folder}: cannot be written: {error.strerror}; choose another folder") from error
    return queue(submission, chain=chain)


def queue(submission: Submission, *, chain: int = 1) -> Submission:
    """Queue what lies in the folder of a submission, with the code and the configuration that were kept there.

    Returns:
        The submission with the new jobs, as it was written. What the executor ``debug`` is to run waits for
        :func:`vitscale_launch.batch.run_here`.

    Raises:
        LaunchError: SLURM does not take the job.
    """
    _check_chain(submission, chain)
    submission = dataclasses.replace(submission, submitted_unix_s=int(time.time()))
    _forget_requests(submission)
    # Before the job is queued, for it may start at once.
    write_submission(submission)
    if submission.executor == "debug":
        return submission
    job: str | None = None
    for _ in range(chain):
        job = start_local(submission) if submission.executor == "local" else queue_slurm(submission, after_job=job)
        submission = dataclasses.replace(submission, jobs=(*submission.jobs, job))
        write_submission(submission)
    return submission


def resubmit(submission: Submission, *, nodes_min: int | None = None, nodes_max: int | None = None) -> Submission:
    """Queue a run again, with the code and the configuration that were kept.

    Args:
        submission: what was submitted.
        nodes_min: another number of fewest nodes.
        nodes_max: another number of most nodes; by default at least the fewest.

    Raises:
        LaunchError: no such number of nodes can share the global batch, or SLURM does not take the job.
    """
    low = nodes_min or submission.nodes_min
    high = nodes_max or max(low, submission.nodes_max)
    if submission.global_batch_size is not None and submission.micro_batch_size is not None:
        micro_batches = submission.global_batch_size // submission.micro_batch_size
        if not any(micro_batches % (nodes * submission.ranks_per_node) == 0 for nodes in range(1, high + 1)):
            raise LaunchError(
                f"--nodes {low}:{high}: {micro_batches} micro-batches cannot be shared by {submission.ranks_per_node} "
                f"ranks on each of so many nodes; choose a number of nodes that divides them"
            )
    if submission.executor == "slurm":
        _ask_slurm(submission.site, low, dry=False, tasks=submission.array_tasks or 0)
    return queue(dataclasses.replace(submission, nodes_min=low, nodes_max=high))


def refuse_if_active(run: Path) -> None:
    """See that no job of this run is queued or running, and that nobody trains in its folder.

    Raises:
        LaunchError: one is.
    """
    if submission_path(run).exists():
        submission = read_submission(run)
        active = _active_local(submission) if submission.executor == "local" else _active_slurm(submission)
        if active is not None:
            raise LaunchError(
                f"run: {run} was submitted already, and {active}; wait for it, stop it with `vitscale launch cancel "
                f"{run}`, or choose another folder with run=..."
            )
    path = run / ".lock"
    if not path.exists():
        return
    lock = Lock(path)
    try:
        if not lock.take():
            raise LaunchError(
                f"run: {run} is being trained right now, by a process that was not submitted; wait for it, stop it, "
                f"or choose another folder with run=..."
            )
    except OSError as error:
        raise LaunchError(f"{path}: cannot be opened: {error.strerror}; choose another folder with run=...") from error
    finally:
        lock.release()


def check_name(run: Path) -> None:
    """See that SLURM takes the path of the run folder literally.

    Raises:
        LaunchError: it does not.
    """
    if wrong := next((character for character in str(run) if character in "%\\" or not character.isprintable()), None):
        raise LaunchError(
            f"run: {str(run)!r} holds {wrong!r}, which SLURM does not take literally in names of logs; rename it"
        )


def _of_task(array: Submission, task: int) -> Submission:
    """The submission of one task of an array."""
    words = (word.replace("{task}", str(task)).replace("{tasks}", str(array.array_tasks)) for word in array.command)
    return dataclasses.replace(array, run=task_folder(array.run, task), command=tuple(words), array_task=task, jobs=())


def _nodes_text(nodes: tuple[int, int], fitting: Sequence[int], site: Site) -> str:
    text = f"{nodes[0]} x {site.ranks_on_node} ranks"
    if nodes[0] != nodes[1]:
        sizes = ", ".join(map(str, fitting))
        text = f"{nodes[0]} to {nodes[1]}, as the queue gives them; used are {sizes}, x {site.ranks_on_node} ranks"
    return text


def _ask_slurm(site: Site, nodes_min: int, *, dry: bool, tasks: int = 0) -> str:
    """See that the cluster has what is asked for. Returns the partition in words."""
    try:
        partitions, nodes, most_tasks = slurm.partitions(), slurm.nodes(), slurm.config().get("MaxArraySize", "")
    except LaunchError:
        if not dry:
            raise
        return f"{site.partition or 'the default'}; not checked, for SLURM does not answer here"
    partition = check_capacity(site, nodes_min, partitions, nodes)
    # The numbers of tasks must be below it.
    if most_tasks.isdecimal() and tasks >= int(most_tasks):
        allowed = int(most_tasks) - 1
        raise LaunchError(f"--tasks is {tasks}; this cluster allows 1 to {allowed}: give each task more to do")
    return f"{partition.name}, {site.time_limit_minutes} minutes for an attempt"


def _check_chain(submission: Submission, chain: int) -> None:
    if chain > 1 and (submission.site.requeue or submission.executor != "slurm"):
        raise LaunchError(
            f"--chain {chain} is for SLURM sites with requeue: false; leave it out: here one job comes back by itself"
        )


def _jobs_before(run: Path) -> tuple[str, ...]:
    return read_submission(run).jobs if submission_path(run).exists() else ()


def _forget_requests(submission: Submission) -> None:
    """What was asked of the jobs before."""
    tasks = [task_folder(submission.run, task) for task in range(submission.array_tasks or 0)]
    for run in (submission.run, *tasks):
        shutil.rmtree(run / FOLDER / "requests", ignore_errors=True)


def _active_slurm(submission: Submission) -> str | None:
    if not submission.jobs or shutil.which("scontrol") is None:
        return None
    for job in slurm.jobs(ids=submission.jobs):
        # Numbers begin again where a cluster is set up anew, so the script must be ours, too.
        ours = str(submission.logs) in job.command
        if ours and not job.has_ended:
            return f"its job {job.job_id} is {job.state.lower()}"
    return None


def _active_local(submission: Submission) -> str | None:
    for job in submission.jobs:
        try:
            words = psutil.Process(int(job)).cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            continue
        if str(submission.logs) in words:
            return f"its process {job} is running on this machine"
    return None
