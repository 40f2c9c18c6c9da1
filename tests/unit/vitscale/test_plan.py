"""Derived numbers of a run, and the combinations that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.shardset import as_mixture
from vitscale.config.duration import Duration
from vitscale.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from vitscale.data.manifest import Manifest, ShardInfo
from vitscale.errors import ConfigError, TopologyError
from vitscale.plan import RunPlan, accumulation_steps

NUM_SAMPLES, BYTES_PER_SAMPLE = 1000, 2000
MODEL = ModelConfig(variant="ViT-mu/4", num_classes=10)


def shardset(**fields: Any) -> Manifest:
    shards = tuple(ShardInfo(f"{n}.tar", size, size * BYTES_PER_SAMPLE) for n, size in enumerate((600, 399, 1)))
    return Manifest("train", shards, **fields)


def config(*, data: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "run": Path("run"),
        "duration": Duration(steps=200),
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "model": MODEL,
        "optim": OptimConfig(lr=0.1),
        "schedule": ScheduleConfig(warmup=Duration(steps=10)),
        "checkpoint": CheckpointConfig(every=Duration(steps=50)),
    }
    return TrainConfig(
        data=DataConfig(**{"train": "train", "eval": "val", "image_size": 8, **(data or {})}),
        **{**defaults, **fields},
    )


def plan(world_size: int = 1, manifest: Manifest | None = None, **fields: Any) -> RunPlan:
    settings = config(**fields)
    train_set = as_mixture(manifest or shardset(), slots=settings.global_batch_size)
    return RunPlan.create(settings, world_size, train_set)


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(**fields)
    return str(caught.value)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_world_sizes_that_fit(world_size: int, accumulation: int) -> None:
    made = plan(world_size)
    assert (made.world_size, made.micro_batch_size, made.gradient_accumulation_steps) == (world_size, 4, accumulation)
    assert made.global_batch_size == 16
    # The number of ranks changes nothing of what is trained on, nor when anything happens.
    alone = plan(1)
    shared = ("global_batch_size", "num_samples", "total_steps", "warmup_steps", "checkpoint_every", "lanes", "window")
    assert [getattr(made, name) for name in shared] == [getattr(alone, name) for name in shared]


@pytest.mark.parametrize("world_size", [3, 5, 8, 1000])
def test_world_sizes_that_do_not_fit(world_size: int) -> None:
    with pytest.raises(TopologyError) as caught:
        plan(world_size)
    assert str(caught.value) == (
        f"global_batch_size 16 with micro_batch_size 4 makes 4 micro-batches, which {world_size} ranks cannot share "
        f"evenly; world sizes that fit: 1, 2, 4; start one of these numbers of ranks or change micro_batch_size"
    )


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 70))
def test_accumulation_makes_the_global_batch(micro_batches: int, micro_batch_size: int, world_size: int) -> None:
    fields = config(global_batch_size=micro_batches * micro_batch_size, micro_batch_size=micro_batch_size)
    fitting = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    if world_size in fitting:
        assert accumulation_steps(fields, world_size) * world_size * micro_batch_size == fields.global_batch_size
    else:
        with pytest.raises(TopologyError, match=f"world sizes that fit: {', '.join(map(str, fitting))};"):
            accumulation_steps(fields, world_size)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(steps=7), 7),
        (Duration(examples=7 * 16), 7),
        (Duration(examples=8 * 16 - 1), 7),
        (Duration(epochs=1), 62),
        (Duration(epochs=2), 125),
        (Duration(epochs=0.5), 31),
    ],
)
def test_length_in_each_unit(duration: Duration, steps: int) -> None:
    assert plan(duration=duration, schedule=ScheduleConfig(warmup=Duration(steps=7))).total_steps == steps


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Duration(steps=30), 30),
        (Duration(examples=480), 30),
        (Duration(epochs=1), 62),
        (Duration(percent=25), 50),
        (Duration(percent=0.5), 1),
    ],
)
def test_cadences_in_each_unit(every: Duration, steps: int) -> None:
    made = plan(
        checkpoint=CheckpointConfig(every=every),
        log=LogConfig(every=every),
        evaluation=EvaluationConfig(every=every),
        schedule=ScheduleConfig(warmup=every),
    )
    assert (made.checkpoint_every, made.log_every, made.evaluate_every, made.warmup_steps) == (steps,) * 4


def test_a_warmup_that_outlasts_the_run_is_refused() -> None:
    assert refusal(schedule=ScheduleConfig(warmup=Duration(examples=201 * 16))) == (
        "schedule.warmup: 3216 examples comes to 201 steps, but the run has 200, so optim.lr would never be reached; "
        "shorten the warm-up or give it in percent"
    )
    for longest in (Duration(steps=200), Duration(examples=201 * 16 - 1), Duration(percent=100)):
        assert plan(schedule=ScheduleConfig(warmup=longest)).warmup_steps == 200


def test_no_warmup_and_no_evaluation() -> None:
    made = plan(schedule=ScheduleConfig(warmup=Duration(steps=0)))
    assert (made.warmup_steps, made.evaluate_every) == (0, None)


@pytest.mark.parametrize("key", ["checkpoint.every", "log.every", "evaluation.every"])
def test_a_cadence_of_no_step(key: str) -> None:
    section = {"checkpoint": CheckpointConfig, "log": LogConfig, "evaluation": EvaluationConfig}[key.split(".")[0]]
    message = refusal(**{key.split(".")[0]: section(every=Duration(examples=15))})
    assert message == (
        f"{key}: 15 examples comes to no step at 16 images per step and 1000 images per epoch; "
        f"give it in steps, make it longer, or lower global_batch_size"
    )
    assert refusal(**{key.split(".")[0]: section(every=Duration(percent=0.4))}).startswith(f"{key}: 0.4 percent comes")


@pytest.mark.parametrize("duration", [Duration(steps=0), Duration(examples=3), Duration(epochs=0.01)])
def test_a_run_of_no_step(duration: Duration) -> None:
    assert refusal(duration=duration).startswith(f"duration: {duration} comes to no step")


def test_labels_outside_the_head() -> None:
    classes = tuple(f"class {n}" for n in range(12))
    assert refusal(manifest=shardset(classes=classes)) == (
        "train: has 12 classes, so labels up to 11, but model.num_classes is 10; set model.num_classes=12"
    )
    assert plan(manifest=shardset(classes=classes[:10])).num_samples == NUM_SAMPLES
    assert plan(manifest=shardset(classes=classes[:3])).num_samples == NUM_SAMPLES
    assert plan(manifest=shardset(classes=None)).num_samples == NUM_SAMPLES


def test_several_labels_need_the_sigmoid_loss() -> None:
    assert refusal(manifest=shardset(multi_label=True)) == (
        "train: images have several labels, but loss.kind is softmax, which takes one; set loss.kind=sigmoid"
    )
    assert plan(manifest=shardset(multi_label=True), loss=LossConfig(kind="sigmoid")).num_shards == 3


def test_lanes_and_the_memory_of_windows() -> None:
    assert (plan().lanes, plan().window) == (16, 64)
    assert plan(data={"lanes": 8}).lanes == 8
    # 16 lanes of 5 samples; on 4 ranks 4 of them each; on few lanes every rank may walk all.
    at_once = {"window": 5, "read_ahead_batches": 0}
    assert plan(data=at_once).window_bytes_per_rank == 16 * 5 * BYTES_PER_SAMPLE
    assert plan(4, data=at_once).window_bytes_per_rank == 4 * 5 * BYTES_PER_SAMPLE
    assert plan(4, data={**at_once, "lanes": 2}).window_bytes_per_rank == 2 * 5 * BYTES_PER_SAMPLE
    # And the samples of the batches that are read ahead.
    assert (
        plan(data={"window": 5, "read_ahead_batches": 3}).window_bytes_per_rank == (16 * 5 + 3 * 4) * BYTES_PER_SAMPLE
    )
    # Never more than the whole set.
    assert plan(data={"window": 5000}).window_bytes_per_rank == NUM_SAMPLES * BYTES_PER_SAMPLE


def test_bad_samples_are_limited_by_count_and_share() -> None:
    made = plan(data={"max_bad_samples": 5})
    assert made.bad_sample_budget(0) == 1
    assert made.bad_sample_budget(999) == 1
    assert made.bad_sample_budget(3000) == 3
    assert made.bad_sample_budget(10**6) == 1000
    assert plan(data={"max_bad_share": 0.0}).bad_sample_budget(10**6) == 0


def test_the_count_of_bad_samples_is_allowed_anew_in_every_epoch() -> None:
    made = plan(data={"max_bad_samples": 5, "max_bad_share": 1.0})
    seen = (0, 1, 1000, 1001, 2000, 2001, 10**6)
    assert [made.bad_sample_budget(examples) for examples in seen] == [5, 5, 5, 10, 10, 15, 5000]
    assert plan(data={"max_bad_samples": 0, "max_bad_share": 1.0}).bad_sample_budget(10**6) == 0


def test_plan_is_plain_data_and_a_table() -> None:
    made = plan(2)
    assert RunPlan(**json.loads(json.dumps(made.to_json()))) == made
    rows = dict(made.describe())
    assert rows["global batch"] == "16 = 4 per rank x 2 accumulated x 2 ranks"
    assert rows["data"] == "1,000 images in 3 shards"
    assert rows["length"] == "200 steps, 3.20 epochs; warm-up 10 steps"
    assert rows["checkpoint"] == "every 50 steps"
