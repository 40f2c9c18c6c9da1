"""A state of two parameters on any number of ranks, so small that tests know every byte of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import MASTER, Checkpoint, FileRecord, Layout, manifest_text, rank_file, step_name
from vitscale.checkpoint.fragments import Fragment
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.snapshot import Snapshot
from vitscale.checkpoint.store import CheckpointStore
from vitscale.distributed import Ranks

SHAPES = {"w": [30, 20], "b": [37]}
RANK_0, RANK_1 = rank_file(0), rank_file(1)


def numel_of(name: str) -> int:
    return torch.Size(SHAPES[name]).numel()


def values_of(step: int, name: str, kind: str = MASTER) -> Tensor:
    """Whole tensor after a step, flattened."""
    generator = torch.Generator().manual_seed(sum(f"{step} {name} {kind}".encode()) + 1000 * step)
    return torch.randn(numel_of(name), generator=generator)


def layouts_on(world_size: int) -> dict[str, Layout]:
    """One parameter after the other, in equal parts."""
    size = -(-sum(map(numel_of, SHAPES)) // world_size)
    return {"w": Layout(0, size), "b": Layout(numel_of("w"), size)}


def content_of(step: int, layouts: Mapping[str, Layout], shapes: Mapping[str, list[int]] = SHAPES) -> dict[str, Any]:
    """What goes into the manifest."""
    entries = {name: {"shape": shapes[name], **layout._asdict()} for name, layout in layouts.items()}
    return {"step": step, "note": "kept", "parameters": entries}


def owned(whole: Mapping[tuple[str, str], Tensor], layouts: Mapping[str, Layout], rank: int) -> list[Fragment]:
    """What a rank owns of flattened tensors that are named by parameter and kind."""
    found = []
    for (name, kind), values in whole.items():
        mine = [e for e in range(values.numel()) if (layouts[name].offset + e) // layouts[name].size == rank]
        if mine:
            found.append(Fragment(name, kind, mine[0], values[mine[0] : mine[-1] + 1]))
    return found


def snapshot_of(step: int, rank: int = 0, world_size: int = 1) -> Snapshot:
    whole = {(name, MASTER): values_of(step, name) for name in SHAPES}
    snapshot = Snapshot(pin_memory=False)
    snapshot.take(owned(whole, layouts_on(world_size), rank))
    return snapshot


def file_of(step: int, rank: int = 0, world_size: int = 1) -> bytes:
    """All of a rank's file."""
    return b"".join(snapshot_of(step, rank, world_size).blocks([]))


SIZE = len(file_of(0))


def store_in(folder: Path | LocalFolder, ranks: Ranks, retention: Retention) -> CheckpointStore:
    return CheckpointStore(LocalFolder(folder) if isinstance(folder, Path) else folder, ranks, retention)


def begin(store: CheckpointStore, step: int, ranks: Ranks, *, scores: Mapping[int, float] | None = None) -> None:
    """Start to save the state after a step."""
    world_size = ranks.world_size
    snapshot = snapshot_of(step, ranks.topology.rank, world_size)
    store.begin(content_of(step, layouts_on(world_size)), snapshot, scores or {})


def save(store: CheckpointStore, ranks: Ranks, *steps: int, scores: Mapping[int, float] | None = None) -> None:
    """Save the states after some steps, one after the other."""
    for step in steps:
        begin(store, step, ranks, scores=scores)
        assert store.wait() in (step_name(step), None)


def write_checkpoint(
    folder: LocalFolder, step: int, whole: Mapping[tuple[str, str], Tensor], layouts: Mapping[str, Layout]
) -> None:
    """Publish a checkpoint of flattened tensors, as all its ranks together would."""
    folder.stage(step_name(step))
    records = []
    for rank in range(1 + max(_last_rank(whole, layouts))):
        snapshot, checksums = Snapshot(pin_memory=False), list[int]()
        snapshot.take(owned(whole, layouts, rank))
        folder.write(step_name(step), rank_file(rank), snapshot.blocks(checksums))
        records.append(FileRecord(rank_file(rank), snapshot.num_bytes, tuple(checksums)))
    shapes = {name: [values.numel()] for (name, _), values in whole.items()}
    folder.publish(step_name(step), manifest_text(content_of(step, layouts, shapes), records))


def _last_rank(whole: Mapping[tuple[str, str], Tensor], layouts: Mapping[str, Layout]) -> Iterator[int]:
    for (name, _), values in whole.items():
        yield (layouts[name].offset + values.numel() - 1) // layouts[name].size


def restored(store: CheckpointStore) -> int | None:
    """Restore, and check that what was read is the state after that step."""
    read: dict[str, Tensor] = {}

    def load(checkpoint: Checkpoint) -> None:
        read.update(read_parameters(checkpoint))

    checkpoint = store.restore(load)
    if checkpoint is None:
        return None
    assert is_state_of(checkpoint.step, read)
    return checkpoint.step


def is_state_of(step: int, state: Mapping[str, Tensor]) -> bool:
    return state.keys() == SHAPES.keys() and all(
        torch.equal(values.flatten(), values_of(step, name)) for name, values in state.items()
    )


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().removesuffix("\n")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def blocks_of(num_bytes: int) -> Iterator[None]:
    """Let the blocks with a checksum be small."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("format", "snapshot", "reading"):
            patch.setattr(f"vitscale.checkpoint.{module}.BLOCK_BYTES", num_bytes)
        yield
