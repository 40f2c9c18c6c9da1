"""What people ask of a run: files in ``RUN/launch/requests``, which the job looks for."""

from __future__ import annotations

import json
import time
from pathlib import Path

from vitscale.durable import publish_text
from vitscale_launch.submission import FOLDER, array_folder, task_folder


def requests_folder(run: Path) -> Path:
    """The folder of the requests. A run that is submitted again begins without it."""
    return run / FOLDER / "requests"


def cancel_path(run: Path) -> Path:
    """The file whose presence says that a run is not to be started again."""
    return requests_folder(run) / "cancel"


def cancel_requested(run: Path) -> bool:
    """Whether the user has asked for an end. What is asked of an array is asked of each of its tasks."""
    if cancel_path(run).exists():
        return True
    array = array_folder(run)
    return run.name.isdecimal() and run == task_folder(array, int(run.name)) and cancel_path(array).exists()


def request_cancel(run: Path) -> None:
    """Ask that a run, an array, or one of its tasks is not started again.

    Raises:
        OSError: its folder cannot be written.
    """
    path = cancel_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, json.dumps({"unix_s": int(time.time())}) + "\n")
