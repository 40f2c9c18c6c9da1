"""Run folders of a Vision Transformer with real checkpoints, as a training would leave them, but for the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.runs import CONFIG, TINY
from vitscale.checkpoint.folder import CheckpointFolder, LocalFolder
from vitscale.checkpoint.format import AVERAGE, MASTER, MOMENTS, FileRecord, Layout, manifest_text, rank_file, step_name
from vitscale.checkpoint.fragments import Fragment
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.snapshot import Snapshot
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config.loader import load_config
from vitscale.config.reference import dump_config
from vitscale.config.schema import TrainConfig
from vitscale.distributed import Ranks
from vitscale.models.vit import build_vit

CLASSES = [f"digit {number}" for number in range(10)]
IMAGES = 400
BATCH = 16


def make_run(run: Path, *overrides: str) -> TrainConfig:
    """A run folder without checkpoints."""
    config = load_config(CONFIG, [*TINY, f"run={run}", *overrides])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    (run / "plan.json").write_text(json.dumps({"num_samples": IMAGES}))
    return config


def shapes_of(config: TrainConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = build_vit(config.model, config.data.image_hw)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def state_of(config: TrainConfig, step: int, kind: str = MASTER) -> dict[str, Tensor]:
    """Whole parameters, or moments, after a step: no two numbers are alike, and none is zero."""
    generator = torch.Generator().manual_seed(step * 100 + sum(kind.encode()))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(config).items()}


def save_vit(
    config: TrainConfig, ranks: Ranks, *steps: int, averaged: bool = False, classes: Sequence[str] | None = CLASSES
) -> LocalFolder:
    """Save checkpoints into the run folder."""
    folder = LocalFolder(config.run / "checkpoints")
    save_into(folder, config, ranks, *steps, averaged=averaged, classes=classes)
    return folder


def save_into(
    folder: CheckpointFolder,
    config: TrainConfig,
    ranks: Ranks,
    *steps: int,
    averaged: bool = False,
    classes: Sequence[str] | None = CLASSES,
) -> None:
    """Save checkpoints through the store."""
    store = CheckpointStore(folder, ranks, Retention(last=100))
    numel = sum(torch.Size(shape).numel() for shape in shapes_of(config).values())
    for step in steps:
        snapshot = Snapshot(pin_memory=False)
        snapshot.take(_fragments(config, step, _layouts(config, numel), 0, averaged=averaged))
        store.begin(_content(config, step, _layouts(config, numel), 1, classes), snapshot, {})
        assert store.wait() == step_name(step)


def publish_vit(config: TrainConfig, step: int, *, part: int, world_size: int) -> LocalFolder:
    """Publish what so many ranks would, each of which owns ``part`` elements of all parameters in a row."""
    folder, layouts = LocalFolder(config.run / "checkpoints"), _layouts(config, part)
    folder.stage(step_name(step))
    records, digests = [], dict[str, int]()
    for rank in range(world_size):
        snapshot, checksums = Snapshot(pin_memory=False), list[int]()
        snapshot.take(_fragments(config, step, layouts, rank, averaged=False))
        folder.write(step_name(step), rank_file(rank), snapshot.blocks(checksums))
        records.append(FileRecord(rank_file(rank), snapshot.num_bytes, tuple(checksums)))
        for kind, digest in snapshot.digests().items():
            digests[kind] = (digests.get(kind, 0) + digest) % 2**64
    content = _content(config, step, layouts, world_size, None)
    content["digests"] = {kind: f"{digest:016x}" for kind, digest in digests.items()}
    folder.publish(step_name(step), manifest_text(content, records))
    return folder


def change_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _layouts(config: TrainConfig, part: int) -> dict[str, Layout]:
    layouts, offset = {}, 0
    for name, shape in shapes_of(config).items():
        layouts[name] = Layout(offset, part)
        offset += torch.Size(shape).numel()
    return layouts


def _fragments(
    config: TrainConfig, step: int, layouts: Mapping[str, Layout], rank: int, *, averaged: bool
) -> list[Fragment]:
    states = {kind: state_of(config, step, kind) for kind in (MASTER, *MOMENTS, *([AVERAGE] if averaged else []))}
    found = []
    for name, (offset, size) in layouts.items():
        for kind, state in states.items():
            values = state[name].flatten()
            low, high = max(0, rank * size - offset), min(len(values), (rank + 1) * size - offset)
            if low < high:
                found.append(Fragment(name, kind, low, values[low:high]))
    return found


def _content(
    config: TrainConfig, step: int, layouts: Mapping[str, Layout], world_size: int, classes: Sequence[str] | None
) -> dict[str, object]:
    parameters = {n: {"shape": shape, **layouts[n]._asdict()} for n, shape in shapes_of(config).items()}
    return {
        "step": step,
        "state": TrainState(step=step, examples_seen=BATCH * step).to_json(),
        "optimizer_steps": step,
        "next_lr": 0.001,
        "parameters": parameters,
        "data_digest": "d" * 64,
        "classes": None if classes is None else list(classes),
        "world_size": world_size,
        "zero_stage": 2,
        "vitscale_version": "0.0",
        "created_unix_s": 1_700_000_000,
    }
