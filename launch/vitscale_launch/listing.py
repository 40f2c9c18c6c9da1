"""All runs below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitscale.errors import LaunchError, VitscaleError
from vitscale_launch import slurm
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.status import Status, is_run, read_status


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders below a folder, itself included, by name. What lies within a run is not searched.

    Folders that cannot be read are among them, for nobody can tell.

    Raises:
        LaunchError: there is no such folder.
    """
    if not folder.is_dir():
        raise LaunchError(f"{folder}: no such folder; name one that holds run folders")
    closed: list[Path] = []
    for path, folders, _ in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        if _may_be_run(Path(path)):
            folders.clear()
            yield Path(path)
        # In place, so that os.walk follows this order and leaves hidden folders out.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from closed


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except OSError:
        # Reading its state says why it cannot be read.
        return True


def read_all(runs: Sequence[Path]) -> tuple[list[Status], list[str]]:
    """The states of runs, and what could not be found out. SLURM is asked at most once for all of them."""
    queue, found, notes = _Queue(), [], []
    for run in runs:
        try:
            found.append(read_status(run, queue.jobs))
        except VitscaleError as error:
            notes.append(str(error))
    if queue.error:
        notes.append(f"the queue is out of reach: {queue.error}")
    return found, notes


class _Queue:
    """SLURM's answer to one question, also if it is an error."""

    def __init__(self) -> None:
        self.error: LaunchError | None = None
        self._jobs: list[SlurmJob] | None = None

    def jobs(self, ids: Sequence[str]) -> list[SlurmJob]:
        if self._jobs is None and self.error is None:
            try:
                self._jobs = slurm.jobs()
            except LaunchError as error:
                self.error = error
        if self.error:
            raise self.error
        return [job for job in self._jobs or () if job.numbers & set(ids)]
