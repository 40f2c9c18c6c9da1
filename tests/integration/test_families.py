"""Every family and every option trains on two ranks under ZeRO, and goes on to the bit where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import assert_same_state, final_state, overrides, trajectory
from tests.helpers.stopping import train_and_stop

# What the debug configuration says of a ViT, taken back for families that have no use for it.
BARE = [f"model.{key}=null" for key in ("depth", "embed_dim", "num_heads", "mlp_dim")]
BARE += ["model.dropout=0", "model.stochastic_depth=0", "model.pool=token", "model.representation_layer=true"]
SIDE_32 = "data.image_size=32"
MODELS = {
    "hybrid": ["model.variant=R26+ViT-mu/16", SIDE_32],
    "t2t": [*BARE, "model.variant=T2T-ViT-7", "model.depth=2", "model.embed_dim=64", "model.num_heads=2", SIDE_32],
    "t2t-transformer": [
        *BARE,
        "model.variant=T2T-ViT_t-14",
        "model.depth=1",
        "model.embed_dim=64",
        "model.num_heads=2",
        SIDE_32,
    ],
    "bit": [*BARE, "model.variant=BiT-R26x1", SIDE_32],
    "efficientnet": [*BARE, "model.variant=EfficientNet-nano", "model.dropout=0.2", SIDE_32],
    "efficientnet-recomputed": [
        *BARE,
        "model.variant=EfficientNet-nano",
        "model.activation_checkpointing=true",
        "engine.precision=bf16",
        SIDE_32,
    ],
    "map": ["model.pool=map", "model.position=sincos_2d"],
    "registers": [
        "model.pool=token",
        "model.registers=3",
        "model.position=learned_2d",
        "model.position_at=every_block_shared",
    ],
    "relative": ["model.position=relative"],
    "factorized": ["model.position=factorized", "model.position_at=every_block"],
    "axial": ["model.attention_span=axial", "model.position=none"],
    "22b": ["model.block=parallel", "model.qk_norm=rms", "model.qkv_bias=false", "model.pool=map"],
}


def cases() -> list[object]:
    """One of each kind under stage 1 now; among the slow tests all, also under stage 3, layer by layer."""
    quick = ("t2t", "efficientnet", "map", "registers", "22b")
    slow = [(name, stage) for name in MODELS for stage in (1, 3) if stage == 3 or name not in quick]
    return [*((name, 1) for name in quick), *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(("name", "stage"), cases())
def test_a_stopped_run_goes_on_to_the_bit(digits: Path, tmp_path: Path, name: str, stage: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*MODELS[name], f"engine.zero_stage={stage}", "duration={steps: 4}", "micro_batch_size=8"]
    run_ranks(train_and_stop, 2, overrides(digits, whole, *common), None)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), 2)
    run_ranks(train_and_stop, 2, overrides(digits, parts, *common), None)
    assert len(trajectory(whole)) == 4
    assert trajectory(parts) == trajectory(whole)
    assert_same_state(parts, whole)


def test_running_statistics_are_those_of_the_whole_batch(digits: Path, tmp_path: Path) -> None:
    """Two ranks with half of each batch keep the statistics that one rank with all of it keeps."""
    common = [*MODELS["efficientnet"], "model.dropout=0", "duration={steps: 1}", "global_batch_size=16"]
    run_ranks(train_and_stop, 1, overrides(digits, tmp_path / "one", *common, "micro_batch_size=16"), None)
    run_ranks(train_and_stop, 2, overrides(digits, tmp_path / "two", *common, "micro_batch_size=8"), None)
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    statistics = [name for name in one if "running_" in name]
    assert statistics
    for name in statistics:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * (1 + one[name].abs().max()), name
