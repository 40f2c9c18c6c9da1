"""Which checkpoints are kept, compared with a statement of the rules one checkpoint at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vitscale.checkpoint.retention import Retention

STEPS = st.sets(st.integers(0, 60), max_size=15)
# Few values, so that some are equal; for more steps than there are checkpoints.
SCORES = st.dictionaries(st.integers(0, 60), st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=20)
RETENTIONS = st.builds(Retention, last=st.integers(0, 6), every=st.none() | st.integers(1, 20), best=st.integers(0, 4))


def _is_wanted(step: int, steps: set[int], scores: dict[int, float], retention: Retention) -> bool:
    if sum(other > step for other in steps) < max(2, retention.last):
        return True
    if retention.every is not None and step >= retention.every:
        before = step - step % retention.every
        if not any(before <= other < step for other in steps):
            return True
    if step not in scores:
        return False
    better = [
        other
        for other in steps & scores.keys()
        if scores[other] > scores[step] or (scores[other] == scores[step] and other < step)
    ]
    return len(better) < retention.best


@given(STEPS, SCORES, RETENTIONS)
def test_what_no_rule_wants_may_go(steps: set[int], scores: dict[int, float], retention: Retention) -> None:
    gone = retention.superfluous(steps, scores)
    assert gone == sorted(step for step in steps if not _is_wanted(step, steps, scores, retention))
    assert len(steps) - len(gone) >= min(2, len(steps))


@given(STEPS, SCORES, RETENTIONS)
def test_what_was_kept_is_kept_again(steps: set[int], scores: dict[int, float], retention: Retention) -> None:
    kept = steps - set(retention.superfluous(steps, scores))
    assert retention.superfluous(kept, scores) == []


def test_each_rule_by_itself() -> None:
    steps = range(10, 100, 10)
    assert Retention(last=3).superfluous(steps, {}) == [10, 20, 30, 40, 50, 60]
    assert Retention(last=1).superfluous(steps, {}) == [10, 20, 30, 40, 50, 60, 70]
    assert Retention(last=2, every=30).superfluous(steps, {}) == [10, 20, 40, 50, 70]
    # Saves that never meet a multiple.
    assert Retention(last=2, every=31).superfluous(steps, {}) == [10, 20, 30, 50, 60]
    scores = {10: 0.5, 20: 0.9, 30: 0.5, 90: 0.1}
    assert Retention(last=2, best=2).superfluous(steps, scores) == [30, 40, 50, 60, 70]


def test_a_score_that_comes_late_counts_from_then_on() -> None:
    retention = Retention(last=2, best=1)
    assert 10 in retention.superfluous([10, 20, 30], {})
    assert retention.superfluous([10, 20, 30], {10: 0.1}) == []
    assert retention.superfluous([10, 20, 30], {10: 0.1, 20: 0.2}) == [10]


def test_scores_of_checkpoints_that_are_gone_take_no_place() -> None:
    assert Retention(last=2, best=1).superfluous([20, 30, 40], {10: 0.9, 20: 0.1}) == []
