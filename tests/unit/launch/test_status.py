"""Status, list and logs from folders as jobs leave them, on a machine without SLURM and with answers of one."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vitscale.durable import Lock
from vitscale.errors import LaunchError
from vitscale.train.records import CHECKPOINTS_REMOVED
from vitscale_launch import cli
from vitscale_launch.attempts import Attempt, errors_folder, write_attempt
from vitscale_launch.listing import find_runs, read_all
from vitscale_launch.logs import follow_logs, show_logs
from vitscale_launch.requests import request_cancel
from vitscale_launch.site import Site
from vitscale_launch.slurm import SlurmJob
from vitscale_launch.status import read_status
from vitscale_launch.submission import Submission, task_folder, write_submission
from vitscale_launch.verdict import State

NOW = int(time.time())
ENDED = {"ended_unix_s": NOW - 100, "exit_code": 75, "reason": "preempted", "ended_step": 40, "followed_by": "requeue"}


def submitted(run: Path, **changed: Any) -> Submission:
    submission = Submission(
        run=run,
        command=("train", "config.yaml"),
        global_batch_size=64,
        micro_batch_size=4,
        nodes_min=2,
        nodes_max=2,
        ranks_per_node=2,
        site=Site(ranks_per_node=2),
        python="python",
        submitted_unix_s=NOW - 5000,
        jobs=("17",),
    )
    submission = dataclasses.replace(submission, **changed)
    write_submission(submission)
    return submission


def attempt(number: int, started_unix_s: int = NOW - 4000, **known: Any) -> Attempt:
    return Attempt(number, "17", number - 1, "gpu[1-2]", 4, started_unix_s, None, **known)


def trained(run: Path, step: int, total: int = 100) -> None:
    (run / "plan.json").write_text(json.dumps({"total_steps": total, "global_batch_size": 64}))
    records = [{"step": s, "loss": 2.5, "images_per_s": 64.0, "attempt": 1, "unix_s": NOW - 60 + s} for s in (1, step)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def beat(run: Path, rank: int, step: int, phase: str, ago_s: float) -> None:
    (run / "heartbeat").mkdir(exist_ok=True)
    record = {"rank": rank, "host": f"gpu{rank // 2 + 1}", "unix_s": time.time() - ago_s, "step": step, "phase": phase}
    (run / "heartbeat" / f"rank-{rank:05}.json").write_text(json.dumps({**record, "attempt": 1}))


def job(submission: Submission, state: str = "RUNNING", **changed: Any) -> SlurmJob:
    known = dict.fromkeys((field.name for field in dataclasses.fields(SlurmJob)), None)
    known |= {"job_id": "17", "state": state, "reason": "", "node_list": "gpu[1-2]", "partition": "main"}
    return SlurmJob(**{**known, "command": f"{submission.logs}/script.sh", **changed})


def answer(*jobs: SlurmJob) -> Any:
    return lambda ids: [found for found in jobs if found.numbers & set(ids)]


def out_of_reach(_: Sequence[str]) -> list[SlurmJob]:
    raise LaunchError("scontrol was not found; log in")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_run_that_hangs_names_the_rank_and_its_phase(run: Path) -> None:
    submission = submitted(run)
    write_attempt(run, attempt(1))
    trained(run, 40)
    for rank in (0, 1, 3):
        beat(run, rank, 40, "train", 300)
    beat(run, 2, 40, "load", 301)
    # Of an earlier attempt that had more ranks, and of one that has died before this began.
    beat(run, 7, 99, "save", 2)
    found = read_status(run, answer(job(submission)))
    assert found.state is State.RUNNING
    assert found.silence is not None
    (suspect,) = found.silence.ranks
    assert (suspect.rank, suspect.host, suspect.phase, suspect.step) == (2, "gpu2", "load", 40)
    assert found.silence.seconds == pytest.approx(300, abs=20)
    assert [each.rank for each in found.beats] == [0, 1, 2, 3]
    assert found.to_json()["silence"]["ranks"][0]["host"] == "gpu2"


def test_a_number_that_another_cluster_has_given_again_is_not_ours(run: Path) -> None:
    submission = submitted(run)
    write_attempt(run, attempt(1, **ENDED))
    assert read_status(run, answer(job(submission))).state is State.RUNNING
    assert read_status(run, answer(job(submission, command="/elsewhere/x.sh"))).state is State.FAILED


def test_without_slurm_the_folder_tells(run: Path) -> None:
    submitted(run)
    write_attempt(run, attempt(1, **ENDED))
    trained(run, 40)
    found = read_status(run, out_of_reach)
    assert found.state is State.WAITING
    assert found.why == "attempt 1 ended: preempted; it went back to the queue"
    assert found.notes == ("the queue is out of reach: scontrol was not found; log in",)
    assert found.progress.remaining_s == 60
    write_attempt(run, attempt(2, NOW - 90))
    beat(run, 0, 41, "train", 3)
    assert read_status(run, out_of_reach).state is State.RUNNING
    beat(run, 0, 41, "train", 4000)
    os.utime(run / "heartbeat" / "rank-00000.json")
    assert read_status(run, answer()).state is State.FAILED


def test_a_longer_run_that_was_submitted_again_is_not_finished(run: Path) -> None:
    submission = submitted(run)
    write_attempt(run, attempt(1, ended_unix_s=NOW - 50, exit_code=0, reason="finished", ended_step=100))
    trained(run, 100)
    assert read_status(run, answer()).state is State.FINISHED
    submission = submitted(run, submitted_unix_s=NOW, jobs=("17", "18"), first_attempt=2)
    waits = job(submission, "PENDING", job_id="18", reason="Priority")
    assert read_status(run, answer(job(submission, "COMPLETED"), waits)).state is State.WAITING


def test_the_rank_that_failed_first_is_named(run: Path) -> None:
    submitted(run)
    write_attempt(run, attempt(1, ended_unix_s=NOW, exit_code=1, reason="crashed: ValueError: x", followed_by="stop"))
    folder = errors_folder(run, 1)
    folder.mkdir(parents=True)
    for rank, unix_s, kind in ((0, 12.0, "DistError"), (3, 11.0, "ValueError"), (1, 10.0, "Interrupted")):
        error = {"rank": rank, "host": "gpu2", "kind": kind, "message": "planted\nmore", "traceback": None}
        error |= {"exit_code": 1, "unix_s": unix_s}
        (folder / f"rank-{rank:05}.json").write_text(json.dumps(error))
    found = read_status(run, answer())
    assert found.failure is not None
    assert (found.failure.rank, found.failure.kind) == (3, "ValueError")
    shown = CliRunner().invoke(cli.app, ["status", str(run)]).output
    assert "failure  rank 3 on gpu2: ValueError: planted\n" in shown
    assert f"next     vitscale launch resume {run}\n" in shown


def test_a_run_that_was_started_by_hand(run: Path) -> None:
    run.mkdir()
    (run / "config.yaml").write_text("")
    trained(run, 40)
    record = {"attempt": 1, "started_unix_s": NOW - 9000, "host": "laptop", "world_size": 2, "restored_step": None}
    (run / "attempts.jsonl").write_text(json.dumps({**record, "slurm_job_id": None}) + "\n")
    (run / ".lock").touch()
    assert read_status(run, out_of_reach).state is State.FAILED
    lock = Lock(run / ".lock")
    assert lock.take()
    found = read_status(run, out_of_reach)
    lock.release()
    assert found.state is State.RUNNING
    assert found.why == "it is being trained on laptop, not by a job that SLURM knows"
    assert found.attempts[0].ranks == 2


def test_a_run_whose_checkpoints_were_removed_at_its_end_is_finished(run: Path) -> None:
    run.mkdir()
    (run / "config.yaml").write_text("")
    record = {"attempt": 1, "started_unix_s": NOW - 9000, "host": "laptop", "world_size": 2, "restored_step": None}
    (run / "attempts.jsonl").write_text(json.dumps(record) + "\n")
    trained(run, 100)
    assert read_status(run, out_of_reach).state is State.FAILED
    (run / CHECKPOINTS_REMOVED).touch()
    assert read_status(run, out_of_reach).state is State.FINISHED
    trained(run, 99)
    assert read_status(run, out_of_reach).state is State.FAILED


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"is no run folder, .* name the folder that run=... named"):
        read_status(tmp_path)


def test_an_array_is_the_sum_of_its_tasks(run: Path) -> None:
    array = submitted(run, array_tasks=4, nodes_min=1, nodes_max=1, ranks_per_node=1)
    write_attempt(task_folder(run, 0), attempt(1, ended_unix_s=NOW, exit_code=0, reason="finished"))
    write_attempt(task_folder(run, 1), attempt(1, ended_unix_s=NOW, exit_code=3, reason="crashed: exit code 3"))
    write_attempt(task_folder(run, 2), attempt(1))
    waits = job(array, "PENDING", array_job="17", array_task="3%1", reason="Priority", node_list="")
    runs = job(array, job_id="20", array_job="17", array_task="2")
    found = read_status(run, answer(waits, runs))
    assert [task.state for task in found.tasks] == [State.FINISHED, State.FAILED, State.RUNNING, State.WAITING]
    assert (found.state, found.why) == (State.RUNNING, "4 tasks: 1 running, 1 waiting, 1 finished, 1 failed")
    assert json.loads(json.dumps(found.to_json()))["tasks"][1]["attempts"][0]["exit_code"] == 3


def test_an_array_of_one_task(run: Path) -> None:
    # submitit makes it no array.
    array = submitted(run, array_tasks=1, nodes_min=1, nodes_max=1, ranks_per_node=1)
    task = submitted(task_folder(run, 0), array_tasks=1, array_task=0, jobs=())
    write_attempt(task.run, attempt(1))
    write_log(array, "17_0_log.out", "hello\n")
    for folder in (run, task.run):
        found = read_status(folder, answer(job(array)))
        assert (found.state, found.notes) == (State.RUNNING, ())
        said: list[str] = []
        show_logs(folder, rank=None, attempt=None, lines=0, write=said.append)
        assert said == [f"==> {array.logs}/17_0_log.out <==\nhello\n"]


def test_a_task_that_was_submitted_anew_is_not_finished(run: Path) -> None:
    array = submitted(run, array_tasks=2)
    for number, first in ((0, 1), (1, 2)):
        task = submitted(task_folder(run, number), array_tasks=2, array_task=number, jobs=(), first_attempt=first)
        write_attempt(task.run, attempt(1, ended_unix_s=NOW, exit_code=0, reason="finished"))
    waits = job(array, "PENDING", array_job="17", array_task="0-1", reason="Priority", node_list="")
    found = read_status(run, answer(waits))
    assert [task.state for task in found.tasks] == [State.FINISHED, State.WAITING]


def test_a_task_is_not_judged_by_others(run: Path) -> None:
    array = submitted(run, array_tasks=3)
    for number in range(3):
        submitted(task_folder(run, number), array_tasks=3, array_task=number, jobs=())
    runs = job(array, job_id="20", array_job="17", array_task="2")
    write_attempt(task_folder(run, 0), attempt(1, ended_unix_s=NOW, exit_code=0, reason="finished"))
    assert read_status(task_folder(run, 0), answer(runs)).state is State.FINISHED
    assert read_status(task_folder(run, 2), answer(runs)).state is State.RUNNING


def test_a_run_that_was_killed_on_request_is_stopped(run: Path) -> None:
    submitted(run)
    write_attempt(run, attempt(1))
    assert read_status(run, answer()).state is State.FAILED
    request_cancel(run)
    found = read_status(run, answer())
    assert found.state is State.STOPPED
    assert found.why == "attempt 1 was cancelled and told of no end, as when it is killed at once"


def test_only_what_may_be_at_work_is_asked_for(run: Path) -> None:
    submission = submitted(run, jobs=("15", "16", "17", "18"))
    write_attempt(run, attempt(1))
    asked: list[Sequence[str]] = []

    def ask(ids: Sequence[str]) -> list[SlurmJob]:
        asked.append(ids)
        return [job(submission)]

    read_status(run, ask)
    assert asked == [("17", "18")]


def test_hints_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "a user's runs" / "one"
    submitted(run, jobs=())
    write_attempt(run, attempt(1, ended_unix_s=NOW, exit_code=1, reason="crashed: x", followed_by="stop"))
    shown = CliRunner().invoke(cli.app, ["status", str(run)]).output
    hints = [line.removeprefix("next").strip() for line in shown.splitlines() if line.startswith("next")]
    assert [shlex.split(hint) for hint in hints] == [
        ["vitscale", "launch", act, str(run)] for act in ("logs", "resume")
    ]
    assert "0 -> 0" in shown


@pytest.mark.parametrize("text", ["{", '{"attempt": 1}', "[]", '"x"', "\xff"])
def test_torn_records_of_a_run_that_was_started_by_hand(tmp_path: Path, text: str) -> None:
    for name in ("torn", "whole"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("")
        trained(run, 40)
    (tmp_path / "torn" / "attempts.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(LaunchError, match=r"attempts.jsonl: is no list of attempts .*; move it aside"):
        read_status(tmp_path / "torn", out_of_reach)
    found, notes = read_all(list(find_runs(tmp_path)))
    assert [status.run.name for status in found] == ["whole"]
    assert [note for note in notes if "torn/attempts.jsonl" in note]


def test_a_file_that_cannot_be_read_spares_other_runs(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        submitted(tmp_path / name, jobs=())
        trained(tmp_path / name, 40)
    (tmp_path / "bad" / "metrics.jsonl").unlink()
    (tmp_path / "bad" / "metrics.jsonl").mkdir()
    found, notes = read_all(list(find_runs(tmp_path)))
    assert [status.run.name for status in found] == ["good"]
    assert notes == [f"{tmp_path}/bad/metrics.jsonl: cannot be read: Is a directory; ask the owner of the run"]


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A folder in which access bits count for this process, whoever it belongs to."""
    with tempfile.TemporaryDirectory() as folder:
        is_root = os.geteuid() == 0
        if is_root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)


def test_folders_of_others(not_root: Path) -> None:
    for name in ("mine", "no search", "no listing"):
        submitted(not_root / name, jobs=())
    (not_root / "no search").chmod(0o644)
    (not_root / "no listing").chmod(0o000)
    found, notes = read_all(list(find_runs(not_root)))
    (not_root / "no search").chmod(0o755)
    (not_root / "no listing").chmod(0o755)
    assert [status.run.name for status in found] == ["mine"]
    told = [f"{not_root}/{name}/launch/submission.json: cannot be read: " for name in ("no listing", "no search")]
    assert sorted(note.partition("Permission")[0] for note in notes) == told


def test_runs_below_a_folder(tmp_path: Path) -> None:
    for name in ("b/two", "a", "b/one", ".hidden/x"):
        submitted(tmp_path / name)
        write_attempt(tmp_path / name, attempt(1, **ENDED))
    # What a run holds is no other run.
    submitted(tmp_path / "a" / "inner")
    (tmp_path / "a" / "launch" / "attempts.jsonl").write_text("{")
    runs = list(find_runs(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in runs] == ["a", "b/one", "b/two"]
    found, notes = read_all(runs)
    assert [status.run.name for status in found] == ["one", "two"]
    assert any("is no list of attempts" in note for note in notes)
    with pytest.raises(LaunchError, match="no such folder"):
        list(find_runs(tmp_path / "none"))


def write_log(submission: Submission, name: str, text: str) -> None:
    submission.logs.mkdir(parents=True, exist_ok=True)
    (submission.logs / name).write_text(text)


def test_logs_of_one_rank_and_one_attempt(run: Path) -> None:
    submission = submitted(run, jobs=("17", "18"))
    first = "set up\nvitscale launch: attempt 1 of job 17, rank 1 on gpu1\none\nended\n"
    again = "vitscale launch: attempt 2 of job 17, rank 1 on gpu1\ntwo\n"
    write_log(submission, "17_1_log.err", first + again)
    write_log(submission, "18_1_log.err", "vitscale launch: attempt 3 of job 18, rank 1 on gpu1\nthree, not ended")
    write_log(submission, "18_0_log.err", "of rank 0\n")
    write_log(submission, "18_1_log.out", "")

    def shown(**options: Any) -> str:
        said: list[str] = []
        show_logs(run, **{"rank": 1, "attempt": None, "lines": 0, **options}, write=said.append)
        return "".join(said)

    older, newer = f"==> {submission.logs}/17_1_log.err <==\n", f"==> {submission.logs}/18_1_log.err <==\n"
    assert shown(lines=1) == f"{older}two\n{newer}three, not ended\n"
    assert shown(attempt=1) == f"{older}{''.join(first.splitlines(True)[1:])}"
    assert shown(attempt=2) == f"{older}{again}"
    assert shown(attempt=3).endswith("three, not ended\n")
    assert shown(rank=None) == f"==> {submission.logs}/18_0_log.err <==\nof rank 0\n"
    with pytest.raises(LaunchError, match="rank 3 has printed nothing yet"):
        shown(rank=3)
    with pytest.raises(LaunchError, match="at most 4 ranks, counted from 0"):
        shown(rank=4)


def test_with_one_task_on_a_node_its_ranks_share_a_log(run: Path) -> None:
    submission = submitted(run, site=Site(ranks_per_node=2, tasks_per_node="node"))
    write_log(submission, "17_1_log.err", "of the second node\n")
    said: list[str] = []
    show_logs(run, rank=3, attempt=None, lines=0, write=said.append)
    assert said[0].endswith("of the second node\n")


def test_following_ends_with_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submission = submitted(run)
    write_attempt(run, attempt(1, ended_unix_s=NOW, exit_code=75, reason="cancelled", followed_by="stop"))
    write_log(submission, "17_0_log.err", "a\nb\nc\n")
    said: list[str] = []
    follow_logs(run, rank=None, attempt=None, lines=2, write=said.append)
    assert said[0] == f"==> {submission.logs}/17_0_log.err <==\nb\nc\n"
    assert said[-1] == "==> stopped: attempt 1 ended: cancelled <==\n"
    with pytest.raises(LaunchError, match="leave one of them out"):
        follow_logs(run, rank=None, attempt=1, lines=2, write=said.append)
