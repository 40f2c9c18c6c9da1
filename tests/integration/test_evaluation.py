"""Evaluating a trained run: the command agrees with the training, on any number of ranks and at any batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command import Outcome, vitscale, vitscale_launched, vitscale_on_ranks
from tests.helpers.runs import CONFIG, assert_same_state, overrides, trajectory
from tests.helpers.shardset import image_bytes, make_shardset, parts_of, spoil_image
from vitscale.data.manifest import read_manifest

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


@pytest.mark.parametrize("command", ["knn", "probe"])
def test_other_judges_do_not_depend_on_ranks_or_batch_size(trained: Path, digits: Path, command: str) -> None:
    arguments = [command, trained, "--train", digits / "train", "--test", digits / "val", "--no-cache"]
    arguments += ["--epochs", "3"] if command == "probe" else []
    alone = result(vitscale(*arguments))
    together = result(vitscale_on_ranks(2, *arguments, "--batch-size", "13"))
    scores = {"knn": ["10-nn", "20-nn"], "probe": ["top1"]}[command]
    for name in scores:
        # Sums of other batches may round otherwise, and turn the odd image that is nearly a tie.
        assert alone[name] == pytest.approx(together[name], abs=0.006)
        assert 0.3 < alone[name] < 1.0
    assert (alone["images"], alone["step"], alone["model"]) == (370, 60, "run")


def test_features_are_kept_for_one_checkpoint_and_never_taken_for_another(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    arguments = ("knn", trained, "--train", digits / "train", "--test", digits / "val", "--cache", cache)
    first = result(vitscale(*arguments))
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2
    assert result(vitscale_on_ranks(2, *arguments)) == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files, "taken, not made again"
    other = result(vitscale(*arguments, "--step", "30"))
    assert len(list(cache.iterdir())) == 4
    assert other != first
    assert other == result(vitscale(*arguments[:-2], "--no-cache", "--step", "30"))
    new = sorted(set(cache.iterdir()) - set(files))
    for old, path in zip(sorted(files), new, strict=True):
        path.rename(old)
    outcome = vitscale(*arguments)
    assert (outcome.code, "holds the features of another checkpoint" in outcome.errors) == (1, True), outcome.errors


def test_a_file_of_weights_is_judged_as_its_run(trained: Path, digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    assert vitscale("checkpoint", "export", trained, file).code == 0
    sets = ("--train", digits / "train", "--test", digits / "val", "--shots", "2")
    # How images are cropped is not in the file.
    crop = "data.eval_crop_share=1.0"
    answers = [result(vitscale("fewshot", file, crop, *sets)), result(vitscale("fewshot", trained, *sets))]
    assert answers[0]["2-shot"] == answers[1]["2-shot"]
    assert (answers[0]["step"], answers[0]["model"]) == (None, "weights.safetensors")
    assert not (tmp_path / "features").exists()
    answers = [
        result(vitscale("evaluate", file, crop, "--data", digits / "val")),
        result(vitscale("evaluate", trained)),
    ]
    assert answers[0]["top1"] == answers[1]["top1"]
    outcome = vitscale("evaluate", file)
    assert (outcome.code, "a file of weights tells no shard set; name a shard set with --data" in outcome.errors) == (
        2,
        True,
    )


def test_a_grid_of_penalties_is_told_as_a_table(trained: Path, digits: Path) -> None:
    arguments = ("fewshot", trained, "--train", digits / "train", "--test", digits / "val", "--shots", "1,5")
    outcome = vitscale(*arguments, "--ridge", "0.1,10,1024")
    answer = result(outcome)
    assert list(answer["5-shot_by_ridge"]) == ["0.1", "10", "1024"]
    assert answer["5-shot"] == answer["5-shot_by_ridge"][f"{answer['5-shot_ridge']:g}"]
    rows = [line.split() for line in outcome.errors.splitlines() if "shot" in line or line[:1] == " "]
    assert ["ridge", "1-shot", "5-shot"] in rows
    assert sum(cell.endswith("*") for row in rows for cell in row) == 2, "one choice for each number of shots"
    assert result(vitscale(*arguments, "--ridge", "10"))["5-shot"] == answer["5-shot_by_ridge"]["10"]
    refused = vitscale(*arguments, "--ridge", "-1")
    assert (refused.code, "--ridge is '-1'; numbers from 0 on" in refused.errors) == (2, True)


def test_a_confusion_matrix_is_drawn_and_kept(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "confusion.png"
    answer = result(vitscale_on_ranks(2, "evaluate", trained, "--confusion", picture))
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
    with np.load(tmp_path / "confusion.npz") as found:
        assert found["counts"].sum() == answer["images"]
        assert found["counts"].trace() == round(answer["top1"] * answer["images"])
        assert found["classes"].tolist() == [str(digit) for digit in range(10)]
    outcome = vitscale("evaluate", trained, "--confusion", tmp_path / "a.jpg")
    assert (outcome.code, "a name that ends in .png is needed" in outcome.errors) == (2, True)


def test_images_with_several_acceptable_labels(trained: Path, tmp_path: Path) -> None:
    """The same images once with one label and once with all: then every answer is right."""
    numbers = range(12)

    def parts(number: int) -> dict[str, bytes]:
        labels = {0: [], 1: list(range(10))}.get(number, [number % 10])
        return {"png": image_bytes(number, hw=(8, 8)), "json": json.dumps({"labels": labels}).encode()}

    manifest = make_shardset(tmp_path / "several", [len(numbers)], parts=parts, multi_label=True, classes=None)
    answer = result(vitscale_on_ranks(2, "evaluate", trained, "--data", manifest.location))
    assert (answer["images"], answer["labelled"]) == (12, 11)
    assert 1 / 11 <= answer["real_top1"] < 1.0
    assert answer["precision_at_1"] == pytest.approx(answer["real_top1"] * 11 / 12)
    assert 0.0 < answer["mean_average_precision"] < 1.0
    assert answer == result(vitscale("evaluate", trained, "--data", manifest.location, "--batch-size", "5"))
    outcome = vitscale("evaluate", trained, "--data", manifest.location, "--confusion", tmp_path / "a.png")
    assert (outcome.code, "images with one label each" in outcome.errors) == (2, True)


def test_unreadable_images_are_named_counted_and_bounded(trained: Path, tmp_path: Path) -> None:
    manifest = make_shardset(tmp_path / "set", [60], classes=None)
    other = make_shardset(tmp_path / "other", [60], parts=lambda number: parts_of(60 + number), classes=None)
    for number in (4, 22):
        spoil_image(manifest, number)
        spoil_image(other, number)
    sets = ("--train", manifest.location, "--test", other.location, "--no-cache")
    commands = [("evaluate", trained, "--data", manifest.location), ("knn", trained, *sets, "--k", "3")]
    for command in commands:
        outcome = vitscale_on_ranks(2, *command)
        assert outcome.code == 1
        assert (
            "2 of 60 images cannot be read, of which 1 are allowed: train-000000.tar: sample_00004 (" in outcome.errors
        )
        assert "--max-unreadable 2" in outcome.errors
        answer = result(vitscale_on_ranks(2, *command, "--max-unreadable", "2"))
        assert answer["unreadable"] == (2 if command[0] == "evaluate" else 4), "of each set that was gone through"
        assert answer["unreadable_images"][0].startswith("train-000000.tar: sample_00004 (")


def test_images_that_are_learnt_from_are_no_test(trained: Path, digits: Path) -> None:
    images = read_manifest(digits / "train").num_samples
    for test, shared in (("", images), ("[40%:]", images // 2 - images * 4 // 10)):
        outcome = vitscale_on_ranks(
            2, "knn", trained, "--train", f"{digits}/train[:50%]" if test else digits / "train",
            "--test", f"{digits}/train{test}", "--k", "1",
        )  # fmt: skip
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.errors.count(f"{digits}/train{test}: {shared} of its ") == 1, outcome.errors


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
