"""The batch script of a submission, and handing it to SLURM or to this machine through submitit.

The script prepares the environment, asks :mod:`vitscale_launch.before` whether and on how many nodes to go on, starts
the ranks with ``srun``, and lets :mod:`vitscale_launch.after` decide what happens next.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

from submitit import DebugExecutor, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from vitscale.errors import LaunchError
from vitscale_launch.job import CommandJob
from vitscale_launch.site import Scalar, Site
from vitscale_launch.submission import Submission, task_folder

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# How the commands find their cluster. All else that begins so belongs to the job that a submission comes from.
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
# What sbatch says if the controller has the job and its answer is lost.
_NO_ANSWER = re.compile(r"timed out|zero bytes were transmitted", re.IGNORECASE)


class NoAnswerError(LaunchError):
    """Nobody can tell whether SLURM took the job."""


def batch_text(submission: Submission, *, after_job: str | None = None) -> str:
    """The script that ``sbatch`` would get.

    Args:
        submission: what is to run.
        after_job: the job that must have ended before.
    """
    executor = _slurm_executor(submission, after_job)
    if submission.array_tasks is not None:
        executor.parameters["map_count"] = submission.array_tasks
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def queue_slurm(submission: Submission, *, after_job: str | None = None) -> str:
    """Queue a job, or an array of jobs, and give its number.

    Raises:
        LaunchError: SLURM does not take it.
    """
    # submitit looks for srun only, and not always.
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise LaunchError(
                f"{command} was not found; log in to a machine of the cluster, or put SLURM's commands on the PATH "
                f"(often: module load slurm)"
            )
    executor = _slurm_executor(submission, after_job)
    with without_job_variables(), _explained(submission):
        if submission.array_tasks is None:
            return str(executor.submit(CommandJob(submission.run)).job_id)
        with executor.batch():
            folders = (task_folder(submission.run, task) for task in range(submission.array_tasks))
            jobs = [executor.submit(CommandJob(folder)) for folder in folders]
    return str(jobs[0].job_id).partition("_")[0]


def start_local(submission: Submission) -> str:
    """Start the command on this machine, in a process that outlives this one, and give its number.

    Raises:
        LaunchError: it cannot be started.
    """
    executor = LocalExecutor(submission.logs, python=shlex.quote(submission.python))
    executor.update_parameters(
        timeout_min=submission.site.time_limit_minutes,
        signal_delay_s=submission.site.signal_delay_s,
        tasks_per_node=1,
        gpus_per_node=submission.site.gpus_per_node,
    )
    with ExitStack() as stack:
        stack.enter_context(_explained(submission))
        stack.enter_context(without_job_variables())
        # Not as words of a command, which every user of the machine can read.
        stack.enter_context(_variables(_local_environment(submission)))
        stack.enter_context(_output_to(submission.logs / "starter.log"))
        stack.enter_context(chdir(submission.cwd or Path.cwd()))
        return str(executor.submit(CommandJob(submission.run)).job_id)


def run_here(submission: Submission) -> int:
    """Run the command from this process, and give its exit code."""
    with without_job_variables(), _variables(_local_environment(submission)):
        return int(DebugExecutor(submission.logs).submit(CommandJob(submission.run)).result())


def environment_lines(site: Site) -> Iterator[str]:
    """Lines of shell that make a node ready for the ranks, as the profile says."""
    for module in site.modules:
        sorry = shlex.quote(f"vitscale: error: module load {module} failed; mend modules in the site profile")
        yield f"module load {shlex.quote(module)} || {{ echo {sorry} >&2; exit 2; }}"
    for name, value in site.environment.items():
        yield f"export {name}={shlex.quote(value)}"
    yield from site.setup


def job_name(run: Path) -> str:
    """What ``squeue`` shows."""
    return "vitscale-" + re.sub(r"[^\w.+-]", "_", run.name)


class _Executor(SlurmExecutor):  # type: ignore[misc]
    """submitit's, except that it also tells its script where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _slurm_executor(submission: Submission, after_job: str | None) -> Any:
    executor = _Executor(submission.logs, python=_python(submission))
    site, elastic = submission.site, submission.nodes_min != submission.nodes_max
    parameters = {
        "job_name": job_name(submission.run),
        "time": site.time_limit_minutes,
        # Once a job has run on many nodes, SLURM keeps the number of their tasks, and a requeued job would never start
        # on fewer. Without these, the script itself says how many tasks srun starts.
        "ntasks_per_node": None if elastic else site.tasks_on_node,
        "cpus_per_task": None if elastic else site.cpus_per_task,
        "signal_delay_s": site.signal_delay_s,
        "exclusive": site.exclusive or None,
        "dependency": after_job and f"afterany:{after_job}",
        "setup": list(_setup(submission)),
        "teardown": list(_teardown(submission)),
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": _more_options(submission),
    }
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    return executor


def _more_options(submission: Submission) -> dict[str, Scalar]:
    """Options that submitit has no name for, or no right form."""
    site, low, high = submission.site, submission.nodes_min, submission.nodes_max
    options: dict[str, Scalar] = {"nodes": str(low), **site.selection, **site.gpus_option(site.gpus_per_node)}
    if submission.cwd is not None:
        options["chdir"] = str(submission.cwd)
    if low != high:
        options |= {"nodes": f"{low}-{high}", "mincpus": site.cpus_per_task * site.tasks_on_node}
    options["requeue" if site.requeue else "no-requeue"] = True
    if site.memory_mb is not None:
        options["mem"] = f"{site.memory_mb}M" if site.memory_mb else "0"
    return {**options, **{name: value for name, value in site.sbatch.items() if value is not False}}


def _setup(submission: Submission) -> Iterator[str]:
    # Bash would die of a signal to the batch step, and nobody would decide what happens next.
    yield "trap : INT TERM USR1 USR2"
    yield f"unset {' '.join(RANK_VARIABLES)}"
    yield from environment_lines(submission.site)
    yield f"export PYTHONPATH={shlex.quote(str(submission.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield f"run={_run_in_shell(submission)}"
    if submission.array_tasks is None:
        # Of an array, the command is the user's, who may rely on it that Python imports from the script's folder.
        yield "export PYTHONSAFEPATH=1"
    yield f'prepared="$({_python(submission)} -m vitscale_launch.before "$run")" || exit $?'
    yield 'eval "$prepared"'


def _teardown(submission: Submission) -> Iterator[str]:
    yield "status=$?"
    yield f'{_python(submission)} -m vitscale_launch.after "$run" "$status"'
    yield 'exit "$status"'


def _python(submission: Submission) -> str:
    """Python for what is the launcher's own. It must not import from the folder that the job was submitted from, which
    may be a checkout that was changed meanwhile."""
    return f"{shlex.quote(submission.python)} -P"


def _run_in_shell(submission: Submission) -> str:
    if submission.array_tasks is None:
        return shlex.quote(str(submission.run))
    # An array of one task is no array for submitit. Bash pads the number as task_folder does.
    tasks = shlex.quote(str(task_folder(submission.run, 0).parent))
    return f'{tasks}/"$(printf %05d "${{SLURM_ARRAY_TASK_ID:-0}}")"'


def _local_environment(submission: Submission) -> dict[str, str]:
    """What the batch script would export."""
    own = submission.site.environment
    path = filter(None, [str(submission.code), own.get("PYTHONPATH", os.environ.get("PYTHONPATH"))])
    return {**own, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Let what is started meanwhile have these variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def without_job_variables() -> Iterator[None]:
    """Hide what belongs to the job that this process itself may run in: ``sbatch`` would take it over.

    Options in variables (SBATCH_PARTITION) would silently win over the profile's.
    """
    prefixes = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name not in _KEPT and (name.startswith(prefixes) or name in RANK_VARIABLES)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Let what is started meanwhile hold neither the terminal nor a pipe, whose reader would wait for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in range(3)]
    with path.open("ab") as log, Path(os.devnull).open("rb") as nothing:
        try:
            for descriptor, file in enumerate((nothing, log, log)):
                os.dup2(file.fileno(), descriptor)
            yield
        finally:
            for descriptor, before in enumerate(kept):
                os.dup2(before, descriptor)
                os.close(before)


@contextmanager
def _explained(submission: Submission) -> Iterator[None]:
    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no reason is told")
        if _NO_ANSWER.search(str(error)):
            raise NoAnswerError(
                f"SLURM did not say whether it took the job: {said.strip()}; it may be queued all the same: look with "
                f"squeue --me --name={job_name(submission.run)}, and scancel it before you submit again"
            ) from error
        raise LaunchError(
            f"SLURM refused the job: {said.strip()}; mend the site profile, or try --dry-run to see the script"
        ) from error
    except OSError as error:
        raise LaunchError(f"the job cannot be started: {error.strerror or error}; check the run folder") from error
