"""How far a run is, from what it wrote into its folder. Needs no SLURM, and nobody who is alive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.checkpoint.commands import COMPLETE, find_place, list_entries
from vitscale.errors import CheckpointError
from vitscale.train.heartbeat import Beat, Phase

# Enough of the end of metrics.jsonl for some hundred records.
TAIL_BYTES = 1 << 16
# A rank that has been at one place for so long, and for so many steps' time, hangs.
SILENT_S = 120.0
SILENT_STEPS = 20
# A first step compiles and may read a checkpoint from afar.
SILENT_AT_START_S = 1200.0
_PHASES = [phase.value for phase in Phase]


@dataclass(frozen=True)
class Progress:
    """The last records of a run. None where nothing is recorded yet."""

    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    images_per_s: float | None = None
    """While it trains, evaluations and saves not counted."""
    step_s: float | None = None
    """Seconds of a step in the newest attempt, evaluations and saves counted."""
    recorded_unix_s: float | None = None
    attempt: int | None = None

    @property
    def remaining_s(self) -> float | None:
        """Of training, without time in the queue."""
        if self.total_steps is None or self.step_s is None:
            return None
        return max(0, self.total_steps - self.step) * self.step_s


@dataclass(frozen=True)
class Commit:
    """The newest complete checkpoint."""

    step: int
    unix_s: float | None
    location: str


@dataclass(frozen=True)
class Silence:
    """Ranks that keep a run waiting."""

    ranks: tuple[Beat, ...]
    """The suspects, by rank."""
    seconds: float
    """Since the last of all ranks has moved."""
    missing: tuple[int, ...] = ()
    """Ranks that have told nothing in this attempt."""


def read_progress(run: Path) -> Progress:
    """The state of a run by its records; an empty one if there are none."""
    plan = _json_file(run / "plan.json")
    records = [record for record in _tail(run / "metrics.jsonl") if "loss" in record]
    total = plan.get("total_steps")
    if not records:
        return Progress(total_steps=total)
    last = records[-1]
    same_attempt = [record for record in records if record.get("attempt") == last.get("attempt")]
    return Progress(
        step=last["step"],
        total_steps=total,
        loss=last["loss"],
        images_per_s=last.get("images_per_s"),
        step_s=_step_seconds(same_attempt, plan.get("global_batch_size")),
        recorded_unix_s=last.get("unix_s"),
        attempt=last.get("attempt"),
    )


def newest_commit(run: Path) -> Commit | None:
    """The checkpoint that the next start takes, or None if there is none.

    Raises:
        CheckpointError: the folder of the checkpoints cannot be read.
        ConfigError: the run's configuration cannot be read.
    """
    if not (run / "config.yaml").is_file() and not (run / "checkpoints").is_dir():
        return None
    place = find_place(str(run))
    try:
        entries = list_entries(place.folder)
    except CheckpointError:
        # A run that has not come to its first save has no folder of checkpoints yet.
        if "://" not in place.folder.location and not Path(place.folder.location).exists():
            return None
        raise
    newest = next((entry for entry in entries if entry.state == COMPLETE), None)
    if newest is None or newest.checkpoint is None:
        return None
    return Commit(newest.step, newest.checkpoint.content.get("created_unix_s"), place.folder.location)


def find_silence(
    beats: Sequence[Beat], now: float, *, ranks: int, since: float, step_s: float | None
) -> Silence | None:
    """The ranks that keep the others waiting, or None while the run moves.

    When one rank hangs, the others come to their next collective operation and wait there. So those that are furthest
    behind, by step and then by phase, are the suspects.

    Args:
        beats: what the ranks have told in this attempt.
        now: Unix seconds.
        ranks: of this attempt.
        since: when this attempt began, in Unix seconds.
        step_s: seconds of a step; None before the first steps of this attempt are recorded.
    """
    seconds = now - max((beat.unix_s for beat in beats), default=since)
    missing = tuple(sorted(set(range(ranks)) - {beat.rank for beat in beats}))
    starts = step_s is None or bool(missing)
    if seconds < (SILENT_AT_START_S if starts else max(SILENT_S, SILENT_STEPS * (step_s or 0))):
        return None
    places = {_place(beat) for beat in beats}
    behind = [beat for beat in beats if len(places) > 1 and _place(beat) == min(places)]
    return Silence(tuple(behind), seconds, missing)


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, _PHASES.index(beat.phase) if beat.phase in _PHASES else len(_PHASES)


def _step_seconds(records: Sequence[dict[str, Any]], global_batch_size: int | None) -> float | None:
    timed = [(record["step"], record["unix_s"]) for record in records if record.get("unix_s")]
    if timed:
        (first, begin_s), (last, end_s) = timed[0], timed[-1]
        if last > first and end_s > begin_s:
            return float((end_s - begin_s) / (last - first))
    rate = records[-1].get("images_per_s")
    return global_batch_size / rate if global_batch_size and rate else None


def _tail(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    # The first line may have lost its beginning, the last one may not be finished.
    found = (_parsed(line) for line in lines)
    return [record for record in found if "step" in record]


def _json_file(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return {}


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
