"""What is queued when a run is resumed, and what is refused. tests/slurm has the real thing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.runs import environment
from tests.unit.launch.test_save_time import _record, _save
from tests.unit.launch.test_status import NOW, attempt
from vitscale.config.loader import load_config
from vitscale.errors import ConfigError, LaunchError, TopologyError
from vitscale_launch.attempts import read_attempts, write_attempt
from vitscale_launch.requests import cancel_requested, request_cancel
from vitscale_launch.resume import resume_run
from vitscale_launch.site import Site
from vitscale_launch.snapshot import freeze_config
from vitscale_launch.submission import Submission, read_submission, write_submission
from vitscale_launch.submit import prepare_run

SITE = Site(ranks_per_node=2, partition="old", signal_delay_s=60)
NODES = "".join(f"NodeName=n{i} State=IDLE CPUTot=8 RealMemory=1000 Partitions=new\\n\\n" for i in range(6))
SCONTROL = f"""case "$3" in
partition) printf 'PartitionName=new Default=YES State=UP\\n' ;;
node) printf '{NODES}' ;;
esac"""
SBATCH = """n=$(($(ls "$0".* | wc -l) + 100)); cat "$1" > "$0.$n"; echo "Submitted batch job $n\""""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that are found instead of SLURM's; sbatch keeps its scripts."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, body in (("scontrol", SCONTROL), ("sbatch", SBATCH), ("srun", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "sbatch.0").touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def stopped(config: Path) -> Submission:
    """A run that was submitted for a partition that is gone, and has failed."""
    submission = prepare_run(config, [], SITE, nodes=(1, 1), dry=True).submission
    submission.logs.mkdir(parents=True)
    freeze_config(load_config(config), submission.config)
    write_submission(submission)
    write_attempt(submission.run, attempt(1, ended_unix_s=NOW, exit_code=1, reason="crashed: x", followed_by="stop"))
    return submission


def scripts(commands: Path) -> Iterator[list[str]]:
    """The options of each job that was queued."""
    for path in sorted(commands.glob("sbatch.1*")):
        yield [line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")]


def test_a_profile_is_mended(stopped: Submission, commands: Path) -> None:
    with pytest.raises(LaunchError, match="old is no partition of this cluster; allowed are new"):
        resume_run(stopped.run)
    assert list(scripts(commands)) == []
    request_cancel(stopped.run)
    submission, jobs = resume_run(stopped.run, changes=["partition=new", "ranks_per_node=3"])
    assert jobs == ("101",)
    (options,) = scripts(commands)
    assert "--partition=new" in options
    assert "--ntasks-per-node=3" in options
    assert read_submission(stopped.run) == submission
    assert submission.ranks_per_node == 3
    assert submission.site == replace(SITE, partition="new", ranks_per_node=3)
    assert not cancel_requested(stopped.run)


def test_a_mistake_in_the_profile(stopped: Submission, commands: Path) -> None:
    with pytest.raises(ConfigError, match="partitoin"):
        resume_run(stopped.run, changes=["partitoin=new"])
    with pytest.raises(TopologyError, match="5 ranks cannot share evenly"):
        resume_run(stopped.run, changes=["partition=new", "ranks_per_node=5"])
    assert read_submission(stopped.run) == stopped
    assert list(scripts(commands)) == []


def test_only_numbers_of_nodes_that_fit_are_asked_for(stopped: Submission, commands: Path) -> None:
    # 12 micro-batches on 2 ranks a node: 1, 2, 3 or 6 nodes.
    submission, _ = resume_run(stopped.run, "2:5", changes=["partition=new"])
    assert (submission.nodes_min, submission.nodes_max) == (2, 3)
    assert "--nodes=2-3" in next(scripts(commands))


def test_a_chain(stopped: Submission, commands: Path) -> None:
    with pytest.raises(LaunchError, match="is for SLURM sites with requeue: false"):
        resume_run(stopped.run, changes=["partition=new"], chain=2)
    _, jobs = resume_run(stopped.run, changes=["partition=new", "requeue=false"], chain=2)
    assert jobs == ("101", "102")
    first, second = scripts(commands)
    assert not any(option.startswith("--dependency") for option in first)
    assert "--dependency=afterany:101" in second


def test_a_warning_that_is_too_short_for_the_measured_save(stopped: Submission, commands: Path) -> None:
    _save(stopped.run, 10, begun=NOW - 500, seconds=70)
    _record(stopped.run, unix_s=NOW - 400, images_per_s=24)
    with pytest.raises(LaunchError, match=r"signal_delay_s: 60 s .* are too few, .* --set signal_delay_s="):
        resume_run(stopped.run, changes=["partition=new"])
    resume_run(stopped.run, changes=["partition=new", "signal_delay_s=200"])
    assert len(list(scripts(commands))) == 1


def test_in_this_terminal(stopped: Submission) -> None:
    # Any command does.
    debug = replace(stopped, executor="debug", command=("--help",))
    write_submission(debug)
    command = [sys.executable, "-m", "vitscale", "launch", "resume", str(debug.run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [each.reason for each in read_attempts(debug.run)] == ["crashed: x", "finished"]
