"""Checks that a run can start, made on the login node instead of after hours in the queue."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.loader import load_config
from vitscale.data.shard_set import open_evaluation_set, open_training_data
from vitscale.errors import LaunchError
from vitscale.plan import RunPlan


def check_run(config_file: Path, overrides: Sequence[str], *, world_size: int) -> list[tuple[str, str]]:
    """The rows of the run's plan on ``world_size`` ranks.

    Raises:
        VitscaleError: the configuration is wrong, a shard set is missing, does not match its index or does not fit
            the head, the global batch cannot be shared by the ranks, or the run folder cannot be written.
    """
    config = load_config(config_file, overrides)
    train_set = open_training_data(config.data, global_batch_size=config.global_batch_size)
    if config.data.eval is not None:
        open_evaluation_set(
            config.data.eval,
            config.data.storage,
            num_classes=config.model.num_classes,
            classes=train_set.classes,
        )
    _check_writable(config.run)
    return [*RunPlan.create(config, world_size, train_set).describe(), ("run", str(config.run))]


def _check_writable(run: Path) -> None:
    """Write a nameless file to the first folder that exists on the way to the run folder."""
    folder = run
    try:
        folder = next(path for path in (run, *run.absolute().parents) if path.exists())
        # Access bits tell little of read-only mounts, of quotas, and of root on a network file system.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise LaunchError(
            f"run: {folder} cannot be written: {error.strerror}; choose another folder with run=..."
        ) from error
