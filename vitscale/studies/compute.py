"""What a training has cost, from its own records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vitscale.train.records import read_records

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Compute:
    """Of one run, up to its last recorded step."""

    examples: int
    """Images that were trained on; those of another epoch count again."""
    flops: float
    """Floating-point operations of the model: three times those of the forward passes, nothing recomputed."""
    device_days: float
    """Ranks times the time that the steps took, without starts and evaluations (the ViT paper tells core-days)."""


def compute_of(run: Path) -> Compute:
    """Read ``plan.json`` and ``metrics.jsonl`` of a run folder.

    Args:
        run: with at least one recorded step.
    """
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    # Every record tells the rate since the one before; attempts may have had other numbers of ranks.
    steps = training_records(run)
    first = {"examples_seen": 0}
    ranks = ranks_of_attempts(run)
    seconds = sum(
        (record["examples_seen"] - before["examples_seen"]) / record["images_per_s"] * ranks[record["attempt"]]
        for before, record in pairwise([first, *steps])
    )
    examples = steps[-1]["examples_seen"]
    return Compute(examples, 3.0 * plan["forward_flops"] * examples, seconds / SECONDS_PER_DAY)


def training_records(run: Path) -> list[dict[str, Any]]:
    """The records of steps in ``metrics.jsonl``, without a torn last line."""
    return [record for record in read_records(run / "metrics.jsonl") if "images_per_s" in record]


def best_step(run: Path) -> int:
    """Step of the evaluation with the highest held-out top-1, the earliest of equals (early stopping)."""
    scored = [record for record in read_records(run / "metrics.jsonl") if record.get("eval_top1") is not None]
    return int(max(scored, key=lambda record: (record["eval_top1"], -record["step"]))["step"])


def ranks_of_attempts(run: Path) -> dict[int, int]:
    """World size by attempt."""
    return {record["attempt"]: record["world_size"] for record in read_records(run / "attempts.jsonl")}
