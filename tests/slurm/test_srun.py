"""`srun vitscale train` on a real SLURM: the tasks are the ranks, and no other launcher is needed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.faults import Fault
from tests.helpers.runs import CONFIG, checkpoint_of, environment, finish, metrics, overrides
from tests.helpers.slurm import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(180)]
ONE_NODE = ("-N1", "-n2")
TWO_NODES = ("-N2", "-n2")
# A failed rank ends the step within this time, also on a busy machine.
SECONDS = 20


def _srun(cluster: SlurmCluster, layout: tuple[str, str], arguments: list[str], **env: str) -> subprocess.Popen[str]:
    # The nodes' names do not resolve here, as they do on a cluster.
    address = {"MASTER_ADDR": "127.0.0.1"} if layout == TWO_NODES else {}
    command = ["srun", *layout, "--kill-on-bad-exit=1", sys.executable, "-m", "vitscale", "train", str(CONFIG)]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment(**cluster.environment, **address, **env),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _attempts(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("layout", "number"), [(ONE_NODE, signal.SIGUSR2), (TWO_NODES, signal.SIGTERM)])
def test_a_step_stops_on_a_signal_and_the_same_command_finishes_the_run(
    cluster: SlurmCluster, digits: Path, tmp_path: Path, layout: tuple[str, str], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = overrides(digits, run)
    hold = Fault(tmp_path / "fault", "hold", rank=1, step=5)
    first = _srun(cluster, layout, arguments, **hold.env)
    hold.wait(first)
    (job,) = cluster.jobs()
    cluster.command("scancel", f"--signal={number.name.removeprefix('SIG')}", f"{job}.0")
    errors = finish(first, expect=75)
    assert errors.count(f"stopped at step 6 of 12 on {number.name}; a checkpoint is committed") == 1
    assert "Traceback" not in errors
    checkpoint = checkpoint_of(run)
    assert checkpoint.step == 6
    assert len(checkpoint.records) == 2

    assert "continuing from the checkpoint of step 6" in finish(_srun(cluster, layout, arguments))
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))
    assert [attempt["world_size"] for attempt in _attempts(run)] == [2, 2]
    assert _attempts(run)[0]["slurm_job_id"] == job


def test_a_killed_task_ends_the_step(cluster: SlurmCluster, digits: Path, tmp_path: Path) -> None:
    death = Fault(tmp_path / "fault", "kill", rank=1, step=3)
    step = _srun(cluster, ONE_NODE, overrides(digits, tmp_path / "run"), **death.env)
    errors = finish(step, expect=128 + signal.SIGKILL)
    assert death.seconds_ago() < SECONDS
    assert "task 1: Killed" in errors
    assert "Traceback" not in errors


def test_an_exception_of_one_task_is_the_exit_status_of_the_step(
    cluster: SlurmCluster, digits: Path, tmp_path: Path
) -> None:
    crash = Fault(tmp_path / "fault", "raise", rank=1, step=3)
    errors = finish(_srun(cluster, TWO_NODES, overrides(digits, tmp_path / "run"), **crash.env), expect=1)
    assert crash.seconds_ago() < SECONDS
    assert errors.count("Traceback") == 1
    assert "vitscale: rank 1 failed\n" in errors
    assert "lost contact" not in errors
