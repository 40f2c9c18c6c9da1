"""How a checkpoint becomes visible: staged, verified, committed, pointed at, pruned.

Layout under the run's ``checkpoints`` folder::

    .staging-step-000001000/    being written or removed; never read
    step-000001000/             complete: manifest.json names every file with size and SHA-256
    damaged-step-000002000/     was found incomplete or changed and moved aside
    latest                      name of the newest complete checkpoint, for people and scripts

A commit is one rename of the staging folder after every rank's file and the manifest are on disk. A process killed
at any moment leaves either the complete checkpoint or none, and ``latest`` never names a folder that is not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitscale.distributed import Ranks
from vitscale.durable import publish_text, sync_folder
from vitscale.errors import CheckpointError

logger = logging.getLogger(__name__)

FORMAT = "vitscale-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest_sha256"
LATEST = "latest"
STAGING = ".staging-"
DAMAGED = "damaged-"
_STEP_NAME = re.compile(r"step-(\d{9,})")


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
        try:
            records = self._ranks.on_all(lambda: _write_file(staging / name, write))
            self._ranks.on_main(lambda: self._publish(target, staging, content, records))
        except CheckpointError:
            # No rank writes any more, and what they wrote lies on a disk that may be full.
            if self._ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and unchanged, agreed by all ranks; ``None`` if there is none.

        Broken ones are moved aside and named in the log.

        Raises:
            CheckpointError: some rank cannot read the folder, or a checkpoint has another format; nothing was moved.
        """
        found: Checkpoint | None = None
        faults: dict[str, str] = {}
        for name in self._ranks.on_main(lambda: step_names(self.folder)):
            found, fault = self._verify(self.folder / name)
            if found is not None:
                break
            faults[name] = fault
        self._ranks.on_main(lambda: self._settle(found, faults))
        return found

    def read(self, checkpoint: Checkpoint, read: Callable[[list[Path]], None]) -> None:
        """Read a checkpoint on all ranks.

        Args:
            checkpoint: what :meth:`newest` gave.
            read: takes this rank's share from the fragment files of all ranks. Not collective.

        Raises:
            CheckpointError: some rank could not read, or the checkpoint does not fit.
        """
        self._ranks.on_all(lambda: read(checkpoint.files))

    def _verify(self, path: Path) -> tuple[Checkpoint | None, str]:
        """The checkpoint, or its fault. The files' digests are shared out over the ranks."""
        checkpoint, fault = self._ranks.on_main(lambda: _inspect(path))
        if checkpoint is None:
            return None, fault
        mine = checkpoint.records[self._ranks.topology.rank :: self._ranks.world_size]
        fault = next(filter(None, self._ranks.on_all(lambda: _first_change(path, mine))), "")
        return (None, fault) if fault else (checkpoint, "")

    def _settle(self, found: Checkpoint | None, faults: dict[str, str]) -> None:
        """Point ``latest`` to what is taken, then move the broken ones aside."""
        try:
            if found is not None:
                _point_latest(found.path)
            elif faults:
                logger.warning("none of the %d checkpoints in %s is complete", len(faults), self.folder)
                (self.folder / LATEST).unlink(missing_ok=True)
                sync_folder(self.folder)
            for name, fault in faults.items():
                logger.warning("checkpoint %s is damaged (%s); moved to %s", name, fault, DAMAGED + name)
                aside = self.folder / (DAMAGED + name)
                if aside.exists():
                    shutil.rmtree(aside)
                (self.folder / name).rename(aside)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot move damaged checkpoints aside or write {LATEST}: {error.strerror}; "
                f"free space or mend the permissions, then start the same command"
            ) from error

    def _stage(self, target: Path, staging: Path) -> bool:
        """Make an empty staging folder, or tell that this step is committed already."""
        try:
            if target.exists():
                return True
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            for left_over in self.folder.glob(f"{STAGING}*"):
                _remove(left_over)
            staging.mkdir()
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
        manifest[MANIFEST_DIGEST] = _manifest_digest(manifest)
        try:
            publish_text(staging / MANIFEST, json.dumps(manifest, indent=1))
            sync_folder(staging)
            staging.rename(target)
            _point_latest(target)
            names = step_names(self.folder)
            # Counted from the new one on, which is the newest unless someone commits out of order.
            for name in names[names.index(target.name) + self._keep :]:
                _remove(self.folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot commit: {error.strerror}; the earlier checkpoints are intact: free space or mend "
                f"the disk, then start the same command"
            ) from error


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:09d}"


def step_names(folder: Path) -> list[str]:
    """Names of the committed checkpoints, newest first. Other names, such as those of copies, are left alone.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}; mend the permissions or mount") from error
    return sorted(names, key=_step_of, reverse=True)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def open_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """Open one checkpoint for reading alone, with its digests verified; the newest complete one by default.

    Raises:
        CheckpointError: there is none, or the one asked for is damaged.
    """
    names = step_names(folder)
    if step is not None:
        if step_name(step) not in names:
            known = ", ".join(str(_step_of(name)) for name in names) or "none"
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {known}")
        names = [step_name(step)]
    faults = []
    for name in names:
        checkpoint, fault = _inspect(folder / name)
        if checkpoint is not None:
            fault = _first_change(checkpoint.path, checkpoint.records)
            if not fault:
                return checkpoint
        faults.append(f"{name}: {fault}")
        logger.warning("checkpoint %s is damaged (%s)", name, fault)
    if faults:
        raise CheckpointError(f"{folder}: no complete checkpoint ({'; '.join(faults)}); train again or restore a copy")
    raise CheckpointError(f"{folder}: holds no checkpoint; train first")


def _inspect(path: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint if its manifest is unchanged and all files have their sizes, else the fault."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop(MANIFEST_DIGEST) != _manifest_digest(manifest):
            return None, "its manifest was changed"
        if (written := (manifest.pop("format"), manifest.pop("format_version"))) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(
                f"{path}: has format {written[0]} version {written[1]}; this vitscale reads {FORMAT} version "
                f"{FORMAT_VERSION}: use the vitscale that wrote it, or another run folder"
            )
        if step_name(manifest["step"]) != path.name:
            return None, f"its manifest is of step {manifest['step']}"
        records = tuple(FileRecord(str(f["name"]), int(f["size"]), str(f["sha256"])) for f in manifest.pop("files"))
        fault = next(filter(None, (_misfit(path, record) for record in records)), "")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return None, f"unreadable manifest ({error!r})"
    except OSError as error:
        return None, _lost(Path(error.filename or path / MANIFEST), error)
    if not records:
        return None, "its manifest names no files"
    return (None, fault) if fault else (Checkpoint(path, manifest, records), "")


def _misfit(path: Path, record: FileRecord) -> str:
    """A fault if the file is not there or has another size; else nothing."""
    file = path / record.name
    if file.name != record.name or not file.is_file():
        return f"{record.name} is missing"
    size = file.stat().st_size
    return "" if size == record.size else f"{record.name} has {size} of {record.size} bytes"


def _first_change(path: Path, records: Sequence[FileRecord]) -> str:
    """A fault if a file's content is not what was committed; else nothing."""
    for record in records:
        try:
            if _sha256(path / record.name) != record.sha256:
                return f"{record.name} has other content"
        except OSError as error:
            return _lost(path / record.name, error)
    return ""


def _lost(file: Path, error: OSError) -> str:
    """The fault of a file that cannot be read because its content is gone.

    Raises:
        CheckpointError: the content may only be out of reach, which is no reason to give the checkpoint up.
    """
    # A file that rank 0 sees and this rank does not lies on a folder that is not mounted here.
    gone = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR) if file.name == MANIFEST else ()
    if error.errno in (errno.EIO, *gone):
        return f"{file.name} cannot be read ({error.strerror})"
    raise CheckpointError(
        f"{file}: this rank cannot read it: {error.strerror}; no checkpoint was changed: mend the permissions or the "
        f"mount of the run folder, which all ranks share, then start the same command"
    ) from error


def _remove(path: Path) -> None:
    """Hide a folder, so that nobody takes it for complete, and remove it."""
    hidden = path if path.name.startswith(STAGING) else path.with_name(STAGING + path.name)
    try:
        path.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        # NFS keeps files that others have open. The next commit tries again.
        logger.warning("%s cannot be removed yet: %s", path, error.strerror)


def _point_latest(target: Path) -> None:
    """Make the rename of ``target`` durable, then let ``latest`` name it."""
    pointer = target.with_name(LATEST)
    sync_folder(target.parent)
    if not (pointer.exists() and pointer.read_bytes() == f"{target.name}\n".encode()):
        publish_text(pointer, f"{target.name}\n")
        sync_folder(target.parent)


def _write_file(path: Path, write: Callable[[Path], None]) -> FileRecord:
    try:
        if not path.parent.is_dir():
            raise CheckpointError(
                f"{path.parent}: rank 0 made this folder, but this rank does not see it; the run folder must be on a "
                f"file system that all ranks share"
            )
        write(path)
        # Whoever may read the folder may read the file; safetensors makes it private.
        path.chmod(path.parent.stat().st_mode & 0o666)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return FileRecord(path.name, path.stat().st_size, _sha256(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror}; free space or mend the disk") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
