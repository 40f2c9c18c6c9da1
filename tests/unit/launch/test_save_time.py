"""The measured time of a save, and what is refused because of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import FileRecord, manifest_text, rank_file
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.errors import LaunchError
from vitscale_launch.preflight import check_signal_delay
from vitscale_launch.save_time import step_and_save_s
from vitscale_launch.site import Site


@pytest.fixture
def loaded(config: Path) -> TrainConfig:
    return load_config(config)


def _save(run: Path, step: int, *, begun: float, seconds: float) -> None:
    name = f"step-{step:09}"
    folder = LocalFolder(run / "checkpoints")
    (folder.path / name).mkdir(parents=True)
    content = {"step": step, "created_unix_s": begun}
    path = folder.path / name / "manifest.json"
    (path.parent / rank_file(0)).write_bytes(b"x")
    path.write_bytes(manifest_text(content, [FileRecord(rank_file(0), 1, (0,))]))
    os.utime(path, (begun + seconds, begun + seconds))


def _record(run: Path, *, unix_s: float, images_per_s: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "loss": 1.0, "images_per_s": images_per_s, "unix_s": unix_s}) + "\n")


def test_a_new_run_has_measured_nothing(loaded: TrainConfig) -> None:
    assert step_and_save_s(loaded) is None
    assert check_signal_delay(loaded, Site(signal_delay_s=1)) == [
        ("signal", "1 s before the time limit; no save was measured yet")
    ]


def test_the_slowest_save_and_the_newest_step_count(loaded: TrainConfig) -> None:
    _save(loaded.run, 10, begun=1000, seconds=40)
    _save(loaded.run, 20, begun=2000, seconds=30)
    for unix_s, rate in ((1500, 1.0), (3000, 12.0)):
        _record(loaded.run, unix_s=unix_s, images_per_s=rate)
    # 24 images of a step at 12 a second.
    assert step_and_save_s(loaded) == pytest.approx(40 + 2)
    assert check_signal_delay(loaded, Site(signal_delay_s=42))[0][0] == "signal"
    with pytest.raises(LaunchError, match=r"signal_delay_s: 41 s .* took 42 s in this run; .*--set signal_delay_s=84"):
        check_signal_delay(loaded, Site(signal_delay_s=41))


def test_a_copied_folder_tells_nothing(loaded: TrainConfig) -> None:
    _save(loaded.run, 10, begun=1000, seconds=86_400)
    _record(loaded.run, unix_s=1500, images_per_s=24.0)
    assert step_and_save_s(loaded) is None


def test_what_cannot_be_read_is_left_out(loaded: TrainConfig) -> None:
    _save(loaded.run, 10, begun=1000, seconds=5)
    _save(loaded.run, 20, begun=1100, seconds=50)
    (loaded.run / "checkpoints" / "step-000000020" / "manifest.json").write_text("{")
    (loaded.run / "checkpoints" / "step-000000030").mkdir()
    _record(loaded.run, unix_s=1500, images_per_s=24.0)
    with (loaded.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "unix_s": 9')
    assert step_and_save_s(loaded) == pytest.approx(5 + 1)


def test_checkpoints_in_another_folder(loaded: TrainConfig, tmp_path: Path) -> None:
    elsewhere = load_config(tmp_path / "config.yaml", [f"checkpoint.folder={tmp_path / 'elsewhere' / 'checkpoints'}"])
    _save(tmp_path / "elsewhere", 10, begun=1000, seconds=7)
    _record(loaded.run, unix_s=1500, images_per_s=24.0)
    assert step_and_save_s(elsewhere) == pytest.approx(7 + 1)


def test_checkpoints_in_a_bucket_are_not_asked(loaded: TrainConfig, tmp_path: Path) -> None:
    remote = load_config(tmp_path / "config.yaml", ["checkpoint.folder=s3://bucket/run"])
    _record(loaded.run, unix_s=1500, images_per_s=24.0)
    assert step_and_save_s(remote) is None
