"""The place of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

from vitscale.checkpoint.folder import CheckpointFolder, LocalFolder
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.config.schema import CheckpointConfig
from vitscale.data.storage.drivers import is_path, package_of, without_secrets
from vitscale.errors import ConfigError


def checkpoint_folder(run: Path, config: CheckpointConfig) -> CheckpointFolder:
    """Where the checkpoints of a run lie. Nothing is asked of a storage yet.

    Raises:
        ConfigError: no checkpoints can lie there.
        DataError: the URL names no bucket, or the package for it is not installed.
    """
    place = config.folder
    if place is None:
        return LocalFolder(run / "checkpoints")
    if package_of(place):
        return ObjectFolder(place)
    if place.startswith("file:///"):
        return LocalFolder(Path(place.removeprefix("file://")))
    if place and is_path(place):
        return LocalFolder(Path(place).absolute())
    raise ConfigError(
        f"checkpoint.folder: {without_secrets(place)!r} cannot hold checkpoints; give a folder that all ranks share, "
        f"s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    )
