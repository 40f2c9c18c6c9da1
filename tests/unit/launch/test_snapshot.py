"""What a queued run will read: the packages and the configuration, as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitscale.config.loader import load_config
from vitscale.errors import LaunchError
from vitscale.run_config import with_absolute_paths
from vitscale_launch.snapshot import PACKAGES, freeze_config, snapshot_code


def test_the_copy_is_imported_instead_of_the_original(tmp_path: Path) -> None:
    code = tmp_path / "code"
    snapshot_code(code)
    show = f"import {', '.join(PACKAGES)}\nfor m in ({', '.join(PACKAGES)}): print(m.__file__)"
    # From a checkout, which would come first.
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    told = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(code / package / "__init__.py") for package in PACKAGES]
    assert not list(code.rglob("__pycache__/*.py"))


def test_a_second_copy_replaces_the_first_as_a_whole(tmp_path: Path) -> None:
    code = tmp_path / "code"
    snapshot_code(code)
    (code / "vitscale" / "removed.py").touch()
    (tmp_path / ".code.fresh").mkdir()
    (tmp_path / ".code.fresh" / "left_by_a_killed_submission").touch()
    snapshot_code(code)
    assert not (code / "vitscale" / "removed.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
    assert sorted(path.name for path in code.iterdir()) == sorted(PACKAGES)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"file/code: the code cannot be copied here: .*Not a directory"):
        snapshot_code(tmp_path / "file" / "code")


def test_the_frozen_configuration_means_the_same_from_anywhere(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["run=some/run", "data.train=shards/train", "checkpoint.folder=some/where", "data.storage.cache=cache"]
    frozen = with_absolute_paths(load_config(config, changes))
    freeze_config(frozen, tmp_path / "frozen.yaml")
    monkeypatch.chdir("/")
    loaded = load_config(tmp_path / "frozen.yaml")
    assert loaded == frozen
    assert loaded.run == tmp_path / "some" / "run"
    assert loaded.data.train == str(tmp_path / "shards" / "train")
    assert loaded.checkpoint.folder == str(tmp_path / "some" / "where")
    assert loaded.data.storage.cache == tmp_path / "cache"


def test_mixtures_and_urls_keep_their_meaning(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["data.train={shards/train: 1, 's3://bucket/set': 2}", "data.eval=null"]
    frozen = with_absolute_paths(load_config(config, changes))
    assert frozen.data.train == {str(tmp_path / "shards" / "train"): 1, "s3://bucket/set": 2}
    assert frozen.data.eval is None


def test_secrets_are_for_the_user_only(config: Path, tmp_path: Path) -> None:
    secret = with_absolute_paths(load_config(config, ["data.eval=https://user:secret@host/set"]))
    freeze_config(secret, tmp_path / "secret.yaml")
    assert (tmp_path / "secret.yaml").stat().st_mode & 0o077 == 0
