"""The engine's optimizer step against plain torch, and what non-finite gradients do to it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.runs import CONFIG, TINY, overrides
from tests.helpers.shardset import as_mixture
from vitscale.config.loader import load_config
from vitscale.config.schema import TrainConfig
from vitscale.data.loader import Batch
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.plan import RunPlan
from vitscale.topology import Topology
from vitscale.train.engine import deepspeed_config

PLAIN = ("run=run", "model.dropout=0", "model.stochastic_depth=0", "global_batch_size=8")


def config_of(*more: str) -> TrainConfig:
    return load_config(CONFIG, [*TINY, *PLAIN, *more])


def plan_of(config: TrainConfig, world_size: int = 1) -> RunPlan:
    manifest = Manifest("data", (ShardInfo("a.tar", 1000, 10_000),))
    return RunPlan.create(config, world_size, as_mixture(manifest, slots=config.global_batch_size))


class Read(dict[str, Any]):
    """A mapping that notes which of its keys someone asked for."""

    def __init__(self, items: dict[str, Any]) -> None:
        super().__init__({key: Read(value) if isinstance(value, dict) else value for key, value in items.items()})
        self.asked: set[object] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> Read:
        return self

    def unread(self) -> list[str]:
        inner = [f"{key}.{name}" for key, value in self.items() if isinstance(value, Read) for name in value.unread()]
        return [key for key in self if key not in self.asked] + inner


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_knows_every_key_that_we_write(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = config_of(f"engine.zero_stage={stage}", f"engine.precision={precision}", "optim.grad_clip_norm=0.5")
    settings = Read(deepspeed_config(config, plan_of(config)))
    settings["typo"] = 1
    understood = DeepSpeedConfig(settings)
    # The sections for ZeRO and bf16 refuse unknown keys by themselves; they are unpacked, not asked key by key.
    assert understood.zero_config.model_config["extra"] == "forbid"
    assert understood.bfloat16_config.model_config["extra"] == "forbid"
    assert [name for name in settings.unread() if not name.startswith(("zero_optimization.", "bf16."))] == ["typo"]

    assert understood.train_batch_size == 8
    assert understood.train_micro_batch_size_per_gpu == 4
    assert understood.gradient_accumulation_steps == 2
    assert understood.gradient_clipping == 0.5
    assert understood.zero_config.stage == stage
    assert not understood.zero_config.round_robin_gradients
    assert understood.zero_allow_untested_optimizer is True
    assert understood.steps_per_print == 10**9
    assert understood.bfloat16_config.enabled == (precision == "bf16")
    assert understood.bfloat16_config.check_grad_overflow
    assert understood.grad_accum_dtype == ("fp32" if precision == "bf16" else None)
    assert not understood.float16_config.enabled


def test_no_clipping_is_zero_to_deepspeed() -> None:
    config = config_of("optim.grad_clip_norm=null")
    assert deepspeed_config(config, plan_of(config))["gradient_clipping"] == 0.0


def random_batches(config: TrainConfig, count: int, *, seed: int = 0) -> list[Batch]:
    """Micro-batches of one rank and step; together they hold the same images however they are cut."""
    generator = torch.Generator().manual_seed(seed)
    size = config.micro_batch_size
    images = torch.randint(256, (count * size, 3, 8, 8), dtype=torch.uint8, generator=generator).split(size)
    labels = torch.randint(10, (count * size, 1), generator=generator).split(size)
    return [
        Batch(
            images=images[number],
            labels=labels[number],
            mask=torch.ones(size, dtype=torch.bool),
            keys=[""] * size,
            sample_ids=list(range(size)),
            digest=1 + number,
        )
        for number in range(count)
    ]


def random_model(config: TrainConfig) -> Any:
    """A model whose head is not zero, so that every parameter has a gradient from the first step."""
    from vitscale.models.init import initialize
    from vitscale.models.vit import build_vit

    model = build_vit(config.model, config.data.image_hw)
    initialize(model, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class PlainTorch:
    """AdamW with clipping as one writes it without DeepSpeed: whole batch, one process, own parameter groups."""

    def __init__(self, model: Any, config: TrainConfig) -> None:
        self.model = model
        self.clip = config.optim.grad_clip_norm or math.inf
        named = dict(model.named_parameters())
        kernels = [n for n in named if n.endswith("weight") and "norm" not in n and n != "head.weight"]
        rest = [n for n in named if n not in kernels and n != "head.weight"]
        decays = ((kernels, 0.1), (rest, 0.0), (["head.weight"], 3.0))
        self.optimizer = torch.optim.AdamW(
            [{"params": [named[n] for n in names], "weight_decay": decay} for names, decay in decays], lr=1.0
        )

    def step(self, batches: list[Batch], lr: float) -> tuple[float, float]:
        images = torch.cat([batch.images for batch in batches]).float() / 127.5 - 1
        labels = torch.cat([batch.labels for batch in batches])[:, 0]
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item(), norm.item()


def _equals_plain_torch(topology: Topology, clip: float | None, micro_batch_size: int) -> None:
    from vitscale.distributed import connect
    from vitscale.train.engine import build_engine, train_step

    config = config_of(
        f"optim.grad_clip_norm={'null' if clip is None else clip}",
        "optim.head_weight_decay=3.0",
        f"micro_batch_size={micro_batch_size}",
        "engine.zero_stage=1",
    )
    accumulation = 8 // micro_batch_size
    with connect(topology, timeout_s=60) as ranks:
        model = random_model(config)
        plain = PlainTorch(copy.deepcopy(model), config)
        engine = build_engine(model, config, plan_of(config), ranks)
        norms = []
        for step in range(8):
            lr = 0.0 if step == 0 else 3e-3 * (8 - step) / 8
            batches = random_batches(config, accumulation, seed=step)
            result = train_step(engine, iter(batches), config, step, lr)
            loss, norm = plain.step(batches, lr)
            norms.append(norm)
            assert result.applied
            assert result.digest == sum(batch.digest for batch in batches)
            assert result.data_wait_s >= 0
            assert float(result.loss) == pytest.approx(loss, rel=2e-6)
            assert result.grad_norm == pytest.approx(norm, rel=2e-5)
            for (name, ours), theirs in zip(model.named_parameters(), plain.model.parameters(), strict=True):
                apart = (ours - theirs).detach().abs()
                if name.endswith("qkv.bias"):
                    # Keys' biases have no gradient but rounding, which Adam scales up to whole steps.
                    apart = apart.view(3, -1)[[0, 2]]
                assert apart.max() < 1e-6, f"{name} at step {step}"
        # Some steps are clipped and some are not.
        assert clip is None or min(norms) < clip < max(norms)


@pytest.mark.parametrize(("clip", "micro_batch_size"), [(1.22, 8), (1.22, 4), (None, 4)])
def test_steps_equal_plain_torch(clip: float | None, micro_batch_size: int) -> None:
    run_ranks(_equals_plain_torch, 1, clip, micro_batch_size)


def _state_of(engine: Any) -> dict[str, torch.Tensor]:
    from vitscale.checkpoint.fragments import fragments, optimizer_steps

    steps = torch.tensor(optimizer_steps(engine))
    # ZeRO 3 holds parts of the working parameters, whole ones only while it computes with them.
    whole = {} if engine.zero_optimization_stage() == 3 else dict(engine.module.named_parameters())
    working = {f"working|{name}": parameter.detach().clone() for name, parameter in whole.items()}
    return {f"{f.name}|{f.kind}|{f.start}": f.values.clone() for f in fragments(engine)} | working | {"steps": steps}


def _nan_is_skipped(topology: Topology, stage: int, precision: str, bad: float) -> None:
    """The last rank alone gets a non-finite loss in its last micro-batch of step 1."""
    import vitscale.train.engine as module
    from vitscale.distributed import connect

    config = config_of("micro_batch_size=2", f"engine.zero_stage={stage}", f"engine.precision={precision}")
    plan = plan_of(config, topology.world_size)
    accumulation = plan.gradient_accumulation_steps
    real_loss, calls = module.training_loss, iter(range(100))

    def faulty(*arguments: Any) -> torch.Tensor:
        last = topology.rank == topology.world_size - 1
        return real_loss(*arguments) * (bad if last and next(calls) == 2 * accumulation - 1 else 1.0)

    module.training_loss = faulty
    with connect(topology, timeout_s=60) as ranks:
        engine = module.build_engine(random_model(config), config, plan, ranks)

        def step(number: int) -> Any:
            batches = random_batches(config, accumulation, seed=10 * number + topology.rank)
            return module.train_step(engine, iter(batches), config, number, 1e-3)

        assert step(0).applied
        before = _state_of(engine)
        skipped = step(1)
        after = _state_of(engine)
        assert not skipped.applied
        assert not math.isfinite(skipped.grad_norm)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        # The gradients of the bad step are gone: the next one is as if it had not been.
        good = step(2)
        assert good.applied
        assert math.isfinite(good.grad_norm)
        assert all(value.isfinite().all() for value in _state_of(engine).values())
        assert int(_state_of(engine)["steps"]) == 2


@pytest.mark.parametrize(
    ("world_size", "stage", "precision", "bad"),
    [
        (1, 1, "fp32", math.nan),
        (2, 2, "fp32", math.inf),
        (2, 3, "fp32", math.nan),
        (2, 1, "bf16", math.nan),
    ],
)
def test_a_step_with_gradients_that_are_not_finite_is_skipped_by_all(
    world_size: int, stage: int, precision: str, bad: float
) -> None:
    run_ranks(_nan_is_skipped, world_size, stage, precision, bad)


def _diverges(topology: Topology, arguments: list[str], bad_calls: list[int]) -> None:
    """A run whose loss is NaN at some of its steps; the error must tell of the third in a row."""
    import vitscale.train.engine as module
    import vitscale.train.loop as loop
    from vitscale.errors import DivergenceError
    from vitscale.train.signals import StopRequest

    real_loss, calls = module.training_loss, iter(range(1000))
    module.training_loss = lambda *a: real_loss(*a) * (math.nan if next(calls) in bad_calls else 1.0)
    with StopRequest() as stop, pytest.raises(DivergenceError) as caught:
        loop.train(load_config(CONFIG, arguments), topology, stop)
    message = str(caught.value)
    assert "not finite in 3 steps in a row up to step 7" in message
    assert "engine.max_skipped_steps" in message


def test_a_run_stops_after_max_skipped_steps_in_a_row(digits: Path, tmp_path: Path) -> None:
    # One micro-batch per step: steps 2 and 3 are bad and forgiven, 5, 6 and 7 are not.
    arguments = overrides(digits, tmp_path / "run", "micro_batch_size=16")
    run_ranks(_diverges, 1, arguments, [1, 2, 4, 5, 6])

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    lines: Iterator[str] = iter((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["step"] for r in records if not r["applied"]] == [2, 3, 5, 6, 7]
    assert all(r["grad_norm"] is None for r in records if not r["applied"])
    # What was committed before is there to go on from.
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000000004\n"
