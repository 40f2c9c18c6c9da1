"""The part of a run's state that is the same on all ranks: a handful of integers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. The data cursor is ``examples_seen``: everything else about the data is a pure function."""

    step: int = 0
    """Finished optimizer steps, skipped updates included."""
    examples_seen: int = 0
    """Images delivered to the optimizer."""
    quarantined: int = 0
    """Bad samples met so far."""
    skipped_steps: int = 0
    """Updates skipped because gradients were not finite."""
    skipped_in_a_row: int = 0
    """Of these, the ones directly before this state."""

    def advance(self, *, examples: int, quarantined: int, applied: bool) -> TrainState:
        """The state after one more step."""
        return TrainState(
            step=self.step + 1,
            examples_seen=self.examples_seen + examples,
            quarantined=self.quarantined + quarantined,
            skipped_steps=self.skipped_steps + (not applied),
            skipped_in_a_row=0 if applied else self.skipped_in_a_row + 1,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint's manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of :meth:`to_json`."""
        return cls(**{field.name: int(data[field.name]) for field in dataclasses.fields(cls)})
