"""Training from object storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import finish, kill_group, metrics, overrides, start_training, trajectory, wait_until
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
    first = start_training(arguments, nproc=2)
    assert wait_until(lambda: len(metrics(run)) >= 12 or first.poll() is not None, timeout_s=120)
    kill_group(first)
    assert 12 <= metrics(run)[-1]["step"] < 40
    finish(start_training([*arguments, f"data.storage.cache={cache}"], nproc=3))
    assert list(cache.rglob("*.tar-*"))
    expected = trajectory(whole)
    assert [row[:2] for row in trajectory(run)] == [row[:2] for row in expected]
    for ours, theirs in zip(trajectory(run), expected, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
