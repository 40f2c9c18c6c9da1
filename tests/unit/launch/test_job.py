"""What a task becomes, and the same job on this machine, with commands that need no training."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import environment, wait_until
from vitscale_launch.attempts import errors_folder, read_attempts
from vitscale_launch.batch import start_local
from vitscale_launch.failures import read_errors
from vitscale_launch.job import command_of, run_on_this_machine
from vitscale_launch.requests import request_cancel
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission, write_submission


def _submission(run: Path, site: Site | None = None, **changed: object) -> Submission:
    values: dict[str, object] = {
        "command": ("train", "config.yaml"),
        "global_batch_size": None,
        "micro_batch_size": None,
        "nodes_min": 1,
        "nodes_max": 1,
        "ranks_per_node": 1,
        "site": site or Site(),
        "python": sys.executable,
        "submitted_unix_s": 0,
        "executor": "local",
    }
    return Submission(run=run, **{**values, **changed})  # type: ignore[arg-type]


def test_ranks_run_in_their_container() -> None:
    plain, contained = Site(), Site(container=("apptainer", "exec", "v.sif"), container_python="/opt/python")
    own = ("-m", "vitscale", "train", "config.yaml")
    assert command_of(_submission(Path("/run"), plain)) == (sys.executable, *own)
    assert command_of(_submission(Path("/run"), contained)) == ("apptainer", "exec", "v.sif", "/opt/python", *own)


def test_what_a_container_gets(tmp_path: Path) -> None:
    """Its ranks are no children of the task where the runtime forks, and would leave at once if they knew its id."""
    said = tmp_path / "said"
    script = f'echo "$VITSCALE_LAUNCHER|$RANK|$*" > {said}'
    submission = _submission(tmp_path / "run", Site(container=("sh", "-c", script, "container")))
    write_submission(submission)
    assert run_on_this_machine(submission) == 0
    assert said.read_text() == "|0|python3 -m vitscale train config.yaml\n"
    assert [attempt.reason for attempt in read_attempts(submission.run)] == ["finished"]


def test_cancel_is_heard_before_the_next_attempt(tmp_path: Path) -> None:
    submission = _submission(tmp_path / "run", Site(container=("sh", "-c", "exit 3"), backoff_s=100))
    write_submission(submission)

    def cancel() -> None:
        assert wait_until(lambda: any(attempt.followed_by for attempt in read_attempts(submission.run)))
        request_cancel(submission.run)

    other = threading.Thread(target=cancel)
    start = time.monotonic()
    other.start()
    try:
        assert run_on_this_machine(submission) == 3
    finally:
        other.join()
    assert time.monotonic() - start < 30
    (attempt,) = read_attempts(submission.run)
    assert (attempt.followed_by, attempt.because) == ("stop", "it was cancelled before the next attempt")
    assert (attempt.reason or "").startswith("crashed: ")
    # Nor does a process that starts late.
    assert run_on_this_machine(submission) == 75
    assert len(read_attempts(submission.run)) == 1


def test_a_command_that_is_nowhere_is_tried_once(tmp_path: Path) -> None:
    submission = _submission(tmp_path / "run", Site(container=("/nowhere/apptainer",)))
    write_submission(submission)
    assert run_on_this_machine(submission) == 2
    (attempt,) = read_attempts(submission.run)
    assert attempt.followed_by == "stop"
    assert "/nowhere/apptainer cannot be started on" in (attempt.reason or "")


# What is nowhere, and what is no command.
@pytest.mark.parametrize("word", ["nosuchcommand", "/dev/null"])
def test_a_task_whose_command_is_nowhere(tmp_path: Path, word: str) -> None:
    run = tmp_path / "array" / "tasks" / "00000"
    submission = _submission(run, command=(word, "x"), executor="slurm", array_tasks=2, array_task=0)
    write_submission(submission)
    task = "from pathlib import Path; from vitscale_launch.job import CommandJob; CommandJob(Path({!r}))()"
    env = environment(VITSCALE_ERRORS=str(errors_folder(run, 1)))
    words = [sys.executable, "-c", task.format(str(run))]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"vitscale: error: {word} cannot be started on" in done.stderr
    assert "Traceback" not in done.stderr
    (error,) = read_errors(errors_folder(run, 1))
    assert (error.kind, error.exit_code) == ("ConfigError", 2)


def test_the_local_job_starts_where_it_was_submitted_and_shows_no_values(tmp_path: Path) -> None:
    """A stand-in for Python notes what it was started with."""
    said, folder = tmp_path / "said", tmp_path / "some where"
    folder.mkdir()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n(pwd; echo "$MY_TOKEN|$PYTHONPATH") > {said}.tmp; mv {said}.tmp {said}; sleep 60\n')
    python.chmod(0o755)
    site = Site(environment={"MY_TOKEN": "abcdefg", "PYTHONPATH": "/of/the/site"})
    submission = _submission(tmp_path / "run", site, python=str(python), cwd=folder)
    write_submission(submission)
    assert submission.folder.stat().st_mode & 0o777 == 0o700
    submission.logs.mkdir()
    before = dict(os.environ)
    process = psutil.Process(int(start_local(submission)))
    try:
        assert dict(os.environ) == before
        assert wait_until(said.exists, timeout_s=60)
        assert said.read_text() == f"{folder}\nabcdefg|{submission.code}:/of/the/site\n"
        words = [word for each in (process, *process.children(recursive=True)) for word in each.cmdline()]
        assert not [word for word in words if "abcdefg" in word]
    finally:
        for each in (*process.children(recursive=True), process):
            each.kill()
        process.wait(timeout=10)
