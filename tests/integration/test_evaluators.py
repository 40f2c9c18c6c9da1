"""Evaluations that a run names for itself: recorded under their names, the same as by command, and never in the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import Outcome, vitscale, vitscale_on_ranks
from tests.helpers.runs import CONFIG, assert_same_state, finish, overrides, start_training, trajectory, wait_until

COMMON = (
    "duration={steps: 6}",
    "checkpoint.every={steps: 6}",
    "global_batch_size=32",
    "micro_batch_size=16",
    "optim.lr=1e-2",
    "schedule.warmup={steps: 1}",
)


def evaluators(digits: Path) -> list[str]:
    sets = f"train: {digits / 'train'}, test: {digits / 'val'}"
    return [
        f"evaluation.evaluators.few={{kind: fewshot, {sets}, shots: [1, 5], every: {{steps: 2}}}}",
        f"evaluation.evaluators.near={{kind: knn, {sets}, k: [3, 10], every: {{steps: 3}}}}",
        f"evaluation.evaluators.line={{kind: probe, {sets}, epochs: 2, lr: [0.01, 0.1]}}",
        f"evaluation.evaluators.again={{kind: accuracy, data: {digits / 'val'}}}",
    ]


def records(run: Path, name: str) -> dict[int, dict[str, Any]]:
    """What an evaluator recorded, by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if f"{name}/images" in line]
    assert len({line["step"] for line in found}) == len(found), "each step once"
    return {line["step"]: {key.partition("/")[2]: v for key, v in line.items() if "/" in key} for line in found}


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.errors
    answer: dict[str, Any] = json.loads(outcome.out)
    return answer


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_they_are_recorded_as_commands_tell_them_and_training_goes_on_as_without_them(
    digits: Path, tmp_path: Path, stage: int
) -> None:
    """With kernels of more than 100,000 elements, which ZeRO 3 parts and gathers again for every forward pass."""
    more = [f"engine.zero_stage={stage}", "model.embed_dim=64", "model.mlp_dim=2048", "model.depth=1"]
    run, plain = tmp_path / "run", tmp_path / "plain"
    for folder, named in ((run, evaluators(digits)), (plain, [])):
        outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, folder, *COMMON, *more, *named))
        assert outcome.code == 0, outcome.errors
    assert trajectory(run) == trajectory(plain)
    assert_same_state(run, plain)
    found = {name: records(run, name) for name in ("few", "near", "line", "again")}
    assert {name: sorted(steps) for name, steps in found.items()} == {
        "few": [2, 4, 6],
        "near": [3, 6],
        "line": [6],
        "again": [6],
    }
    sets = ("--train", digits / "train", "--test", digits / "val")
    few = result(vitscale("fewshot", run, *sets, "--shots", "1,5"))
    near = result(vitscale("knn", run, *sets, "--k", "3,10"))
    line = result(vitscale("probe", run, *sets, "--epochs", "2", "--lr", "0.01,0.1"))
    accuracy = result(vitscale("evaluate", run))
    for answer, name in ((few, "few"), (near, "near"), (line, "line"), (accuracy, "again")):
        recorded = found[name][6]
        assert recorded["images"] == 370
        for key, value in recorded.items():
            # Sums of other batches may round otherwise, and turn the odd image that is nearly a tie.
            assert answer[key] == pytest.approx(value, abs=0.006), (name, key)
    assert few["5-shot"] > 0.3
    assert near["10-nn"] > 0.3
    # The features of each set were made once for three commands.
    assert len(list((run / "features").glob("*.safetensors"))) == 2


@pytest.mark.slow
def test_a_run_that_was_killed_records_each_once_and_a_stop_does_not_wait_for_them(
    digits: Path, tmp_path: Path
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    named = [*evaluators(digits)[:2], "checkpoint.every={steps: 2}"]
    assert vitscale("train", CONFIG, *overrides(digits, plain, *COMMON, *named)).code == 0
    slow = f"evaluation.evaluators.slow={{kind: probe, train: {digits / 'train'}, test: {digits / 'val'}, "
    slow += "epochs: 100000, lr: [0.01], every: {steps: 4}}"
    arguments = overrides(digits, run, *COMMON, *named)
    process = start_training([*arguments, slow], nproc=1)
    # The slow one comes last of those that are due.
    assert wait_until(lambda: (run / "metrics.jsonl").exists() and 4 in records(run, "few"))
    process.send_signal(signal.SIGTERM)
    assert "stopped at step 4" in finish(process, expect=75)
    assert vitscale("train", CONFIG, *arguments).code == 0
    assert trajectory(run) == trajectory(plain)
    for name in ("few", "near"):
        assert records(run, name) == records(plain, name)


def test_averaged_weights_are_what_is_evaluated(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = overrides(digits, run, *COMMON, "optim.ema_decay=0.95", *evaluators(digits)[:1])
    assert vitscale("train", CONFIG, *arguments).code == 0
    sets = ("--train", digits / "train", "--test", digits / "val", "--shots", "5")
    ema, raw = (result(vitscale("fewshot", run, *sets, "--weights", kind)) for kind in ("ema", "raw"))
    recorded = records(run, "few")[6]["5-shot"]
    assert recorded == pytest.approx(ema["5-shot"], abs=0.002)
    assert abs(recorded - raw["5-shot"]) > 0.002


def test_sets_that_do_not_fit_are_told_before_training_and_too_small_ones_do_not_end_it(
    digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    missing = f"evaluation.evaluators.x={{kind: knn, train: {tmp_path / 'none'}, test: {digits / 'val'}}}"
    outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, run, *COMMON, missing))
    assert (outcome.code, outcome.errors.count("vitscale: error:")) == (1, 1)
    assert f"{tmp_path / 'none'}: no such shard set" in outcome.errors
    assert not run.exists()
    many = f"evaluation.evaluators.x={{kind: fewshot, train: {digits / 'train'}, test: {digits / 'val'}, shots: [500]}}"
    outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, run, *COMMON, many))
    assert outcome.code == 0, outcome.errors
    assert "images, but 500 shots are needed" in records(run, "x")[6]["error"]
    assert "images, but 500 shots are needed" in outcome.out + outcome.errors


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_representations_are_judged_while_masked_patches_are_predicted(
    digits: Path, tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    more = ["model.head=masked_patches", "model.num_classes=512", "loss.kind=masked_patches", "data.eval=null"]
    more += [f"engine.zero_stage={stage}", *evaluators(digits)[:1]]
    outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, run, *COMMON), *more)
    assert outcome.code == 0, outcome.errors
    sets = ("--train", digits / "train", "--test", digits / "val", "--shots", "1,5")
    assert records(run, "few")[6]["5-shot"] == pytest.approx(
        result(vitscale("fewshot", run, *sets))["5-shot"], abs=0.004
    )
