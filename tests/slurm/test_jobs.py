"""Submitted training jobs of 2 nodes x 2 ranks: to the end, preempted, cancelled."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from tests.helpers.job_faults import JobFaults
from tests.helpers.jobs import Job, Lab
from tests.helpers.runs import assert_same_state, checkpoint_of, metrics, trajectory
from tests.helpers.slurm import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(shared_cluster: SlurmCluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that nothing happened to."""
    shared_cluster.clear()
    lab = Lab(shared_cluster, digits, tmp_path_factory.mktemp("undisturbed"))
    job = lab.submit()
    job.finish()
    return job


def test_a_job_runs_to_the_end(undisturbed: Job) -> None:
    (attempt,) = undisturbed.attempts()
    assert dataclasses.asdict(attempt) | {
        "job": undisturbed.id,
        "restart": 0,
        "nodes": "node1,node2",
        "ranks": 4,
        "started_step": None,
        "exit_code": 0,
        "ended_step": 12,
        "followed_by": "finish",
    } == dataclasses.asdict(attempt)
    assert [record["step"] for record in metrics(undisturbed.run)] == list(range(1, 13))
    assert len(checkpoint_of(undisturbed.run).records) == 4
    outcome = undisturbed.lab.command("status", undisturbed.run)
    assert outcome.code == 0, outcome.errors
    assert "finished" in outcome.out
    assert "12" in outcome.out


@pytest.mark.slow
def test_a_preempted_job_saves_comes_back_once_and_ends_with_the_same_bits(lab: Lab, undisturbed: Job) -> None:
    faults = JobFaults(lab.folder / "faults")
    # In the midst of an epoch, and of the steps between two checkpoints.
    hold = faults.add("hold", rank=3, step=5)
    job = lab.submit(faults=faults)
    hold.wait()
    important = lab.cluster.preempt(seconds=1)
    job.wait_until_waiting()
    # What was running when the signal came is the last step: none is lost.
    assert checkpoint_of(job.run).step == 6
    assert lab.cluster.show(job.id)["Requeue"] == "1"
    job.finish()
    assert lab.cluster.state_of(important) == "COMPLETED"
    assert job.reasons() == ["preempted", "finished"]
    assert [attempt.started_step for attempt in job.attempts()] == [None, 6]
    assert [attempt.restart for attempt in job.attempts()] == [0, 1]
    assert lab.cluster.restarts_of(job.id) == 1
    assert job.ids == [job.id]
    assert trajectory(job.run) == trajectory(undisturbed.run)
    assert_same_state(job.run, undisturbed.run)
    # All of it ran the code that was there at the submission.
    assert hold.code().is_relative_to(job.run / "launch" / "code")


@pytest.mark.slow
def test_scancel_saves_and_nothing_comes_back(lab: Lab) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=0, step=7)
    job = lab.submit(faults=faults)
    hold.wait()
    lab.cluster.command("scancel", job.id)
    job.wait_until_gone()
    assert lab.cluster.state_of(job.id) == "CANCELLED"
    assert checkpoint_of(job.run).step == 8
    assert job.reasons() == ["cancelled"]
    assert job.attempts()[0].followed_by == "stop"
    shown = lab.command("status", job.run)
    assert shown.code == 0, shown.errors
    assert "cancelled" in shown.out
    assert f"vitscale launch resume {job.run}" in " ".join(shown.out.split())


@pytest.mark.slow
def test_the_ranks_run_in_the_container(lab: Lab) -> None:
    seen = lab.folder / "seen"
    # Stands in front of Python as a container's runtime does.
    script = f'echo "$SLURM_PROCID $*" >> {seen}; exec "$0" "$@"'
    job = lab.submit(site=lab.site(container=["sh", "-c", script], container_python=sys.executable))
    job.finish()
    command = f"-m vitscale train {job.run}/launch/config.yaml"
    assert sorted(seen.read_text().splitlines()) == [f"{rank} {command}" for rank in range(4)]
