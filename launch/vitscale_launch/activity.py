"""Who is at work for a submission: jobs that SLURM knows, or a process of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil

from vitscale_launch.attempts import Attempt
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.submission import Submission, array_folder, read_submission

Ask = Callable[[Sequence[str]], list[SlurmJob]]


def job_ids(submission: Submission, attempts: Sequence[Attempt] = ()) -> tuple[str, ...]:
    """SLURM's numbers of those jobs that may still be at work. A task of an array has those of the array.

    Jobs of a run work one after another, so those before the newest attempt's are over.
    """
    if submission.executor != "slurm":
        return ()
    if submission.array_task is not None:
        return read_submission(array_folder(submission.run)).jobs
    newest = attempts[-1].job if attempts else None
    return submission.jobs[submission.jobs.index(newest) :] if newest in submission.jobs else submission.jobs


def own_jobs(submission: Submission, ids: Sequence[str], ask: Ask) -> list[SlurmJob]:
    """Those of the jobs with these numbers that belong to the submission.

    Args:
        submission: of a run, an array or a task.
        ids: SLURM's numbers.
        ask: gives the jobs with some numbers that SLURM still knows.

    Raises:
        LaunchError: SLURM does not answer.
    """
    found = [job for job in (ask(ids) if ids else []) if is_ours(job, submission)]
    return found if submission.array_task is None else jobs_of_task(submission, submission.array_task, found)


def is_ours(job: SlurmJob, submission: Submission) -> bool:
    """Numbers of jobs begin again where a cluster is set up anew, so the script must be ours, too."""
    return str(submission.logs) in job.command


def jobs_of_task(submission: Submission, task: int, jobs: Sequence[SlurmJob]) -> list[SlurmJob]:
    """Those jobs of an array that are, or hold, one of its tasks."""
    if submission.array_tasks == 1:
        # SLURM need not know that it is an array.
        return list(jobs)
    return [job for job in jobs if job.array_task is not None and has_task(job.array_task, task)]


def has_task(tasks: str, number: int) -> bool:
    """Whether SLURM's list of an array's tasks, such as ``1,4-7%2``, has a number."""
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and int(first) <= number <= int(last or first):
            return True
    return False


def local_process(submission: Submission) -> psutil.Process | None:
    """The process of this machine that runs a submission without SLURM, if it is alive."""
    if submission.executor != "local":
        return None
    for job in reversed(submission.jobs):
        try:
            process = psutil.Process(int(job))
            # Numbers of processes are used again.
            if str(submission.logs) in process.cmdline():
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None
