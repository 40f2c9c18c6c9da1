"""An engine's training state into and out of a checkpoint store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitscale import __version__
from vitscale.checkpoint.fragments import (
    optimizer_steps,
    parameter_shapes,
    push_masters,
    read_fragments,
    write_fragments,
)
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import Checkpoint, CheckpointStore
from vitscale.errors import CheckpointError


def commit_state(
    store: CheckpointStore, engine: Any, state: TrainState, *, data_digest: str, classes: Sequence[str] | None
) -> None:
    """Commit the engine and ``state`` as the checkpoint of ``state.step``. Collective.

    Args:
        store: where to.
        engine: the DeepSpeed engine, between two steps.
        state: the integers that go with it.
        data_digest: identity of the training data, compared by :func:`restore_state`.
        classes: names of the head's outputs, for whoever evaluates the checkpoint.

    Raises:
        CheckpointError: some rank could not write.
    """
    content = {
        "step": state.step,
        "state": state.to_json(),
        "optimizer_steps": optimizer_steps(engine),
        "parameters": parameter_shapes(engine),
        "data_digest": data_digest,
        "classes": None if classes is None else list(classes),
        "world_size": engine.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "vitscale_version": __version__,
        "created_unix_s": int(time.time()),
    }
    store.commit(content, lambda path: write_fragments(engine, path))


def restore_state(store: CheckpointStore, engine: Any, *, data_digest: str) -> TrainState | None:
    """Load the newest complete checkpoint into a fresh engine, or give ``None`` if there is none. Collective.

    Raises:
        CheckpointError: the checkpoint is of another model or of other training data, or cannot be read.
    """
    checkpoint = store.newest()
    if checkpoint is None:
        return None

    def read(files: list[Path]) -> None:
        _check_fits(checkpoint, parameter_shapes(engine), data_digest)
        read_fragments(engine, files, steps=int(checkpoint.content["optimizer_steps"]))

    store.read(checkpoint, read)
    push_masters(engine)
    return TrainState.from_json(checkpoint.content["state"])


def _check_fits(checkpoint: Checkpoint, shapes: dict[str, list[int]], data_digest: str) -> None:
    saved: dict[str, list[int]] = checkpoint.content["parameters"]
    different = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
    if different:
        shown = "; ".join(
            f"{n}: saved {saved.get(n, 'absent')}, model {shapes.get(n, 'absent')}" for n in different[:5]
        )
        raise CheckpointError(
            f"{checkpoint.path}: {len(different)} parameters do not fit the model ({shown}); "
            f"use the model's configuration of that run, or another run folder"
        )
    if checkpoint.content["data_digest"] != data_digest:
        raise CheckpointError(
            f"{checkpoint.path}: was trained on other data: another content of the shards, or other shares of a "
            f"mixture (data.train); the order of samples would change in the middle of the run: bring back the shards "
            f"and the shares, or start another run folder"
        )
