"""Checks that a run can start, made on the login node instead of after hours in the queue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.loader import load_config
from vitscale.data.manifest import check_files, read_manifest
from vitscale.errors import LaunchError
from vitscale.plan import RunPlan


def check_run(config_file: Path, overrides: Sequence[str], *, world_size: int) -> list[tuple[str, str]]:
    """The rows of the run's plan on ``world_size`` ranks.

    Raises:
        VitscaleError: the configuration is wrong, a shard set is missing or does not match its index, the global
            batch cannot be shared by the ranks, or the run folder cannot be written.
    """
    config = load_config(config_file, overrides)
    train_set = read_manifest(config.data.train)
    check_files(train_set)
    if config.data.eval is not None:
        check_files(read_manifest(config.data.eval))
    _check_writable(config.run)
    return [*RunPlan.create(config, world_size, train_set).describe(), ("run", str(config.run))]


def _check_writable(run: Path) -> None:
    """The first folder that exists on the way to the run folder must let us write."""
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise LaunchError(f"run: {existing} cannot be written; choose another folder with run=...")
