"""Which of SLURM's jobs belong to a submission, and which of its numbers need to be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.test_status import answer, attempt, job, submitted
from vitscale_launch.activity import has_task, job_ids, jobs_of_task, own_jobs
from vitscale_launch.submission import task_folder


@pytest.mark.parametrize(
    ("tasks", "numbers"), [("3", {3}), ("1-3%1", {1, 2, 3}), ("0,4-5", {0, 4, 5}), ("1,3-4%7", {1, 3, 4})]
)
def test_lists_of_tasks(tasks: str, numbers: set[int]) -> None:
    assert {number for number in range(10) if has_task(tasks, number)} == numbers


def test_jobs_before_the_newest_attempts_are_over(tmp_path: Path) -> None:
    submission = submitted(tmp_path / "run", jobs=("16", "17", "18", "19"))
    assert job_ids(submission) == ("16", "17", "18", "19")
    assert job_ids(submission, [attempt(1)]) == ("17", "18", "19")
    local = submitted(tmp_path / "local", executor="local", jobs=("4711",))
    assert job_ids(local, [attempt(1)]) == ()


def test_a_task_has_the_jobs_of_its_own(tmp_path: Path) -> None:
    array = submitted(tmp_path, array_tasks=4)
    task = submitted(task_folder(tmp_path, 2), array_tasks=4, array_task=2, jobs=())
    waits = job(array, "PENDING", job_id="17", array_job="17", array_task="2-3%1")
    others = job(array, job_id="18", array_job="17", array_task="1")
    elsewhere = job(array, job_id="17", array_job="17", array_task="2", command="/elsewhere/x.sh")
    ids = job_ids(task)
    assert ids == ("17",)
    assert own_jobs(task, ids, answer(waits, others, elsewhere)) == [waits]
    assert own_jobs(array, ids, answer(waits, others, elsewhere)) == [waits, others]
    assert jobs_of_task(array, 1, [waits, others]) == [others]


def test_a_single_task_is_no_array_for_slurm(tmp_path: Path) -> None:
    array = submitted(tmp_path, array_tasks=1)
    runs = job(array)
    assert jobs_of_task(array, 0, [runs]) == [runs]
