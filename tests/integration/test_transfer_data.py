"""Runs on parts of shard sets with the crops and the mixup of transfer: any number of ranks, any micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import finish, metrics, overrides, start_training, trajectory
from tests.helpers.stopping import train_and_stop
from vitscale.data.manifest import read_manifest

TRANSFER = (
    "global_batch_size=48",
    "duration={steps: 12}",
    "model.dropout=0",
    "model.stochastic_depth=0",
    "data.crop_area=[0.05, 1.0]",
    "data.crop_aspect=[0.75, 1.33]",
    "data.crop=square",
    "data.crop_from=10",
    "data.eval_resize=square",
    "data.eval_crop_share=0.875",
    "loss.mixup=0.4",
)


@pytest.mark.parametrize("kind", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_parts_and_mixup_go_on_with_any_number_of_ranks(digits: Path, tmp_path: Path, kind: str) -> None:
    def arguments(name: str) -> list[str]:
        sets = f"{{'{digits / 'train'}[10%:60%]': 0.6, '{digits / 'val'}[:200]': 0.4}}"
        return overrides(digits, tmp_path / name, *TRANSFER, f"loss.kind={kind}", f"data.train={sets}")

    run_ranks(train_and_stop, 2, arguments("whole"), None)
    for world_size, micro_batch_size, stop_at in ((2, 4, 3), (3, 8, 8), (1, 48, None)):
        more = [f"micro_batch_size={micro_batch_size}", f"data.workers={world_size}"]
        run_ranks(train_and_stop, world_size, [*arguments("parts"), *more], stop_at)
    whole, parts = trajectory(tmp_path / "whole"), trajectory(tmp_path / "parts")
    assert len(whole) == 12
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)


def test_a_held_out_part_of_the_training_set(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = digits / "train"
    arguments = overrides(
        digits, run, *TRANSFER, f"data.train={train}[:90%]", f"data.eval={train}[90%:]", "evaluation.every={steps: 6}"
    )
    finish(start_training(arguments, nproc=None))
    total = read_manifest(train).num_samples
    plan = json.loads((run / "plan.json").read_text())
    assert plan["num_samples"] == total * 9 // 10
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["eval_images"] for line in lines if "eval_images" in line} == {total - total * 9 // 10}
    assert len(metrics(run)) == 12
    error = finish(start_training([*arguments, f"data.train={train}[:80%]"], nproc=None), expect=1)
    assert "was trained on other data" in error
