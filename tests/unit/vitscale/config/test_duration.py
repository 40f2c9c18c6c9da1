import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config.duration import Duration, is_due

EXACTLY_ONE = "a duration takes exactly one of steps, epochs, examples, percent; given: "


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (Duration(steps=7), 7),
        (Duration(steps=0), 0),
        (Duration(examples=4096), 4),
        (Duration(examples=4095), 3),
        (Duration(epochs=1), 9),
        (Duration(epochs=0.5), 4),
        (Duration(epochs=300), 2929),
        (Duration(percent=0), 0),
        (Duration(percent=25), 50),
        (Duration(percent=100), 200),
    ],
)
def test_to_steps_rounds_down(duration: Duration, expected: int) -> None:
    assert duration.to_steps(global_batch_size=1024, num_samples=10_000, total_steps=200) == expected


def test_percent_needs_the_length_of_the_run() -> None:
    with pytest.raises(ValueError, match="percent is a share of the whole run"):
        Duration(percent=5).to_steps(global_batch_size=1, num_samples=1)


@pytest.mark.parametrize(
    ("units", "named"),
    [
        ({}, "none"),
        ({"steps": 1, "epochs": 2.0}, "steps, epochs"),
        ({"steps": 0, "percent": 0.0}, "steps, percent"),
    ],
)
def test_takes_exactly_one_unit(units: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match="exactly one") as caught:
        Duration(**units)
    assert str(caught.value) == EXACTLY_ONE + named


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (Duration(steps=500), "500 steps"),
        (Duration(epochs=0.5), "0.5 epochs"),
        (Duration(percent=5), "5 percent"),
    ],
)
def test_prints_its_unit(duration: Duration, text: str) -> None:
    assert str(duration) == text


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Duration(steps=1).steps = 2  # type: ignore[misc]


@given(samples=st.integers(1, 10**9), batch=st.integers(1, 10**5), epochs=st.integers(0, 1000))
def test_whole_epochs_are_exact(samples: int, batch: int, epochs: int) -> None:
    steps = Duration(epochs=epochs).to_steps(global_batch_size=batch, num_samples=samples)
    assert steps == epochs * samples // batch


@pytest.mark.parametrize(
    ("step", "every", "due"),
    [
        (0, 10, False),
        (9, 10, False),
        (10, 10, True),
        (20, 10, True),
        (1, 1, True),
        (10, None, False),
    ],
)
def test_is_due(step: int, every: int | None, due: bool) -> None:
    assert is_due(step, every) is due
