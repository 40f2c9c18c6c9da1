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

from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.durable import Lock
from vitscale.errors import LaunchError
from vitscale.run_config import with_absolute_paths
from vitscale_launch import slurm
from vitscale_launch.activity import job_ids, local_process, own_jobs
from vitscale_launch.attempts import read_attempts
from vitscale_launch.batch import batch_text
from vitscale_launch.capacity import check_capacity
from vitscale_launch.hints import launch_command
from vitscale_launch.preflight import (
    OTHER_FOLDER,
    OTHER_RUN,
    Rows,
    check_config,
    check_signal_delay,
    check_writable,
    fitting_nodes,
)
from vitscale_launch.queueing import check_chain, queue
from vitscale_launch.site import Site
from vitscale_launch.snapshot import freeze_config, snapshot_code
from vitscale_launch.submission import (
    FOLDER,
    Submission,
    read_submission,
    submission_path,
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
    low, high = (fitting[0], fitting[-1]) if fitting else nodes
    rows = check_config(config, world_size=high * site.ranks_on_node, allow_change=allow_change)
    rows += [("nodes", _nodes_text(low, high, fitting, site))]
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
        # Fewer would be given only to be handed back, and more would stay idle.
        nodes_min=low,
        nodes_max=high,
        ranks_per_node=site.ranks_on_node,
        site=site,
        python=sys.executable,
        submitted_unix_s=int(time.time()),
        jobs=_jobs_before(config.run),
        executor=executor,
        max_failures=max_failures,
        health_check=site.health_check if health_check is None else health_check,
        cwd=Path.cwd(),
    )
    if executor == "slurm":
        rows += [("partition", _ask_slurm(site, low, dry=dry))]
    elif site.modules or site.setup or submission.health_check:
        rows += [("note", "modules, setup and health check of the profile are for SLURM jobs; here they are left out")]
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
    check_writable(folder, OTHER_FOLDER)
    refuse_if_active(folder, OTHER_FOLDER)
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
        cwd=Path.cwd(),
    )
    first = [*submission.rank_python, "-P", "-m", "vitscale"] if command[0] == "vitscale" else [command[0]]
    submission = dataclasses.replace(submission, command=(*first, *command[1:]))
    rows = [("tasks", str(tasks)), ("command", shlex.join(submission.command)), ("folder", str(folder))]
    if not (site.container or site.modules or site.setup) and shutil.which(first[0]) is None:
        rows += [("note", f"{first[0]} was not found here; it must be there on every node")]
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
    check_chain(submission, chain)
    try:
        submission.logs.mkdir(parents=True, exist_ok=True)
        snapshot_code(submission.code)
        if prepared.config is not None:
            freeze_config(prepared.config, submission.config)
    except OSError as error:
        raise LaunchError(f"{submission.folder}: cannot be written: {error.strerror}; choose another folder") from error
    return queue(submission, chain=chain, anew=True)


def check_again(submission: Submission) -> Rows:
    """See that what was submitted once can still run: the cluster may have changed, and saves were measured meanwhile.

    Returns:
        Rows of the plan that this adds.

    Raises:
        LaunchError: the cluster has no such partition or nodes any more, or the warning before the time limit is too
            short for a step and a save.
        ConfigError: the kept configuration cannot be read.
    """
    if submission.executor != "slurm":
        return []
    rows = []
    if submission.array_tasks is None:
        rows += check_signal_delay(load_config(submission.config), submission.site)
    text = _ask_slurm(submission.site, submission.nodes_min, tasks=submission.array_tasks or 0, dry=False)
    return [*rows, ("partition", text)]


def refuse_if_active(run: Path, choose: str = OTHER_RUN) -> None:
    """See that no job of this run is queued or running, and that nobody trains in its folder.

    Args:
        run: the folder of the run, or of an array.
        choose: what to do instead.

    Raises:
        LaunchError: one is.
    """
    if submission_path(run).exists():
        active = _active(read_submission(run))
        if active is not None:
            raise LaunchError(
                f"{run} was submitted already, and {active}; wait for it, stop it with "
                f"`{launch_command('cancel', run)}`, or {choose}"
            )
    path = run / ".lock"
    if not path.exists():
        return
    lock = Lock(path)
    try:
        if not lock.take():
            raise LaunchError(
                f"{run} is being trained right now, by a process that was not submitted; wait for it, stop it, "
                f"or {choose}"
            )
    except OSError as error:
        raise LaunchError(f"{path}: cannot be opened: {error.strerror}; {choose}") from error
    finally:
        lock.release()


def check_name(run: Path) -> None:
    """See that SLURM takes the path of the run folder literally.

    Raises:
        LaunchError: it does not.
    """
    if wrong := next((character for character in str(run) if character in "%\\" or not character.isprintable()), None):
        raise LaunchError(
            f"{str(run)!r} holds {wrong!r}, which SLURM does not take literally in names of logs; rename it"
        )


def _nodes_text(low: int, high: int, fitting: Sequence[int], site: Site) -> str:
    text = f"{low} x {site.ranks_on_node} ranks"
    if low != high:
        sizes = ", ".join(map(str, fitting))
        text = f"{low} to {high}, as the queue gives them; used are {sizes}, x {site.ranks_on_node} ranks"
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


def _jobs_before(run: Path) -> tuple[str, ...]:
    return read_submission(run).jobs if submission_path(run).exists() else ()


def _active(submission: Submission) -> str | None:
    """Who is at work for a submission, if anybody is."""
    if (process := local_process(submission)) is not None:
        return f"its process {process.pid} is running on this machine"
    if shutil.which("scontrol") is None:
        return None
    known = own_jobs(submission, job_ids(submission, read_attempts(submission.run)), lambda ids: slurm.jobs(ids=ids))
    return next((f"its job {job.job_id} is {job.state.lower()}" for job in known if not job.has_ended), None)
