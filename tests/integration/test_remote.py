"""Training from object storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command import train, training
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import metrics, overrides, trajectory, wait_until
from tests.helpers.s3 import S3Server, upload
from tests.helpers.stopping import train_and_stop

PLAIN = (
    "global_batch_size=48",
    "micro_batch_size=4",
    "duration={steps: 40}",  # more than one epoch
    "checkpoint.every={steps: 5}",
    "model.dropout=0",
    "model.stochastic_depth=0",
    "data.eval=null",
)


def test_a_run_on_s3_that_is_killed_goes_on_with_three_ranks(s3: S3Server, digits: Path, tmp_path: Path) -> None:
    """The first attempt reads windows as they are needed, the second one keeps them in a cache."""
    whole, run, cache = tmp_path / "whole", tmp_path / "run", tmp_path / "cache"
    run_ranks(train_and_stop, 2, overrides(digits, whole, *PLAIN), None)
    arguments = overrides(digits, run, *PLAIN, f"data.train={upload(s3, digits / 'train')}")
    with training(arguments, **s3.environment) as ranks:
        assert wait_until(lambda: len(metrics(run)) >= 12 or not ranks[0].is_alive(), timeout_s=120)
    assert 12 <= metrics(run)[-1]["step"] < 40
    train([*arguments, f"data.storage.cache={cache}"], nproc=3, **s3.environment)
    assert list(cache.rglob("*.tar-*"))
    expected = trajectory(whole)
    assert [row[:2] for row in trajectory(run)] == [row[:2] for row in expected]
    for ours, theirs in zip(trajectory(run), expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
