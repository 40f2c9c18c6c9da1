"""Evaluators by name: what a configuration may say of them, and what a mistake is told."""

from __future__ import annotations

import pytest

from tests.helpers.runs import CONFIG
from vitscale.config.duration import Duration
from vitscale.config.evaluators import AccuracyEvaluator, FewshotEvaluator, KnnEvaluator, ProbeEvaluator
from vitscale.config.loader import load_config, parse_section
from vitscale.config.reference import dump_config, reference_yaml
from vitscale.config.schema import TrainConfig
from vitscale.errors import ConfigError

ALL = (
    "evaluation.evaluators.real={kind: accuracy, data: r}",
    "evaluation.evaluators.shots={kind: fewshot, train: a, test: b, shots: [2], ridge: [1.0, 2.0], every: {steps: 5}}",
    "evaluation.evaluators.k-nn={kind: knn, train: a, test: b, k: [5]}",
    "evaluation.evaluators.p_1={kind: probe, train: a, test: b, lr: [0.1], optimizer: adamw}",
)


def test_all_kinds_are_read_and_written_back() -> None:
    config = load_config(CONFIG, ALL)
    assert config.evaluation.evaluators == {
        "real": AccuracyEvaluator(data="r"),
        "shots": FewshotEvaluator(train="a", test="b", shots=(2,), ridge=(1.0, 2.0), every=Duration(steps=5)),
        "k-nn": KnnEvaluator(train="a", test="b", k=(5,)),
        "p_1": ProbeEvaluator(train="a", test="b", lr=(0.1,), optimizer="adamw"),
    }
    assert parse_section(TrainConfig, dump_config(config), "config.yaml") == config


def test_none_is_the_default_and_of_an_old_configuration() -> None:
    config = load_config(CONFIG)
    assert config.evaluation.evaluators == {}
    old = "".join(line for line in dump_config(config).splitlines(keepends=True) if "evaluators" not in line)
    assert parse_section(TrainConfig, old, "config.yaml") == config


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            "{kind: fewshots, train: a, test: b}",
            "x: must be of a kind that there is ('accuracy', 'fewshot', 'knn', 'probe')",
        ),
        ("{train: a, test: b}", "x: must be a section that says its kind"),
        ("{kind: knn, train: a}", "x.test: required, but not given; add it"),
        (
            "{kind: knn, train: a, tset: b}",
            "x.tset: unknown key; did you mean 'test'? (known: kind, data, every, train",
        ),
        ("{kind: knn, train: a, test: b, shots: [1]}", "x.shots: not a key of the kind that is chosen here; remove it"),
        ("{kind: knn, train: a, test: b, k: []}", "x.k: must be a list of at least one, got []"),
        ("{kind: knn, train: a, test: b, k: [0]}", "x.k[0]: must be greater than 0, got 0"),
        ("{kind: knn, train: a, test: b, every: {step: 1}}", "x.every.step: unknown key; did you mean 'steps'?"),
        ("3", "x: must be a mapping, got 3"),
    ],
)
def test_mistakes(value: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [f"evaluation.evaluators.x={value}"])
    assert f"evaluation.evaluators.{problem}" in str(caught.value)


def test_masked_patches_have_no_accuracy_but_features() -> None:
    masked = ["model.head=masked_patches", "model.num_classes=512", "loss.kind=masked_patches", "evaluation.every=null"]
    masked += ["data.eval=null"]
    assert load_config(CONFIG, [*masked, *ALL[1:]]).evaluation.evaluators.keys() == {"shots", "k-nn", "p_1"}
    with pytest.raises(ConfigError, match="evaluators: real of kind accuracy needs classes"):
        load_config(CONFIG, [*masked, *ALL])


def test_a_name_may_not_look_like_a_path() -> None:
    with pytest.raises(ConfigError, match=r"a/b: must be named with letters, digits and _ . - only, got 'a/b'"):
        load_config(CONFIG, ["evaluation.evaluators={a/b: {kind: accuracy, data: r}}"])


def test_the_reference_tells_the_keys_of_each_kind_and_fits_a_screen() -> None:
    text = reference_yaml(TrainConfig)
    for part in ("kind: fewshot", "shots: [1, 5, 10, 25]", "temperature: 0.07", "held_out: 0.1", "  NAME:"):
        assert any(line.startswith("#") and part in line for line in text.splitlines()), part
    assert max(map(len, text.splitlines())) <= 100
