"""A run that is killed twenty times, at any moment and within commits, equals one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.runs import (
    assert_same_state,
    checkpoint_of,
    checkpoints_of,
    environment,
    finish,
    kill_group,
    metrics,
    overrides,
    start_training,
    trajectory,
    wait_until,
)

KILLS = 20
STEPS = 120
SETTINGS = (f"duration={{steps: {STEPS}}}", "checkpoint.every={steps: 5}", "checkpoint.keep=2", "engine.zero_stage=2")

# Python imports a module of this name at start. One rank dies before the n-th change that its saves make to the disk.
PLANTED = """
import os
import signal
import threading
from pathlib import Path

if os.environ.get("RANK") == os.environ["KILL_RANK"]:
    left = int(os.environ["KILL_CALL"])

    def deadly(function):
        def wrapper(*arguments, **keywords):
            global left
            left -= threading.current_thread().name == "checkpoint"
            if left < 0:
                Path(os.environ["KILL_MARK"]).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return wrapper

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
"""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: ``what`` dies ``how`` far into an attempt."""

    what: str
    """``all`` ranks, or rank ``0`` or ``1`` alone."""
    how: str
    """``seconds`` or ``steps`` after the start, with the next ``commit``, or at a disk ``call`` within commits."""
    amount: float = 0


def draw_kills(seed: int) -> list[Kill]:
    chance = random.Random(seed)
    kills = [Kill("all", "seconds", chance.uniform(0.2, 3)) for _ in range(3)]
    kills += [Kill("all", "steps", chance.randint(1, 9)) for _ in range(6)]
    kills += [Kill("all", "commit") for _ in range(4)]
    # A save changes the disk about 14 times on rank 0, and once on the other ranks.
    kills += [Kill("0", "call", chance.randint(0, 40)) for _ in range(4)]
    kills += [Kill("1", "call", chance.randint(0, 3)) for _ in range(3)]
    assert len(kills) == KILLS
    chance.shuffle(kills)
    return kills


def staged(checkpoints: Path) -> set[tuple[str, int]]:
    """The staging folders and when each was last changed."""
    found = set()
    for path in checkpoints.glob(".staging-*"):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:
            continue
    return found


def assert_only_complete_checkpoints(checkpoints: Path) -> None:
    for name in checkpoints_of(checkpoints.parent):
        checkpoint_of(checkpoints.parent, int(name.removeprefix("step-")))
    latest = checkpoints / "latest"
    if latest.exists():
        assert latest.read_text().removesuffix("\n") in checkpoints_of(checkpoints.parent)


def suffer(kill: Kill, arguments: list[str], run: Path, planted: Path) -> bool:
    """Start the run and kill it. Returns whether that hit within a commit."""
    checkpoints = run / "checkpoints"
    before = staged(checkpoints)
    if kill.how == "call":
        return _lose_a_rank(kill, arguments, planted)
    known = max((record["attempt"] for record in metrics(run)), default=0)
    process = start_training(arguments)
    if kill.how == "seconds":
        time.sleep(kill.amount)
    elif kill.how == "steps":
        assert wait_until(lambda: sum(r["attempt"] > known for r in metrics(run)) >= kill.amount, every_s=0.02)
    else:
        assert wait_until(lambda: bool(staged(checkpoints) - before), every_s=0.0005)
    assert process.poll() is None, "the run ended before it was killed"
    kill_group(process)
    return bool(staged(checkpoints) - before)


def _lose_a_rank(kill: Kill, arguments: list[str], planted: Path) -> bool:
    """One rank kills itself; the launcher takes the other one down."""
    mark = planted / "happened"
    mark.unlink(missing_ok=True)
    process = start_training(
        arguments,
        PYTHONPATH=f"{planted}{os.pathsep}{environment()['PYTHONPATH']}",
        KILL_RANK=kill.what,
        KILL_CALL=str(int(kill.amount)),
        KILL_MARK=str(mark),
    )
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    assert mark.exists(), errors
    assert process.returncode > 0
    assert "Traceback" not in errors
    return True


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_leave_the_run_as_it_would_have_been(digits: Path, tmp_path: Path) -> None:
    whole, run, planted = tmp_path / "whole", tmp_path / "run", tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED)
    finish(start_training(overrides(digits, whole, *SETTINGS)), timeout_s=300)
    arguments = overrides(digits, run, *SETTINGS)

    within_commits = 0
    for kill in draw_kills(seed=20):
        within_commit = suffer(kill, arguments, run, planted)
        within_commits += within_commit
        assert_only_complete_checkpoints(run / "checkpoints")
        print(f"{kill}: within a commit: {within_commit}; {(checkpoints_of(run) or ['nothing'])[0]}")
    print(f"{within_commits} of {KILLS} kills hit within a commit")
    assert within_commits >= 6
    assert metrics(run)[-1]["step"] < STEPS

    finish(start_training(arguments), timeout_s=300)
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1))
    assert trajectory(run) == trajectory(whole)
    assert_same_state(run, whole)
