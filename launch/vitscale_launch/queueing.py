"""Queue what lies in the folder of a submission: for the first time, or again."""

from __future__ import annotations

import dataclasses
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vitscale.durable import publish_text
from vitscale.errors import LaunchError
from vitscale_launch.attempts import read_attempts
from vitscale_launch.batch import NoAnswerError, queue_slurm, start_local
from vitscale_launch.requests import cancel_requested, request_cancel, requests_folder
from vitscale_launch.restart import Action
from vitscale_launch.submission import Submission, submission_path, task_folder, write_submission


def queue(submission: Submission, *, chain: int = 1, anew: bool = False) -> Submission:
    """Queue what lies in the folder of a submission, with the code and the configuration that were kept there.

    Args:
        submission: what is to run.
        chain: jobs that follow one another, for sites that do not requeue.
        anew: whether tasks of an array that have finished run again.

    Returns:
        The submission with the new jobs, as it was written. What the executor ``debug`` is to run waits for
        :func:`vitscale_launch.batch.run_here`.

    Raises:
        LaunchError: its folder cannot be written, or SLURM does not take the job. Then it is told as it was before.
    """
    check_chain(submission, chain)
    path, before = submission_path(submission.run), len(submission.jobs)
    try:
        kept = path.read_bytes() if path.exists() else None
        submission = _with_clean_slate(submission)
        # Before the job is queued, for it may start at once.
        cancelled = _forget_requests(submission)
        write_submission(submission)
        _write_tasks(submission, anew=anew)
    except OSError as error:
        raise LaunchError(f"{submission.folder}: cannot be written: {error.strerror}; ask its owner") from error
    if submission.executor == "debug":
        return submission
    job: str | None = None
    try:
        for _ in range(chain):
            job = start_local(submission) if submission.executor == "local" else queue_slurm(submission, after_job=job)
            submission = dataclasses.replace(submission, jobs=(*submission.jobs, job))
            write_submission(submission)
    except OSError as error:
        raise LaunchError(
            f"{path}: cannot be written: {error.strerror}; end what was started, {job}, before you submit again"
        ) from error
    except NoAnswerError:
        raise
    except LaunchError:
        if kept is not None and len(submission.jobs) == before:
            publish_text(path, kept.decode())
            for run in cancelled:
                request_cancel(run)
        raise
    return submission


def check_chain(submission: Submission, chain: int) -> None:
    """See that ``chain`` jobs, one after another, are of use.

    Raises:
        LaunchError: they are not.
    """
    if chain > 1 and (submission.site.requeue or submission.executor != "slurm"):
        raise LaunchError(
            f"--chain {chain} is for SLURM sites with requeue: false; leave it out: here one job comes back by itself"
        )


def _with_clean_slate(submission: Submission) -> Submission:
    """The submission as of now: no earlier attempt counts."""
    attempts = read_attempts(submission.run)
    first = attempts[-1].number + 1 if attempts else 1
    return dataclasses.replace(submission, submitted_unix_s=int(time.time()), first_attempt=first)


def _write_tasks(array: Submission, *, anew: bool) -> None:
    """Write what each task of an array is to run, if it is one."""

    def write(number: int) -> None:
        task = _of_task(array, number)
        attempts = read_attempts(task.run)
        if attempts and (anew or attempts[-1].followed_by != Action.FINISH.value):
            task = dataclasses.replace(task, first_attempt=attempts[-1].number + 1)
        write_submission(task)

    # Each waits for the disk, so many of them at a time.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(array.array_tasks or 0)))


def _of_task(array: Submission, task: int) -> Submission:
    """The submission of one task of an array."""
    words = (word.replace("{task}", str(task)).replace("{tasks}", str(array.array_tasks)) for word in array.command)
    return dataclasses.replace(array, run=task_folder(array.run, task), command=tuple(words), array_task=task, jobs=())


def _forget_requests(submission: Submission) -> list[Path]:
    """Remove what was asked of the jobs before. Returns the folders of those that were to stop."""
    tasks = [task_folder(submission.run, task) for task in range(submission.array_tasks or 0)]
    folders = [run for run in (submission.run, *tasks) if requests_folder(run).exists()]
    cancelled = [run for run in folders if cancel_requested(run)]
    for run in folders:
        shutil.rmtree(requests_folder(run))
    return cancelled
