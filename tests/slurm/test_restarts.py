"""What ends the attempts of a job, one after another: time limits, killed tasks, lost nodes, errors that come again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.helpers.job_faults import JobFaults
from tests.helpers.jobs import PATIENCE_S, Lab
from tests.helpers.runs import (
    assert_same_state,
    checkpoint_of,
    checkpoints_of,
    finish,
    metrics,
    overrides,
    start_training,
    trajectory,
)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
EVALUATED = ("evaluation.every={steps: 4}",)
# Of one rank on each node, which trains as two ranks of one machine do.
ONE_RANK = {"ranks_per_node": 1, "cpus_per_node": 1}


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one machine, which evaluates at steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start_training(overrides(digits, run, *EVALUATED), nproc=2))
    return run


def test_three_time_limits_in_a_row_lose_no_step(lab: Lab, undisturbed: Path) -> None:
    faults = JobFaults(lab.folder / "faults")
    for step in (3, 6, 9):
        faults.add("hold", rank=1, step=step)
    # SLURM looks at the limits every half a minute, so the signal comes after 25 to 55 s. On a busy machine that may be
    # before the first step.
    site = lab.site(**ONE_RANK, time_limit_minutes=1, signal_delay_s=5)
    job = lab.submit(*EVALUATED, site=site, faults=faults, options=("--max-failures", "10"))
    job.finish(timeout_s=780)
    attempts = job.attempts()
    assert job.reasons() == ["time limit"] * (len(attempts) - 1) + ["finished"]
    assert [attempt.restart for attempt in attempts] == list(range(len(attempts)))
    # Each has saved the step that the signal met, and the next began there.
    assert {4, 7, 10} <= {attempt.ended_step for attempt in attempts}
    assert [attempt.started_step for attempt in attempts[1:]] == [attempt.ended_step for attempt in attempts[:-1]]
    assert not (job.run / "metrics.rolled_back.jsonl").exists()
    assert trajectory(job.run) == trajectory(undisturbed)
    assert_same_state(job.run, undisturbed)


def test_a_killed_task_takes_the_step_down_and_the_job_comes_back(lab: Lab, undisturbed: Path) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=1, step=6)
    job = lab.submit(*EVALUATED, site=lab.site(**ONE_RANK), faults=faults)
    hold.wait()
    lab.cluster.tasks(job.id)[1].kill()
    killed = time.time()
    job.wait_for(lambda: job.reasons()[0] is not None, "the end of the attempt")
    first = job.attempts()[0]
    assert first.ended_unix_s is not None
    # The other rank waits within a collective operation for the one that is gone.
    assert first.ended_unix_s - killed < 20
    assert (first.reason or "").startswith("crashed: ")
    assert "ill" in (first.reason or "")  # killed, SIGKILL
    # srun tells the highest of the tasks' codes: of the one that was killed, or of the other, which srun then ended.
    assert first.exit_code in (137, 143)
    assert first.ended_step == 4
    job.finish()
    assert [attempt.started_step for attempt in job.attempts()] == [None, 4]
    assert trajectory(job.run) == trajectory(undisturbed)
    assert_same_state(job.run, undisturbed)


@pytest.mark.parametrize("lost", ["node2", "node1"])
def test_a_job_goes_on_with_the_nodes_that_are_left(lab: Lab, undisturbed: Path, lost: str) -> None:
    """``node1`` is the one that the batch script runs on, so nobody is left there who could decide anything."""
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=1, step=6)
    job = lab.submit(*EVALUATED, site=lab.site(**ONE_RANK), nodes="1:2", faults=faults)
    hold.wait()
    lab.cluster.kill_node(lost)
    job.wait_for(lambda: lab.cluster.restarts_of(job.id) > 0, "the requeue")
    job.finish(timeout_s=2 * PATIENCE_S)
    attempts = job.attempts()
    assert (attempts[0].reason or "").startswith("lost: ")
    (other,) = set(lab.cluster.nodes) - {lost}
    assert (attempts[-1].nodes, attempts[-1].ranks) == (other, 1)
    assert attempts[1].started_step == 4
    # The same batches; sums over one rank round otherwise than over two.
    assert [row[:2] for row in trajectory(job.run)] == [row[:2] for row in trajectory(undisturbed)]
    losses = [[row[2] for row in trajectory(run)] for run in (job.run, undisturbed)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("place", "step", "saved"), [("evaluation", None, 4), ("save", 4, None)])
def test_a_job_is_preempted_while_it_evaluates_or_saves(
    lab: Lab, undisturbed: Path, place: str, step: int | None, saved: int | None
) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=1, place=place, step=step)
    job = lab.submit(*EVALUATED, site=lab.site(**ONE_RANK), faults=faults)
    hold.wait()
    lab.cluster.preempt(seconds=1)
    job.wait_until_waiting()
    stopped_at = checkpoint_of(job.run).step
    if saved is not None:
        assert stopped_at == saved
    # Training goes on while a checkpoint is written, until the next one waits for it.
    assert 4 <= stopped_at <= 9
    assert not [name for name in checkpoints_of(job.run) if int(name.partition("-")[2]) > stopped_at]
    job.finish()
    assert job.reasons() == ["preempted", "finished"]
    assert trajectory(job.run) == trajectory(undisturbed)
    assert_same_state(job.run, undisturbed)
    assert _evaluations(job.run) == _evaluations(undisturbed)


def test_a_grace_time_that_does_not_suffice_loses_the_steps_since_the_last_checkpoint(
    lab: Lab, undisturbed: Path
) -> None:
    faults = JobFaults(lab.folder / "faults")
    hang = faults.add("hang", rank=1, step=6)
    # Neither does the checkpoint of step 6 become complete without the next step, nor can the batch script tell.
    job = lab.submit(*EVALUATED, "checkpoint.every={steps: 1}", site=lab.site(**ONE_RANK), faults=faults)
    hang.wait()
    lab.cluster.preempt(seconds=1)
    job.wait_until_waiting()
    job.finish()
    assert job.reasons() == ["preempted", "finished"]
    assert [attempt.started_step for attempt in job.attempts()] == [None, 5]
    assert trajectory(job.run) == trajectory(undisturbed)
    assert_same_state(job.run, undisturbed)


@pytest.mark.parametrize(("what", "attempts"), [("raise", 2), ("kill", 3)])
def test_a_job_that_crashes_at_the_same_step_each_time_is_given_up(lab: Lab, what: str, attempts: int) -> None:
    """An error that came twice at one step is known to come again; a kill is tried as often as is allowed."""
    faults = JobFaults(lab.folder / "faults")
    faults.add(what, rank=1, step=5, always=True)
    job = lab.submit(site=lab.site(**ONE_RANK), faults=faults, options=("--max-failures", "2"))
    job.wait_until_gone(timeout_s=2 * PATIENCE_S)
    # The first one has committed step 4, which is progress.
    assert len(job.attempts()) == attempts, job.story()
    assert all((reason or "").startswith("crashed: ") for reason in job.reasons())
    assert {attempt.ended_step for attempt in job.attempts()} == {4}
    last = job.attempts()[-1]
    assert last.followed_by == "stop"
    assert lab.cluster.state_of(job.id) == "FAILED"
    shown = lab.command("status", job.run)
    assert shown.code == 0, shown.errors
    assert last.because is not None
    assert last.because in " ".join(shown.out.split())
    if what == "raise":
        assert "the same error came twice after step 5" in last.because
        assert "RuntimeError: planted fault (rank 1 on node2)" in (last.reason or "")


def test_a_chain_of_jobs_does_without_requeue(lab: Lab, undisturbed: Path) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=1, step=6)
    site = lab.site(**ONE_RANK, partition="frail", requeue=False)
    job = lab.submit(*EVALUATED, site=site, faults=faults, options=("--chain", "3"))
    first, second, third = job.ids
    hold.wait()
    lab.cluster.preempt(seconds=1)
    job.wait_until_gone(timeout_s=2 * PATIENCE_S)
    assert [(attempt.job, attempt.reason) for attempt in job.attempts()] == [
        (first, "preempted"),
        (second, "finished"),
    ], job.story()
    # The last link finds nothing left to do.
    assert lab.cluster.state_of(third) == "COMPLETED"
    assert [attempt.restart for attempt in job.attempts()] == [0, 0]
    assert trajectory(job.run) == trajectory(undisturbed)
    assert_same_state(job.run, undisturbed)


def test_the_next_link_of_a_chain_waits_after_a_crash(lab: Lab) -> None:
    faults = JobFaults(lab.folder / "faults")
    faults.add("raise", rank=0, step=5)
    site = lab.site(requeue=False, backoff_s=25, **ONE_RANK)
    job = lab.submit(site=site, faults=faults, options=("--chain", "2"))
    job.wait_until_gone()
    crashed, finished = job.attempts()
    assert (crashed.followed_by, finished.reason) == ("next link", "finished"), job.story()
    assert finished.started_unix_s - (crashed.ended_unix_s or 0) >= 24


def test_a_task_for_each_node_starts_the_ranks_of_its_node(lab: Lab) -> None:
    faults = JobFaults(lab.folder / "faults")
    hold = faults.add("hold", rank=3, step=5)
    job = lab.submit(site=lab.site(tasks_per_node="node"), faults=faults)
    hold.wait()
    lab.cluster.preempt(seconds=1)
    job.wait_until_waiting()
    assert checkpoint_of(job.run).step == 6
    job.finish()
    assert job.reasons() == ["preempted", "finished"]
    assert {attempt.ranks for attempt in job.attempts()} == {4}
    assert len(checkpoint_of(job.run).records) == 4
    assert [record["step"] for record in metrics(job.run)] == list(range(1, 13))


def _evaluations(run: Path) -> list[dict[str, object]]:
    """What was evaluated, without how long it took."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in ("step", "eval_top1")} for record in records if "eval_top1" in record]
