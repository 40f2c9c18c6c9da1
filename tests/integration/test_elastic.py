"""A run on a mixture with bad samples goes on with other numbers of ranks and gives the same global batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import overrides, trajectory
from tests.helpers.shardset import overwrite
from tests.helpers.stopping import train_and_stop
from vitscale.data.manifest import read_manifest


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits with unreadable images in both sets."""
    folder = shutil.copytree(digits, tmp_path / "digits")
    for name in ("train", "val"):
        manifest = read_manifest(folder / name)
        for number in range(0, manifest.num_samples, 9):
            overwrite(manifest, number, "png", b"no image at all")
    return folder


def test_mixtures_with_bad_samples_go_on_with_any_number_of_ranks(spoilt: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        sets = f"{{{spoilt / 'train'}: 0.6, {spoilt / 'val'}: 0.4}}"
        return overrides(
            spoilt,
            tmp_path / name,
            "global_batch_size=48",
            "micro_batch_size=4",
            "duration={steps: 24}",  # more than one epoch of the smaller set
            "data.max_bad_share=0.5",
            "model.dropout=0",
            "model.stochastic_depth=0",
            f"data.train={sets}",
        )

    run_ranks(train_and_stop, 2, arguments("whole"), None)
    for world_size, stop_at, processes in ((2, 5, 1), (3, 11, 0), (1, 14, 2), (4, None, 0)):
        more = [f"data.workers={1 + world_size}", f"data.processes={processes}"]
        run_ranks(train_and_stop, world_size, [*arguments("parts"), *more], stop_at)
    whole, parts = trajectory(tmp_path / "whole"), trajectory(tmp_path / "parts")
    assert len(whole) == 24
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2:] == pytest.approx(theirs[2:], rel=2e-4)
    assert quarantined(tmp_path / "parts") == quarantined(tmp_path / "whole") != []


def quarantined(run: Path) -> list[dict[str, object]]:
    """Records of bad samples without the number of the attempt."""
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "attempt"} for record in records]
