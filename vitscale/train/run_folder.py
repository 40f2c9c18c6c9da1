"""The run folder: whose it is, what was tried, and which records survive a resume.

Writes ``config.yaml``, ``plan.json`` and ``attempts.jsonl``. A *run* is the folder, an *attempt* is one start of it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.checkpoint.format import Checkpoint, other_data, step_of
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.checkpoint.store import checkpoint_names, inspect
from vitscale.config.loader import load_config
from vitscale.config.reference import KeyChange, diff_configs
from vitscale.config.schema import TrainConfig
from vitscale.data.storage.drivers import without_secrets
from vitscale.data.storage.files import absolute
from vitscale.durable import Lock as FileLock
from vitscale.durable import publish_text, sync_folder
from vitscale.errors import CheckpointError, ConfigError, LaunchError
from vitscale.plan import RunPlan
from vitscale.run_config import publish_config, with_absolute_paths
from vitscale.train.changes import (
    AUTO,
    Change,
    Group,
    Resume,
    ResumePolicy,
    changed_content,
    changed_world_size,
    covers,
    judge,
    refuse,
)

LOCK_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Continuation:
    """How an attempt goes on with what lies in the run folder."""

    must_resume: bool
    """Whether starting from scratch would be a mistake."""
    data_digest: str
    """Identity of the training data."""
    changes: tuple[Change, ...] = ()
    """Since the last attempt."""
    free_data: bool = False
    """Whether the checkpoint may be of other training data, since the user said so."""
    same_lr_steps: frozenset[int] = frozenset()
    """Of checkpoints that an attempt with the same learning rates has saved, so that they can be compared."""


def check_policy(config: TrainConfig, policy: ResumePolicy) -> None:
    """See that there is a checkpoint if there must be one, or none if there must be none. Writes nothing.

    Raises:
        ConfigError: says where it looked.
    """
    folder = checkpoint_folder(config.run, config.checkpoint)
    location, names = absolute(folder.location), checkpoint_names(folder)
    if policy.resume is Resume.MUST and not names:
        raise ConfigError(
            f"--resume must: there is no checkpoint in {location}; check run=... and checkpoint.folder, or leave "
            f"--resume out to begin a run there"
        )
    if policy.resume is Resume.NEVER and names:
        raise ConfigError(
            f"--resume never: {location} holds {len(names)} checkpoints, the newest being {names[0]}; choose another "
            f"folder with run=..., or leave --resume out to continue that run"
        )


def check_run(
    config: TrainConfig,
    plan: RunPlan,
    data_digest: str,
    policy: ResumePolicy = AUTO,
    *,
    say: Callable[[str], None],
) -> Continuation:
    """See that the run folder, if there is one, may go on with ``config``, and say what changed. Writes nothing.

    Args:
        config: of this attempt.
        plan: of this attempt.
        data_digest: identity of its training data.
        policy: what the user allows.
        say: shows a line.

    Raises:
        ConfigError: the folder belongs to a run with another configuration, or the policy does not fit it.
        CheckpointError: the newest checkpoint is of other training data, or cannot be read.
    """
    check_policy(config, policy)
    path, attempts = config.run / "config.yaml", _attempts(config.run)
    differences = diff_configs(load_config(path), with_absolute_paths(config)) if path.exists() else []
    folder = checkpoint_folder(config.run, config.checkpoint)
    names = checkpoint_names(folder)
    newest = next((found for name in names if (found := inspect(folder, name)[0])), None)
    step = newest.step if newest else step_of(names[0]) if names else None
    free_data = False
    if step is None:
        _check_not_left_elsewhere(config)
        # A run that has no checkpoint yet has nothing that could go on wrongly.
        changes = [Change(difference.key, _shown(difference), Group.FREE) for difference in differences]
    else:
        _check_length(config, plan, step)
        since = _at_checkpoint(attempts, step)[1]
        same_lr = _has_same_lr(attempts, step, config, plan)
        changes = [judge(change, _shown(change), step=step, same_lr=same_lr) for change in differences]
        if attempts and attempts[-1]["world_size"] != plan.world_size:
            changes.append(changed_world_size(attempts[-1]["world_size"], plan.world_size))
        if newest and newest.content["data_digest"] != data_digest:
            free_data = True
            if not _was_accepted(data_digest, since):
                _check_content_may_change(newest, policy)
                changes.append(changed_content(newest.content["data_digest"], data_digest, step=step))
    # An older checkpoint is loaded if this one turns out to be damaged.
    same_lr_steps = {
        older for name in names if (older := step_of(name)) is not None and _has_same_lr(attempts, older, config, plan)
    }
    if any(change["key"] == "data.train" for attempt in attempts for change in _forced(attempt)):
        free_data |= attempts[-1].get("data_digest") == data_digest
    forced_before = [change["key"] for attempt in attempts for change in _forced(attempt)]
    refuse(str(config.run.absolute()), changes, policy.allow_change, forced_before=forced_before)
    for change in changes:
        say(change.announcement())
    return Continuation(policy.resume is Resume.MUST, data_digest, tuple(changes), free_data, frozenset(same_lr_steps))


def _check_length(config: TrainConfig, plan: RunPlan, step: int) -> None:
    if plan.total_steps < step:
        raise ConfigError(
            f"duration: {config.duration} comes to {plan.total_steps} steps, but the run in {config.run.absolute()} "
            f"has made {step} already; give {step} steps or more, or choose another folder with run=..."
        )


def _check_content_may_change(checkpoint: Checkpoint, policy: ResumePolicy) -> None:
    if not any(covers(name, "data.train") for name in policy.allow_change):
        raise other_data(checkpoint)


def _at_checkpoint(attempts: list[dict[str, Any]], step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The attempts up to the one that saved the checkpoint of a step, and those that have made no step of it.

    The last one that began before the step has saved it; a later one would have begun there.
    """
    starts = [attempt.get("restored_step") for attempt in attempts]
    count = max((number for number, start in enumerate(starts, 1) if start is None or start < step), default=0)
    return attempts[:count], attempts[count:]


def _has_same_lr(attempts: list[dict[str, Any]], step: int, config: TrainConfig, plan: RunPlan) -> bool:
    """Whether the attempt that saved the checkpoint of a step had the learning rates of this one."""
    until_saved = _at_checkpoint(attempts, step)[0]
    return not until_saved or until_saved[-1].get("learning_rate") == _learning_rate(config, plan)


def _check_not_left_elsewhere(config: TrainConfig) -> None:
    """A run whose checkpoints lie elsewhere would start from scratch without a word."""
    path = config.run / "config.yaml"
    before = load_config(path).checkpoint if path.exists() else config.checkpoint
    if before.folder == with_absolute_paths(config).checkpoint.folder:
        return
    folder = checkpoint_folder(config.run, before)
    if names := checkpoint_names(folder):
        raise ConfigError(
            f"checkpoint.folder: the checkpoints of this run, the newest being {names[0]}, lie in {folder.location}; "
            f"take that back, copy them to the new place, or choose another folder with run=..."
        )


def _was_accepted(data_digest: str, since: list[dict[str, Any]]) -> bool:
    """Whether an attempt that went on from this checkpoint, but has saved none, was allowed these training data."""
    forced = any(change["key"] == "data.train" for attempt in since for change in _forced(attempt))
    return forced and since[-1].get("data_digest") == data_digest


def _forced(attempt: dict[str, Any]) -> list[dict[str, Any]]:
    return [change for change in attempt.get("changed", ()) if change["forced"]]


def _learning_rate(config: TrainConfig, plan: RunPlan) -> dict[str, Any]:
    """All that the learning rate of a step depends on."""
    schedule = config.schedule
    # Not in the records of attempts that were made before there were any.
    steps = {"milestones": list(schedule.milestones), "factor": schedule.factor} if schedule.decay == "steps" else {}
    return {
        "peak": config.optim.lr,
        "decay": schedule.decay,
        "final": schedule.final_lr,
        "warmup_steps": plan.warmup_steps,
        "total_steps": plan.total_steps,
        **steps,
    }


def record_attempt(
    config: TrainConfig,
    plan: RunPlan,
    start: Continuation,
    restored_step: int | None,
    initial: dict[str, Any] | None = None,
) -> int:
    """Write the configuration, the plan and one more attempt into the run folder. Returns its number, from 1.

    To be called when nothing else can refuse this start: what it writes is what the run goes on with.

    Args:
        config: of the attempt.
        plan: of the attempt.
        start: what :func:`check_run` found.
        restored_step: step of the checkpoint that was loaded; None if there was none.
        initial: what the weights came from, if they began as another model's.

    Raises:
        CheckpointError: none was loaded where one had to be.
        ConfigError: the folder cannot be written.
    """
    run = config.run
    if start.must_resume and restored_step is None:
        location = absolute(checkpoint_folder(run, config.checkpoint).location)
        raise CheckpointError(
            f"--resume must: no checkpoint in {location} is complete, and the damaged ones were moved aside; bring "
            f"back a copy, or leave --resume out to start from scratch"
        )
    with _writing_to(run):
        # First what was forced: the configuration alone would not tell that it was.
        attempt = _note_attempt(config, plan, start, restored_step, initial)
        publish_config(run / "config.yaml", with_absolute_paths(config))
        publish_text(run / "plan.json", json.dumps(plan.to_json(), indent=1) + "\n")
        sync_folder(run)
        sync_folder(run.parent)
    return attempt


def _shown(change: KeyChange) -> str:
    text = str(change)
    shown = without_secrets(text)
    # Else a new password alone would look like no change.
    return shown if shown == text else f"{shown} (passwords and queries left out)"


def _note_attempt(
    config: TrainConfig,
    plan: RunPlan,
    start: Continuation,
    restored_step: int | None,
    initial: dict[str, Any] | None,
) -> int:
    attempts = _attempts(config.run)
    record = {
        "attempt": len(attempts) + 1,
        "started_unix_s": int(time.time()),
        "host": socket.gethostname(),
        "world_size": plan.world_size,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "restored_step": restored_step,
        "initial_weights": initial,
        "changed": [change.to_json() for change in start.changes],
        "data_digest": start.data_digest,
        "learning_rate": _learning_rate(config, plan),
    }
    publish_text(_attempts_path(config.run), "".join(f"{json.dumps(line)}\n" for line in [*attempts, record]))
    return len(attempts) + 1


def _attempts(run: Path) -> list[dict[str, Any]]:
    path = _attempts_path(run)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _attempts_path(run: Path) -> Path:
    return run / "attempts.jsonl"


class RunLock:
    """Keeps a second start of the same run out, for as long as the process of rank 0 lives."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = FileLock(run / ".lock")

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
    attempts = _attempts(run)
    if not attempts:
        return "which has only just begun"
    last = attempts[-1]
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
