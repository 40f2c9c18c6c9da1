"""A run that is stopped and started again equals one that was not: losses, sample keys, weights, moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import assert_same_state, final_state, overrides, trajectory
from tests.helpers.stopping import train_and_stop

STOP_AT = 6


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
        ),
    ],
)
def test_stop_and_resume_is_bit_identical(digits: Path, tmp_path: Path, stage: int, precision: str) -> None:
    # Two accumulation steps; step 6 lies within an epoch and between two periodic checkpoints.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "evaluation.every={steps: 5}",
        "optim.ema_decay=0.9",
    ]
    run_ranks(train_and_stop, 2, overrides(digits, whole, *common), None)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), STOP_AT)
    assert len(trajectory(parts)) == STOP_AT
    assert (parts / "checkpoints" / "latest").read_text() == f"step-{STOP_AT:09d}\n"
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), None)
    assert trajectory(parts) == trajectory(whole)
    assert_same_state(parts, whole)


def test_resume_across_the_end_of_an_epoch_is_bit_identical(digits: Path, tmp_path: Path) -> None:
    # 1,427 samples are no multiple of the batch of 100: step 15 holds samples of both epochs.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["global_batch_size=100", "micro_batch_size=50", "duration={steps: 20}"]
    run_ranks(train_and_stop, 2, overrides(digits, whole, *common), None)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), 14)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), 15)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), None)
    assert trajectory(parts) == trajectory(whole)
    assert_same_state(parts, whole)


def test_resume_on_other_ranks_stage_and_micro_batch_continues_the_same_run(digits: Path, tmp_path: Path) -> None:
    """The same batches to the key; losses differ by the order of sums only."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plain = ["model.dropout=0", "model.stochastic_depth=0", "optim.ema_decay=0.9"]
    run_ranks(train_and_stop, 2, overrides(digits, whole, *plain), None)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *plain, "engine.zero_stage=3"), STOP_AT)
    run_ranks(train_and_stop, 1, overrides(digits, parts, *plain, "engine.zero_stage=1", "micro_batch_size=16"), 9)
    run_ranks(train_and_stop, 4, overrides(digits, parts, *plain, "engine.zero_stage=2", "micro_batch_size=2"), None)
    for ours, theirs in zip(trajectory(parts), trajectory(whole), strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-5)
    left, right = final_state(parts), final_state(whole)
    for name in right:
        assert (left[name] - right[name]).abs().max() < 2e-5, name
