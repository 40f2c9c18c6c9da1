from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitscale.studies.compute import best_step, compute_of


def write_lines(path: Path, records: list[dict[str, object]], torn: str = "") -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records) + torn)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "plan.json").write_text(json.dumps({"forward_flops": 1000}))
    write_lines(tmp_path / "attempts.jsonl", [{"attempt": 1, "world_size": 2}, {"attempt": 2, "world_size": 4}])
    records: list[dict[str, object]] = [
        {"step": 1, "examples_seen": 10, "images_per_s": 5.0, "attempt": 1},
        {"step": 10, "examples_seen": 100, "images_per_s": 10.0, "attempt": 1},
        {"step": 10, "eval_top1": 0.5, "attempt": 1},
        {"step": 20, "examples_seen": 200, "images_per_s": 50.0, "attempt": 2},
        {"step": 20, "eval_top1": 0.75, "attempt": 2},
        {"step": 30, "eval_top1": 0.75, "attempt": 2},
    ]
    write_lines(tmp_path / "metrics.jsonl", records, torn='{"step": 31, "examp')
    return tmp_path


def test_compute_counts_ranks_and_rates_of_every_attempt(run: Path) -> None:
    compute = compute_of(run)
    assert compute.examples == 200
    assert compute.flops == 3 * 1000 * 200
    # 2 s and 9 s on two ranks, then 2 s on four.
    assert compute.device_days == pytest.approx((2 * 2 + 9 * 2 + 2 * 4) / 86_400)


def test_the_best_step_is_the_earliest_of_equals(run: Path) -> None:
    assert best_step(run) == 20
