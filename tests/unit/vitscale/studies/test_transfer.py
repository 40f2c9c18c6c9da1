from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.checkpoint.choices import Weights
from vitscale.config.loader import parse_section
from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.studies.fine_tuning import accuracy, storage_of
from vitscale.studies.models import StartingPoint, fine_tuned_model
from vitscale.studies.scaling import StudyConfig
from vitscale.studies.tables import Score
from vitscale.studies.transfer import DatasetConfig, SuiteConfig, Task, mean_over
from vitscale.train.recipes import vit_finetune


def task(*, train_size: int = 1000, held_out: float | None = None, rates: tuple[float, ...] | None = None) -> Task:
    dataset = DatasetConfig(train="a/train", test="a/test", held_out=held_out, learning_rates=rates)
    suite = SuiteConfig(folder=Path("out"), datasets={"a": dataset}, seeds=2)
    model = StartingPoint("m", Path("/m"), 7, Weights.EMA, ModelConfig(num_classes=10), "vit", "d", None)
    return Task(suite, "a", model, vit_finetune(train_size), 10, train_size, {}, None)


@given(st.integers(2, 10**6), st.floats(0.01, 99))
def test_what_is_held_out_is_the_end_of_the_training_set(size: int, percent: float) -> None:
    train, held_out = task(train_size=size, held_out=percent).parts()
    kept = int(train.removeprefix("a/train[:").removesuffix("]"))
    assert held_out == f"a/train[{kept}:]"
    assert 0 < kept < size
    assert size - kept == pytest.approx(min(size * percent / 100, size - 1), abs=1)


def test_recipes_say_what_is_held_out() -> None:
    assert task(train_size=50_000).parts() == ("a/train[:49000]", "a/train[49000:]")
    assert task(train_size=1_280_000).parts() == ("a/train[:1267200]", "a/train[1267200:]")


@given(st.lists(st.floats(0, 100) | st.none(), min_size=2, max_size=5))
def test_the_best_learning_rate_is_chosen_and_the_lower_of_equals(scores: list[float | None]) -> None:
    rates = tuple(0.001 * 3**index for index in range(len(scores)))
    chooser = task(rates=rates)
    results = {f"m/a/lr-{rate:g}": {"held-out": score} for rate, score in zip(rates, scores, strict=True)}
    known = [score for score in scores if score is not None]
    if known:
        assert chooser.choose(results) == rates[scores.index(max(known))]
    else:
        with pytest.raises(ConfigError, match="m/a: training diverged with every learning rate"):
            chooser.choose(results)


def test_one_learning_rate_is_no_choice() -> None:
    single = task(rates=(0.01,))
    assert single.search() == []
    assert single.choose({}) == 0.01


def test_the_fine_tuned_model_has_a_linear_head_and_is_otherwise_the_same() -> None:
    trained = ModelConfig(variant="ViT-B/32", num_classes=21_843, head_bias=-10.0, dropout=0.1, attention="triton")
    keys = fine_tuned_model(trained, "vit", num_classes=37)
    assert keys == {"variant": "ViT-B/32", "num_classes": 37, "representation_layer": False}
    bit = ModelConfig(variant="BiT-R50x1", num_classes=21_843)
    assert fine_tuned_model(bit, "bit", num_classes=37) == {"variant": "BiT-R50x1", "num_classes": 37}


def test_labels_of_reals_kind_are_judged_by_hits() -> None:
    assert accuracy({"top1": 0.5, "images": 4}) == 50.0
    assert accuracy({"real_top1": 0.75, "precision_at_1": 0.5}) == 75.0


def test_fine_tunings_begin_with_the_checkpoint_that_was_described() -> None:
    keys = task().model.init_keys(resize="bicubic")
    assert (keys["step"], keys["weights"], keys["resize"]) == (7, "ema", "bicubic")


SUITE = "folder: out\ndatasets: {a: {train: x, test: y}"
STUDY = "folder: out\nbase: b.yaml\nfewshot: {train: x, test: y}\nmodels: {m: {"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SuiteConfig, SUITE + "}\noverrides: {optim.lr: 1}", "optim.lr cannot be given here: set the learning rate"),
        (SuiteConfig, SUITE + "}\noverrides: {optim: {lr: 1}}", "optim cannot be given here, where optim.lr stands"),
        (SuiteConfig, SUITE + "}\noverrides: {init.step: 1}", "init.step cannot be given here"),
        (SuiteConfig, SUITE + ", b: {train: x, test: {a: z}}}", "datasets: 'a' names two rows of the table"),
        (SuiteConfig, SUITE + ", b: {train: x, test: z, group: a}}", "datasets: 'a' names two rows of the table"),
        (SuiteConfig, SUITE + ", b: {train: x, test: y, overrides: {seed: 1}}}", "datasets.b.overrides: seed cannot"),
        (StudyConfig, STUDY + "data.train: x}}", "models.m: data.train cannot be given here: all models learn from"),
        (
            StudyConfig,
            STUDY + "}}\noverrides: {data.eval: x}",
            "overrides: data.eval cannot be given here: it is the end",
        ),
    ],
)
def test_what_a_study_varies_is_not_overridden(kind: type, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_section(kind, text, "file")
    assert message in str(caught.value)


def test_storage_is_read_from_overrides() -> None:
    storage = storage_of({"data.storage.connections": 2, "optim.eps": 1}, {"data.storage": {"connections": 3}})
    assert storage.connections == 3
    with pytest.raises(ConfigError, match="conections"):
        storage_of({"data.storage.conections": 2})


def test_a_repetition_that_diverged_is_told() -> None:
    assert str(Score((90.0, None, 92.0))) == "91.00 ± 1.41, 1 diverged"
    assert str(Score((None,))) == "diverged"
    assert mean_over([Score((90.0, None)), Score((80.0, 70.0))]).values == (85.0, None)
