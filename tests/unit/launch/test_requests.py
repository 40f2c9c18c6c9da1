"""What is asked of a run, and of an array, whose tasks must hear it, too."""

from __future__ import annotations

from pathlib import Path

from vitscale_launch.requests import cancel_path, cancel_requested, request_cancel
from vitscale_launch.submission import task_folder


def test_a_run_hears_its_own_request_only(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert not cancel_requested(one)
    request_cancel(one)
    assert cancel_requested(one)
    assert not cancel_requested(other)
    # A run that lies in a folder of runs, one of which is named as an array's task is.
    assert not cancel_requested(one / "00001")
    assert not cancel_requested(one / "tasks" / "1")


def test_one_request_reaches_all_tasks_of_an_array(tmp_path: Path) -> None:
    tasks = [task_folder(tmp_path, number) for number in range(3)]
    request_cancel(tasks[1])
    assert [cancel_requested(task) for task in tasks] == [False, True, False]
    assert not cancel_requested(tmp_path)
    cancel_path(tasks[1]).unlink()
    request_cancel(tmp_path)
    assert all(cancel_requested(task) for task in tasks)
