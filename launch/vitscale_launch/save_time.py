"""How long a step and a save took in the earlier attempts of a run, from what they left in its folder."""

from __future__ import annotations

from vitscale.checkpoint.folder import MANIFEST, LocalFolder
from vitscale.checkpoint.format import read_manifest, step_of
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.config.schema import TrainConfig
from vitscale.errors import CheckpointError
from vitscale.train.records import read_records

# A save ends while training goes on, so records follow it; the last one of an attempt may lack them for so long.
_AFTER_LAST_RECORD_S = 60.0


def step_and_save_s(config: TrainConfig) -> float | None:
    """Seconds that the slowest known save and a step took; None if no save was measured.

    Only checkpoints in a folder of this file system tell: a save begins at the time that its manifest names and ends
    when the manifest is written.
    """
    records = [record for record in read_records(config.run / "metrics.jsonl") if "unix_s" in record]
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
