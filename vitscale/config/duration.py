"""Durations of a run and of everything that happens every so often, in the unit that the user thinks in."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from vitscale.config.section import section


@section
class Duration:
    """A length of training. Exactly one unit is given."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer updates."""
    epochs: Annotated[float, Field(ge=0)] | None = None
    """Passes over the training set; fractions are allowed."""
    examples: Annotated[int, Field(ge=0)] | None = None
    """Images delivered to the optimizer."""
    percent: Annotated[float, Field(ge=0, le=100)] | None = None
    """Share of the whole run, 0 to 100. Not allowed for the whole run itself."""

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            named = ", ".join(given) if given else "none"
            raise ValueError(f"a duration takes exactly one of steps, epochs, examples, percent; given: {named}")

    def to_steps(self, *, global_batch_size: int, num_samples: int, total_steps: int | None = None) -> int:
        """Whole optimizer steps, rounded down, as in the papers' step counts.

        Args:
            global_batch_size: images per step.
            num_samples: images in one epoch.
            total_steps: length of the run; needed for ``percent``.

        Raises:
            ValueError: ``percent`` without ``total_steps``.
        """
        if self.steps is not None:
            return self.steps
        if self.examples is not None:
            return self.examples // global_batch_size
        if self.epochs is not None:
            return int(_exact(self.epochs) * num_samples / global_batch_size)
        if total_steps is None:
            raise ValueError("percent is a share of the whole run, so the whole run needs another unit")
        assert self.percent is not None
        return int(_exact(self.percent) * total_steps / 100)

    def __str__(self) -> str:
        return next(
            f"{value} {f.name}" for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None
        )


def _exact(value: float) -> Fraction:
    """The number that was written: 29 percent of 100 steps is 29, not the 28 of 0.29 * 100 in floating point."""
    return Fraction(str(value))


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every ``every`` steps happens after ``step``. ``None`` is never."""
    return every is not None and step > 0 and step % every == 0
