"""Keys of a fine-tuning: which go together, and that older configurations mean what they meant."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tests.helpers.runs import CONFIG
from vitscale.checkpoint.choices import Weights
from vitscale.config.loader import load_config
from vitscale.config.reference import dump_config
from vitscale.config.schema import InitConfig, OptimConfig, ScheduleConfig
from vitscale.errors import ConfigError
from vitscale.weights.choices import PreLogitsMode, ResizeMode


def choices(key: str) -> set[str]:
    """What a key of ``init`` may be."""
    hint = get_type_hints(InitConfig)[key]
    return {choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)}


@pytest.mark.parametrize(("key", "enum"), [("weights", Weights), ("resize", ResizeMode), ("pre_logits", PreLogitsMode)])
def test_what_init_takes_is_what_readers_of_weights_take(key: str, enum: type[StrEnum]) -> None:
    assert choices(key) == set(enum)


def test_the_defaults_are_those_of_runs_that_were_made_before() -> None:
    config = load_config(CONFIG)
    assert (config.optim.kind, config.schedule.decay, config.init) == ("adamw", "cosine", InitConfig())
    assert config.init.path is None


def test_a_fine_tuning_survives_the_run_folder(tmp_path: Path) -> None:
    config = load_config(
        CONFIG,
        [
            "init={path: ../runs/a, step: 7, weights: ema, resize: bicubic, head: keep, pre_logits: keep}",
            "optim={kind: sgd, lr: 0.03, weight_decay: 0, momentum: 0.8}",
            "schedule={decay: steps, milestones: [0.25, 0.5], factor: 3}",
        ],
    )
    assert config.init.path == Path("../runs/a")
    assert config.schedule.milestones == (0.25, 0.5)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["optim.momentum=0.8"], "kind adamw has no use for momentum; leave them out"),
        (["optim={kind: sgd, lr: 1, weight_decay: 0, betas: [0.8, 0.9], eps: 1}"], "kind sgd has no use for betas and"),
        (["optim={kind: sgd, lr: 1}"], "weight_decay 0.1 is meant for adamw"),
        (["optim={kind: sgd, lr: 1, weight_decay: 0, momentum: 0}"], "optim.momentum: must be greater than 0"),
        (["optim={kind: sgd, lr: 1, weight_decay: 0, momentum: 1}"], "optim.momentum: must be less than 1"),
        (["optim.kind=adam"], "must be 'adamw' or 'sgd', got 'adam'"),
        (["schedule.factor=3"], "decay cosine has no use for factor"),
        (["schedule={decay: linear, milestones: [0.5]}"], "decay linear has no use for milestones"),
        (["schedule={decay: steps, final_lr: 1e-5}"], "decay steps has no use for final_lr"),
        (["schedule={decay: steps, milestones: [0.5, 0.5]}"], "milestones must grow, got [0.5, 0.5]; sort them"),
        (["schedule={decay: steps, milestones: [1.5]}"], "schedule.milestones"),
        (["schedule={decay: steps, factor: 1}"], "must be greater than 1"),
        (["init.path=s3://bucket/run"], "is a URL; fetch the weights"),
        (["init.resize=bicubic", "init.step=3"], "step and resize without path say nothing; set path"),
        (["init={path: a, resize: nearest}"], "init.resize: must be"),
        (["init={path: a, head: zero}"], "must be 'new' or 'keep', got 'zero'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_cure(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, overrides)
    assert text in str(caught.value)


@pytest.mark.parametrize("section", [OptimConfig, ScheduleConfig, InitConfig])
def test_each_key_has_its_help(section: Any) -> None:
    from vitscale.config.reference import attribute_docs

    assert attribute_docs(section).keys() == {field.name for field in dataclasses.fields(section)}
