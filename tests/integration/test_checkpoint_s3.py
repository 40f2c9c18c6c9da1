"""A run whose checkpoints are on object storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command import train, training, vitscale
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import metrics, overrides, trajectory, wait_until
from tests.helpers.s3 import S3Server
from tests.helpers.stopping import train_and_stop
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.checkpoint.store import checkpoint_names, open_checkpoint

PLAIN = (
    "global_batch_size=48",
    "micro_batch_size=4",
    "duration={steps: 30}",
    "checkpoint.every={steps: 5}",
    "checkpoint.keep=2",
    "model.dropout=0",
    "model.stochastic_depth=0",
)


@pytest.mark.parametrize("nproc", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_from_s3(s3: S3Server, digits: Path, tmp_path: Path, nproc: int) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(train_and_stop, 2, overrides(digits, whole, *PLAIN), None)
    url = f"{s3.bucket()}/runs/{nproc}"
    folder = ObjectFolder(url)
    arguments = overrides(digits, run, *PLAIN, f"checkpoint.folder={url}")
    with training(arguments, **s3.environment) as ranks:
        assert wait_until(
            lambda: (len(metrics(run)) >= 12 and len(folder.names()) == 2) or not ranks[0].is_alive(), timeout_s=120
        )
    assert 12 <= metrics(run)[-1]["step"] < 30
    resumed_at = open_checkpoint(folder).step
    assert resumed_at % 5 == 0

    train(arguments, nproc=nproc, **s3.environment)
    assert not (run / "checkpoints").exists()
    assert checkpoint_names(folder) == ["step-000000030", "step-000000025"]
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["world_size"] for attempt in attempts] == [2, nproc]
    assert {r["attempt"] for r in metrics(run) if r["step"] <= resumed_at} == {1}
    assert {r["attempt"] for r in metrics(run) if r["step"] > resumed_at} == {2}
    expected = trajectory(whole)
    assert [row[:2] for row in trajectory(run)] == [row[:2] for row in expected]
    for ours, theirs in zip(trajectory(run), expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    outcome = vitscale("evaluate", run, **s3.environment)
    assert outcome.code == 0, outcome.errors
    assert json.loads(outcome.out)["step"] == 30
