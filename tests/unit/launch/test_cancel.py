"""What cannot be cancelled or resumed, and what `cancel` leaves behind. tests/slurm has the real thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import wait_until
from tests.unit.launch.test_status import NOW, attempt, job, submitted
from vitscale.errors import LaunchError
from vitscale_launch.attempts import write_attempt
from vitscale_launch.cancel import _key, cancel_run
from vitscale_launch.requests import cancel_path
from vitscale_launch.resume import resume_run

# Ends 0.5 s after SIGTERM, with its folder of logs among its arguments, as the process of a local submission.
_PROCESS = """
import signal, sys, time
from pathlib import Path
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
Path(sys.argv[1], "ready").touch()
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def cancel(run: Path, *, now: bool = False, wait_s: float = 20) -> list[str]:
    said: list[str] = []
    cancel_run(run, now=now, wait_s=wait_s, say=said.append)
    return said


def test_what_was_never_submitted_or_has_ended(run: Path) -> None:
    for act in (cancel, resume_run):
        with pytest.raises(LaunchError, match="was never submitted"):
            act(run)
    submitted(run, jobs=())
    write_attempt(run, attempt(1, ended_unix_s=NOW, exit_code=0, reason="finished"))
    with pytest.raises(LaunchError, match=r"neither runs nor waits in the queue \(finished: all steps are done\)"):
        cancel(run)
    with pytest.raises(LaunchError, match=r"is finished \(all steps are done\); there is nothing to resume"):
        resume_run(run)
    assert not cancel_path(run).exists()


def test_nothing_is_done_where_slurm_cannot_be_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted(run)
    with pytest.raises(LaunchError, match=r"nothing was cancelled, for the queue is out of reach: scontrol was not"):
        cancel(run)
    with pytest.raises(LaunchError, match=r"was not submitted, for it may be in the queue: .*scontrol was not found"):
        resume_run(run)
    assert not cancel_path(run).exists()


def test_a_task_is_resumed_with_its_array(tmp_path: Path) -> None:
    task = tmp_path / "array" / "tasks" / "00003"
    submitted(task, array_tasks=5, array_task=3)
    with pytest.raises(LaunchError, match=r"resume the array: vitscale launch resume .*/array$"):
        resume_run(task)


@pytest.mark.parametrize(
    ("job_id", "array_task", "of_array", "of_task_3"),
    [("17", None, "17", "17"), ("21", "3", "17_3", "17_3"), ("17", "3-9%2", "17", "17_3")],
)
def test_what_scancel_takes(tmp_path: Path, job_id: str, array_task: str | None, of_array: str, of_task_3: str) -> None:
    array = None if array_task is None else "17"
    found = job(submitted(tmp_path), job_id=job_id, array_job=array, array_task=array_task)
    assert _key(found, None) == of_array
    # One task among those that wait together must not take the others with it.
    assert _key(found, 3) == of_task_3


@pytest.fixture
def process(run: Path) -> subprocess.Popen[bytes]:
    """A local submission that runs."""
    submission = submitted(run, executor="local", jobs=())
    submission.logs.mkdir()
    started = subprocess.Popen([sys.executable, "-c", _PROCESS, str(submission.logs)])
    submitted(run, executor="local", jobs=(str(started.pid),))
    assert wait_until((submission.logs / "ready").exists, timeout_s=20)
    return started


def test_a_local_process_is_asked_and_waited_for(run: Path, process: subprocess.Popen[bytes]) -> None:
    write_attempt(run, attempt(1))
    with pytest.raises(LaunchError, match=r"its process .* is running on this machine"):
        resume_run(run)
    begin = time.monotonic()
    said = cancel(run)
    assert time.monotonic() - begin >= 0.5
    assert process.wait(timeout=5) == 0
    assert said == [
        f"process {process.pid}: asked to stop after a commit",
        f"stopped; nothing is committed; begin again with: vitscale launch resume {run}",
    ]
    assert json.loads(cancel_path(run).read_text())["unix_s"] >= NOW


def test_a_process_that_does_not_end_is_told(run: Path, process: subprocess.Popen[bytes]) -> None:
    write_attempt(run, attempt(1))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LaunchError, match=r"has not stopped within 1 s \(process \d+ is running\); wait longer"):
            cancel(run, wait_s=1)
    finally:
        process.kill()
        process.wait()


def test_without_waiting_it_is_only_asked(run: Path, process: subprocess.Popen[bytes]) -> None:
    write_attempt(run, attempt(1))
    assert cancel(run, wait_s=0) == [f"process {process.pid}: asked to stop after a commit"]
    assert process.wait(timeout=10) == 0
