"""How long a step and a save took in the earlier attempts of a run, from what they left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitscale.checkpoint.folder import MANIFEST, LocalFolder
from vitscale.checkpoint.format import read_manifest, step_of
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.config.schema import TrainConfig
from vitscale.errors import CheckpointError

# A save ends while training goes on, so records follow it; the last one of an attempt may lack them for so long.
_AFTER_LAST_RECORD_S = 60.0


def step_and_save_s(config: TrainConfig) -> float | None:
    """Seconds that the slowest known save and a step took; None if no save was measured.

    Only checkpoints in a folder of this file system tell: a save begins at the time that its manifest names and ends
    when the manifest is written.
    """
    records = _records(config.run / "metrics.jsonl")
    folder = checkpoint_folder(config.run, config.checkpoint)
    if not records or not isinstance(folder, LocalFolder) or not folder.path.is_dir():
        return None
    last_record = max(float(record["unix_s"]) for record in records)
    saves = [times for name in folder.names() if step_of(name) is not None and (times := _times(folder, name))]
    # In a folder that was copied, all files are of the time of the copy.
    measured = [end - start for start, end in saves if start <= end <= last_record + _AFTER_LAST_RECORD_S]
    if not measured:
        return None
    rates = [rate for record in records if (rate := record.get("images_per_s"))]
    return max(measured) + (config.global_batch_size / rates[-1] if rates else 0.0)


def _times(folder: LocalFolder, name: str) -> tuple[float, float] | None:
    """When the save of a checkpoint began and ended, in Unix seconds."""
    try:
        begun = read_manifest(folder, name).content["created_unix_s"]
        return float(begun), (folder.path / name / MANIFEST).stat().st_mtime
    except (OSError, KeyError, CheckpointError):
        # Removed meanwhile, damaged, or of a version that did not note it: it tells nothing.
        return None


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of training steps."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [record for line in lines if (record := _parse(line)) is not None]
    return [record for record in records if "unix_s" in record]


def _parse(line: str) -> dict[str, Any] | None:
    """A record, or None for the torn last line of a killed process."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
