"""A stop before the first step, what a failed rank leaves behind, and a submitted job on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.faults import Fault
from tests.helpers.runs import (
    CONFIG,
    assert_same_state,
    checkpoint_of,
    checkpoints_of,
    environment,
    finish,
    metrics,
    overrides,
    start_training,
    wait_until,
)
from vitscale.config.loader import load_config
from vitscale.config.reference import dump_config
from vitscale_launch.attempts import read_attempts
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission, write_submission

pytestmark = pytest.mark.timeout(180)
# The loader of one rank gives its first batch only when the test has ended.
SLOW_DATA = """
import os, time
if os.environ.get("RANK") == "1":
    import vitscale.train.loop as loop

    real = loop.train_batches

    def train_batches(*words, **named):
        open(os.environ["MARK"], "w").close()
        time.sleep(600)
        yield from real(*words, **named)

    loop.train_batches = train_batches
"""


def _planted(folder: Path, code: str, **env: str) -> dict[str, str]:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{environment()['PYTHONPATH']}", **env}


def test_a_stop_while_data_are_waited_for_is_heard(digits: Path, tmp_path: Path) -> None:
    mark, errors = tmp_path / "mark", tmp_path / "errors"
    env = _planted(tmp_path / "planted", SLOW_DATA, MARK=str(mark), VITSCALE_ERRORS=str(errors))
    launcher = start_training(overrides(digits, tmp_path / "run"), **env)
    assert wait_until(lambda: mark.exists() or launcher.poll() is not None, timeout_s=90)
    asked = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    said = finish(launcher, expect=75)
    assert time.monotonic() - asked < 20
    assert said.count("vitscale: stopped before the first step on SIGTERM; there was nothing to save") == 1
    assert not checkpoints_of(tmp_path / "run")
    (report,) = errors.iterdir()
    record = json.loads(report.read_text())
    assert (record["kind"], record["exit_code"], record["is_victim"]) == ("Interrupted", 75, False)


def test_blocked_signals_wait_for_the_rank_to_be_ready(digits: Path, tmp_path: Path) -> None:
    """As the tasks of a submitted job start: whatever comes while Python and torch start is heard afterwards."""
    stops = {signal.SIGTERM, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        rank = start_training(overrides(digits, tmp_path / "run"), nproc=None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    rank.send_signal(signal.SIGUSR2)
    assert "stopped before the first step on SIGUSR2" in finish(rank, expect=75)


def test_a_rank_that_fails_leaves_its_reason(digits: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    crash = Fault(tmp_path / "fault", "raise", rank=1, step=3)
    finish(start_training(overrides(digits, tmp_path / "run"), VITSCALE_ERRORS=str(errors), **crash.env), expect=1)
    records = {path.name: json.loads(path.read_text()) for path in errors.iterdir()}
    failed = records.pop("rank-00001.json")
    assert (failed["rank"], failed["kind"], failed["message"]) == (1, "RuntimeError", "planted fault")
    assert (failed["exit_code"], failed["is_victim"]) == (1, False)
    assert "in train_step" in failed["traceback"]
    # The other rank may have been stopped before it could write.
    assert all(record["is_victim"] for record in records.values())


def _submit_here(run: Path, arguments: list[str]) -> Submission:
    config = load_config(CONFIG, arguments)
    frozen = run / "launch" / "config.yaml"
    frozen.parent.mkdir(parents=True)
    frozen.write_text(dump_config(config))
    submission = Submission(
        run=run,
        command=("train", str(frozen)),
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        nodes_min=1,
        nodes_max=1,
        ranks_per_node=2,
        site=Site(backoff_s=1),
        python=sys.executable,
        submitted_unix_s=int(time.time()),
        executor="local",
    )
    write_submission(submission)
    return submission


def _start_job(run: Path, **env: str) -> subprocess.Popen[str]:
    code = "import sys; from pathlib import Path; from vitscale_launch.job import CommandJob; "
    code += "sys.exit(CommandJob(Path(sys.argv[1]))())"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        env=environment(**env),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_job_on_this_machine_restarts_by_itself_after_a_kill(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _submit_here(run, overrides(digits, run))
    # The planted fault happens in every attempt that comes to this step; the second one has it behind itself.
    death = Fault(tmp_path / "fault", "kill", rank=1, step=6)
    first_time = (tmp_path / "fault" / "sitecustomize.py").read_text()
    once = first_time.replace("if step == int(", 'if not Path(os.environ["FAULT_MARK"]).exists() and step == int(')
    assert once != first_time
    (tmp_path / "fault" / "sitecustomize.py").write_text(once)
    said = finish(_start_job(run, **death.env))
    first, second = read_attempts(run)
    assert first.reason == f"crashed: Killed: killed by SIGKILL (rank 1 on {first.nodes})"
    assert (first.exit_code, first.ended_step, first.followed_by) == (137, 4, "requeue")
    assert (second.started_step, second.ended_step, second.reason, second.followed_by) == (4, 12, "finished", "finish")
    assert "attempt 1 ended (crashed: Killed" in said
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))

    undisturbed = tmp_path / "undisturbed"
    finish(start_training(overrides(digits, undisturbed)))
    assert_same_state(run, undisturbed)


def test_a_job_on_this_machine_that_is_stopped_stays_stopped(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _submit_here(run, overrides(digits, run))
    hold = Fault(tmp_path / "fault", "hold", rank=0, step=5)
    job = _start_job(run, **hold.env)
    hold.wait(job)
    job.send_signal(signal.SIGTERM)
    finish(job, expect=75)
    (attempt,) = read_attempts(run)
    assert (attempt.reason, attempt.followed_by, attempt.ended_step) == ("cancelled", "stop", 6)
    assert checkpoint_of(run).step == 6
