"""A submission without SLURM: the job is the same, and it runs from what was kept at the submission."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import CONFIG, REPOSITORY, checkpoint_of, environment, metrics, overrides, wait_until
from vitscale_launch.attempts import read_attempts
from vitscale_launch.submission import read_submission

pytestmark = pytest.mark.timeout(240)


def _submit(digits: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitscale", "launch", "submit", str(CONFIG), *overrides(digits, run), *words]
    env = environment(PYTHONDONTWRITEBYTECODE="")
    # From the checkout, whose packages must not be taken for those that were kept.
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_in_this_terminal(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = _submit(digits, run, "--debug", "--set", "ranks_per_node=2")
    assert done.returncode == 0, done.stderr
    assert checkpoint_of(run).step == 12
    assert len(metrics(run)) == 12
    (attempt,) = read_attempts(run)
    assert (attempt.reason, attempt.ranks, attempt.ended_step) == ("finished", 2, 12)


@pytest.mark.slow
def test_in_the_background_and_edited_meanwhile(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = _submit(digits, run, "--local")
    assert done.returncode == 0, done.stderr
    submission = read_submission(run)
    assert f"submitted    process {submission.jobs[-1]}\n" in done.stdout
    again = _submit(digits, run, "--local")
    assert again.returncode == 1
    assert f"its process {submission.jobs[-1]} is running on this machine" in again.stderr

    assert wait_until(lambda: any(attempt.reason for attempt in read_attempts(run)), timeout_s=120, every_s=0.5)
    assert [attempt.reason for attempt in read_attempts(run)] == ["finished"]
    # Only a process that imports from there leaves these.
    assert list((submission.code / "vitscale" / "train" / "__pycache__").glob("loop.*.pyc"))
