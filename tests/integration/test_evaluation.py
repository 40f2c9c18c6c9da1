"""Evaluating a trained run: the command agrees with the training, on any number of ranks and at any batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import Outcome, vitscale, vitscale_launched, vitscale_on_ranks
from tests.helpers.runs import CONFIG, assert_same_state, overrides, trajectory

# A learning rate at which the tiny model learns something in few steps.
LEARNING = (
    "duration={steps: 60}",
    "optim.lr=1e-2",
    "schedule.warmup={steps: 5}",
    "checkpoint.every={steps: 30}",
    "evaluation.every={steps: 30}",
    "global_batch_size=64",
    "micro_batch_size=64",
    "model.dropout=0",
    "model.stochastic_depth=0",
)


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = vitscale("train", CONFIG, *overrides(digits, run, *LEARNING))
    assert outcome.code == 0, outcome.errors
    return run


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """What the training recorded, by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in records if "eval_top1" in r}


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.errors
    assert outcome.out.count("\n") == 1, "one rank prints, once"
    answer: dict[str, Any] = json.loads(outcome.out)
    return answer


def test_evaluate_equals_the_evaluation_during_training(trained: Path, digits: Path) -> None:
    recorded = evaluations(trained)
    assert sorted(recorded) == [30, 60]
    outcomes = {
        60: [
            vitscale("evaluate", trained),
            vitscale("evaluate", trained, "--data", digits / "val", "--batch-size", "1000"),
            vitscale_launched(2, "evaluate", trained, "--batch-size", "7"),
            vitscale_on_ranks(3, "evaluate", trained, "--batch-size", "50"),
        ],
        30: [vitscale("evaluate", trained, "--step", "30", "--batch-size", "5")],
    }
    for step, answers in outcomes.items():
        for answer in map(result, answers):
            assert answer["step"] == step
            assert answer["data"] == str(digits / "val")
            for name in ("top1", "top5", "images", "unreadable"):
                assert answer[name] == recorded[step][f"eval_{name}"], (step, name)
    assert recorded[60]["eval_images"] == 370
    # Neither chance nor perfect, so that equal figures say something.
    assert 0.2 < recorded[60]["eval_top1"] < 0.99
    assert recorded[30]["eval_top1"] != recorded[60]["eval_top1"]


def test_the_training_set_can_be_evaluated_on(trained: Path, digits: Path) -> None:
    answer = result(vitscale("evaluate", trained, "--data", digits / "train"))
    assert answer["images"] == 1427
    assert answer["top1"] > 0.2


def test_fewshot_does_not_depend_on_ranks_or_batch_size(trained: Path, digits: Path) -> None:
    arguments = ("fewshot", trained, "--train", digits / "train", "--test", digits / "val", "--shots", "1,5,20")
    alone = result(vitscale(*arguments))
    together = result(vitscale_on_ranks(2, *arguments, "--batch-size", "13"))
    assert alone == together
    assert alone["train"] == str(digits / "train")
    assert (alone["step"], alone["seeds"], alone["ridge"]) == (60, 3, 1024.0)
    assert 0.1 < alone["1-shot"] < alone["5-shot"] < alone["20-shot"] < 1.0


def test_training_goes_on_from_an_evaluation_as_if_there_had_been_none(digits: Path, tmp_path: Path) -> None:
    """With kernels of more than 100,000 elements, which ZeRO 3 parts and gathers again for every forward pass."""
    common = ["duration={steps: 5}", "checkpoint.every={steps: 5}", "engine.zero_stage=3"]
    common += ["model.embed_dim=64", "model.mlp_dim=2048", "model.depth=1"]
    runs = tmp_path / "evaluated", tmp_path / "plain"
    for run, every in zip(runs, ("{steps: 2}", "null"), strict=True):
        outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, run, *common, f"evaluation.every={every}"))
        assert outcome.code == 0, outcome.errors
    assert sorted(evaluations(runs[0])) == [2, 4, 5]
    assert trajectory(runs[0]) == trajectory(runs[1])
    assert_same_state(*runs)
