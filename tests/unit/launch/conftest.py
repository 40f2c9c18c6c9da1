"""A small shard set and a run on it, for everything that happens before a run is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vitscale_shards.cli import app as shards_app


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    for i in range(60):
        path = images / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
    split = ["--split", "train=0.8,val=0.2", "--samples-per-shard", "16"]
    CliRunner().invoke(shards_app, ["write", str(images), str(tmp_path / "shards"), *split], catch_exceptions=False)
    return tmp_path / "shards"


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {tmp_path / 'runs' / 'first'}\n"
        "duration: {epochs: 10}\n"
        "global_batch_size: 24\n"
        "micro_batch_size: 2\n"
        f"data: {{train: {shards / 'train'}, eval: {shards / 'val'}, image_size: 8}}\n"
        "model: {variant: ViT-Ti/4, num_classes: 3}\n"
        "optim: {lr: 1.0e-3}\n"
        "schedule: {warmup: {percent: 10}}\n"
    )
    return path
