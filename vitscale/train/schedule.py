"""Learning rate as a pure function of the step (ViT paper, table 3; formulas of the JAX reference)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from vitscale.config.schema import OptimConfig, ScheduleConfig, TrainConfig
from vitscale.plan import RunPlan


def planned_learning_rate(config: TrainConfig, plan: RunPlan) -> Callable[[int], float]:
    """The learning rate of a run by the number of finished updates."""
    return partial(
        learning_rate,
        optim=config.optim,
        schedule=config.schedule,
        warmup=plan.warmup_steps,
        total=plan.total_steps,
    )


def learning_rate(step: int, *, optim: OptimConfig, schedule: ScheduleConfig, warmup: int, total: int) -> float:
    """Learning rate of the update that follows ``step`` finished updates.

    Linear warm-up from 0 multiplies the decay, which itself starts at the end of the warm-up:
    linear falls from ``lr`` to ``final_lr``, cosine likewise along half a period. With steps, the learning rate is
    divided at milestones, which are shares of the whole run (BiT paper, section 3.3).
    """
    decayed = _decayed(step, optim, schedule, warmup, total)
    return decayed * min(1.0, step / warmup) if warmup else decayed


def _decayed(step: int, optim: OptimConfig, schedule: ScheduleConfig, warmup: int, total: int) -> float:
    if schedule.decay == "steps":
        passed = sum(step >= round(share * total) for share in schedule.milestones)
        return float(optim.lr / schedule.factor**passed)
    progress = min(max((step - warmup) / max(1, total - warmup), 0.0), 1.0)
    share = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.final_lr + (optim.lr - schedule.final_lr) * share
