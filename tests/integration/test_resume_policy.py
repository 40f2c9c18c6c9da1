"""A run that is continued otherwise than it began: longer, with an average, forced onto other images. Real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command import Outcome, vitscale, vitscale_on_ranks
from tests.helpers.runs import CONFIG, checkpoint_of, checkpoints_of, metrics, overrides
from vitscale.checkpoint.format import AVERAGE, Checkpoint
from vitscale.config.loader import load_config
from vitscale.train.schedule import learning_rate

pytestmark = pytest.mark.timeout(180)

EVERY = "checkpoint.every={steps: 2}"


def train(digits: Path, run: Path, *more: str) -> Outcome:
    """``more`` are overrides and options."""
    given = [word for word in more if "=" in word]
    options = [word for word in more if "=" not in word]
    return vitscale("train", CONFIG, *overrides(digits, run, EVERY, "data.eval=null", *given), *options)


def has_average(checkpoint: Checkpoint) -> bool:
    return AVERAGE in checkpoint.content["digests"]


def test_a_run_is_made_longer_and_then_forced_onto_another_course(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(digits, run, "duration={steps: 4}", "--resume", "never")
    assert first.code == 0, first.errors
    made = metrics(run)
    assert [record["step"] for record in made] == [1, 2, 3, 4]

    refused = train(digits, run, "duration={steps: 4}", "--resume", "never")
    assert (refused.code, refused.errors.count("vitscale: error: ")) == (2, 1)
    assert f"--resume never: {run / 'checkpoints'} holds 2 checkpoints, the newest being step-0000" in refused.errors

    longer = train(digits, run, "duration={steps: 6}", "optim.ema_decay=0.5", "--resume", "must")
    assert longer.code == 0, longer.errors
    said = "duration: {steps: 4} -> {steps: 6}: the learning rate changes from step 4 on; steps already made stay"
    assert longer.errors.count(said) == 1
    assert "optim.ema_decay: null -> 0.5: weights are averaged otherwise from step 4 on" in longer.errors
    assert metrics(run)[:4] == made
    config = load_config(run / "config.yaml")
    lrs = [learning_rate(step, optim=config.optim, schedule=config.schedule, warmup=1, total=6) for step in range(4, 6)]
    assert [(record["step"], record["lr"]) for record in metrics(run)[4:]] == list(zip((5, 6), lrs, strict=True))
    assert has_average(checkpoint_of(run, 6))
    assert not has_average(checkpoint_of(run, 4))

    forced = ["duration={steps: 8}", "optim.lr=2e-3", f"data.train={digits / 'val'}"]
    options = ["--allow-change", "data.train", "--allow-change", "optim"]
    other = train(digits, run, *forced, *options)
    assert other.code == 0, other.errors
    assert (
        "FORCED by --allow-change: optim.lr: 0.001 -> 0.002: the learning rate changes from step 6 on" in other.errors
    )
    assert "FORCED by --allow-change: data.train: content " in other.errors
    assert "optim.ema_decay: 0.5 -> null" in other.errors
    assert [record["step"] for record in metrics(run)] == list(range(1, 9))
    assert [record["attempt"] for record in metrics(run)] == [1, 1, 1, 1, 2, 2, 3, 3]

    again = train(digits, run, *forced, *options)
    assert again.code == 0, again.errors
    assert "the run was finished before; nothing was left to do: step 8" in again.errors
    assert "FORCED" not in again.errors
    assert checkpoints_of(run)[0] == "step-000000008"
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["restored_step"] for attempt in attempts] == [None, 4, 6, 8]
    of_others = {"key": "optim.ema_decay", "change": "optim.ema_decay: 0.5 -> null", "forced": False}
    assert of_others in attempts[2]["changed"]
    assert {change["key"] for change in attempts[2]["changed"] if change["forced"]} == {"optim.lr", "data.train"}
    assert (attempts[0]["changed"], attempts[3]["changed"]) == ([], [])


def test_a_mistyped_run_that_must_continue_is_refused_once_and_makes_no_folder(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "rnu"
    outcome = vitscale_on_ranks(2, "train", CONFIG, *overrides(digits, run), "--resume", "must")
    assert outcome.code == 2, outcome.errors
    assert outcome.errors.count("vitscale: error: ") == 1
    assert f"--resume must: there is no checkpoint in {run / 'checkpoints'}; check run=..." in outcome.errors
    assert "Traceback" not in outcome.errors
    assert not run.exists()
