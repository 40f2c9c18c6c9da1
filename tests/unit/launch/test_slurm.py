"""What is said where SLURM's commands are missing, fail or are silent. tests/slurm has the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale_launch import slurm

Scripts = Callable[..., None]


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    """Write programs that are found instead of SLURM's; without any, none is found."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin-without-slurm:/bin-without-slurm")

    def write(**bodies: str) -> None:
        for name, body in bodies.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)

    return write


def test_without_slurm(scripts: Scripts) -> None:
    scripts()
    for call in (slurm.nodes, slurm.config, lambda: slurm.job("1"), lambda: slurm.cancel("1")):
        with pytest.raises(
            LaunchError, match=r"was not found; log in to a machine of the cluster, or put .* on the PATH"
        ):
            call()


def test_a_silent_controller(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    scripts(scontrol="exec /bin/sleep 30")
    with pytest.raises(LaunchError, match="`scontrol --all show job` did not answer within 0 s; SLURM's controller is"):
        slurm.jobs()


def test_a_controller_that_is_gone(scripts: Scripts) -> None:
    scripts(scontrol="echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"failed: .*connect failure\); look at `scontrol ping`"):
        slurm.job("7")
    scripts(scontrol="echo 'scontrol: fatal: Unable to process configuration file' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"configuration file; look at `scontrol ping`, at SLURM_CONF"):
        slurm.job("7")
    # A machine that belongs to no cluster.
    scripts(scontrol="printf 'scontrol: error: tried DNS\\nscontrol: fatal: no configuration source\\n' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"failed: scontrol: fatal: no configuration source; look at `scontrol ping`"):
        slurm.job("7")


def test_a_job_that_slurm_has_forgotten(scripts: Scripts) -> None:
    scripts(
        scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        scancel="echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1",
    )
    assert slurm.job("7") is None
    assert slurm.jobs(ids=["7"]) == []
    slurm.cancel("7")
    with pytest.raises(LaunchError, match="Invalid job id"):
        slurm.requeue("7")


def test_slurm_is_asked_once_for_many_jobs(scripts: Scripts, tmp_path: Path) -> None:
    said = tmp_path / "said"
    known = ("JobId=7", "JobId=8 ArrayJobId=5 ArrayTaskId=2", "JobId=9", "JobId=5 ArrayJobId=5 ArrayTaskId=3-4%1")
    lines = "".join(f"echo '{line} JobState=RUNNING'; echo; " for line in known)
    scripts(scontrol=f'echo "$@" >> {said}; {lines}')
    assert [job.job_id for job in slurm.jobs(ids=["7", "6", "5"])] == ["7", "8", "5"]
    assert [job.job_id for job in slurm.jobs(ids=["7", "5_2"])] == ["7", "8"]
    assert said.read_text().splitlines() == ["--all show job"] * 2
    slurm.jobs(ids=["7"])
    assert said.read_text().splitlines()[2:] == ["--all show job 7"]
    assert slurm.jobs(ids=[]) == []
    assert len(said.read_text().splitlines()) == 3


def test_a_job_that_was_requeued_already(scripts: Scripts) -> None:
    scripts(scontrol="echo 'Job is pending execution for job 7' >&2; exit 1")
    assert not slurm.requeue("7")
    scripts(scontrol="exit 0")
    assert slurm.requeue("7")


def test_what_is_passed_on(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    scripts(
        scancel=f'echo "$@" >> {said}; echo "${{SCANCEL_INTERACTIVE:-}}" >> {said}', scontrol=f'echo "$@" >> {said}'
    )
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")
    slurm.cancel("7", signal="USR2", to="batch")
    slurm.cancel("7_1", state="PENDING")
    slurm.update("7", StartTime="now+60", ExcNodeList="a,b")
    assert said.read_text().splitlines() == [
        "--signal=USR2 --batch 7",
        "",
        "--state=PENDING 7_1",
        "",
        "update JobId=7 StartTime=now+60 ExcNodeList=a,b",
    ]


def test_settings(scripts: Scripts) -> None:
    scripts(scontrol="printf 'Configuration data as of now\\nKillWait   = 30 sec\\nEpilog  = (null)\\nKillWait = 9\\n'")
    assert slurm.config() == {"KillWait": "30 sec", "Epilog": ""}
