"""What was submitted survives the file, and a file that is none is told as such."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vitscale.errors import LaunchError
from vitscale_launch.site import Site
from vitscale_launch.submission import Submission, array_folder, read_submission, task_folder, write_submission


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    return Submission(
        run=tmp_path / "run",
        command=("train", "config.yaml"),
        global_batch_size=64,
        micro_batch_size=None,
        nodes_min=1,
        nodes_max=2,
        ranks_per_node=4,
        site=Site(scratch=Path("/scratch"), environment={"A": "b"}, sbatch={"comment": "x", "spread-job": True}),
        python="/venv/bin/python",
        submitted_unix_s=7,
        jobs=("17", "18"),
    )


def test_it_is_read_as_it_was_written(submission: Submission) -> None:
    write_submission(submission)
    assert read_submission(submission.run) == submission
    later = dataclasses.replace(submission, jobs=("17", "18", "19"), executor="local")
    write_submission(later)
    assert read_submission(submission.run) == later


def test_where_things_lie(submission: Submission) -> None:
    assert submission.config == submission.run / "launch" / "config.yaml"
    assert submission.rank_python == ("/venv/bin/python",)
    contained = dataclasses.replace(submission, site=Site(container=("apptainer", "exec", "v.sif")))
    assert contained.rank_python == ("apptainer", "exec", "v.sif", "python3")


def test_tasks_of_an_array_share_code_and_logs(submission: Submission) -> None:
    array = dataclasses.replace(submission, array_tasks=20)
    task = dataclasses.replace(array, run=task_folder(array.run, 12), array_task=12)
    assert task.run == array.run / "tasks" / "00012"
    assert array_folder(task.run) == array.run
    assert (task.code, task.logs) == (array.code, array.logs)
    assert task.folder != array.folder


def test_a_run_that_was_never_submitted(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"was never submitted, .* vitscale launch submit CONFIG --site SITE run="):
        read_submission(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [({"nodes_min": "two"}, "nodes_min"), ({"unknown": 1}, "unknown"), ({"site": {}}, None)]
)
def test_a_file_of_another_kind(submission: Submission, change: dict[str, object], message: str | None) -> None:
    write_submission(submission)
    path = submission.folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        assert read_submission(submission.run).site == Site()
    else:
        with pytest.raises(
            LaunchError, match=rf"is no description of a submission \({message}: .*submit the run again"
        ):
            read_submission(submission.run)


def test_a_file_that_was_cut(submission: Submission) -> None:
    write_submission(submission)
    path = submission.folder / "submission.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(LaunchError, match="is no description of a submission"):
        read_submission(submission.run)


def test_a_folder_that_holds_a_secret_is_closed_to_others(submission: Submission) -> None:
    write_submission(submission)
    before = submission.folder.stat().st_mode
    assert before & 0o077
    write_submission(dataclasses.replace(submission, site=Site(environment={"HF_TOKEN": "x"})))
    assert submission.folder.stat().st_mode & 0o777 == 0o700
