"""What ``vitscale checkpoint`` does with the checkpoints of a run. Only what reads tensors imports torch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitscale.checkpoint.folder import DAMAGED, STAGING, CheckpointFolder, LocalFolder
from vitscale.checkpoint.format import Checkpoint, DamagedCheckpointError, read_manifest, step_of
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.checkpoint.retention import Retention
from vitscale.config.loader import load_config
from vitscale.config.schema import CheckpointConfig, TrainConfig
from vitscale.durable import Lock
from vitscale.errors import CheckpointError

ROLLED_BACK = "rolled-back-"
COMPLETE, UNREADABLE = "complete", "unreadable"

logger = logging.getLogger(__name__)

Advance = Callable[[str, int, int], None]
"""Told the name of a checkpoint, how many of its bytes were read, and of how many."""


@dataclass(frozen=True)
class Place:
    """Where checkpoints lie, and the run that they are of, if that is known."""

    folder: CheckpointFolder
    run: Path | None = None
    config: TrainConfig | None = None


@dataclass(frozen=True)
class Entry:
    """What lies in the folder under one name."""

    name: str
    step: int
    state: str
    """complete, damaged, unreadable, set aside, or staged: that is being written, or was left by a dead attempt."""
    fault: str = ""
    checkpoint: Checkpoint | None = None
    size_bytes: int | None = None
    """None if it is not known."""
    latest: bool = False
    """Whether the next start takes it."""


def find_place(given: str) -> Place:
    """The checkpoints of a run folder, or of a folder or URL that holds nothing but checkpoints.

    Raises:
        CheckpointError: there is no such folder.
        ConfigError: the configuration of the run cannot be read.
    """
    if "://" in given:
        return Place(checkpoint_folder(Path(), CheckpointConfig(folder=given)))
    path = Path(given)
    inside = path.name == "checkpoints" and not (path / "config.yaml").is_file()
    run = path.absolute().parent if inside else path
    if (run / "config.yaml").is_file():
        config = load_config(run / "config.yaml")
        return Place(checkpoint_folder(run, config.checkpoint), run, config)
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            return Place(LocalFolder(folder))
    raise CheckpointError(f"{given}: no such folder; give a run folder, or the folder or URL of its checkpoints")


def list_entries(folder: CheckpointFolder) -> list[Entry]:
    """Everything in the folder that is or was a checkpoint, newest step first. Their contents are not read.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = set(folder.names())
        if isinstance(folder, LocalFolder):
            names |= {path.name for path in folder.path.glob(f"{STAGING}*")}
    except OSError as error:
        raise _failure(folder.location, "cannot be read", error) from error
    found = sorted(filter(None, (_entry(folder, name) for name in names)), key=lambda e: (-e.step, e.state, e.name))
    newest = next((entry for entry in found if entry.state == COMPLETE), None)
    return [dataclasses.replace(entry, latest=True) if entry is newest else entry for entry in found]


def choose(folder: CheckpointFolder, step: int | None) -> Checkpoint:
    """The complete checkpoint of a step; the newest by default. Its content is not read.

    Raises:
        CheckpointError: there is none, or it is damaged or out of reach.
    """
    faults = []
    for entry in _committed(folder, step):
        if entry.checkpoint is not None:
            return entry.checkpoint
        if entry.state == UNREADABLE:
            raise CheckpointError(entry.fault)
        faults.append(f"{entry.name}: {entry.fault}")
        if step is None:
            logger.warning("checkpoint %s is damaged (%s)", entry.name, entry.fault)
    raise CheckpointError(
        f"{folder.location}: no complete checkpoint{'' if step is None else f' of step {step}'} "
        f"({'; '.join(faults)}); take another step, or restore a copy"
    )


def verify_steps(
    folder: CheckpointFolder, step: int | None, *, every: bool, advance: Advance
) -> Iterator[tuple[str, str]]:
    """Read checkpoints and give for each its name and its fault, which is empty if there is none.

    Args:
        folder: of the checkpoints.
        step: of the one that is wanted; the newest, be it damaged or not, by default.
        every: all of them instead.
        advance: told of the bytes that were read.

    Raises:
        CheckpointError: there is none, or it is out of reach.
    """
    entries = _committed(folder, step)
    for entry in entries if every else entries[:1]:
        if entry.state == UNREADABLE:
            raise CheckpointError(entry.fault)
        yield entry.name, entry.fault if entry.checkpoint is None else content_fault(entry.checkpoint, advance)


def content_fault(checkpoint: Checkpoint, advance: Advance) -> str:
    """The fault that reading all of a checkpoint finds, or nothing.

    Raises:
        CheckpointError: it is out of reach.
    """
    from vitscale.checkpoint.verification import verify_checkpoint

    done, total = 0, sum(record.size for record in checkpoint.records)
    try:
        for more in verify_checkpoint(checkpoint):
            done += more
            advance(checkpoint.name, done, total)
    except DamagedCheckpointError as error:
        return str(error)
    return ""


@contextmanager
def not_trained(place: Place, what: str) -> Iterator[None]:
    """Keep training out for the length of a ``with`` block.

    Raises:
        CheckpointError: the run is being trained, or whether it is cannot be known.
    """
    if place.run is None:
        raise CheckpointError(
            f"{place.folder.location}: {what} needs the run folder (with config.yaml), whose lock tells whether the "
            f"run is being trained; give that"
        )
    lock = Lock(place.run / ".lock")
    try:
        taken = lock.take()
    except OSError as error:
        raise _failure(str(place.run), "cannot be locked", error) from error
    if not taken:
        raise CheckpointError(
            f"{place.run}: is being trained, and {what} would change its checkpoints meanwhile; stop the training or "
            f"wait for its end, then give the same command"
        )
    try:
        yield
    finally:
        lock.release()


def superfluous(folder: CheckpointFolder, *, keep: int, keep_every: int | None) -> list[Entry]:
    """Complete checkpoints that may go, oldest first. Of the newest complete ones, two stay at least."""
    complete = {entry.step: entry for entry in list_entries(folder) if entry.state == COMPLETE}
    return [complete[step] for step in Retention(keep, keep_every).superfluous(complete, {})]


def remove(folder: CheckpointFolder, entries: list[Entry]) -> None:
    """Remove checkpoints for good.

    Raises:
        CheckpointError: some are still there.
    """
    try:
        for entry in entries:
            folder.remove(entry.name)
        left = {entry.name for entry in entries} & set(folder.names())
    except OSError as error:
        raise _failure(folder.location, "cannot be changed", error) from error
    if left:
        raise CheckpointError(
            f"{folder.location}: {', '.join(sorted(left))} could not be removed; mend the permissions, then give the "
            f"same command"
        )


def roll_back(folder: CheckpointFolder, step: int, advance: Advance) -> list[str]:
    """Make the checkpoint of ``step`` the newest. Returns the new names of those that were newer.

    Raises:
        CheckpointError: it is absent or damaged, which is found by reading all of it; nothing was changed.
    """
    target = choose(folder, step)
    if fault := content_fault(target, advance):
        raise CheckpointError(f"{target.shown}: is damaged ({fault}); nothing was changed; take another step")
    newer = [entry for entry in _committed(folder, None) if entry.step > step]
    try:
        # First of all, so that it never names what is gone.
        folder.point_latest(target.name)
        return [folder.set_aside(entry.name, ROLLED_BACK) for entry in newer]
    except OSError as error:
        raise _failure(folder.location, "cannot be changed", error) from error


def _committed(folder: CheckpointFolder, step: int | None) -> list[Entry]:
    """What lies under the names of checkpoints, newest first, or only that of one step."""
    entries = [entry for entry in list_entries(folder) if step_of(entry.name) is not None]
    if not entries:
        raise CheckpointError(f"{folder.location}: holds no checkpoint; train first, or give another folder")
    if step is None:
        return entries
    if wanted := [entry for entry in entries if entry.step == step]:
        return wanted
    known = ", ".join(str(entry.step) for entry in entries)
    raise CheckpointError(f"{folder.location}: no checkpoint of step {step}; there are: {known}")


def _entry(folder: CheckpointFolder, name: str) -> Entry | None:
    step = step_of(name)
    if step is None:
        for prefix, state in ((STAGING, "staged"), (DAMAGED, "set aside"), (ROLLED_BACK, "set aside")):
            step = step_of(name.removeprefix(prefix))
            if name.startswith(prefix) and step is not None:
                return Entry(name, step, state, size_bytes=_local_size(folder, name))
        return None
    try:
        checkpoint = read_manifest(folder, name)
    except DamagedCheckpointError as error:
        return Entry(name, step, "damaged", str(error), size_bytes=_local_size(folder, name))
    except CheckpointError as error:
        return Entry(name, step, UNREADABLE, str(error), size_bytes=_local_size(folder, name))
    except OSError as error:
        return Entry(name, step, UNREADABLE, str(_failure(f"{folder.location}/{name}", "cannot be read", error)))
    size = sum(record.size for record in checkpoint.records)
    return Entry(name, step, COMPLETE, checkpoint=checkpoint, size_bytes=size)


def _local_size(folder: CheckpointFolder, name: str) -> int | None:
    """Bytes of the files of what is no complete checkpoint, which may vanish meanwhile."""
    if not isinstance(folder, LocalFolder):
        return None
    try:
        return sum(path.stat().st_size for path in (folder.path / name).iterdir() if path.is_file())
    except OSError:
        return None


def _failure(what: str, problem: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"{what}: {problem}: {error.strerror or error}; mend the permissions or the mount")
