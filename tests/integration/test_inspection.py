"""Looking into a trained run and asking it about images: the commands as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command import vitscale, vitscale_on_ranks
from tests.helpers.runs import CONFIG, overrides
from tests.helpers.shardset import read_tars
from vitscale.config.schema import ModelConfig
from vitscale.data.manifest import read_manifest
from vitscale.models.build import build_model
from vitscale.models.init import initialize
from vitscale.weights.choices import WeightFormat
from vitscale.weights.save import save_weights

LEARNING = (
    "duration={steps: 40}",
    "optim.lr=1e-2",
    "schedule.warmup={steps: 5}",
    "checkpoint.every={steps: 20}",
    "global_batch_size=64",
    "micro_batch_size=64",
)
PICTURES = ("attention_distance", "filters", "position_similarity", "rollout")


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = vitscale("train", CONFIG, *overrides(digits, run, *LEARNING))
    assert outcome.code == 0, outcome.errors
    return run


@pytest.fixture(scope="module")
def images(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first held-out images as files, called by their keys."""
    folder = tmp_path_factory.mktemp("images")
    for key, parts in read_tars(read_manifest(digits / "val"))[:6]:
        (extension,) = parts.keys() - {"cls"}
        (folder / f"{key.replace('/', '_')}.{extension}").write_bytes(parts[extension])
    return folder


def arrays(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def test_inspect_draws_all_pictures_of_a_run_into_it(trained: Path) -> None:
    outcome = vitscale("inspect", trained, "--num-images", "20", "--overlays", "3", "--batch-size", "7")
    assert outcome.code == 0, outcome.errors
    folder = trained / "inspection" / "step-000000040"
    named = sorted(Path(line) for line in outcome.out.splitlines())
    assert named == sorted(folder.iterdir()) == sorted(folder / f"{n}.{e}" for n in PICTURES for e in ("npz", "png"))
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300
    # 2 x 2 patches of 4 pixels, two layers of two heads.
    distance = arrays(folder, "attention_distance")
    assert distance["distance_px"].shape == distance["entropy_nats"].shape == (2, 2)
    assert 0 < distance["distance_px"].min() <= distance["distance_px"].max() < 4 * np.sqrt(2)
    assert distance["images"] == 20
    assert arrays(folder, "position_similarity")["similarity"].shape == (2, 2, 2, 2)
    assert arrays(folder, "filters")["components"].shape == (15, 4, 4, 3)  # of 16 filters
    rollout = arrays(folder, "rollout")
    assert (rollout["maps"].shape, rollout["pixels"].shape) == ((3, 2, 2), (3, 8, 8, 3))
    assert len(set(rollout["names"].tolist())) == 3


def test_inspect_does_not_depend_on_batches(trained: Path, tmp_path: Path) -> None:
    for size in ("1", "64"):
        outcome = vitscale("inspect", trained, "--num-images", "9", "--batch-size", size, "--out", tmp_path / size)
        assert outcome.code == 0, outcome.errors
    for name in PICTURES:
        one, other = arrays(tmp_path / "1", name), arrays(tmp_path / "64", name)
        assert one.keys() == other.keys()
        for key, values in one.items():
            same = values == other[key] if values.dtype.kind in "UiIu" else np.isclose(values, other[key], atol=1e-5)
            assert np.all(same), (name, key)


def test_inspect_looks_at_images_that_are_named(trained: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    outcome = vitscale("inspect", trained, images, tmp_path / "bad.png", "--step", "20", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.errors
    assert f"unreadable: {tmp_path / 'bad.png'} (cannot decode" in outcome.errors
    assert arrays(tmp_path / "out", "attention_distance")["images"] == 6
    assert "attention is that of 6 of 7 images" in outcome.errors
    names = arrays(tmp_path / "out", "rollout")["names"].tolist()
    assert names == sorted(str(path) for path in images.iterdir())
    only_bad = vitscale("inspect", trained, tmp_path / "bad.png", "--out", tmp_path / "none")
    assert only_bad.code == 1
    assert "none of 1 images can be read" in only_bad.errors


def test_inspect_bounds_unreadable_images(trained: Path, images: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"bad{number}.png").write_bytes(b"no image")
    arguments = ("inspect", trained, images, f"{tmp_path}/bad*.png", "--out", tmp_path / "out")
    outcome = vitscale(*arguments)
    assert outcome.code == 1
    assert f"3 of 9 images cannot be read, of which 1 are allowed: {tmp_path}/bad0.png (" in outcome.errors
    assert not (tmp_path / "out" / "attention_distance.npz").exists()
    outcome = vitscale(*arguments, "--max-unreadable", "3")
    assert outcome.code == 0, outcome.errors
    assert "attention is that of 6 of 9 images" in outcome.errors
    assert arrays(tmp_path / "out", "attention_distance")["images"] == 6


def test_predict_is_as_right_as_evaluate_says(trained: Path, digits: Path) -> None:
    outcome = vitscale("predict", trained, digits / "val", "--json", "--top", "2", "--batch-size", "50")
    assert outcome.code == 0, outcome.errors
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    labels = {key: int(parts["cls"]) for key, parts in read_tars(read_manifest(digits / "val"))}
    assert [answer["image"] for answer in answers] == list(labels)
    right = sum(answer["classes"][0]["label"] == labels[answer["image"]] for answer in answers)
    judged = json.loads(vitscale("evaluate", trained).out)
    assert right / len(labels) == judged["top1"] > 0.15
    classes = read_manifest(digits / "val").classes
    assert classes is not None
    for answer in answers:
        first, second = answer["classes"]
        assert first["name"] == classes[first["label"]]
        assert 1 >= first["probability"] >= second["probability"] >= 0


def test_predict_takes_files_folders_and_patterns_alike(trained: Path, images: Path, digits: Path) -> None:
    answers = {}
    for kind, word in (("folder", images), ("pattern", f"{images}/*")):
        outcome = vitscale("predict", trained, word)
        assert outcome.code == 0, outcome.errors
        answers[kind] = outcome.out
    assert answers["folder"] == answers["pattern"]
    lines = answers["folder"].splitlines()
    assert len(lines) == 6
    of_set = vitscale("predict", trained, digits / "val").out.splitlines()[:6]
    ours = {line.rpartition("/")[2].partition(".")[0]: line.partition(": ")[2] for line in lines}
    theirs = {line.partition(": ")[0].replace("/", "_"): line.partition(": ")[2] for line in of_set}
    assert ours == theirs


def test_predict_takes_a_part_of_a_part(trained: Path, digits: Path) -> None:
    outcome = vitscale("predict", trained, f"{digits}/val[:100][:3]", "--top", "99")
    assert outcome.code == 0, outcome.errors
    assert [line.count("%") for line in outcome.out.splitlines()] == [10] * 3


def test_unreadable_images_are_named_counted_and_bounded(trained: Path, images: Path, tmp_path: Path) -> None:
    bad = [tmp_path / f"bad{number}.png" for number in range(4)]
    for path in bad:
        path.write_bytes(b"no image")
    outcome = vitscale("predict", trained, *bad, images, "--json")
    assert outcome.code == 1
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [line["image"] for line in lines if "error" in line] == [str(path) for path in bad]
    assert sum("classes" in line for line in lines) == 6
    assert "4 unreadable" in outcome.errors
    assert "of 10 images" in outcome.errors
    bounded = vitscale("predict", trained, *bad, images, "--most-unreadable", "2", "--batch-size", "1")
    assert bounded.code == 1
    assert bounded.errors.count(": unreadable: ") == 3
    assert "more than 2" in bounded.errors
    assert bounded.out == ""


def test_names_of_classes_may_be_given(trained: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"number {n}" for n in range(10)) + "\n")
    outcome = vitscale("predict", trained, images, "--classes", tmp_path / "names.txt", "--top", "1")
    assert outcome.code == 0, outcome.errors
    assert outcome.out.count(": number ") == 6
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    outcome = vitscale("predict", trained, images, "--classes", tmp_path / "names.txt")
    assert outcome.code == 1
    assert "has 2 lines, but the model tells 10 classes" in outcome.errors


def test_mistakes_have_one_clear_error(trained: Path, images: Path, tmp_path: Path) -> None:
    for arguments, told in (
        (("predict", trained, images / "missing.png"), "names no image"),
        (("inspect", trained, images, "--out", trained / "config.yaml" / "below"), "cannot be made"),
        (("inspect", trained / "metrics.jsonl", images), "metrics.jsonl"),
        (("predict", trained, images, "--image-size", "big"), "--image-size"),
        (("inspect", trained, images, "--set", "model.depth=3"), "model.depth"),
    ):
        outcome = vitscale(*arguments)
        assert outcome.code in (1, 2), arguments
        assert told in outcome.errors, outcome.errors
        assert "Traceback" not in outcome.errors
    for command, operand in (("inspect", images), ("predict", images), ("export", tmp_path / "m.pt2")):
        outcome = vitscale_on_ranks(2, command, trained, operand)
        assert outcome.code == 1
        assert outcome.errors.count("runs in one process, but 2 ranks were started") == 1


def write_weights(path: Path, hw: tuple[int, int], **fields: Any) -> Path:
    config = ModelConfig(**{"num_classes": 3, **fields})
    model = build_model(config, hw)
    initialize(model, 0)
    save_weights(path, model.state_dict(), WeightFormat.SAFETENSORS, config, hw, classes=None)
    return path


def test_files_of_weights_are_taken_like_runs(images: Path, tmp_path: Path) -> None:
    file = write_weights(tmp_path / "vit.safetensors", (8, 12), variant="ViT-mu/4", position="relative", pool="gap")
    outcome = vitscale("inspect", file, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.errors
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["filters.npz", "filters.png"]
    assert "left out: similarity of position embeddings: with model.position relative" in outcome.errors
    assert "left out: attention distance and rollout: there are no images" in outcome.errors
    outcome = vitscale("inspect", file, images, "--out", tmp_path / "more", "--overlays", "0")
    assert outcome.code == 0, outcome.errors
    assert arrays(tmp_path / "more", "attention_distance")["distance_px"].shape == (1, 2)
    assert not (tmp_path / "more" / "rollout.png").exists()
    outcome = vitscale("inspect", file, images)
    assert outcome.code == 2
    assert "name one with --out" in outcome.errors
    outcome = vitscale("predict", file, images, "--top", "9")
    assert outcome.code == 0, outcome.errors
    # The head of a new model is zero, so all classes are alike.
    assert outcome.out.count("class 0 33.3%") == 6


def test_models_that_have_nothing_to_tell_are_refused(images: Path, tmp_path: Path) -> None:
    network = write_weights(tmp_path / "net.safetensors", (32, 32), variant="EfficientNet-nano")
    outcome = vitscale("inspect", network, images, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "EfficientNet-nano has no patches, positions or attention to look at" in outcome.errors
    masked = {"variant": "ViT-mu/4", "head": "masked_patches", "num_classes": 512}
    outcome = vitscale("predict", write_weights(tmp_path / "masked.safetensors", (8, 8), **masked), images)
    assert outcome.code == 2
    assert "tells no classes" in outcome.errors


def test_probabilities_are_those_of_the_loss(trained: Path, images: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    assert "kind: softmax" in text
    (run / "config.yaml").write_text(text.replace("kind: softmax", "kind: sigmoid"))
    totals = {}
    for name, arguments in {
        "softmax": (trained,),
        "sigmoid": (run,),
        "asked": (run, "--probabilities", "softmax"),
    }.items():
        outcome = vitscale("predict", *arguments, images, "--top", "10", "--json")
        assert outcome.code == 0, outcome.errors
        answer = json.loads(outcome.out.splitlines()[0])
        totals[name] = sum(guess["probability"] for guess in answer["classes"])
    assert totals["softmax"] == totals["asked"] == pytest.approx(1)
    assert totals["sigmoid"] != pytest.approx(1, abs=0.01)
