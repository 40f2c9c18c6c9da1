"""Features on disk: found again by what they depend on, and never taken for those of something else."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitscale.checkpoint.choices import Weights
from vitscale.config.schema import DataConfig, ModelConfig, StorageConfig
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.errors import DataError
from vitscale.evaluation.feature_cache import (
    _NOT_SEEN,
    Identity,
    identity_of,
    load_features,
    preprocessing_text,
    save_features,
)
from vitscale.evaluation.features import Features
from vitscale.evaluation.pretrained import Pretrained
from vitscale.models.build import build_model

IDENTITY = Identity(weights="a", model="b", preprocessing="c", data="d")
MANIFEST = Manifest("/set", (ShardInfo("x.tar", 3, 99, "e" * 64),))
CONFIG = ModelConfig(variant="ViT-mu/4", num_classes=3)


def features(seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    return Features(rng.normal(size=(5, 4)).astype(np.float32), np.arange(5), ("x.tar: k (broken)",))


def pretrained(**keys: Any) -> Pretrained:
    with torch.device("meta"):
        model = build_model(CONFIG, (8, 8))
    known = Pretrained(
        model=model,
        config=CONFIG,
        image_hw=(8, 8),
        data=DataConfig(train="t", image_size=8),
        digest="0123",
        name="run",
        step=1,
        weights=Weights.RAW,
        classes=None,
    )
    return dataclasses.replace(known, **keys)


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    assert load_features(tmp_path / "new", IDENTITY) is None
    save_features(tmp_path / "new", IDENTITY, features())
    found = load_features(tmp_path / "new", IDENTITY)
    assert found is not None
    np.testing.assert_array_equal(found.values, features().values)
    np.testing.assert_array_equal(found.labels, features().labels)
    assert (found.values.dtype, found.labels.dtype, found.unreadable) == (np.float32, np.int64, features().unreadable)


@pytest.mark.parametrize("part", ["weights", "model", "preprocessing", "data"])
def test_those_of_something_else_are_not_found_and_refused_under_a_false_name(tmp_path: Path, part: str) -> None:
    other = dataclasses.replace(IDENTITY, **{part: "other"})
    save_features(tmp_path, other, features())
    assert load_features(tmp_path, IDENTITY) is None
    (tmp_path / other.file_name).rename(tmp_path / IDENTITY.file_name)
    names = {"weights": "checkpoint", "data": "shard set"}
    with pytest.raises(DataError, match=rf"holds the features of another {names.get(part, part)} \(other\), under the"):
        load_features(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": "4567"},
        {"image_hw": (8, 12)},
        {"config": dataclasses.replace(CONFIG, gelu="erf")},
        {"data": DataConfig(train="t", image_size=8, eval_crop_share=1.0)},
        {"data": DataConfig(train="t", image_size=8, eval_resize="square")},
        {"data": DataConfig(train="t", image_size=8, max_image_pixels=1000)},
    ],
)
def test_another_model_or_crop_is_something_else(changed: dict[str, Any]) -> None:
    assert identity_of(pretrained(**changed), MANIFEST).file_name != identity_of(pretrained(), MANIFEST).file_name


def test_other_sets_are_something_else_and_the_place_counts_where_the_content_is_not_known() -> None:
    of = identity_of(pretrained(), MANIFEST)
    other = dataclasses.replace(MANIFEST, shards=(ShardInfo("x.tar", 3, 99, "f" * 64),))
    assert identity_of(pretrained(), other) != of
    assert identity_of(pretrained(), dataclasses.replace(MANIFEST, location="/moved")) == of
    unknown = dataclasses.replace(MANIFEST, shards=(ShardInfo("x.tar", 3, 99),))
    moved = dataclasses.replace(unknown, location="/moved")
    assert identity_of(pretrained(), unknown) != identity_of(pretrained(), moved)


def test_how_bytes_arrive_and_what_training_does_changes_nothing() -> None:
    plain = DataConfig(train="t", image_size=8)
    changed = DataConfig(
        train="u",
        eval="v",
        image_size=8,
        flip=False,
        crop_area=(0.5, 1.0),
        workers=7,
        prefetch_batches=1,
        storage=StorageConfig(connections=3, cache=Path("/c")),
        max_bad_samples=1,
    )
    assert preprocessing_text(changed) == preprocessing_text(plain)
    # Every key is known, so that a new one of training does not go unnoticed here.
    seen = {part.partition(":")[0] for part in preprocessing_text(plain).split(" ") if part.endswith(":")}
    assert seen | _NOT_SEEN == {field.name for field in dataclasses.fields(DataConfig)}
    assert seen == {"image_size", "eval_resize", "eval_crop_share", "max_image_pixels"}


@pytest.mark.parametrize("damage", ["byte", "cut", "junk", "empty"])
def test_damaged_features_are_told_and_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_features(tmp_path, IDENTITY, features())
    path = tmp_path / IDENTITY.file_name
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[-1] ^= 1
    new = {"byte": bytes(content), "cut": bytes(content[:-9]), "junk": b"junk", "empty": b""}[damage]
    path.write_bytes(new)
    with caplog.at_level(logging.WARNING):
        assert load_features(tmp_path, IDENTITY) is None
    assert f"{path}: damaged features" in caplog.text
    save_features(tmp_path, IDENTITY, features())
    assert load_features(tmp_path, IDENTITY) is not None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        save_features(tmp_path / "file" / "features", IDENTITY, features())
    assert "features are not kept: Not a directory" in caplog.text


def test_copies_of_a_folder_are_as_good(tmp_path: Path) -> None:
    save_features(tmp_path / "a", IDENTITY, features())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_features(tmp_path / "b", IDENTITY) is not None
