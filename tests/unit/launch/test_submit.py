"""What is planned, refused and shown before anything is queued, and what is kept when something is."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitscale.checkpoint.format import FileRecord, manifest_text, rank_file
from vitscale.config.loader import load_config
from vitscale.durable import Lock
from vitscale.errors import ConfigError, DataError, LaunchError, TopologyError, VitscaleError
from vitscale_launch.attempts import Attempt, write_attempt
from vitscale_launch.batch import batch_text
from vitscale_launch.cli import app
from vitscale_launch.queueing import queue
from vitscale_launch.requests import cancel_requested, request_cancel
from vitscale_launch.site import Site
from vitscale_launch.snapshot import freeze_config
from vitscale_launch.submission import Submission, read_submission, task_folder, write_submission
from vitscale_launch.submit import check_again, prepare_array, prepare_run, refuse_if_active, submit
from vitscale_launch.submit_cli import _echo_submitted, parse_nodes

TWO = Site(ranks_per_node=2, cpus_per_node=4)


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SLURM's commands may be installed here, but they would look for a cluster for a minute."""
    monkeypatch.setenv("PATH", str(tmp_path / "no-commands"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def _run(config: Path, *changes: str, nodes: tuple[int, int] = (1, 1), site: Site = TWO) -> Submission:
    return prepare_run(config, changes, site, nodes=nodes, dry=True).submission


def _attempt(**end: str) -> Attempt:
    return Attempt(1, "17", 0, "n1", 1, started_unix_s=0, started_step=None, ended_unix_s=1, reason="x", **end)


def _rows(config: Path, *changes: str, nodes: tuple[int, int] = (1, 1), site: Site = TWO) -> dict[str, str]:
    return dict(prepare_run(config, changes, site, nodes=nodes, dry=True).plan)


def test_the_plan_of_a_fixed_number_of_nodes(config: Path, tmp_path: Path) -> None:
    rows = _rows(config, nodes=(3, 3))
    assert rows["global batch"] == "24 = 2 per rank x 2 accumulated x 6 ranks"
    assert rows["nodes"] == "3 x 2 ranks"
    assert rows["run"] == str(tmp_path / "runs" / "first")
    assert rows["partition"] == "the default; not checked, for SLURM does not answer here"


def test_the_plan_of_a_range_is_that_of_the_most_nodes_that_fit(config: Path) -> None:
    rows = _rows(config, nodes=(2, 5))
    assert rows["global batch"].endswith("x 6 ranks")
    assert rows["nodes"] == "2 to 3, as the queue gives them; used are 2, 3, x 2 ranks"


def test_slurm_is_asked_for_numbers_of_nodes_that_can_be_used(config: Path) -> None:
    elastic = _run(config, nodes=(4, 11))
    assert (elastic.nodes_min, elastic.nodes_max) == (6, 6)
    assert "#SBATCH --nodes=6\n" in batch_text(elastic)
    elastic = _run(config, nodes=(3, 8), site=Site())
    assert (elastic.nodes_min, elastic.nodes_max) == (3, 6)


def test_what_is_submitted(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    submission = prepare_run(
        config,
        ["optim.lr=0.1"],
        replace(TWO, health_check=True),
        nodes=(1, 3),
        allow_change=["optim.lr", "seed"],
        max_failures=5,
        dry=True,
    ).submission
    frozen = str(run / "launch" / "config.yaml")
    assert submission.command == ("train", frozen, "--allow-change", "optim.lr", "--allow-change", "seed")
    assert (submission.global_batch_size, submission.micro_batch_size) == (24, 2)
    assert (submission.nodes_min, submission.nodes_max, submission.ranks_per_node) == (1, 3, 2)
    assert (submission.max_failures, submission.health_check, submission.executor) == (5, True, "slurm")
    assert not run.exists()


@pytest.mark.parametrize(
    ("changes", "nodes", "error", "message"),
    [
        ([], (5, 5), TopologyError, "12 micro-batches, which 10 ranks cannot share evenly"),
        ([], (7, 9), TopologyError, "which 18 ranks cannot share"),
        (["data.train=/nowhere"], (1, 1), DataError, "no such shard set"),
        (["run=/proc/run"], (1, 1), LaunchError, "/proc cannot be written"),
        (["run=runs/50%"], (1, 1), LaunchError, "holds '%', which SLURM does not take literally"),
        (["optim.lr=-1"], (1, 1), ConfigError, r"optim\.lr"),
        (["model.variant=ViT-Q/4"], (1, 1), ConfigError, "ViT-Q/4"),
    ],
)
def test_what_cannot_work_is_refused(
    config: Path, changes: list[str], nodes: tuple[int, int], error: type[VitscaleError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(config, *changes, nodes=nodes)


def test_a_real_submission_needs_slurm(config: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="scontrol was not found; log in to a machine of the cluster"):
        prepare_run(config, [], TWO, nodes=(1, 1))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_being_trained(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    lock = Lock(run / ".lock")
    assert lock.take()
    with pytest.raises(LaunchError, match="first is being trained right now"):
        _run(config)
    lock.release()
    _run(config)


def test_a_run_with_another_configuration(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    # No checkpoint yet: everything may change, but it is said.
    (run / "config.yaml").write_text(config.read_text())
    rows = prepare_run(config, ["optim.lr=0.5"], TWO, nodes=(1, 1), dry=True).plan
    assert [text for name, text in rows if name == "change" and "optim.lr: 0.001 -> 0.5" in text]


def test_an_array(tmp_path: Path) -> None:
    command = ["vitscale", "shards", "write", "in", "out", "--part", "{task}", "--of={tasks}"]
    prepared = prepare_array(command, Site(), folder=tmp_path / "array", tasks=3, dry=True)
    array = prepared.submission
    assert array.command[1:4] == ("-P", "-m", "vitscale")
    assert (array.array_tasks, array.array_task, array.global_batch_size) == (3, None, None)
    assert "#SBATCH --array=0-2%3\n" in prepared.text()
    own = prepare_array(["./own.sh", "{task}"], Site(), folder=tmp_path / "array", tasks=1, dry=True).submission
    assert own.command == ("./own.sh", "{task}")
    with pytest.raises(LaunchError, match="--tasks is 0; allowed is 1 to"):
        prepare_array(command, Site(), folder=tmp_path / "array", tasks=0, dry=True)


def test_all_is_kept_before_slurm_is_asked(config: Path, tmp_path: Path) -> None:
    prepared = prepare_run(config, ["optim.lr=0.25"], TWO, nodes=(1, 1), dry=True)
    with pytest.raises(LaunchError, match="sbatch was not found; log in to a machine of the cluster"):
        submit(prepared)
    run = tmp_path / "runs" / "first"
    kept = read_submission(run)
    assert kept.jobs == ()
    assert load_config(kept.config).optim.lr == 0.25
    assert (kept.code / "vitscale_launch" / "submit.py").read_text()
    # Nothing stands in the way of a second try.
    refuse_if_active(run)


def test_an_array_keeps_what_each_task_runs(tmp_path: Path) -> None:
    prepared = prepare_array(["run", "{task}/{tasks}"], Site(), folder=tmp_path / "array", tasks=2, dry=True)
    with pytest.raises(LaunchError):
        submit(prepared)
    tasks = [read_submission(task_folder(tmp_path / "array", task)) for task in range(2)]
    assert [task.command for task in tasks] == [("run", "0/2"), ("run", "1/2")]
    assert [(task.array_task, task.array_tasks) for task in tasks] == [(0, 2), (1, 2)]
    assert {task.logs for task in tasks} == {tmp_path / "array" / "launch" / "logs"}


def test_old_requests_do_not_reach_the_next_submission(config: Path) -> None:
    submission = _run(config)
    write_submission(submission)
    (submission.folder / "requests").mkdir()
    (submission.folder / "requests" / "cancel").touch()
    queue(replace(submission, executor="debug"))
    assert not (submission.folder / "requests").exists()


def test_a_refused_job_leaves_all_as_it_was(config: Path) -> None:
    submission = replace(_run(config), submitted_unix_s=5)
    write_submission(submission)
    write_attempt(submission.run, _attempt(followed_by="stop"))
    request_cancel(submission.run)
    with pytest.raises(LaunchError, match="sbatch was not found"):
        queue(submission)
    assert read_submission(submission.run) == submission
    assert cancel_requested(submission.run)


def test_only_new_attempts_count(config: Path) -> None:
    submission = replace(_run(config), executor="debug")
    write_submission(submission)
    assert queue(submission).first_attempt == 1
    write_attempt(submission.run, _attempt(followed_by="stop"))
    assert queue(submission).first_attempt == 2
    assert read_submission(submission.run).first_attempt == 2


def test_an_array_that_is_queued_again_runs_what_has_not_finished(tmp_path: Path) -> None:
    array = prepare_array(["run", "{task}"], Site(), folder=tmp_path / "array", tasks=3, dry=True).submission
    array = replace(array, executor="debug")
    queue(array)
    folders = [task_folder(array.run, task) for task in range(3)]
    write_attempt(folders[0], _attempt(followed_by="stop"))
    write_attempt(folders[1], _attempt(followed_by="finish"))
    queue(array)
    # What has finished still counts, so that nothing is done again.
    assert [read_submission(folder).first_attempt for folder in folders] == [2, 1, 1]
    queue(array, anew=True)
    assert [read_submission(folder).first_attempt for folder in folders] == [2, 2, 1]


def test_a_controller_that_does_not_answer_may_have_the_job(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "slow-commands"
    commands.mkdir()
    for name in ("sbatch", "srun"):
        said = "Batch job submission failed: Socket timed out on send/recv operation"
        (commands / name).write_text(f"#!/bin/sh\necho '{name}: error: {said}' >&2\nexit 1\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    submission = replace(_run(config), submitted_unix_s=5)
    write_submission(submission)
    request_cancel(submission.run)
    message = "may be queued all the same: look with squeue --me --name=vitscale-first, and scancel it"
    with pytest.raises(LaunchError, match=message):
        queue(submission)
    # What may be queued must not find the old request.
    assert not cancel_requested(submission.run)
    (commands / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    with pytest.raises(LaunchError, match=r"SLURM refused the job: .*Invalid account; mend the site profile"):
        queue(submission)


def test_what_was_submitted_is_checked_again(config: Path) -> None:
    submission = _run(config)
    freeze_config(load_config(config), submission.config)
    assert check_again(replace(submission, executor="local")) == []
    with pytest.raises(LaunchError, match="scontrol was not found"):
        check_again(submission)
    # A save of a minute was measured meanwhile.
    name = submission.run / "checkpoints" / "step-000000010"
    name.mkdir(parents=True)
    (name / rank_file(0)).write_bytes(b"x")
    text = manifest_text({"step": 10, "created_unix_s": 1000}, [FileRecord(rank_file(0), 1, (0,))])
    (name / "manifest.json").write_bytes(text)
    os.utime(name / "manifest.json", (1060, 1060))
    (submission.run / "metrics.jsonl").write_text('{"step": 10, "unix_s": 1050}\n')
    with pytest.raises(LaunchError, match="signal_delay_s: 30 s before the time limit are too few"):
        check_again(replace(submission, site=replace(TWO, signal_delay_s=30)))


def test_what_a_local_run_leaves_out_is_said(config: Path) -> None:
    site = replace(TWO, modules=("cuda",))
    rows = dict(prepare_run(config, [], site, nodes=(1, 1), executor="local").plan)
    assert rows["note"].startswith("modules, setup and health check of the profile are for SLURM jobs")
    assert "note" not in dict(prepare_run(config, [], TWO, nodes=(1, 1), executor="local").plan)


def test_refusals_of_an_array_name_its_own_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="Not a directory; choose another folder with --folder"):
        prepare_array(["true"], Site(), folder=tmp_path / "file" / "array", tasks=1, dry=True)


def test_a_command_that_is_not_here_is_noted(tmp_path: Path) -> None:
    for site, expected in ((Site(), True), (Site(modules=("tools",)), False)):
        rows = prepare_array(["nosuchcommand"], site, folder=tmp_path / "array", tasks=1, dry=True).plan
        assert (("note", "nosuchcommand was not found here; it must be there on every node") in rows) is expected
    rows = prepare_array([sys.executable], Site(), folder=tmp_path / "array", tasks=1, dry=True).plan
    assert "note" not in dict(rows)


def test_a_chain_is_for_sites_that_do_not_requeue(config: Path) -> None:
    with pytest.raises(LaunchError, match=r"--chain 3 is for SLURM sites with requeue: false; leave it out"):
        submit(prepare_run(config, [], TWO, nodes=(1, 1), dry=True), chain=3)


def test_a_local_process_that_runs(config: Path, tmp_path: Path) -> None:
    submission = replace(_run(config), executor="local", jobs=(str(os.getpid()), "999999999", "1"))
    write_submission(submission)
    # Numbers of processes are used again: this one has nothing to do with the run.
    refuse_if_active(submission.run)


@pytest.mark.parametrize(("text", "nodes"), [("1", (1, 1)), ("8", (8, 8)), ("8:32", (8, 32)), ("4:4", (4, 4))])
def test_numbers_of_nodes(text: str, nodes: tuple[int, int]) -> None:
    assert parse_nodes(text) == nodes


@pytest.mark.parametrize("text", ["0", "-1", "8:4", "8-32", "", ":", "8:", "many", "0:3", "9999999"])
def test_wrong_numbers_of_nodes(text: str) -> None:
    with pytest.raises(LaunchError, match="allowed is a number such as 8, or the fewest and the most such as 8:32"):
        parse_nodes(text)


def test_one_machine_has_one_node() -> None:
    with pytest.raises(LaunchError, match="--local and --debug have this machine only"):
        parse_nodes("2", "local")


def test_the_dry_run_shows_plan_and_script_and_leaves_nothing(config: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: main\nranks_per_node: 2\n")
    words = ["submit", str(config), "--site", str(site), "--set", "time_limit_minutes=7", "--nodes", "1:3", "--dry-run"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    plan, _, script = result.stdout.partition("\n#!/bin/bash\n")
    assert "nodes        1 to 3, as the queue gives them; used are 1, 2, 3, x 2 ranks\n" in plan
    expected = prepare_run(
        config, [], Site(partition="main", ranks_per_node=2, time_limit_minutes=7), nodes=(1, 3), dry=True
    )
    assert f"#!/bin/bash\n{script}" == expected.text() + "\n" == batch_text(expected.submission) + "\n"
    assert not (tmp_path / "runs").exists()


def test_a_submission_without_a_site(config: Path) -> None:
    with pytest.raises(
        LaunchError, match=r"--site is not given; .* site init NAME.*, or run on this machine with --local"
    ):
        CliRunner().invoke(app, ["submit", str(config)], catch_exceptions=False)


def test_local_and_debug_exclude_each_other(config: Path) -> None:
    with pytest.raises(LaunchError, match="exclude each other"):
        CliRunner().invoke(app, ["submit", str(config), "--local", "--debug"], catch_exceptions=False)


def test_the_dry_run_of_an_array(tmp_path: Path) -> None:
    words = [
        "array",
        "--tasks",
        "4",
        "--site",
        "local",
        "--cpus",
        "3",
        "--folder",
        str(tmp_path / "array"),
        "--dry-run",
    ]
    result = CliRunner().invoke(app, [*words, "--", "sh", "-c", "echo {task}"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "command      sh -c 'echo {task}'\n" in result.stdout
    assert "#SBATCH --cpus-per-task=3\n" in result.stdout
    assert "#SBATCH --array=0-3%4\n" in result.stdout
    assert not (tmp_path / "array").exists()


@pytest.mark.parametrize(
    ("words", "memory"), [([], "0"), (["--cpus", "3"], None), (["--cpus", "3", "--memory-mb", "900"], "900M")]
)
def test_a_task_does_not_take_the_whole_node_of_a_profile_for_training(
    tmp_path: Path, words: list[str], memory: str | None
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 8\ncpus_per_node: 96\nexclusive: true\nmemory_mb: 0\n")
    command = ["array", "--tasks", "4", "--site", str(site), "--folder", str(tmp_path / "array"), "--dry-run", *words]
    result = CliRunner().invoke(app, [*command, "--", "true"], catch_exceptions=False)
    assert "exclusive" not in result.stdout
    assert "gpus" not in result.stdout
    assert re.findall(r"#SBATCH --mem=(\S+)", result.stdout) == ([] if memory is None else [memory])


def test_all_jobs_of_a_chain_are_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submission = replace(_run(config), jobs=("7", "18", "19"))
    _echo_submitted(submission, jobs=2)
    assert "submitted    jobs 18, 19\n" in capsys.readouterr().out


def test_the_time_of_a_submission_is_that_of_its_queueing(config: Path) -> None:
    submission = replace(_run(config), submitted_unix_s=5)
    with pytest.raises(LaunchError):
        queue(submission)
    assert abs(read_submission(submission.run).submitted_unix_s - time.time()) < 60
