"""What has become of a run: by its folder, and by SLURM as long as SLURM knows it. Changes nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitscale.durable import Lock
from vitscale.errors import CheckpointError, ConfigError, Interrupted, LaunchError
from vitscale.train.heartbeat import Beat, read_beats
from vitscale.train.records import CHECKPOINTS_REMOVED
from vitscale_launch import slurm
from vitscale_launch.activity import Ask, job_ids, jobs_of_task, local_process, own_jobs
from vitscale_launch.attempts import Attempt, errors_folder, read_attempts
from vitscale_launch.failures import RankError, read_errors
from vitscale_launch.progress import Commit, Progress, Silence, find_silence, newest_commit, read_progress
from vitscale_launch.requests import cancel_requested
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.submission import Submission, read_submission, submission_path, task_folder
from vitscale_launch.verdict import State, judge

# A rank that told its place so short a time ago is alive.
ALIVE_S = 120.0


@dataclass(frozen=True)
class Status:
    """All that is known of a run."""

    run: Path
    state: State
    why: str
    """One sentence."""
    attempts: tuple[Attempt, ...] = ()
    jobs: tuple[SlurmJob, ...] = ()
    """Those that SLURM still knows."""
    progress: Progress = field(default_factory=Progress)
    commit: Commit | None = None
    failure: RankError | None = None
    """Of the rank that failed first in the newest attempt."""
    beats: tuple[Beat, ...] = ()
    """Where each rank of the attempt that runs stands, as far as it has told."""
    silence: Silence | None = None
    notes: tuple[str, ...] = ()
    """What could not be found out."""
    tasks: tuple[Status, ...] = ()
    """Of an array."""

    @property
    def step(self) -> int:
        """Finished steps, of which those after the newest commit would be lost in a crash."""
        return max(self.progress.step, self.commit.step if self.commit else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data. What is not known is null."""
        return {
            **asdict(self),
            "run": str(self.run),
            "state": self.state.value,
            "step": self.step,
            "remaining_s": self.progress.remaining_s if self.state.is_active else None,
            "tasks": [task.to_json() for task in self.tasks],
        }


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of an array of tasks."""
    return submission_path(folder).is_file() or (
        (folder / "config.yaml").is_file() and (folder / "plan.json").is_file()
    )


def ask_slurm(ids: Sequence[str]) -> list[SlurmJob]:
    """The jobs with these numbers that SLURM still knows."""
    return slurm.jobs(ids=ids)


def read_status(run: Path, ask: Ask = ask_slurm) -> Status:
    """The state of a run.

    Args:
        run: its folder, or that of an array.
        ask: gives the jobs with some numbers, or raises LaunchError.

    Raises:
        LaunchError: there is no run in that folder, or it cannot be read.
    """
    try:
        return _read_status(run, ask)
    except OSError as error:
        raise LaunchError(
            f"{error.filename or run}: cannot be read: {error.strerror or error}; ask the owner of the run"
        ) from error


def _read_status(run: Path, ask: Ask) -> Status:
    if not is_run(run):
        raise LaunchError(
            f"{run}: is no run folder, for it holds neither {submission_path(run).relative_to(run)} nor a config.yaml "
            f"with its plan.json; name the folder that run=... named"
        )
    run = run.absolute()
    submission = read_submission(run) if submission_path(run).is_file() else None
    notes: list[str] = []
    attempts = read_attempts(run) or _started_by_hand(run)
    jobs = _own_jobs(submission, attempts, ask, notes)
    if submission and submission.array_tasks is not None and submission.array_task is None:
        return _array_status(run, submission, jobs, notes)
    try:
        commit, unreadable = newest_commit(run), []
    except (CheckpointError, ConfigError) as error:
        commit, unreadable = None, [f"the checkpoints are out of reach: {error}"]
    progress, asked = read_progress(run), not notes
    is_alive = _is_alive(run, submission, attempts, asked=asked)
    finished = _is_finished(run, submission, attempts, progress, commit)
    cancelled = cancel_requested(run)
    state, why = judge(jobs, attempts, finished=finished, is_alive=is_alive, asked=asked, cancelled=cancelled)
    beats, silence = _ranks(run, state, attempts, progress)
    return Status(
        run,
        state,
        why,
        tuple(attempts),
        jobs,
        progress,
        commit,
        None if state is State.FINISHED else _first_failure(run, attempts),
        beats,
        silence,
        (*notes, *unreadable),
    )


def _is_finished(
    run: Path, submission: Submission | None, attempts: Sequence[Attempt], progress: Progress, commit: Commit | None
) -> bool:
    if not attempts or (submission and attempts[-1].number < submission.first_attempt):
        # What was submitted since may be longer.
        return False
    step = commit.step if commit else 0
    if commit is None and (run / CHECKPOINTS_REMOVED).exists():
        # As a search of learning rates does when the score is known.
        step = progress.step
    is_last = progress.total_steps is not None and step >= progress.total_steps
    return is_last or attempts[-1].exit_code == 0


def _ranks(
    run: Path, state: State, attempts: Sequence[Attempt], progress: Progress
) -> tuple[tuple[Beat, ...], Silence | None]:
    """Where the ranks of the attempt that runs stand, and which of them keep it waiting."""
    if state is not State.RUNNING or not attempts or attempts[-1].ended_unix_s is not None:
        return (), None
    newest = attempts[-1]
    # Clocks of nodes differ a little.
    begun = newest.started_unix_s - 1
    beats = [beat for beat in read_beats(run) if beat.rank < newest.ranks and beat.unix_s >= begun]
    is_recorded = (progress.recorded_unix_s or 0) > begun
    step_s = progress.step_s if is_recorded else None
    silence = find_silence(beats, time.time(), ranks=newest.ranks, since=newest.started_unix_s, step_s=step_s)
    return tuple(beats), silence


def _array_status(run: Path, submission: Submission, jobs: Sequence[SlurmJob], notes: list[str]) -> Status:
    tasks = []
    for number in range(submission.array_tasks or 0):
        folder = task_folder(run, number)
        mine = jobs_of_task(submission, number, jobs)
        attempts = read_attempts(folder)
        own = read_submission(folder) if attempts and submission_path(folder).is_file() else submission
        finished = _is_finished(folder, own, attempts, Progress(), commit=None)
        cancelled = cancel_requested(folder)
        state, why = judge(mine, attempts, finished=finished, is_alive=False, cancelled=cancelled)
        failure = _first_failure(folder, attempts) if state is State.FAILED else None
        tasks.append(Status(folder, state, why, tuple(attempts), tuple(mine), failure=failure))
    counts = {state: sum(task.state is state for task in tasks) for state in State}
    told = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    # What goes on by itself comes first, and what needs a person before what does not.
    order = (State.RUNNING, State.WAITING, State.FAILED, State.STOPPED, State.NEW, State.FINISHED)
    state = next(state for state in order if counts[state])
    why = f"{len(tasks)} tasks: {told}"
    return Status(run, state, why, jobs=tuple(jobs), notes=tuple(notes), tasks=tuple(tasks))


def _own_jobs(
    submission: Submission | None,
    attempts: Sequence[Attempt],
    ask: Ask,
    notes: list[str],
) -> tuple[SlurmJob, ...]:
    """The jobs of a run that SLURM knows and that may be at work, oldest first."""
    try:
        if submission:
            return tuple(own_jobs(submission, job_ids(submission, attempts), ask))
        # Of a run that was started by hand, only the newest attempt can be at work.
        newest = attempts[-1].job if attempts else ""
        return tuple(ask([newest])) if newest else ()
    except LaunchError as error:
        notes.append(f"the queue is out of reach: {error}")
        return ()


def _started_by_hand(run: Path) -> list[Attempt]:
    """The attempts of a run that was not submitted, but started by srun, torchrun or --nproc."""
    path = run / "attempts.jsonl"
    if not path.is_file():
        return []
    try:
        return [_attempt_by_hand(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LaunchError(
            f"{path}: is no list of attempts ({type(error).__name__}: {error}); move it aside, the run itself "
            f"continues from its checkpoints"
        ) from error


def _attempt_by_hand(record: dict[str, Any]) -> Attempt:
    return Attempt(
        number=record["attempt"],
        job=record.get("slurm_job_id") or "",
        restart=0,
        nodes=record["host"],
        ranks=record["world_size"],
        started_unix_s=record["started_unix_s"],
        started_step=record.get("restored_step"),
        ended_unix_s=None,
        exit_code=None,
        reason=None,
        ended_step=None,
    )


def _first_failure(run: Path, attempts: Sequence[Attempt]) -> RankError | None:
    """What the first rank that failed in the newest attempt said. Those that it took down are left out."""
    if not attempts:
        return None
    errors = read_errors(errors_folder(run, attempts[-1].number))
    own = [error for error in errors if not error.is_victim and error.kind != Interrupted.__name__]
    return min(own, key=lambda error: (error.unix_s, error.rank), default=None)


def _is_alive(run: Path, submission: Submission | None, attempts: Sequence[Attempt], *, asked: bool) -> bool:
    """Whether someone is at work in this folder, whom SLURM does not tell of."""
    if (submission and local_process(submission)) or _is_locked(run):
        return True
    if not attempts or attempts[-1].ended_unix_s is not None:
        return False
    by_slurm = submission is not None and submission.executor == "slurm"
    if (by_slurm and asked) or attempts[-1].nodes == socket.gethostname():
        return False
    last_sign = max([attempts[-1].started_unix_s, *(beat.unix_s for beat in read_beats(run))])
    return time.time() - last_sign < ALIVE_S


def _is_locked(run: Path) -> bool:
    """Whether a process keeps others from training in this folder."""
    path = run / ".lock"
    if not path.exists():
        return False
    lock = Lock(path)
    try:
        taken = lock.take()
    except OSError:
        # A reader of another's run may not open the file for writing; the heartbeats tell, too.
        return False
    lock.release()
    return not taken
