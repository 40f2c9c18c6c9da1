"""What ``submit`` refuses before anything is queued, with the reason and the cure; and that nothing is left of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.command import Outcome, train, vitscale
from tests.helpers.jobs import Lab
from tests.helpers.runs import CONFIG, checkpoint_of, overrides

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def _submit(lab: Lab, *words: object, site: Path | None = None, nodes: str = "2", run: Path | None = None) -> Outcome:
    arguments = [*overrides(lab.digits, run or lab.folder / "run"), "--site", site or lab.site(), "--nodes", nodes]
    return vitscale("launch", "submit", CONFIG, *arguments, *words, **lab.cluster.environment)


def _assert_refused(lab: Lab, outcome: Outcome, *parts: str) -> None:
    assert outcome.code in (1, 2), outcome
    assert outcome.errors.startswith("vitscale: error: ")
    assert "Traceback" not in outcome.errors
    for part in parts:
        assert part in outcome.errors, outcome.errors
    assert lab.cluster.jobs() == []


def test_what_the_configuration_forbids(lab: Lab) -> None:
    missing = lab.folder / "missing"
    for words, parts in (
        (["optim.lrr=1"], ["optim.lrr", "did you mean"]),
        (["global_batch_size=24"], ["24", "4 ranks"]),
        ([f"data.train={missing}"], [str(missing), "index.json"]),
        (["model.num_classes=3"], ["10 classes", "3 outputs"]),
        (["model.variant=ViT-B/17"], ["ViT-B/17"]),
    ):
        _assert_refused(lab, _submit(lab, *words), *parts)
    assert not (lab.folder / "run").exists()


def test_what_the_cluster_does_not_have(lab: Lab) -> None:
    for changed, parts in (
        ({"partition": "gpu"}, ["gpu", "main, frail, high"]),
        ({"cpus_per_node": 64}, ["64", "4"]),
        ({"gpus_per_node": 8, "ranks_per_node": 2}, ["gpus_per_node (8)", "0 of the 2 nodes"]),
        ({"memory_mb": 10**7}, ["memory_mb", "4000"]),
        ({"constraint": "nvlink"}, ["nvlink", "none"]),
        ({"exclude": ["node2"]}, ["--nodes: 2", "at most 1"]),
    ):
        _assert_refused(lab, _submit(lab, site=lab.site(**changed)), *parts)
    _assert_refused(lab, _submit(lab, "micro_batch_size=2", nodes="4"), "--nodes: 4", "at most 2")
    # What only SLURM itself can tell.
    outcome = _submit(lab, site=lab.site(sbatch={"licenses": "matlab"}))
    assert outcome.code == 1
    assert "vitscale: error: SLURM refused the job: " in outcome.errors
    assert "Invalid license" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert lab.cluster.jobs() == []


def test_what_contradicts_itself(lab: Lab) -> None:
    for words, parts in (
        (["--nodes", "3:2"], ["--nodes 3:2", "8:32"]),
        (["--nodes", "two"], ["--nodes two", "8:32"]),
        (["--chain", "3"], ["--chain 3", "requeue: false"]),
        (["--set", "signal_delay_s=3600"], ["signal_delay_s", "time_limit_minutes"]),
        (["--set", "partitions=main"], ["partitions", "did you mean"]),
        (["--site", "nowhere"], ["nowhere", "site init"]),
    ):
        _assert_refused(lab, _submit(lab, *words), *parts)


def test_a_run_folder_that_cannot_be_written(lab: Lab) -> None:
    file = lab.folder / "file"
    file.touch()
    for run in (file / "run", Path("/proc/run")):
        _assert_refused(lab, _submit(lab, run=run), str(run.parent), "run=...")
    _assert_refused(lab, _submit(lab, run=lab.folder / "%j"), "%")


def test_a_run_that_waits_or_is_trained_already(lab: Lab) -> None:
    # It needs both nodes, so the job waits.
    lab.cluster.preempt(seconds=120)
    job = lab.submit()
    outcome = _submit(lab)
    assert outcome.code == 1
    assert f"its job {job.id} is pending" in outcome.errors
    assert "launch cancel" in outcome.errors
    assert job.id in lab.cluster.jobs()
    assert job.ids == [job.id]


def test_a_warning_before_the_time_limit_that_is_too_short_for_a_save(lab: Lab) -> None:
    """As an earlier attempt has measured it: here a save ended a minute after it had begun."""
    run = lab.folder / "run"
    train(overrides(lab.digits, run, "duration={steps: 4}"))
    # Only the length of the run differs, which may change.
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = folder / "manifest.json"
        end = checkpoint_of(run).content["created_unix_s"] + 45
        os.utime(manifest, (end, end))
    _assert_refused(lab, _submit(lab, "--set", "signal_delay_s=20", run=run), "signal_delay_s: 20", "took 4", "--set")
    accepted = _submit(lab, "--set", "signal_delay_s=90", "--dry-run", run=run)
    assert accepted.code == 0, accepted.errors
    assert "--signal=USR2@90" in accepted.out
    assert not (run / "launch").exists()
