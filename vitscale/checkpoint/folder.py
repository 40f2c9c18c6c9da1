"""Where the checkpoints of a run lie, and how one becomes visible there.

RUN/checkpoints/
    .staging-step-000001000/    being written or removed; never read
    step-000001000/             complete: manifest.json names every file with its size and checksums
    damaged-step-000002000/     was found incomplete or changed and moved aside
    latest                      name of the newest complete checkpoint, for people and scripts
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vitscale.durable import publish_text, sync_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
STAGING = ".staging-"
DAMAGED = "damaged-"


class CheckpointFolder(Protocol):
    """The checkpoints of one run. Methods raise OSError; several ranks may call them at a time. Picklable: rank 0 tells
    the others what it has found."""

    location: str
    """The folder or URL, for messages."""

    def names(self) -> list[str]:
        """Names in it that may be those of complete checkpoints, in any order."""

    def read_manifest(self, name: str) -> bytes | None:
        """The manifest of a checkpoint; None if there is none."""

    def file_size(self, name: str, file: str) -> int | None:
        """Bytes of a file of a checkpoint; None if it is not there."""

    def read(self, name: str, file: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end."""

    def stage(self, name: str) -> None:
        """Prepare for a checkpoint that is to be written."""

    def write(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Write a file of a staged checkpoint. It is on the disk when this returns."""

    def publish(self, name: str, manifest: bytes) -> None:
        """Make a staged checkpoint visible, in one step and durably."""

    def discard(self, name: str) -> None:
        """Remove what was staged, as far as that is possible."""

    def point_latest(self, name: str | None) -> None:
        """Say which one is the newest, for people and scripts."""

    def remove(self, name: str) -> None:
        """Remove a complete checkpoint; it is invisible before its first file is gone."""

    def set_aside(self, name: str, prefix: str) -> str:
        """Rename a checkpoint so that it is not taken any more. Returns its new name."""

    def remove_left_overs(self) -> None:
        """Remove what dead attempts have staged."""


class LocalFolder:
    """A folder on a file system that all ranks share and that renames folders in one step.

    A commit is one rename of the staging folder after every rank's file and the manifest are on the disk. A process
    that is killed at any moment leaves either the complete checkpoint or none, and ``latest`` never names a folder that
    is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)

    def names(self) -> list[str]:
        """Names of the folders in it."""
        try:
            return [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".") and entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_manifest(self, name: str) -> bytes | None:
        """The manifest of a checkpoint; None if there is none."""
        try:
            return (self.path / name / MANIFEST).read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
                return None
            raise

    def file_size(self, name: str, file: str) -> int | None:
        """Bytes of a file of a checkpoint; None if it is not there."""
        path = self.path / name / file
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, file: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from byte ``start``; fewer only at its end."""
        with (self.path / name / file).open("rb", buffering=0) as opened:
            opened.seek(start)
            pieces = []
            while length and (piece := opened.read(length)):
                pieces.append(piece)
                length -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def stage(self, name: str) -> None:
        """Make an empty staging folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        staging = self._staging(name)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()

    def write(self, name: str, file: str, blocks: Iterable[memoryview]) -> None:
        """Write a file of a staged checkpoint. It is on the disk when this returns."""
        descriptor = os.open(self._staging(name) / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for block in blocks:
                while block:
                    block = block[os.write(descriptor, block) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, name: str, manifest: bytes) -> None:
        """Make a staged checkpoint visible, in one step and durably."""
        staging = self._staging(name)
        publish_text(staging / MANIFEST, manifest.decode())
        sync_folder(staging)
        staging.rename(self.path / name)
        sync_folder(self.path)

    def discard(self, name: str) -> None:
        """Remove what was staged, as far as that is possible."""
        shutil.rmtree(self._staging(name), ignore_errors=True)

    def point_latest(self, name: str | None) -> None:
        """Let ``latest`` name a checkpoint."""
        pointer = self.path / LATEST
        if name is None:
            pointer.unlink(missing_ok=True)
        elif not (pointer.exists() and pointer.read_bytes() == f"{name}\n".encode()):
            publish_text(pointer, f"{name}\n")
        else:
            return
        sync_folder(self.path)

    def remove(self, name: str) -> None:
        """Hide a checkpoint, so that nobody takes it for complete, and remove it."""
        hidden = self._staging(name)
        try:
            (self.path / name).rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            # NFS keeps files that others have open. The next start tries again.
            logger.warning("%s cannot be removed yet: %s", self.path / name, error.strerror)

    def set_aside(self, name: str, prefix: str) -> str:
        """Rename a checkpoint so that it is not taken any more. Returns its new name."""
        aside = self.path / (prefix + name)
        if aside.exists():
            shutil.rmtree(aside)
        (self.path / name).rename(aside)
        sync_folder(self.path)
        return aside.name

    def remove_left_overs(self) -> None:
        """Remove what dead attempts have staged or not finished to remove."""
        for left_over in self.path.glob(f"{STAGING}*"):
            try:
                shutil.rmtree(left_over)
            except OSError as error:
                logger.warning("%s cannot be removed yet: %s", left_over, error.strerror)

    def _staging(self, name: str) -> Path:
        return self.path / (STAGING + name)
