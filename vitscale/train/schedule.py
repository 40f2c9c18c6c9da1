"""Learning rate as a pure function of the step (ViT paper, table 3; formulas of the JAX reference)."""

from __future__ import annotations

import math

from vitscale.config.schema import OptimConfig, ScheduleConfig


def learning_rate(step: int, *, optim: OptimConfig, schedule: ScheduleConfig, warmup: int, total: int) -> float:
    """Learning rate of the update that follows ``step`` finished updates.

    Linear warm-up from 0 multiplies the decay, which itself starts at the end of the warm-up:
    linear falls from ``lr`` to ``final_lr``, cosine likewise along half a period.
    """
    progress = min(max((step - warmup) / max(1, total - warmup), 0.0), 1.0)
    share = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    decayed = schedule.final_lr + (optim.lr - schedule.final_lr) * share
    return decayed * min(1.0, step / warmup) if warmup else decayed
