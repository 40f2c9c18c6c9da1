"""How a checkpoint becomes visible: staged, verified, committed, pointed at, pruned.

Layout under the run's ``checkpoints`` folder::

    .staging-step-000001000/    being written; never read
    step-000001000/             complete: manifest.json names every file with size and SHA-256
    damaged-step-000002000/     was found incomplete or changed and moved aside
    latest                      name of the newest complete checkpoint, for people and scripts

A commit is one rename of the staging folder after every rank's file and the manifest are on disk. A process killed
at any moment leaves either the complete checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitscale.distributed import Ranks
from vitscale.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "vitscale-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
STAGING = ".staging-"
DAMAGED = "damaged-"


class FileRecord(NamedTuple):
    """A file of a checkpoint as the manifest knows it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    content: dict[str, Any]
    """The manifest's own keys, as given to :meth:`CheckpointStore.commit`."""
    records: tuple[FileRecord, ...]

    @property
    def step(self) -> int:
        """Step after which it was taken."""
        return int(self.content["step"])

    @property
    def files(self) -> list[Path]:
        """The fragment files of all ranks."""
        return [self.path / record.name for record in self.records]


class CheckpointStore:
    """The checkpoints of one run. Methods are collective.

    Args:
        folder: the run's ``checkpoints`` folder, on a file system that all ranks share.
        ranks: the ranks that write and read together.
        keep: newest complete checkpoints that survive pruning, at least 2.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        self.folder, self._ranks, self._keep = folder, ranks, keep

    def commit(self, content: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write a checkpoint on all ranks and publish it.

        Args:
            content: goes into the manifest; must have ``step``.
            write: writes this rank's state to the path it is given.

        Raises:
            CheckpointError: some rank could not write; the earlier checkpoints are untouched.
        """
        target = self.folder / step_name(content["step"])
        staging = self.folder / (STAGING + target.name)
        if self._ranks.on_main(lambda: self._stage(target, staging)):
            return target
        name = f"rank-{self._ranks.topology.rank:05d}.safetensors"
        records = self._ranks.on_all(lambda: _write_file(staging / name, write))
        self._ranks.on_main(lambda: self._publish(target, staging, content, records))
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and unchanged, agreed by all ranks; ``None`` if there is none.

        Broken ones are moved aside and named in the log.
        """
        for name in self._ranks.on_main(lambda: step_names(self.folder)):
            path = self.folder / name
            checkpoint, fault = self._ranks.on_main(lambda path=path: _inspect(path))  # type: ignore[misc]
            if checkpoint is not None:
                fault = self._verify_digests(checkpoint)
            if fault is None:
                self._ranks.on_main(lambda path=path: _point_latest(path))  # type: ignore[misc]
                return checkpoint
            self._ranks.on_main(lambda path=path, fault=fault: _move_aside(path, fault))  # type: ignore[misc]
        return None

    def _verify_digests(self, checkpoint: Checkpoint) -> str | None:
        """Share the files out over the ranks; returns the first fault found."""
        rank, world_size = self._ranks.topology.rank, self._ranks.world_size
        faults = self._ranks.gather(
            [fault for record in checkpoint.records[rank::world_size] if (fault := _changed(checkpoint.path, record))]
        )
        return next((fault for of_rank in faults for fault in of_rank), None)

    def _stage(self, target: Path, staging: Path) -> bool:
        """Make an empty staging folder, or tell that this step is committed already."""
        if target.exists():
            return True
        try:
            for left_over in self.folder.glob(f"{STAGING}*"):
                shutil.rmtree(left_over)
            staging.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{staging}: cannot create: {error.strerror}; check the run folder") from error
        return False

    def _publish(self, target: Path, staging: Path, content: dict[str, Any], records: list[FileRecord]) -> None:
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **content,
            "files": [record._asdict() for record in records],
        }
        try:
            _write_durably(staging / MANIFEST, json.dumps(manifest, indent=1))
            _sync_folder(staging)
            staging.rename(target)
            _point_latest(target)
            for name in step_names(self.folder)[self._keep :]:
                shutil.rmtree(self.folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot commit: {error.strerror}; the earlier checkpoints are intact: free space or mend "
                f"the disk, then start the same command"
            ) from error


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:09d}"


def step_names(folder: Path) -> list[str]:
    """Names of the committed checkpoints, newest first."""
    return sorted((path.name for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def open_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Open one checkpoint for reading alone, with its digests verified; the newest complete one by default.

    Raises:
        CheckpointError: there is none, or the one asked for is damaged.
    """
    names = step_names(folder)
    if step is not None:
        if step_name(step) not in names:
            known = ", ".join(str(int(name.removeprefix("step-"))) for name in names) or "none"
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {known}")
        names = [step_name(step)]
    faults = []
    for name in names:
        checkpoint, fault = _inspect(folder / name)
        if checkpoint is not None:
            fault = next((f for record in checkpoint.records if (f := _changed(checkpoint.path, record))), None)
            if fault is None:
                return checkpoint
        faults.append(f"{name}: {fault}")
        logger.warning("checkpoint %s is damaged (%s); looking for an older one", name, fault)
    if faults:
        raise CheckpointError(f"{folder}: no complete checkpoint ({'; '.join(faults)}); train again or restore a copy")
    raise CheckpointError(f"{folder}: holds no checkpoint; train first")


def _inspect(path: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint if its manifest is readable and all files have their sizes, else the fault."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        records = tuple(FileRecord(f["name"], int(f["size"]), f["sha256"]) for f in manifest.pop("files"))
        if (manifest.pop("format"), manifest.pop("format_version")) != (FORMAT, FORMAT_VERSION):
            return None, "another format"
        if step_name(manifest["step"]) != path.name:
            return None, f"its manifest is of step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"unreadable manifest ({error!r})"
    for record in records:
        file = path / record.name
        if Path(record.name).name != record.name or not file.is_file():
            return None, f"{record.name} is missing"
        if file.stat().st_size != record.size:
            return None, f"{record.name} has {file.stat().st_size} of {record.size} bytes"
    return Checkpoint(path, manifest, records), None


def _changed(path: Path, record: FileRecord) -> str | None:
    """A fault if the file's content is not what was committed."""
    try:
        return None if _sha256(path / record.name) == record.sha256 else f"{record.name} has other content"
    except OSError as error:
        return f"{record.name} cannot be read ({error.strerror})"


def _move_aside(path: Path, fault: str) -> None:
    aside = path.with_name(DAMAGED + path.name)
    logger.warning(
        "checkpoint %s is damaged (%s); moved to %s, looking for the one before", path.name, fault, aside.name
    )
    try:
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{path}: damaged, and cannot be moved aside: {error.strerror}; remove it") from error


def _point_latest(target: Path) -> None:
    """Make ``latest`` name ``target``; the folder's sync also makes the rename of ``target`` durable."""
    pointer = target.with_name(LATEST)
    if not (pointer.exists() and pointer.read_text(encoding="utf-8") == target.name + "\n"):
        fresh = target.with_name(f".{LATEST}")
        _write_durably(fresh, target.name + "\n")
        _sync_folder(target.parent)
        fresh.replace(pointer)
    _sync_folder(target.parent)


def _write_file(path: Path, write: Callable[[Path], None]) -> FileRecord:
    write(path)
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return FileRecord(path.name, path.stat().st_size, _sha256(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror}; free space or mend the disk") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
