"""The batch script, word for word, and that bash and the environment take it as it is meant."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vitscale_launch.batch import batch_text, job_name, without_job_variables
from vitscale_launch.site import Site, load_site
from vitscale_launch.submission import Submission

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RUN = Submission(
    run=Path("/runs/first run"),
    command=("train", "/runs/first run/launch/config.yaml"),
    global_batch_size=4096,
    micro_batch_size=64,
    nodes_min=2,
    nodes_max=8,
    ranks_per_node=8,
    site=Site(
        partition="gpu",
        account="vision",
        qos="long",
        constraint="nvlink",
        reservation="week 47",
        exclude=("gpu3", "gpu7"),
        time_limit_minutes=600,
        gpus_per_node=8,
        gpu_type="h100",
        cpus_per_node=96,
        memory_mb=0,
        exclusive=True,
        signal_delay_s=300,
        modules=("cuda/12.8",),
        setup=("ulimit -n 65536",),
        environment={"NCCL_IB_HCA": "mlx5", "NOTE": "it's"},
        container=("apptainer", "exec", "--nv", "/images/v.sif"),
        sbatch={"mail-type": "END", "spread-job": True, "get-user-env": False},
    ),
    python="/venv/bin/python",
    submitted_unix_s=0,
    cwd=Path("/home/me/my project"),
)
ARRAY = replace(
    RUN,
    run=Path("/arrays/shards"),
    command=("/venv/bin/python", "-m", "vitscale", "shards", "write"),
    nodes_min=1,
    nodes_max=1,
    ranks_per_node=1,
    site=Site(cpus_per_node=4, memory_mb=8000, requeue=False),
    array_tasks=600,
)


@pytest.mark.parametrize(("name", "submission"), [("batch_run.sh", RUN), ("batch_array.sh", ARRAY)])
def test_the_script(name: str, submission: Submission) -> None:
    # To accept a change: write the text there, and read the difference.
    assert batch_text(submission) == (GOLDEN / name).read_text()


@pytest.mark.parametrize("submission", [RUN, ARRAY, replace(RUN, site=load_site("gpu-cluster"))])
def test_bash_can_read_it(submission: Submission) -> None:
    subprocess.run(["bash", "-n"], input=batch_text(submission), text=True, check=True)


def test_a_fixed_number_of_nodes_has_its_tasks_from_slurm() -> None:
    fixed, elastic = batch_text(replace(RUN, nodes_min=8)).splitlines(), batch_text(RUN).splitlines()
    assert set(fixed) - set(elastic) == {
        "#SBATCH --nodes=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=12",
    }
    assert set(elastic) - set(fixed) == {"#SBATCH --nodes=2-8", "#SBATCH --mincpus=96"}


def test_a_link_of_a_chain_waits_for_the_one_before() -> None:
    text = batch_text(RUN, after_job="17")
    assert "#SBATCH --dependency=afterany:17\n" in text
    assert text.replace("#SBATCH --dependency=afterany:17\n", "") == batch_text(RUN)


@pytest.mark.parametrize("task", [0, 7, 599])
def test_the_folder_of_an_arrays_task(task: int) -> None:
    line = next(line for line in batch_text(ARRAY).splitlines() if line.startswith("run="))
    shell = f'{line}; printf %s "$run"'
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    told = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, check=True).stdout
    assert told == f"/arrays/shards/tasks/{task:05}"


def test_environment_and_quotes_survive_the_shell() -> None:
    lines = [line for line in batch_text(RUN).splitlines() if line.startswith(("export NOTE", "export PYTHONPATH"))]
    shell = "\n".join([*lines, 'printf "%s|%s" "$NOTE" "$PYTHONPATH"'])
    env = {**os.environ, "PYTHONPATH": "/before"}
    told = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, check=True).stdout
    assert told == "it's|/runs/first run/launch/code:/before"


def test_a_module_that_is_missing_ends_the_job_with_a_reason() -> None:
    line = next(line for line in batch_text(RUN).splitlines() if line.startswith("module load"))
    done = subprocess.run(["bash", "-c", f"{line}; exit 0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "vitscale: error: module load cuda/12.8 failed; mend modules in the site profile" in done.stderr


def test_the_job_that_submits_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SUBMITIT_EXECUTOR", "RANK", "SLURM_CONF", "KEPT"):
        monkeypatch.setenv(name, "x")
    before = dict(os.environ)
    with without_job_variables():
        assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "SUBMITIT_EXECUTOR", "RANK"} & os.environ.keys()
        assert {"SLURM_CONF", "KEPT"} <= os.environ.keys()
    assert dict(os.environ) == before


def test_the_name_of_a_job() -> None:
    assert job_name(Path("/runs/my run,1")) == "vitscale-my_run_1"
