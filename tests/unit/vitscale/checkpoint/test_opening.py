"""Where a configuration puts the checkpoints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.objects import ObjectFolder
from vitscale.checkpoint.opening import checkpoint_folder
from vitscale.config.schema import CheckpointConfig
from vitscale.errors import ConfigError, DataError


def test_the_configuration_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(folder: str | None) -> tuple[type, str]:
        chosen = checkpoint_folder(tmp_path / "run", CheckpointConfig(folder=folder))
        return type(chosen), chosen.location

    monkeypatch.chdir(tmp_path)
    assert opened(None) == (LocalFolder, f"{tmp_path}/run/checkpoints")
    assert opened("there/it") == (LocalFolder, f"{tmp_path}/there/it")
    assert opened("/there/it") == opened("file:///there/it") == (LocalFolder, "/there/it")
    assert opened("s3://bucket/it/") == (ObjectFolder, "s3://bucket/it")
    assert opened("s3a://bucket/it") == (ObjectFolder, "s3a://bucket/it")


@pytest.mark.parametrize("folder", ["", "https://host/it", "pipe:cat", "s3:/bucket/it", "ftp://host/it"])
def test_other_places_are_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.folder: .* cannot hold checkpoints; give a folder that all"):
        checkpoint_folder(tmp_path, CheckpointConfig(folder=folder))


@pytest.mark.parametrize("folder", ["s3://", "s3:///it", "gs://"])
def test_a_url_needs_a_bucket(tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match="names no bucket"):
        checkpoint_folder(tmp_path, CheckpointConfig(folder=folder))


@pytest.mark.parametrize("folder", ["s3://me:hunter2@bucket/it", "s3://bucket/it?sig=hunter2", "ftp://me:hunter2@host"])
def test_credentials_in_a_url_are_refused_and_not_shown(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError) as raised:
        checkpoint_folder(tmp_path, CheckpointConfig(folder=folder))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # Where fsspec keeps the drivers that it has imported.
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    with pytest.raises(DataError, match=f"the package {package} is missing; run: pip install {package}"):
        checkpoint_folder(tmp_path, CheckpointConfig(folder=f"{scheme}://bucket/it"))
