"""The run folder: whose it is, what was tried, and which records survive a resume.

Writes ``config.yaml``, ``plan.json`` and ``attempts.jsonl``. A *run* is the folder, an *attempt* is one start of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitscale.checkpoint.store import step_names
from vitscale.config.loader import load_config
from vitscale.config.reference import KeyChange, diff_configs, dump_config
from vitscale.config.schema import TrainConfig
from vitscale.data.storage.drivers import without_secrets
from vitscale.data.storage.files import absolute
from vitscale.durable import Lock, publish_text, published, sync_folder
from vitscale.errors import ConfigError, LaunchError
from vitscale.plan import RunPlan

LOCK_PATIENCE_S = 10.0
# Keys whose change leaves the sequence of global batches and updates as it was.
FREE_KEYS = (
    "run",
    "micro_batch_size",
    "data.train",
    "data.eval",
    "data.eval_crop_share",
    "data.workers",
    "data.processes",
    "data.prefetch_batches",
    "data.read_ahead_batches",
    "data.storage",
    "data.max_bad_samples",
    "data.max_bad_share",
    "model.activation_checkpointing",
    "model.attention",
    "engine.zero_stage",
    "engine.timeout_s",
    "engine.max_skipped_steps",
    "checkpoint",
    "evaluation",
    "log",
)


def check_run(config: TrainConfig, *, say: Callable[[str], None]) -> None:
    """See that the run folder, if there is one, may go on with ``config``, and say what changed. Writes nothing.

    Raises:
        ConfigError: the folder belongs to a run with another configuration.
    """
    path = config.run / "config.yaml"
    if not path.exists():
        return
    changes = diff_configs(load_config(path), _with_absolute_paths(config))
    refused = [change for change in changes if not _is_free(change)]
    # A run that has no checkpoint yet has nothing that could go on wrongly.
    if refused and step_names(config.run / "checkpoints"):
        listed = "\n".join(f"  {_shown(change)}" for change in refused)
        raise ConfigError(
            f"run: {config.run.absolute()} belongs to a run with another configuration:\n{listed}\n"
            f"going on would not continue that run; take these values back, remove the folder to start anew, or choose "
            f"another one with run=..."
        )
    for change in changes:
        say(f"changed since the last attempt: {_shown(change)}")


def record_attempt(config: TrainConfig, plan: RunPlan) -> int:
    """Write the configuration, the plan and one more attempt into the run folder. Returns its number, from 1.

    To be called when nothing can refuse this start any more: what it writes is what the run goes on with.

    Raises:
        ConfigError: the folder cannot be written.
    """
    run = config.run
    with _writing_to(run):
        _publish_config(run / "config.yaml", dump_config(_with_absolute_paths(config)))
        publish_text(run / "plan.json", json.dumps(plan.to_json(), indent=1) + "\n")
        attempt = _note_attempt(run, plan)
        sync_folder(run)
        sync_folder(run.parent)
    return attempt


def _publish_config(path: Path, text: str) -> None:
    with published(path) as file:
        if without_secrets(text) != text:
            # Before the first byte, so that no other user can ever read it.
            os.fchmod(file.fileno(), 0o600)
        file.write(text.encode())


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """So that commands on the run find its data from any folder."""
    train, held_out, cache = config.data.train, config.data.eval, config.data.storage.cache
    data = dataclasses.replace(
        config.data,
        train=absolute(train) if isinstance(train, str) else {absolute(key): weight for key, weight in train.items()},
        eval=held_out and absolute(held_out),
        storage=dataclasses.replace(config.data.storage, cache=cache and cache.absolute()),
    )
    return dataclasses.replace(config, run=config.run.absolute(), data=data)


def _is_free(change: KeyChange) -> bool:
    return any(change.key == key or change.key.startswith(key + ".") for key in FREE_KEYS)


def _shown(change: KeyChange) -> str:
    text = str(change)
    shown = without_secrets(text)
    # Else a new password alone would look like no change.
    return shown if shown == text else f"{shown} (passwords and queries left out)"


def _note_attempt(run: Path, plan: RunPlan) -> int:
    path = run / "attempts.jsonl"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    number = len(earlier) + 1
    record = {
        "attempt": number,
        "started_unix_s": int(time.time()),
        "host": socket.gethostname(),
        "world_size": plan.world_size,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    publish_text(path, "".join(f"{line}\n" for line in [*earlier, json.dumps(record)]))
    return number


class RunLock:
    """Keeps a second start of the same run out, for as long as the process of rank 0 lives."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = Lock(run / ".lock")

    def take(self) -> None:
        """Take the lock.

        Raises:
            LaunchError: another attempt is running.
            ConfigError: the folder cannot be written.
        """
        with _writing_to(self._run):
            self._run.mkdir(parents=True, exist_ok=True)
            # Ranks that were just killed may take a moment to be gone.
            taken = self._lock.take(patience_s=LOCK_PATIENCE_S)
        if not taken:
            raise LaunchError(
                f"run: {self._run} is being trained by another attempt ({_last_attempt(self._run)}); "
                f"wait for it, stop it, or choose another folder with run=..."
            )


def _last_attempt(run: Path) -> str:
    path = run / "attempts.jsonl"
    if not path.exists():
        return "which has only just begun"
    last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["started_unix_s"]))
    return f"attempt {last['attempt']} on {last['host']} since {since}"


@contextmanager
def _writing_to(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run: cannot write to {run}: {error.strerror}; choose another folder with run=..."
        ) from error


class StepRecords:
    """A JSON-lines file whose records carry ``step``. Records of steps that are repeated after a resume move to
    ``<name>.rolled_back.jsonl``, so that the file reads as one uninterrupted run."""

    def __init__(self, path: Path, *, restored_step: int) -> None:
        self._path = path
        self.records = self._roll_back(restored_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns. Numbers that are not finite become null."""
        self._file.write(_to_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _roll_back(self, restored_step: int) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace")
        records = [record for line in text.splitlines() if (record := _parse(line)) is not None]
        kept = [record for record in records if record["step"] <= restored_step]
        undone = [record for record in records if record["step"] > restored_step]
        if undone:
            with self._path.with_suffix(".rolled_back.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(map(_to_line, undone))
        # Unequal also if only the last line break is missing, to which the next record would be glued.
        if (clean := "".join(map(_to_line, kept))) != text:
            publish_text(self._path, clean)
        return kept


def _to_line(record: dict[str, Any]) -> str:
    # JSON has no word for infinity, and no reader but Python's takes the one that json.dumps would write.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    """A record, or ``None`` for the torn last line of a killed process."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None
