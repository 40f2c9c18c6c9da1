"""A run whose checkpoints are on object storage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.command import vitscale
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import (
    finish,
    kill_group,
    metrics,
    overrides,
    start_training,
    trajectory,
    wait_until,
)
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
    first = start_training(arguments, nproc=2)
    committed = wait_until(
        lambda: (len(metrics(run)) >= 12 and len(folder.names()) == 2) or first.poll() is not None, timeout_s=120
    )
    kill_group(first)
    assert committed
    assert 12 <= metrics(run)[-1]["step"] < 30
    resumed_at = open_checkpoint(folder).step
    assert resumed_at % 5 == 0

    finish(start_training(arguments, nproc=nproc))
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
    # The process that the command is forked from may have been started with other credentials.
    outcome = vitscale(
        "evaluate", run, **{name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    )
    assert outcome.code == 0, outcome.errors
    assert json.loads(outcome.out)["step"] == 30
