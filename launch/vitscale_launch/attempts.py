"""What became of each attempt of a submitted run: ``RUN/launch/attempts.jsonl``.

An attempt is one allocation of a job. The batch script writes its beginning and its end; the end of one whose batch
script was killed is written by the next.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.checkpoint.commands import COMPLETE, find_place, list_entries
from vitscale.durable import publish_text
from vitscale.errors import LaunchError, VitscaleError

FINISHED, PREEMPTED, TIME_LIMIT, CANCELLED = "finished", "preempted", "time limit", "cancelled"
CRASHED, LOST, UNHEALTHY = "crashed: ", "lost: ", "unhealthy: "
"""What the reason of an attempt is or begins with."""


@dataclass(frozen=True)
class Attempt:
    """One allocation of a run's job. Times are Unix seconds; None is what is not known, or not yet."""

    number: int
    """From 1."""
    job: str
    """SLURM's id of the job, or ``local``."""
    restart: int
    """How often SLURM had started the job before."""
    nodes: str
    """The nodes of the ranks, compact, such as ``gpu[003-010]``."""
    ranks: int
    started_unix_s: int
    started_step: int | None
    """Of the newest checkpoint when it began."""
    ended_unix_s: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    """How it ended: finished, preempted, time limit, cancelled, "crashed: ...", "lost: ..." or "unhealthy: ..."."""
    ended_step: int | None = None
    """Of the newest checkpoint when it ended."""
    error: str | None = None
    """What failed, without the numbers that differ from time to time."""
    error_step: int | None = None
    """The last step that was recorded before it failed."""
    excluded: tuple[str, ...] = ()
    """Nodes that later attempts leave out."""
    followed_by: str | None = None
    """What was decided at its end: "finish", "requeue", "next link" or "stop"."""
    because: str | None = None
    """Why, in a sentence."""

    @property
    def made_progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.ended_step is not None and self.ended_step > (self.started_step or 0)


_FIELDS = {field.name for field in dataclasses.fields(Attempt)}


def attempts_path(run: Path) -> Path:
    """The file that holds the attempts of a run."""
    return run / "launch" / "attempts.jsonl"


def errors_folder(run: Path, attempt: int) -> Path:
    """Where the ranks of an attempt tell why they failed."""
    return run / "launch" / "errors" / str(attempt)


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts of a run, oldest first; none if it was never started.

    Raises:
        LaunchError: the file is damaged or cannot be read.
    """
    path = attempts_path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}; check the folder") from error
    try:
        return [_attempt(json.loads(line)) for line in lines]
    except (ValueError, TypeError, AttributeError) as error:
        raise LaunchError(
            f"{path}: is no list of attempts ({error}); move it aside, the run itself continues from its checkpoints"
        ) from error


def write_attempt(run: Path, attempt: Attempt) -> None:
    """Add an attempt, or replace what is known of it."""
    attempts = {each.number: each for each in read_attempts(run)} | {attempt.number: attempt}
    lines = [json.dumps(dataclasses.asdict(attempts[number])) for number in sorted(attempts)]
    attempts_path(run).parent.mkdir(parents=True, exist_ok=True)
    publish_text(attempts_path(run), "".join(f"{line}\n" for line in lines))


def since_submission(attempts: Sequence[Attempt], first_attempt: int) -> list[Attempt]:
    """The attempts that count for decisions: a run that is submitted again starts with a clean slate.

    Args:
        attempts: all of a run.
        first_attempt: number of the first one since the last submission.
    """
    return [attempt for attempt in attempts if attempt.number >= first_attempt]


def newest_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint of a run; None if it has none, or if nobody can tell."""
    try:
        entries = list_entries(find_place(str(run)).folder)
    except (VitscaleError, OSError):
        # Decisions on restarts go on without it: an attempt of which nothing is known made no progress.
        return None
    return next((entry.step for entry in entries if entry.state == COMPLETE), None)


def last_recorded_step(run: Path) -> int | None:
    """The last step that ``metrics.jsonl`` tells of. The same failure leaves the same one."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a killed process
    return None


def _attempt(record: dict[str, Any]) -> Attempt:
    # A newer version may have added something.
    known = {name: value for name, value in record.items() if name in _FIELDS}
    return Attempt(**{**known, "excluded": tuple(known.get("excluded", ()))})
