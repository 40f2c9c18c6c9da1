from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.helpers.runs import CONFIG
from vitscale.config.loader import load_config
from vitscale.run_config import publish_config, with_absolute_paths

RELATIVE = [
    "run=out/run",
    "data.train={a/train: 0.5, 's3://bucket/b': 0.5}",
    "data.eval='a/val[:50%]'",
    "data.storage.cache=cache",
    "checkpoint.folder=saved",
    "init.path=other/run",
    "evaluation.evaluators.top={kind: accuracy, data: a/real}",
    "evaluation.evaluators.near={kind: knn, train: 'a/train[:10]', test: https://host/set}",
]


def test_every_location_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths(load_config(CONFIG, RELATIVE))
    assert found.run == tmp_path / "out/run"
    assert found.data.train == {f"{tmp_path}/a/train": 0.5, "s3://bucket/b": 0.5}
    assert found.data.eval == f"{tmp_path}/a/val[:50%]"
    assert found.data.storage.cache == tmp_path / "cache"
    assert found.checkpoint.folder == f"{tmp_path}/saved"
    assert found.init.path == tmp_path / "other/run"
    top, near = (found.evaluation.evaluators[name] for name in ("top", "near"))
    assert vars(top)["data"] == f"{tmp_path}/a/real"
    assert (vars(near)["train"], vars(near)["test"]) == (f"{tmp_path}/a/train[:10]", "https://host/set")
    # Seen from elsewhere, it does not change any more.
    monkeypatch.chdir("/")
    assert with_absolute_paths(found) == found


def test_a_published_configuration_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = with_absolute_paths(load_config(CONFIG, RELATIVE))
    publish_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == config
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) & stat.S_IRGRP


def test_passwords_are_the_owners(tmp_path: Path) -> None:
    publish_config(tmp_path / "config.yaml", load_config(CONFIG, ["data.train=https://me:secret@host/set"]))
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600
