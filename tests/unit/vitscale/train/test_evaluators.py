"""When further evaluations are due."""

from __future__ import annotations

import pytest

from vitscale.train.evaluators import is_evaluation_due


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [
        (None, 10, [10]),
        (3, 10, [3, 6, 9, 10]),
        # Less than a quarter of the distance before the end nothing new is to be learned.
        (8, 25, [8, 16, 25]),
        (8, 26, [8, 16, 24, 26]),
        (10, 10, [10]),
        (50, 10, [10]),
    ],
)
def test_after_the_last_step_always_and_before_it_at_the_cadence(
    every: int | None, total: int, expected: list[int]
) -> None:
    assert [step for step in range(total + 1) if is_evaluation_due(step, every, total)] == expected
