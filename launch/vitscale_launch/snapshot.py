"""The code and the configuration as they were at submission. What is edited afterwards changes no queued run."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from vitscale.config.schema import TrainConfig
from vitscale.errors import LaunchError
from vitscale.run_config import publish_config

PACKAGES = ("vitscale", "vitscale_shards", "vitscale_launch")


def snapshot_code(folder: Path) -> None:
    """Copy the packages that a job imports into ``folder``, which replaces what lies there.

    Raises:
        LaunchError: it cannot be written.
    """
    fresh, stale = (folder.with_name(f".{folder.name}.{state}") for state in ("fresh", "stale"))
    try:
        for left_over in (fresh, stale):
            shutil.rmtree(left_over, ignore_errors=True)
        for package in PACKAGES:
            shutil.copytree(_source(package), fresh / package, ignore=shutil.ignore_patterns("__pycache__"))
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        # copytree gathers the failures of all files in a list.
        reason = error.strerror or str(error.args[0])
        raise LaunchError(
            f"{folder}: the code cannot be copied here: {reason}; make room or choose another folder"
        ) from error


def freeze_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration with all defaults, so that it loads to an equal one from any folder.

    Raises:
        LaunchError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_config(path, config)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error.strerror}; choose another folder with run=...") from error


def _source(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LaunchError(f"the package {package} was not found; install vitscale again")
    return Path(found.submodule_search_locations[0])
