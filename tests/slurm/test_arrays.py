"""An array of shard writers of which one is killed: it comes back, and the set is that of an undisturbed writer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.helpers.jobs import Lab
from tests.helpers.runs import environment, wait_until
from vitscale_launch.attempts import read_attempts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
TASKS = 3


@pytest.mark.slow
def test_a_killed_writer_comes_back_and_the_set_is_the_same_to_the_byte(lab: Lab) -> None:
    source, out, whole, folder = (lab.folder / name for name in ("source", "out", "whole", "array"))
    _photos(source, 240)
    plan = ["--samples-per-shard", "5", "--resize-short", "160"]
    _shards("plan", source, out, *plan)
    site = lab.site(cpus_per_node=1, ranks_per_node=1)
    command = ["vitscale", "shards", "write", out]
    outcome = lab.command("array", "--tasks", TASKS, "--site", site, "--folder", folder, "--", *command)
    assert outcome.code == 0, outcome.errors
    (job,) = json.loads((folder / "launch" / "submission.json").read_text())["jobs"]

    # A writer that has begun.
    assert wait_until(lambda: len(list(out.glob("train/.progress/*.tar.json"))) >= 3, timeout_s=180, every_s=0.02)
    victim = next(process for process in psutil.process_iter() if _is_task(process, job))
    number = int(victim.environ()["VITSCALE_TASK"])
    victim.kill()
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=300, every_s=0.2), lab.cluster.command("squeue")

    for task in range(TASKS):
        reasons = [attempt.reason or "" for attempt in read_attempts(folder / "tasks" / f"{task:05}")]
        assert reasons[-1] == "finished"
        assert len(reasons) == (2 if task == number else 1), reasons
    killed = read_attempts(folder / "tasks" / f"{number:05}")[0]
    assert (killed.reason or "").startswith("crashed: ")
    assert killed.exit_code == 137
    _shards("verify", out)
    _shards("write", source, whole, *plan)
    assert _digests(out) == _digests(whole)
    outcome = lab.command("status", folder)
    assert outcome.code == 0, outcome.errors
    assert "finished" in outcome.out


def test_every_task_knows_its_number(lab: Lab) -> None:
    folder = lab.folder / "array"
    code = "import os, sys; print('part', *sys.argv[1:], os.environ['VITSCALE_TASK'], os.environ['VITSCALE_TASKS'])"
    words = ["--", sys.executable, "-c", code, "{task}", "{tasks}"]
    outcome = lab.command("array", "--tasks", 2, "--site", lab.site(), "--folder", folder, *words)
    assert outcome.code == 0, outcome.errors
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=180, every_s=0.2)
    said = "".join(path.read_text() for path in (folder / "launch" / "logs").glob("*.out"))
    assert [f"part {task} 2 {task} 2" in said for task in range(2)] == [True, True], said


@pytest.mark.slow
def test_an_array_whose_cause_was_mended_goes_on(lab: Lab) -> None:
    folder, mended, done = lab.folder / "array", lab.folder / "mended", lab.folder / "done"
    script = f"test {{task}} = 0 -o -e {mended} || exit 3; echo {{task}} >> {done}"
    words = ["--tasks", 3, "--max-failures", 1, "--site", lab.site(), "--folder", folder, "--", "sh", "-c", script]
    outcome = lab.command("array", *words)
    assert outcome.code == 0, outcome.errors
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=180, every_s=0.2)
    assert done.read_text() == "0\n"
    mended.touch()
    outcome = lab.command("resume", folder)
    assert outcome.code == 0, outcome.errors
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=180, every_s=0.2)
    # What had finished was not done again.
    assert sorted(done.read_text().split()) == ["0", "1", "2"]
    last = [read_attempts(folder / "tasks" / f"{task:05}")[-1] for task in range(3)]
    assert [(attempt.number, attempt.reason) for attempt in last] == [(1, "finished"), (2, "finished"), (2, "finished")]


@pytest.mark.slow
def test_a_command_starts_in_the_folder_that_it_was_submitted_from(lab: Lab) -> None:
    folder, here = lab.folder / "array", lab.folder / "here and there"
    here.mkdir()
    command = ["array", "--tasks", 2, "--site", lab.site(), "--folder", folder, "--", "sh", "-c", "touch {task}"]
    outcome = lab.command(*command, cwd=here)
    assert outcome.code == 0, outcome.errors
    assert wait_until(lambda: lab.cluster.jobs() == [], timeout_s=180, every_s=0.2)
    assert sorted(path.name for path in here.iterdir()) == ["0", "1"]


def _is_task(process: psutil.Process, job: str) -> bool:
    """Whether this is the writer of a task, not the batch script around it."""
    try:
        env = process.environ()
        return (
            env.get("SLURM_ARRAY_JOB_ID") == job
            and "VITSCALE_TASK" in env
            and "SLURM_STEP_NUM_TASKS" in env
            and process.parent().name().startswith("slurmstepd")
            and "shards" in process.cmdline()
        )
    except (psutil.Error, AttributeError):
        return False


def _photos(folder: Path, count: int) -> None:
    for i in range(count):
        path = folder / f"class{i % 4}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(path, quality=90)


def _shards(*words: object) -> None:
    command = [sys.executable, "-m", "vitscale", "shards", *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _digests(out: Path) -> list[tuple[str, str]]:
    index = json.loads((out / "train" / "index.json").read_text())
    return [(shard["url"], shard["sha256"]) for shard in index["shardlist"]]
