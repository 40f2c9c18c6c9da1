"""Seeing and steering jobs on a real SLURM: its commands from Python, then status, logs, list, cancel and resume."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job_faults import JobFaults
from tests.helpers.jobs import Job, Lab
from tests.helpers.runs import checkpoint_of, environment, metrics, wait_until
from tests.helpers.slurm import SlurmCluster
from vitscale.errors import LaunchError
from vitscale_launch import slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ONE_NODE = "1"


@pytest.fixture
def sbatch(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Queue a script of one line; SLURM's commands find the cluster in this process, too."""
    for name, value in lab.cluster.environment.items():
        monkeypatch.setenv(name, value)

    def queue(line: str, *options: str) -> str:
        where = ["--output=/dev/null", f"--chdir={lab.folder}"]
        return lab.cluster.command("sbatch", "--parsable", *where, *options, "--wrap", line)

    return queue


def _job(job_id: str) -> slurm.SlurmJob:
    found = slurm.job(job_id)
    assert found is not None
    return found


def _wait_for(job_id: str, *states: str) -> slurm.SlurmJob:
    assert wait_until(lambda: _job(job_id).state in states, timeout_s=30, every_s=0.1), _job(job_id)
    return _job(job_id)


def test_a_job_from_the_queue_to_its_end(sbatch: Any, lab: Lab) -> None:
    before = time.time()
    job_id = sbatch("sleep 60", "--nodes=2", "--time=5", "--job-name=a job State=x", "--requeue")
    job = _wait_for(job_id, "RUNNING")
    assert (job.job_id, job.name, job.partition, job.node_list, job.nodes) == (
        job_id,
        "a job State=x",
        "main",
        "node[1-2]",
        2,
    )
    assert (job.reason, job.restarts, job.requeues, job.time_limit_s) == ("", 0, True, 300)
    assert job.time_left_s is not None
    assert 270 <= job.time_left_s <= 300
    assert job.submitted_unix_s is not None
    assert job.started_unix_s is not None
    assert before - 2 <= job.submitted_unix_s <= job.started_unix_s <= time.time() + 2
    assert Path(job.work_dir) == lab.folder
    # SLURM remembers for a while the ended jobs of other tests.
    assert [found.job_id for found in slurm.jobs(user=job.user) if not found.has_ended] == [job_id]
    assert slurm.jobs(user="nobody-of-this-name") == []

    assert slurm.requeue(job_id)
    assert not slurm.requeue(job_id), "it is in the queue already"
    slurm.update(job_id, StartTime="now+600")
    waiting = _wait_for(job_id, "PENDING")
    assert waiting.is_waiting
    assert waiting.restarts == 1
    assert waiting.started_unix_s is not None
    assert waiting.started_unix_s > time.time() + 500

    slurm.cancel(job_id)
    ended = _wait_for(job_id, "CANCELLED")
    assert ended.has_ended
    assert ended.ended_unix_s is not None
    with pytest.raises(LaunchError, match=r"`scontrol requeue 999999` failed: Invalid job id"):
        slurm.requeue("999999")
    assert slurm.job("999999") is None
    slurm.cancel("999999")
    with pytest.raises(LaunchError, match="NoSuchKey"):
        slurm.update(job_id, NoSuchKey="1")


def test_the_exit_code_of_a_job_and_a_signal_to_its_tasks(sbatch: Any, lab: Lab) -> None:
    failed = _wait_for(sbatch("exit 3"), "FAILED")
    assert (failed.exit_code, failed.reason) == (3, "NonZeroExitCode")
    ready = lab.folder / "ready"
    job_id = sbatch(f"srun sh -c 'trap \"exit 7\" USR2; touch {ready}; while :; do sleep 0.1; done'")
    assert wait_until(ready.exists, timeout_s=30, every_s=0.1)
    slurm.cancel(job_id, signal="USR2")
    assert _wait_for(job_id, "FAILED").exit_code == 7


def test_the_tasks_of_an_array(sbatch: Any) -> None:
    job_id = sbatch("sleep 60", "--array=0-5%1")
    assert wait_until(lambda: any(job.state == "RUNNING" for job in slurm.jobs(ids=[job_id])), timeout_s=30)
    waiting, running = sorted(slurm.jobs(ids=[job_id]), key=lambda job: job.state)
    assert (running.array_job, running.array_task, running.state) == (job_id, "0", "RUNNING")
    assert (waiting.array_task, waiting.state, waiting.reason) == ("1-5%1", "PENDING", "JobArrayTaskLimit")
    assert _job(f"{job_id}_0").job_id == running.job_id
    slurm.cancel(job_id, state="PENDING")
    assert _job(f"{job_id}_0").state == "RUNNING"
    left = [job for job in slurm.jobs(ids=[job_id]) if not job.has_ended]
    assert [job.array_task for job in left] == ["0"]


def test_what_the_cluster_has(sbatch: Any, lab: Lab) -> None:
    assert [(node.name, node.cpus, node.state) for node in slurm.nodes()] == [
        ("node1", 4, "IDLE"),
        ("node2", 4, "IDLE"),
    ]
    assert all(node.address == "127.0.0.1" and "main" in node.partitions for node in slurm.nodes())
    partitions = {partition.name: partition for partition in slurm.partitions()}
    assert partitions["main"].is_default
    assert (partitions["main"].nodes, partitions["main"].node_list) == (2, "node[1-2]")
    assert partitions["high"].priority_tier > partitions["main"].priority_tier
    assert partitions["main"].preempt_mode == "REQUEUE"
    assert slurm.config()["ClusterName"] == "lab"
    assert slurm.host_names("node[1-2],other") == ["node1", "node2", "other"]
    assert slurm.jobs() == [] or all(job.has_ended for job in slurm.jobs())


def status(job: Job) -> dict[str, Any]:
    outcome = job.lab.command("status", job.run, "--json")
    assert outcome.code == 0, outcome.errors
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def refused(job: Job, *words: object) -> str:
    outcome = job.lab.command(*words)
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert outcome.errors.startswith("vitscale: error: ")
    assert "Traceback" not in outcome.errors
    return outcome.errors


@pytest.mark.slow
def test_a_run_is_watched_stopped_after_a_commit_and_resumed(lab: Lab, cluster: SlurmCluster) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=1, step=5)
    job = lab.submit(nodes=ONE_NODE, faults=faults)
    follower = subprocess.Popen(
        [sys.executable, "-m", "vitscale", "launch", "logs", str(job.run), "--follow", "--lines", "3"],
        env=environment(**cluster.environment),
        stdout=subprocess.PIPE,
        text=True,
    )
    hold.wait()
    found = status(job)
    assert (found["state"], found["step"], found["progress"]["total_steps"]) == ("running", 5, 12)
    assert found["why"].startswith(f"job {job.id} is running on node")
    assert found["remaining_s"] > 0
    assert found["commit"]["step"] == 4
    assert [beat["rank"] for beat in found["beats"]] == [0, 1]
    assert found["silence"] is None
    assert found["notes"] == []
    (attempt,) = found["attempts"]
    assert (attempt["number"], attempt["job"], attempt["ranks"], attempt["reason"]) == (1, job.id, 2, None)
    shown = lab.command("status", job.run).out
    assert "5 of 12 (41.7%), loss " in shown
    assert "2 of 2 have told their place" in shown
    assert "goes on" in shown
    listed = lab.command("list", lab.folder).out
    (row,) = [line for line in listed.splitlines() if line.startswith("run ") and "running" in line]
    assert "5 of 12" in row
    assert row.endswith(job.id)
    said = refused(job, "resume", job.run)
    assert f"its job {job.id} is running; wait for it, stop it with `vitscale launch cancel" in said

    outcome = lab.command("cancel", job.run)
    assert outcome.code == 0, outcome.errors
    assert f"job {job.id}: asked to stop after a commit\n" in outcome.out
    assert f"stopped; committed is step 6; go on with: vitscale launch resume {job.run}\n" in outcome.out
    assert job.is_gone()
    assert checkpoint_of(job.run).step == 6
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    assert "step 5/12" in followed
    assert followed.splitlines()[-1] == "==> stopped: attempt 1 ended: cancelled <=="

    found = status(job)
    assert (found["state"], found["why"], found["step"]) == ("stopped", "attempt 1 ended: cancelled", 6)
    said = refused(job, "cancel", job.run)
    assert "neither runs nor waits in the queue (stopped: attempt 1 ended: cancelled); leave it" in said
    said = refused(job, "resume", job.run, "--nodes", "3")
    assert "6 ranks cannot share evenly; world sizes that fit: 1, 2, 4" in said
    outcome = lab.command("resume", job.run)
    assert outcome.code == 0, outcome.errors
    job.finish()
    assert [record["step"] for record in metrics(job.run)] == list(range(1, 13))
    found = status(job)
    assert (found["state"], found["commit"]["step"], found["remaining_s"]) == ("finished", 12, None)
    assert [attempt["reason"] for attempt in found["attempts"]] == ["cancelled", "finished"]
    assert "is finished (all steps are done); there is nothing to resume" in refused(job, "resume", job.run)
    second = lab.command("logs", job.run, "--attempt", "2", "--lines", "0").out
    assert "continuing from the checkpoint of step 6" in second
    assert "starting from scratch" not in second
    assert "starting from scratch" in lab.command("logs", job.run, "--attempt", "1", "--lines", "0").out
    assert "attempt 2 of job" in lab.command("logs", job.run, "--rank", "1").out
    assert "at most 2 ranks, counted from 0" in refused(job, "logs", job.run, "--rank", "2")
    assert "rank 0 in attempt 3 has printed nothing yet" in refused(job, "logs", job.run, "--attempt", "3")

    # Elsewhere, the folder alone tells as much.
    elsewhere = {"PATH": str(Path(sys.executable).parent), "SLURM_CONF": "/nonexistent"}
    command = [sys.executable, "-m", "vitscale", "launch", "status", str(job.run)]
    done = subprocess.run(command, env=environment(**elsewhere), capture_output=True, text=True, check=True)
    assert "finished: all steps are done" in done.stdout
    assert "the queue is out of reach: scontrol was not found" in done.stdout


def test_a_job_that_waits_is_cancelled_without_a_start(lab: Lab) -> None:
    lab.cluster.command("sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    job = lab.submit(nodes=ONE_NODE)
    assert wait_until(lambda: lab.cluster.show(job.id)["Reason"] == "Resources", timeout_s=30, every_s=0.2)
    found = status(job)
    assert found["state"] == "waiting"
    assert found["why"].startswith(f"job {job.id} waits in main (Resources)")
    outcome = lab.command("cancel", job.run)
    assert outcome.code == 0, outcome.errors
    assert "stopped; nothing is committed; begin again with: vitscale launch resume" in outcome.out
    assert lab.cluster.state_of(job.id) == "CANCELLED"
    found = status(job)
    assert (found["state"], found["attempts"]) == ("stopped", [])
    assert found["why"].startswith(f"job {job.id} ended before its first attempt began: CANCELLED")


@pytest.mark.slow
def test_cancel_at_once(lab: Lab) -> None:
    # Without the commit, not even a rank that hears nothing keeps the job.
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=0, step=5)
    job = lab.submit(nodes=ONE_NODE, faults=faults)
    hold.wait()
    outcome = lab.command("cancel", job.run, "--now")
    assert outcome.code == 0, outcome.errors
    assert "asked to stop at once" in outcome.out
    assert job.is_gone()
    assert lab.cluster.state_of(job.id) == "CANCELLED"
    assert status(job)["state"] == "stopped"


@pytest.mark.slow
def test_the_tasks_of_an_array_are_watched_and_cancelled(lab: Lab) -> None:
    folder = lab.folder / "array"
    words = ["--tasks", "3", "--site", lab.site(cpus_per_node=4), "--folder", folder]
    script = "import sys, time; print('part', sys.argv[1]); time.sleep(0 if sys.argv[1] == '0' else 300)"
    outcome = lab.command("array", *words, "--", sys.executable, "-c", script, "{task}")
    assert outcome.code == 0, outcome.errors
    job = Job(lab, folder)

    def states() -> list[str]:
        return [task["state"] for task in status(job)["tasks"]]

    assert wait_until(lambda: states() == ["finished", "running", "running"], timeout_s=60, every_s=0.5), states()
    shown = lab.command("status", folder).out
    assert "running: 3 tasks: 2 running, 1 finished" in shown
    assert "part 0" in lab.command("logs", folder, "--rank", "0").out
    assert "there are 3, counted from 0" in refused(job, "logs", folder, "--rank", "3")
    outcome = lab.command("cancel", folder / "tasks" / "00002")
    assert outcome.code == 0, outcome.errors
    assert f"stopped; go on with: vitscale launch resume {folder}\n" in outcome.out
    assert states() == ["finished", "running", "stopped"]
    outcome = lab.command("cancel", folder)
    assert outcome.code == 0, outcome.errors
    assert job.is_gone()
    assert states() == ["finished", "stopped", "stopped"]


def test_an_array_of_one_task_is_watched_and_cancelled(lab: Lab) -> None:
    # submitit makes it no array.
    folder = lab.folder / "a user's array"
    words = ["--tasks", "1", "--site", lab.site(ranks_per_node=1), "--folder", folder]
    outcome = lab.command("array", *words, "--", "sh", "-c", "echo hello {task} of {tasks}; exec sleep 300")
    assert outcome.code == 0, outcome.errors
    job = Job(lab, folder)
    assert wait_until(lambda: "hello 0 of 1" in lab.command("logs", folder).out, timeout_s=60, every_s=0.5), job.story()
    found = status(job)
    assert (found["state"], [task["state"] for task in found["tasks"]]) == ("running", ["running"])
    outcome = lab.command("cancel", folder)
    assert outcome.code == 0, outcome.errors
    assert f"stopped; go on with: vitscale launch resume '{lab.folder}/a user'\"'\"'s array'" in outcome.out
    assert job.is_gone()
    assert status(job)["state"] == "stopped"
