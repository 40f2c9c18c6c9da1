"""What a run is doing, by what is known: one test for each way to get there."""

from __future__ import annotations

import time
from typing import Any

from vitscale_launch.attempts import Attempt
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.verdict import State, judge

_JOB = SlurmJob(
    job_id="17",
    name="run",
    user="ada",
    state="RUNNING",
    reason="",
    partition="main",
    node_list="gpu[1-2]",
    nodes=2,
    restarts=0,
    requeues=True,
    submitted_unix_s=1,
    started_unix_s=None,
    ended_unix_s=None,
    time_limit_s=None,
    time_left_s=None,
    exit_code=None,
    dependency="",
    command="",
    work_dir="",
)


def job(**changed: Any) -> SlurmJob:
    return SlurmJob(**{**_JOB.__dict__, **changed})


def attempt(number: int = 1, **known: Any) -> Attempt:
    return Attempt(number, "17", 0, "gpu[1-2]", 16, 100, None, **known)


def ended(reason: str, code: int, **known: Any) -> Attempt:
    return attempt(ended_unix_s=200, exit_code=code, reason=reason, **known)


def verdict(
    jobs: list[SlurmJob], attempts: list[Attempt], *, finished: bool = False, is_alive: bool = False, asked: bool = True
) -> tuple[State, str]:
    return judge(jobs, attempts, finished=finished, is_alive=is_alive, asked=asked)


def test_a_running_job() -> None:
    running = job(started_unix_s=int(time.time()) - 7260, time_left_s=600)
    state, why = verdict([job(state="CANCELLED", job_id="16"), running], [attempt()])
    assert state is State.RUNNING
    assert why == "job 17 is running on gpu[1-2], since 2 h 01 min, 10 min to its time limit"


def test_a_job_that_is_ending_is_still_at_work() -> None:
    assert verdict([job(state="COMPLETING")], [ended("finished", 0)], finished=True) == (
        State.RUNNING,
        "job 17 is ending on gpu[1-2]",
    )


def test_a_waiting_job() -> None:
    start = int(time.time()) + 1000
    waiting = job(state="PENDING", reason="BeginTime", node_list="", started_unix_s=start)
    state, why = verdict([waiting], [ended("preempted", 75, followed_by="requeue")])
    assert state is State.WAITING
    assert why.startswith("job 17 waits in main (BeginTime), expected to start at 2")


def test_a_finished_run() -> None:
    assert verdict([job(state="COMPLETED")], [ended("finished", 0)], finished=True) == (
        State.FINISHED,
        "all steps are done",
    )
    state, why = verdict([job(state="PENDING")], [ended("finished", 0)], finished=True)
    assert state is State.FINISHED
    assert "will leave at once" in why


def test_a_run_that_was_never_started() -> None:
    assert verdict([], [])[0] is State.NEW


def test_a_job_that_failed_before_its_first_attempt() -> None:
    state, why = verdict([job(state="FAILED", reason="NonZeroExitCode", exit_code=127)], [])
    assert state is State.FAILED
    assert why == "job 17 ended before its first attempt began: FAILED, NonZeroExitCode, exit code 127"


def test_a_job_that_was_cancelled_while_it_waited() -> None:
    state, why = verdict([job(state="CANCELLED", exit_code=0)], [])
    assert state is State.STOPPED
    assert why == "job 17 ended before its first attempt began: CANCELLED, exit code 0"


def test_a_run_that_was_cancelled() -> None:
    assert verdict([], [ended("cancelled", 75, followed_by="stop", because="the user cancelled it")]) == (
        State.STOPPED,
        "attempt 1 ended: cancelled",
    )


def test_a_run_that_was_given_up() -> None:
    given_up = ended("crashed: ValueError: x", 1, followed_by="stop", because="it failed 3 times without progress")
    assert verdict([], [given_up]) == (
        State.FAILED,
        "attempt 1 ended: crashed: ValueError: x; it failed 3 times without progress",
    )


def test_a_requeue_that_slurm_does_not_know_of() -> None:
    gone = [ended("preempted", 75, followed_by="requeue")]
    state, why = verdict([], gone)
    assert state is State.FAILED
    assert why.endswith("but SLURM knows no job of it any more")
    # Where nobody can be asked, there is no reason to doubt it.
    assert verdict([], gone, asked=False)[0] is State.WAITING


def test_an_attempt_that_told_of_no_end() -> None:
    state, why = verdict([job(state="NODE_FAIL", reason="NodeDown", exit_code=0)], [attempt()])
    assert state is State.FAILED
    assert "SLURM says NODE_FAIL, NodeDown" in why
    assert verdict([], [attempt()], is_alive=True)[0] is State.RUNNING
