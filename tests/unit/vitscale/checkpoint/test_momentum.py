"""SGD's momentum under every ZeRO stage: plain torch's to the last digits, and saved and resharded bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscale.train.engine as engine_module
from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG
from tests.unit.vitscale.checkpoint.engines import MICRO_BATCH, Odd
from vitscale.checkpoint.engine_state import Checkpoints, Identity
from vitscale.checkpoint.folder import LocalFolder
from vitscale.checkpoint.format import MASTER, MOMENTUM
from vitscale.checkpoint.fragments import fragments, masters, moment_kinds, optimizer_steps
from vitscale.checkpoint.reading import read_parameters
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.state import TrainState
from vitscale.checkpoint.store import CheckpointStore, open_checkpoint
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.distributed import Ranks, connect
from vitscale.errors import CheckpointError
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.optim import build_optimizer

SGD = ("optim={kind: sgd, lr: 0.1, momentum: 0.8, weight_decay: 1e-2, grad_clip_norm: null}",)
STEPS = 3


def _config(stage: int, *optim: str) -> TrainConfig:
    return load_config(CONFIG, [f"engine.zero_stage={stage}", "engine.precision=fp32", *optim])


def _engine(stage: int, ranks: Ranks, *optim: str) -> Any:
    plan: Any = SimpleNamespace(
        global_batch_size=MICRO_BATCH * ranks.world_size, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=1
    )
    torch.manual_seed(0)
    real = engine_module.deepspeed_config

    def settings(config: TrainConfig, plan: RunPlan) -> dict[str, Any]:
        """Stage 3 would keep parameters this small whole on each rank."""
        changed = real(config, plan)
        if stage == 3:
            changed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return changed

    engine_module.deepspeed_config = settings
    try:
        return engine_module.build_engine(Odd(), _config(stage, *optim), plan, ranks)
    finally:
        engine_module.deepspeed_config = real


def _images(step: int, rank: int) -> Tensor:
    return torch.randn(MICRO_BATCH, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def _train(engine: Any, steps: range) -> None:
    for step in steps:
        loss: Tensor = engine(_images(step, engine.global_rank)).square().mean()
        engine.backward(loss)
        engine.step()


def _plain(steps: int, world_size: int) -> dict[str, Tensor]:
    """Weights and momentum of one process without DeepSpeed."""
    torch.manual_seed(0)
    model = copy.deepcopy(Odd())
    optimizer = build_optimizer(model, _config(1, *SGD).optim)
    for step in range(steps):
        optimizer.zero_grad()
        losses = [model(_images(step, rank)).square().mean() for rank in range(world_size)]
        torch.autograd.backward(torch.stack(losses).mean())
        optimizer.step()
    named = dict(model.named_parameters())
    momentum = {f"{name}|{MOMENTUM[0]}": optimizer.state[values]["momentum_buffer"] for name, values in named.items()}
    return {f"{name}|{MASTER}": values.detach() for name, values in named.items()} | momentum


def _checkpoints(root: Path, engine: Any, ranks: Ranks) -> Checkpoints:
    store = CheckpointStore(LocalFolder(root), ranks, Retention(last=9))
    return Checkpoints(store, engine, ranks, Identity("data", None))


def _saved(root: Path, step: int) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(LocalFolder(root), step)
    assert checkpoint.content["digests"].keys() == {MASTER, *MOMENTUM, "buffer"}
    assert checkpoint.content["optimizer_steps"] == step
    return {
        f"{name}|{kind}": values
        for kind in (MASTER, *MOMENTUM)
        for name, values in read_parameters(checkpoint, kind).items()
        if name in checkpoint.shapes
    }


def _follow(topology: Topology, root: Path, stages: tuple[int, ...]) -> None:
    """Three steps with each stage, each from where the stage before has stopped."""
    with connect(topology, timeout_s=60) as ranks:
        for turn, stage in enumerate(stages):
            engine = _engine(stage, ranks, *SGD)
            checkpoints = _checkpoints(root, engine, ranks)
            state = checkpoints.restore(lr_of=None)
            done = turn * STEPS
            assert (state.step if state else 0, optimizer_steps(engine)) == (done, done)
            assert moment_kinds(engine) == MOMENTUM
            _train(engine, range(done, done + STEPS))
            checkpoints.save(TrainState(step=done + STEPS), next_lr=0.1, scores={}, must=True)
            ours, theirs = _saved(root, done + STEPS), _plain(done + STEPS, ranks.world_size)
            assert ours.keys() == theirs.keys()
            for name, values in theirs.items():
                torch.testing.assert_close(ours[name], values, rtol=2e-5, atol=1e-6, msg=f"{name} of stage {stage}")
        _refuses_another_optimizer(root, ranks)


def _refuses_another_optimizer(root: Path, ranks: Ranks) -> None:
    adam = _engine(1, ranks)
    with pytest.raises(CheckpointError, match="holds an optimizer's momentum_buffer, but that"):
        _checkpoints(root, adam, ranks).restore(lr_of=None)
    assert not any(fragment.kind != MASTER for fragment in fragments(adam))


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_stage_goes_on_where_another_stopped_as_plain_torch_would(world_size: int, tmp_path: Path) -> None:
    run_ranks(_follow, world_size, tmp_path, (1, 3, 2, 1))


def _begin(topology: Topology, stage: int) -> None:
    """Other first weights reach the master weights, the model and the averages; what is not named stays."""
    with connect(topology, timeout_s=60) as ranks:
        engine = _engine(stage, ranks, *SGD)
        averages = [torch.full_like(flat, 9.0) for flat in masters(engine)]
        store = CheckpointStore(LocalFolder(Path("nowhere")), ranks, Retention(last=9))
        checkpoints = Checkpoints(store, engine, ranks, Identity("data", None), averages=averages)
        torch.manual_seed(0)
        first = {name: values.detach().clone() for name, values in Odd().named_parameters()}
        other = {"first.weight": torch.arange(35.0).view(5, 7), "seen": torch.full((2, 1), 4.0)}
        checkpoints.begin_with(iter(other.items()))
        whole = first | other
        for fragment in fragments(engine, averages):
            expected = whole[fragment.name].flatten()[fragment.start : fragment.start + fragment.values.numel()]
            assert torch.equal(fragment.values, expected), (fragment.name, fragment.kind)
        assert engine.module.seen.tolist() == [[4.0], [4.0]]
        output = engine(_images(0, 0))
        hidden = torch.tanh(_images(0, 0) @ whole["first.weight"].T + whole["first.bias"])
        torch.testing.assert_close(output, hidden @ whole["last.weight"].T + whole["last.bias"])


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_engine_begins_with_other_weights(stage: int) -> None:
    run_ranks(_begin, 2, stage)
