"""What the ranks of a submitted run have printed. All attempts of a job append to the same two files of a task."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vitscale.errors import LaunchError
from vitscale_launch.hints import launch_command
from vitscale_launch.job import ATTEMPT_LINE
from vitscale_launch.status import read_status
from vitscale_launch.submission import Submission, array_folder, read_submission

STREAMS = ("out", "err")
# More than a person reads; the whole files are named in the headings.
TAIL_BYTES = 4 << 20
POLL_S = 0.5
LOOK_WHETHER_IT_RUNS_S = 10.0
_ATTEMPT = re.compile(re.escape(ATTEMPT_LINE.partition("{")[0]) + r"(\d+) ")

Write = Callable[[str], object]


def show_logs(run: Path, *, rank: int | None, attempt: int | None, lines: int, write: Write) -> None:
    """Write the ends of the logs of one rank, each behind a heading with its file.

    Args:
        run: the run folder, or that of an array or of one of its tasks.
        rank: of the run; of an array, the task. None for the first.
        attempt: only what this one said; None for all.
        lines: at most so many from the end of each file; 0 for all.
        write: takes text.

    Raises:
        LaunchError: the run was never submitted, there is no such rank, or nothing was printed yet.
    """
    submission = read_submission(run.absolute())
    told = False
    for file in log_files(submission, rank):
        text = _end(file, lines) if attempt is None else _of_attempt(_read(file), attempt)
        if shown := _last_lines(text, lines):
            write(f"==> {file} <==\n{shown}")
            told = True
    if not told:
        raise LaunchError(_nothing(run, submission, rank, attempt))


def follow_logs(run: Path, *, rank: int | None, attempt: int | None, lines: int, write: Write) -> None:
    """Like :func:`show_logs`, and then what is added, until the run neither runs nor waits.

    Raises:
        LaunchError: the run was never submitted, there is no such rank, or one attempt was asked for.
    """
    if attempt is not None:
        raise LaunchError(
            f"--follow goes on across attempts, but --attempt {attempt} asks for one; leave one of them out"
        )
    run = run.absolute()
    offsets: dict[Path, int] = {}
    newest: Path | None = None
    looked = -LOOK_WHETHER_IT_RUNS_S
    ended = ""
    while True:
        # A chain of jobs grows, and so does an array's list of them.
        for file in log_files(read_submission(run), rank):
            is_new = file not in offsets
            text, offsets[file] = _added(file, offsets.get(file, 0))
            text = _last_lines(text, lines) if is_new else text
            if text:
                write(text if file == newest else f"==> {file} <==\n{text}")
                newest = file
        if ended:
            write(ended)
            return
        if time.monotonic() - looked >= LOOK_WHETHER_IT_RUNS_S:
            status = read_status(run)
            looked = time.monotonic()
            # An attempt of which nobody tells, SLURM being out of reach, may go on.
            is_open = not status.attempts or status.attempts[-1].ended_unix_s is None
            if not status.state.is_active and not (status.notes and is_open):
                # What was printed meanwhile comes first.
                ended = f"==> {status.state.value}: {status.why} <==\n"
        if not ended:
            time.sleep(POLL_S)


def log_files(submission: Submission, rank: int | None) -> list[Path]:
    """The files of one rank that are there, those of the oldest job first.

    Raises:
        LaunchError: there is no such rank.
    """
    names = [f"{stem}_log.{stream}" for stem in _stems(submission, rank or 0) for stream in STREAMS]
    return [path for name in names if (path := submission.logs / name).is_file()]


def _stems(submission: Submission, rank: int) -> Iterator[str]:
    if submission.array_task is not None:
        _check(rank, 1, f"--rank {rank}: a task of an array has one rank, 0; leave --rank out")
        return _stems_of_task(read_submission(array_folder(submission.run)), submission.array_task)
    if submission.array_tasks is not None:
        tasks = submission.array_tasks
        _check(rank, tasks, f"--rank {rank}: is the task of an array here, and there are {tasks}, counted from 0")
        return _stems_of_task(submission, rank)
    ranks = submission.nodes_max * submission.ranks_per_node
    _check(rank, ranks, f"--rank {rank}: this run has at most {ranks} ranks, counted from 0")
    if submission.executor != "slurm":
        # One process starts all ranks.
        return (f"{job}_0" for job in submission.jobs)
    task = rank // (submission.ranks_per_node // submission.site.tasks_on_node)
    return (f"{job}_{task}" for job in submission.jobs)


def _stems_of_task(array: Submission, task: int) -> Iterator[str]:
    for job in array.jobs:
        # A single task is no array for submitit.
        yield f"{job}_0" if array.array_tasks == 1 else f"{job}_{task}_0"


def _check(rank: int, count: int, message: str) -> None:
    if rank >= count:
        raise LaunchError(message)


def _read(file: Path, offset: int = 0) -> str:
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read().decode(errors="replace")
    except OSError as error:
        raise LaunchError(f"{file}: cannot be read: {error.strerror}; ask the owner of the run") from error


def _end(file: Path, lines: int) -> str:
    return _read(file, max(0, file.stat().st_size - TAIL_BYTES) if lines else 0)


def _added(file: Path, offset: int) -> tuple[str, int]:
    """What was written since, up to the end of the last whole line, and where that ends."""
    with file.open("rb") as opened:
        opened.seek(offset)
        added = opened.read()
    whole = added[: added.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), offset + len(whole)


def _last_lines(text: str, lines: int) -> str:
    found = text.splitlines(keepends=True)
    shown = "".join(found[-lines:] if lines else found)
    return shown if not shown or shown.endswith("\n") else f"{shown}\n"


def _of_attempt(text: str, attempt: int) -> str:
    """From where the attempt announces itself to where the next one does."""
    current, kept = 0, []
    for line in text.splitlines(keepends=True):
        if match := _ATTEMPT.match(line):
            current = int(match[1])
        if current == attempt:
            kept.append(line)
    return "".join(kept)


def _nothing(run: Path, submission: Submission, rank: int | None, attempt: int | None) -> str:
    whose = f"rank {rank or 0}" if attempt is None else f"rank {rank or 0} in attempt {attempt}"
    return (
        f"{run}: {whose} has printed nothing yet, or its logs in {submission.logs} were removed; see what the run is "
        f"doing with: {launch_command('status', run)}"
    )
