"""A run's state through the store: what is refused, and that all ranks refuse it with one error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vitscale.checkpoint.engine_state as engine_state
from tests.helpers.distributed import run_ranks
from vitscale.checkpoint.engine_state import commit_state, restore_state
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore, open_checkpoint
from vitscale.distributed import connect
from vitscale.errors import CheckpointError
from vitscale.topology import Topology

STATE = TrainState(step=7, examples_seen=70, quarantined=2, skipped_steps=3, skipped_in_a_row=1)
SHAPES = {"head.weight": [10, 4], "head.bias": [10]}


def test_state_survives_json() -> None:
    assert TrainState.from_json(STATE.to_json()) == STATE


def test_state_counts_skipped_steps() -> None:
    skipped = STATE.advance(examples=10, quarantined=1, applied=False)
    assert skipped == TrainState(step=8, examples_seen=80, quarantined=3, skipped_steps=4, skipped_in_a_row=2)
    applied = skipped.advance(examples=10, quarantined=0, applied=True)
    assert applied == TrainState(step=9, examples_seen=90, quarantined=3, skipped_steps=4, skipped_in_a_row=0)


def _restore(topology: Topology, folder: Path) -> None:
    shapes, reads, pushes = dict(SHAPES), [], []

    def read(engine: Any, files: list[Path], *, steps: int) -> None:
        reads.append(([file.name for file in files], steps))
        if broken and topology.rank == 1:
            raise CheckpointError("rank 1 cannot read")

    # The engine's own side is tested with real ones.
    engine_state.parameter_shapes = lambda engine: shapes
    engine_state.optimizer_steps = lambda engine: 4
    engine_state.write_fragments = lambda engine, path: path.write_text("fragments")
    engine_state.read_fragments = read
    engine_state.push_masters = pushes.append
    engine: Any = SimpleNamespace(world_size=2, zero_optimization_stage=lambda: 2)
    broken = False

    with connect(topology, timeout_s=60) as ranks:
        store = CheckpointStore(folder, ranks, keep=2)
        assert restore_state(store, engine, data_digest="d") is None
        ranks.barrier()
        commit_state(store, engine, STATE, data_digest="d", classes=("cat", "dog"))
        assert restore_state(store, engine, data_digest="d") == STATE
        assert reads == [(["rank-00000.safetensors", "rank-00001.safetensors"], 4)]
        assert pushes == [engine]

        with pytest.raises(CheckpointError, match=r"was trained on other data: ") as raised:
            restore_state(store, engine, data_digest="e")
        assert raised.value.agreed
        # In a mixture, other weights alone make another digest.
        for part in (
            "content of the shards",
            "shares of a mixture (data.train)",
            "bring back the shards and the shares",
        ):
            assert part in str(raised.value)
        shapes |= {"head.bias": [11], "cls_token": [1, 1, 4]}
        del shapes["head.weight"]
        with pytest.raises(CheckpointError) as raised:
            restore_state(store, engine, data_digest="d")
        assert raised.value.agreed
        assert str(raised.value) == (
            f"{folder / 'step-000000007'}: 3 parameters do not fit the model (cls_token: saved absent, "
            f"model [1, 1, 4]; head.bias: saved [10], model [11]; head.weight: saved [10, 4], model absent); "
            f"use the model's configuration of that run, or another run folder"
        )
        shapes = dict(SHAPES)
        broken = True
        with pytest.raises(CheckpointError, match=r"^rank 1 cannot read$") as raised:
            restore_state(store, engine, data_digest="d")
        assert raised.value.agreed
        # No rank goes on to exchange weights with one that has none.
        assert len(pushes) == 1


def _commit(topology: Topology, folder: Path) -> None:
    engine_state.parameter_shapes = lambda engine: SHAPES
    engine_state.optimizer_steps = lambda engine: 4
    engine_state.write_fragments = lambda engine, path: path.write_text("fragments")
    engine: Any = SimpleNamespace(world_size=1, zero_optimization_stage=lambda: 2)
    with connect(topology, timeout_s=60) as ranks:
        store = CheckpointStore(folder, ranks, keep=2)
        for step, classes in enumerate((("cat", "dog"), None), start=1):
            commit_state(store, engine, TrainState(step=step), data_digest="d", classes=classes)


def test_a_checkpoint_tells_what_it_is_of(tmp_path: Path) -> None:
    run_ranks(_commit, 1, tmp_path / "checkpoints")
    named, unnamed = (open_checkpoint(tmp_path / "checkpoints", step).content for step in (1, 2))
    assert (named["classes"], unnamed["classes"]) == (["cat", "dog"], None)
    for content in (named, unnamed):
        assert (content["data_digest"], content["parameters"], content["optimizer_steps"]) == ("d", SHAPES, 4)
        assert (content["world_size"], content["zero_stage"]) == (1, 2)


def test_restore_refuses_what_does_not_fit_on_all_ranks_alike(tmp_path: Path) -> None:
    run_ranks(_restore, 2, tmp_path / "checkpoints")
