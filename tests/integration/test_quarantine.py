"""A bad image of a real run: recorded and replaced, and past the budget one error that ends all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.command import train
from tests.helpers.runs import metrics, overrides
from vitscale.data.manifest import read_idx, read_manifest


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    """A copy of the digits whose first shard has unreadable images, and the keys of these."""
    folder = shutil.copytree(digits, tmp_path / "digits")
    shard = read_manifest(folder / "train").shards[0]
    images = [m for sample in read_idx(folder / "train" / shard.idx_name)[::8] for m in sample if m.extension == "png"]
    with (folder / "train" / shard.name).open("r+b") as tar:
        for image in images:
            tar.seek(image.offset)
            tar.write(b"\0" * image.size)
    return folder, {image.name.removesuffix(".png") for image in images}


def test_bad_images_are_recorded_and_replaced_until_the_budget_is_spent(
    spoilt: tuple[Path, set[str]], tmp_path: Path
) -> None:
    folder, bad = spoilt
    run = tmp_path / "run"
    # Past one epoch of 1,427 images, so that each bad one is met.
    arguments = overrides(folder, run, "global_batch_size=128", "micro_batch_size=64", "data.max_bad_share=0.1")
    train(arguments)
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {record["key"] for record in records} == bad
    assert all("cannot decode the image" in record["reason"] for record in records)
    assert not bad & {record["substitute"] for record in records}
    assert metrics(run)[-1]["quarantined"] == len(records)

    strict = overrides(folder, tmp_path / "strict", "global_batch_size=128", "micro_batch_size=64")
    errors = train([*strict, "data.max_bad_samples=3", "data.max_bad_share=0.1"], expect=1)
    assert errors.count("vitscale: error:") == 1
    assert "data.max_bad_samples and data.max_bad_share allow 3" in errors
    assert "Traceback" not in errors
