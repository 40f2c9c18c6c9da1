"""What a checkpoint consists of: a manifest, and one file of fragments per rank. docs/checkpoints.md describes it.

A *fragment* is a contiguous range of one flattened parameter, or of one of its moments, that one rank owned; a buffer
is one fragment of rank 0. A rank's file is a safetensors file of its fragments, named PARAMETER|KIND|START. The
manifest names each file with its size and the CRC-32 of each of its blocks, and tells which rank owned what by two
numbers per parameter.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitscale.checkpoint.folder import CheckpointFolder
from vitscale.errors import CheckpointError

FORMAT = "vitscale-checkpoint"
FORMAT_VERSION = 2
MANIFEST_DIGEST = "manifest_sha256"
# Each has a checksum of its own, so that a reader verifies what it reads and nothing else.
BLOCK_BYTES = 4 << 20

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's."""
MOMENTUM = ("momentum_buffer",)
"""SGD's."""
AVERAGE = "ema"
BUFFER = "buffer"

_STEP_NAME = re.compile(r"step-(\d{9,})")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's content is not what was committed; an earlier one may do."""


class FileRecord(NamedTuple):
    """A file of a checkpoint as the manifest knows it."""

    name: str
    size: int
    crc32: tuple[int, ...]
    """Of each block of ``BLOCK_BYTES``, the last of which may be shorter."""


class Layout(NamedTuple):
    """How the elements of a flattened parameter, and of its moments, were spread over ranks: element ``e`` was owned by
    rank ``(offset + e) // size``."""

    offset: int
    size: int

    def first_of(self, rank: int) -> int:
        """The first element that a rank owned, if it owned any; those of the next rank begin where its own end."""
        return max(0, rank * self.size - self.offset)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Its files have their sizes; what is in them is verified where it is read."""

    folder: CheckpointFolder
    name: str
    content: dict[str, Any]
    """The manifest's own keys."""
    records: tuple[FileRecord, ...]

    @property
    def shown(self) -> str:
        """Where it is, for messages."""
        return f"{self.folder.location}/{self.name}"

    @property
    def step(self) -> int:
        """Step after which it was taken."""
        return int(self.content["step"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Logical shape of each parameter, by its state-dict name."""
        return {name: list(entry["shape"]) for name, entry in self.content["parameters"].items()}

    @property
    def buffers(self) -> dict[str, list[int]]:
        """Shape of each persistent buffer, by its state-dict name."""
        return {name: list(entry["shape"]) for name, entry in self.content.get("buffers", {}).items()}

    @property
    def digests(self) -> dict[str, int]:
        """Of the whole state by kind, see :mod:`vitscale.checkpoint.digest`."""
        return {kind: int(digest, 16) for kind, digest in self.content["digests"].items()}

    def layout(self, name: str) -> Layout:
        """How a parameter or a buffer was spread."""
        entry = self.content["parameters"].get(name) or self.content["buffers"][name]
        return Layout(int(entry["offset"]), int(entry["size"]))


def step_name(step: int) -> str:
    """Name of a checkpoint."""
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    """Name of a rank's file of fragments."""
    return f"rank-{rank:05d}.safetensors"


def fragment_key(parameter: str, kind: str, start: int) -> str:
    """Name of a fragment in its file."""
    return f"{parameter}|{kind}|{start}"


def other_data(checkpoint: Checkpoint) -> CheckpointError:
    """The error of a checkpoint that was trained on other data than those that are there now."""
    return CheckpointError(
        f"{checkpoint.shown}: was trained on other data: another content of the shards, or other shares of a "
        f"mixture (data.train); the order of samples would change in the middle of the run: bring back the shards "
        f"and the shares, or start another run folder, or, if this is meant, add --allow-change data.train"
    )


def manifest_text(content: dict[str, Any], records: list[FileRecord]) -> bytes:
    """The manifest, which holds a digest of itself."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **content,
        "block_bytes": BLOCK_BYTES,
        "files": [record._asdict() for record in records],
    }
    manifest[MANIFEST_DIGEST] = _digest(manifest)
    return json.dumps(manifest, indent=1).encode()


def read_manifest(folder: CheckpointFolder, name: str) -> Checkpoint:
    """Open a checkpoint: its manifest is unchanged and all its files have their sizes.

    Raises:
        DamagedCheckpointError: that is not so.
        CheckpointError: it has another format.
        OSError: it is out of reach, which is no reason to give it up.
    """
    try:
        text = folder.read_manifest(name)
        if text is None:
            raise DamagedCheckpointError("it has no manifest")
        manifest = json.loads(text)
        if manifest.pop(MANIFEST_DIGEST) != _digest(manifest):
            raise DamagedCheckpointError("its manifest was changed")
        if (written := (manifest.pop("format"), manifest.pop("format_version"))) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(
                f"{folder.location}/{name}: has format {written[0]} version {written[1]}; this vitscale reads {FORMAT} "
                f"version {FORMAT_VERSION}: use the vitscale that wrote it, or another run folder"
            )
        if step_name(manifest["step"]) != name:
            raise DamagedCheckpointError(f"its manifest is of step {manifest['step']}")
        if manifest.pop("block_bytes") != BLOCK_BYTES:
            raise DamagedCheckpointError("its blocks have another size")
        records = tuple(FileRecord(str(f["name"]), int(f["size"]), tuple(f["crc32"])) for f in manifest.pop("files"))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DamagedCheckpointError(f"unreadable manifest ({error!r})") from error
    if not records:
        raise DamagedCheckpointError("its manifest names no files")
    for record in records:
        _check_size(folder, name, record)
    return Checkpoint(folder, name, manifest, records)


def _check_size(folder: CheckpointFolder, name: str, record: FileRecord) -> None:
    plain = "/" not in record.name and record.name not in ("", ".", "..")
    size = folder.file_size(name, record.name) if plain else None
    if size is None:
        raise DamagedCheckpointError(f"{record.name} is missing")
    if size != record.size:
        raise DamagedCheckpointError(f"{record.name} has {size} of {record.size} bytes")
    if len(record.crc32) != -(-size // BLOCK_BYTES):
        raise DamagedCheckpointError(f"its manifest has {len(record.crc32)} checksums for {size} bytes")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
