"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# A damaged newest one needs a predecessor.
FEWEST = 2


@dataclass(frozen=True)
class Retention:
    """What is kept; a checkpoint goes if none of the three rules wants it.

    Args:
        last: so many of the newest ones, at least 2.
        every: of each stretch of so many steps, the first; so those at its multiples, where there are any.
        best: so many of those with the highest scores; of equal ones the older. Not scored yet means not wanted by
            this rule.
    """

    last: int
    every: int | None = None
    best: int = 0

    def superfluous(self, steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
        """The steps of complete checkpoints that may go, oldest first.

        Args:
            steps: of all complete checkpoints.
            scores: of steps, higher is better.
        """
        ordered = sorted(steps)
        wanted = set(ordered[-max(self.last, FEWEST) :])
        if self.every is not None:
            firsts: dict[int, int] = {}
            for step in ordered:
                firsts.setdefault(step // self.every, step)
            wanted |= {step for stretch, step in firsts.items() if stretch}
        scored = sorted((step for step in ordered if step in scores), key=lambda step: (-scores[step], step))
        wanted |= set(scored[: self.best])
        return [step for step in ordered if step not in wanted]
