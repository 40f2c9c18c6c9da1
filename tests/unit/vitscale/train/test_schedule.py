"""The learning rate against the formulas of the ViT paper's reference code (vit_jax/utils.py), written out anew."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config.schema import OptimConfig, ScheduleConfig
from vitscale.train.schedule import learning_rate


def rate(step: int, decay: str = "cosine", *, lr: float = 1e-3, final: float = 0.0, warmup: int, total: int) -> float:
    schedule = ScheduleConfig(decay=decay, final_lr=final)  # type: ignore[arg-type]
    return learning_rate(step, optim=OptimConfig(lr=lr), schedule=schedule, warmup=warmup, total=total)


def reference_cosine(step: int, lr: float, warmup: int, total: int) -> float:
    progress = max(0.0, min(1.0, (step - warmup) / float(total - warmup)))
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress)) * min(1.0, step / warmup)


def reference_linear(step: int, lr: float, warmup: int, total: int, end: float = 1e-5) -> float:
    progress = max(0.0, min(1.0, (step - warmup) / float(total - warmup)))
    return (end + (lr - end) * (1.0 - progress)) * min(1.0, step / warmup)


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 2), (10_000, 517_800)])
def test_equals_the_reference_formulas(warmup: int, total: int) -> None:
    for step in {*range(min(total, 200) + 1), warmup - 1, warmup, warmup + 1, total // 2, total - 1, total}:
        assert rate(step, "cosine", warmup=warmup, total=total) == pytest.approx(
            reference_cosine(step, 1e-3, warmup, total), rel=1e-12, abs=1e-18
        )
        assert rate(step, "linear", final=1e-5, warmup=warmup, total=total) == pytest.approx(
            reference_linear(step, 1e-3, warmup, total), rel=1e-12
        )


def test_landmarks() -> None:
    assert rate(0, warmup=10, total=110) == 0
    assert rate(5, warmup=10, total=110) == 5e-4
    assert rate(10, warmup=10, total=110) == 1e-3
    assert rate(60, warmup=10, total=110) == pytest.approx(5e-4)
    assert rate(60, "linear", final=2e-4, warmup=10, total=110) == pytest.approx(6e-4)
    assert rate(110, "linear", final=2e-4, warmup=10, total=110) == pytest.approx(2e-4)
    assert rate(110, final=2e-4, warmup=10, total=110) == pytest.approx(2e-4)


def test_without_warmup_starts_at_the_peak() -> None:
    for decay in ("cosine", "linear"):
        assert rate(0, decay, warmup=0, total=7) == 1e-3
        assert rate(0, decay, warmup=0, total=1) == 1e-3


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_warmup_as_long_as_the_run_only_rises(decay: str) -> None:
    for warmup in (20, 50):
        assert [rate(s, decay, warmup=warmup, total=20) for s in range(20)] == [1e-3 * (s / warmup) for s in range(20)]


def test_steps_are_those_of_bits_hyperrule() -> None:
    """10,000 steps, of which 500 warm up, divided by 10 at 3,000, 6,000 and 9,000 (BiT paper, section 3.3)."""
    schedule = ScheduleConfig(decay="steps")
    at = {
        step: learning_rate(step, optim=OptimConfig(lr=3e-3), schedule=schedule, warmup=500, total=10_000)
        for step in (0, 250, 500, 2999, 3000, 5999, 6000, 8999, 9000, 9999)
    }
    wanted = [0, 1.5e-3, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    assert list(at.values()) == pytest.approx(wanted, rel=1e-12)


def test_steps_without_milestones_stay_constant() -> None:
    schedule = ScheduleConfig(decay="steps", milestones=())
    rates = [learning_rate(s, optim=OptimConfig(lr=1.0), schedule=schedule, warmup=2, total=5) for s in range(5)]
    assert rates == [0, 0.5, 1, 1, 1]


@given(
    shares=st.lists(st.integers(1, 99), unique=True, max_size=5).map(sorted),
    factor=st.sampled_from([2.0, 10.0]),
    total=st.integers(1, 1000).map(lambda hundreds: 100 * hundreds),
)
def test_a_milestone_in_percent_is_met_at_its_very_step(shares: list[int], factor: float, total: int) -> None:
    schedule = ScheduleConfig(decay="steps", milestones=tuple(share / 100 for share in shares), factor=factor)
    for number, share in enumerate(shares):
        at = share * total // 100
        before, after = (
            learning_rate(step, optim=OptimConfig(lr=1.0), schedule=schedule, warmup=0, total=total)
            for step in (at - 1, at)
        )
        assert (before, after) == (factor**-number, pytest.approx(factor ** -(number + 1)))


lengths = st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(
    lengths=lengths,
    decay=st.sampled_from(["cosine", "linear"]),
    lr=st.floats(1e-6, 10),
    final_share=st.floats(0, 1),
    where=st.floats(0, 1),
)
def test_is_bounded_continuous_and_falls_after_the_warmup(
    lengths: tuple[int, int], decay: str, lr: float, final_share: float, where: float
) -> None:
    warmup, total = lengths
    final = lr * final_share

    def at(step: int) -> float:
        return rate(step, decay, lr=lr, final=final, warmup=warmup, total=total)

    step = int(where * total)
    slack = 1e-9 * lr
    assert 0 <= at(step) <= lr + slack
    if step >= warmup:
        assert at(step) >= final - slack
        assert at(step + 1) <= at(step) + slack
    else:
        assert at(step + 1) >= at(step)
    # The steepest places are the warm-up and the middle of the cosine.
    steepest = max(1 / warmup if warmup else 0, math.pi / 2 / max(1, total - warmup))
    assert abs(at(step + 1) - at(step)) <= lr * steepest * (1 + 1e-9) + slack
    assert at(total) == pytest.approx(lr if total == warmup else final, rel=1e-9, abs=slack)
    if warmup < total:
        assert at(total + 5) == at(total)
