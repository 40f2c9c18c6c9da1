"""Where the data lies, as users write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import CONFIG
from vitscale.config.loader import load_config
from vitscale.config.reference import dump_config
from vitscale.config.schema import DataConfig
from vitscale.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/train", "data/train"),
        ("s3://bucket/set", "s3://bucket/set"),
        ("{s3://bucket/set: 3, /b/c: 0.5}", {"s3://bucket/set": 3.0, "/b/c": 0.5}),
        ("data/train[:98%]", "data/train[:98%]"),
        ("{'/b/train[:50%]': 3, \"/b/train[50%:]\": 1}", {"/b/train[:50%]": 3.0, "/b/train[50%:]": 1.0}),
        ("{'pipe:ssh store cat /a/{name}': 1}", {"pipe:ssh store cat /a/{name}": 1.0}),
    ],
)
def test_sets_and_mixtures_survive_the_run_folder(text: str, expected: object, tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"data.train={text}"])
    assert config.data.train == expected
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.train={}", "data.train"),
        ("data.train={a: 0}", "data.train"),
        ("data.train={a: .inf}", "data.train"),
        ("data.train=[a, b]", "data.train"),
        ("data.storage.cache_gb=0", "data.storage.cache_gb"),
        ("data.storage.total_timeout_s=600", "together must be below engine.timeout_s (600)"),
    ],
)
def test_wrong_places_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [override])
    assert text in str(caught.value)


def test_lanes_are_for_a_single_set() -> None:
    with pytest.raises(ConfigError, match=r"lanes \(8\) is for a single set; leave it out with a mixture"):
        load_config(CONFIG, ["data.train={a: 1, b: 1}", "data.lanes=8"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"crop": "square"},
            "crop square needs crop_from, the size in pixels to crop from: 448 for an image_size of 384",
        ),
        ({"crop": "short_side", "crop_from": 31}, r"crop_from \(31\) is below image_size \(32\)"),
        ({"crop": "square", "crop_from": (40, 31)}, r"crop_from \(\(40, 31\)\) is below image_size \(32\)"),
        ({"crop_from": 40}, r"crop_from \(40\) is for crop square and short_side; set crop, too"),
        (
            {"crop": "square", "crop_from": 40, "crop_area": (0.5, 1.0)},
            "crop_area and crop_aspect are for crop inception",
        ),
        (
            {"eval_resize": "square", "eval_crop_share": 0.5},
            r"eval_crop_share \(0.5\) has no effect with eval_resize sq",
        ),
    ],
)
def test_keys_about_crops_that_do_not_go_together(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DataConfig(train="train", image_size=32, **fields)


def test_crops_of_the_papers() -> None:
    config = load_config(CONFIG, ["data.crop_area=[0.05, 1]", "data.crop_aspect=[0.75, 1.33]", *BIT])
    assert (config.data.crop, config.data.crop_from, config.loss.mixup) == ("square", 160, 0.1)


BIT = ("data.crop=square", "data.crop_from=160", "data.image_size=128", "loss.mixup=0.1", "model.variant=ViT-mu/4")


def test_mixup_needs_pairs_and_classes() -> None:
    with pytest.raises(ConfigError, match=r"loss.mixup blends pairs of images, so micro_batch_size \(1\) must be even"):
        load_config(CONFIG, ["loss.mixup=0.1", "micro_batch_size=1"])
    with pytest.raises(ConfigError, match=r"mixup is for the losses on classes, got 0.1 with masked_patches"):
        load_config(CONFIG, ["loss.mixup=0.1", "loss.kind=masked_patches", "model.head=masked_patches"])
    with pytest.raises(ConfigError, match=r"loss\.mixup"):
        load_config(CONFIG, ["loss.mixup=-1"])
