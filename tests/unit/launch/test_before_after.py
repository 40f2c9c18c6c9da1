"""The batch script's first and last act, but for what needs SLURM (tests/slurm)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import environment
from tests.unit.launch.test_environment import submission
from vitscale_launch.after import _queue
from vitscale_launch.attempts import Attempt, attempts_path, errors_folder, read_attempts, write_attempt
from vitscale_launch.batch_log import batch_log, read_end, read_from, size_of
from vitscale_launch.before import _close, _no_need
from vitscale_launch.failures import Cause, Failure
from vitscale_launch.restart import MAX_FRUITLESS, Queue
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.submission import Submission

OPEN = Attempt(number=1, job="7", restart=0, nodes="a", ranks=2, started_unix_s=100, started_step=None)
JOB = SlurmJob(
    job_id="7",
    name="vit",
    user="me",
    state="RUNNING",
    reason="",
    partition="main",
    node_list="a",
    nodes=1,
    restarts=0,
    requeues=True,
    submitted_unix_s=1,
    started_unix_s=2,
    ended_unix_s=None,
    time_limit_s=600,
    time_left_s=300,
    exit_code=None,
    dependency="",
    command="",
    work_dir="",
)
STOPPED = Failure(Cause.STOPPED, "stopped")


def here(run: Path) -> Submission:
    return submission(Site(), run=run)


def tell(run: Path, kind: str, message: str, attempt: int = 1) -> None:
    folder = errors_folder(run, attempt)
    folder.mkdir(parents=True)
    record = {"rank": 0, "host": "a", "kind": kind, "message": message, "exit_code": 1, "unix_s": 5.0}
    (folder / "rank-00000.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "failure", "said", "expected"),
    [
        ({}, STOPPED, "", Queue.RUNNING),
        ({"restarts": 1, "state": "COMPLETING"}, STOPPED, "", Queue.REQUEUED),
        ({"restarts": 1, "state": "PENDING"}, STOPPED, "", Queue.REQUEUED),
        ({"state": "COMPLETING"}, STOPPED, "", Queue.CANCELLED),
        ({"state": "CANCELLED"}, STOPPED, "", Queue.CANCELLED),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, STOPPED, "", Queue.TIMED_OUT),
        ({"state": "TIMEOUT"}, STOPPED, "", Queue.TIMED_OUT),
        ({"state": "COMPLETING"}, STOPPED, "STEP 7.0 CANCELLED AT x DUE TO PREEMPTION ***", Queue.RUNNING),
        ({"state": "COMPLETING"}, Failure(Cause.NODE, "node failure on b"), "", Queue.RUNNING),
    ],
)
def test_what_slurm_has_done_already(changes: dict[str, Any], failure: Failure, said: str, expected: Queue) -> None:
    assert _queue(dataclasses.replace(JOB, **changes), 0, failure, said) is expected
    assert _queue(None, 0, failure, said) is Queue.RUNNING


@pytest.mark.parametrize(
    ("said", "report", "reason"),
    [
        ("", None, "lost: its batch script was killed before it could record the end"),
        ("error: *** JOB 7 ON a CANCELLED AT 1 DUE TO PREEMPTION ***", None, "preempted"),
        ("error: *** JOB 7 ON a CANCELLED AT 1 DUE TO TIME LIMIT ***", None, "time limit"),
        ("error: *** JOB 7 ON a CANCELLED AT 1 DUE TO NODE FAILURE, SEE LOG", None, "lost: node failure"),
        ("", ("Interrupted", "stopped at step 3 of 9 on SIGTERM; ..."), "preempted"),
        ("", ("Interrupted", "stopped at step 3 of 9 on SIGUSR2; ..."), "time limit"),
        ("", ("ValueError", "planted"), "crashed: ValueError: planted (rank 0 on a)"),
        ("", ("TopologyError", "no answer"), "lost: TopologyError: no answer (rank 0 on a)"),
        ("*** DUE TO NODE FAILURE, SEE", ("Interrupted", "stopped on SIGTERM"), "lost: node failure"),
    ],
)
def test_an_attempt_that_could_not_record_its_end_is_told_of(
    tmp_path: Path, said: str, report: tuple[str, str] | None, reason: str
) -> None:
    write_attempt(tmp_path, OPEN)
    log = tmp_path / "log"
    log.write_text("earlier\n" + said)
    if report:
        tell(tmp_path, *report)
    (closed,) = _close(here(tmp_path), log)
    assert (closed.reason, closed.followed_by, closed.exit_code) == (reason, "requeue", None)
    assert read_attempts(tmp_path) == [closed]
    # Once.
    assert _close(here(tmp_path), None) == [closed]


def test_nothing_starts_that_was_cancelled_or_is_finished_or_was_stopped(tmp_path: Path) -> None:
    job = here(tmp_path)
    stopped = dataclasses.replace(OPEN, reason="crashed: x", followed_by="stop", because="the same error twice")
    finished = dataclasses.replace(OPEN, reason="finished", followed_by="finish")
    assert _no_need(job, [], "7") is None
    assert _no_need(job, [dataclasses.replace(OPEN, reason="preempted", followed_by="requeue")], "7") is None
    assert _no_need(job, [finished], "8") == "exit 0\n"
    # The next link of a chain leaves; a job that somebody has requeued by hand is meant to start.
    assert _no_need(job, [stopped], "8") == "exit 1\n"
    assert _no_need(job, [stopped], "7") is None
    (tmp_path / "launch" / "requests").mkdir(parents=True)
    (tmp_path / "launch" / "requests" / "cancel").write_text("{}\n")
    assert _no_need(job, [], "7") == "exit 75\n"


def test_attempts_that_only_get_lost_end_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = [
        dataclasses.replace(OPEN, number=n, reason="lost: x", followed_by="requeue")
        for n in range(1, MAX_FRUITLESS + 1)
    ]
    assert _no_need(here(tmp_path), lost[1:], "7") is None
    assert _no_need(here(tmp_path), lost, "7") == "exit 1\n"
    assert read_attempts(tmp_path)[-1].followed_by == "stop"
    assert "20 attempts in a row left no new checkpoint" in capsys.readouterr().err


def test_the_log_of_the_batch_script_is_read_from_where_the_attempt_began(tmp_path: Path) -> None:
    job = here(tmp_path)
    assert batch_log(job, {}) is None
    log = batch_log(job, {"SLURM_JOB_ID": "9"})
    assert log == job.logs / "9_0_log.err"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}
    assert batch_log(job, array) == job.logs / "8_3_0_log.err"
    assert (size_of(log), read_from(log, 0), size_of(None), read_end(None)) == (0, "", 0, "")
    job.logs.mkdir(parents=True)
    (job.logs / "9_0_log.err").write_text("first attempt\nsecond")
    assert read_from(log, 14) == "second"
    assert read_end(log, 3) == "ond"


def _act(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"vitscale_launch.{module}", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)


def test_a_folder_that_was_never_submitted_starts_nothing(tmp_path: Path) -> None:
    done = _act("before", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "exit 1\n")
    assert "was never submitted" in done.stderr
    assert "Traceback" not in done.stderr
    done = _act("after", str(tmp_path), "75")
    assert done.returncode == 75
    assert "was never submitted" in done.stderr
    assert not attempts_path(tmp_path).exists()
