"""The DeepSpeed engine and one optimizer step on it."""

from __future__ import annotations

import importlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitscale.config.schema import TrainConfig
from vitscale.data.loader import Batch, Quarantined, value_range
from vitscale.data.order import hash64
from vitscale.data.stages import StageSeconds
from vitscale.distributed import Ranks
from vitscale.plan import RunPlan
from vitscale.train.loss import training_loss
from vitscale.train.mixup import blend, mixing_share
from vitscale.train.optim import build_optimizer

# Salt that keeps dropout randomness apart from the data's.
DROPOUT = 0xD20


def build_engine(model: nn.Module, config: TrainConfig, plan: RunPlan, ranks: Ranks) -> Any:
    """Wrap the model. Returns a ``deepspeed.DeepSpeedEngine``."""
    # DeepSpeed takes its device from here, and a launcher that shows each task one GPU sets another number.
    index = ranks.device.index
    os.environ["LOCAL_RANK"] = str(ranks.topology.local_rank if index is None else index)
    deepspeed = _import_deepspeed(ranks.device)
    model = model.to(ranks.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, config.optim), config=deepspeed_config(config, plan)
    )
    return engine


def deepspeed_config(config: TrainConfig, plan: RunPlan) -> dict[str, Any]:
    """DeepSpeed's dictionary. Users never write it: DeepSpeed ignores keys that it does not know."""
    settings: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": config.optim.grad_clip_norm or 0.0,
        # round_robin_gradients stays off: with it the fragments of the master weights cannot be located.
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.engine.precision == "bf16":
        # Accumulating bf16 gradients in bf16 costs ten times the error of accumulating them in fp32.
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, kept from compiling a host extension at start and from warning about the missing GPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    importlib.import_module("deepspeed.utils").logger.setLevel(logging.ERROR)
    return deepspeed


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did on this rank."""

    loss: Tensor
    """Mean over this rank's images, a scalar still on the device."""
    grad_norm: float
    """Global norm before clipping; not finite if the update was skipped."""
    applied: bool
    """False if gradients were not finite on some rank and all ranks skipped the update."""
    data_wait_s: float
    """Seconds that the model waited for batches."""
    stages: StageSeconds
    """Where the loader's threads spent their time."""
    digest: int
    """Sum of the batches' digests, see :class:`vitscale.data.loader.Batch`."""
    quarantined: list[Quarantined]
    """Bad samples among this rank's."""


def train_step(engine: Any, batches: Iterator[Batch], config: TrainConfig, step: int, lr: float) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update. Collective."""
    accumulation = engine.gradient_accumulation_steps()
    share = mixing_share(config.seed, step, config.loss.mixup)
    losses, digest, quarantined, data_wait_s, stages = [], 0, [], 0.0, StageSeconds()
    for micro_step in range(accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        data_wait_s += time.perf_counter() - asked
        digest += batch.digest
        quarantined += batch.quarantined
        stages += batch.stages
        # Dropout and corrupted patches are drawn anew from the micro-batch's place in the run, so no random state needs
        # saving.
        torch.manual_seed(hash64(config.seed, DROPOUT, step, micro_step * engine.world_size + engine.global_rank) >> 1)
        # Before the forward pass: after it, this copy would make the host wait until the GPU is through with it.
        labels = batch.labels.to(engine.device, non_blocking=True)
        outputs = engine(model_input(batch.images, engine, share))
        loss = training_loss(outputs, labels, config.loss, share)
        engine.backward(loss)
        losses.append(loss.detach())
        if micro_step == accumulation - 1:
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
        engine.step()
    norm = engine.get_global_grad_norm()
    return StepResult(
        loss=torch.stack(losses).mean(),
        grad_norm=math.nan if norm is None else float(norm),
        applied=bool(engine.was_step_applied()),
        data_wait_s=data_wait_s,
        stages=stages,
        digest=digest,
        quarantined=quarantined,
    )


def model_input(images: Tensor, engine: Any, share: float = 1.0) -> Tensor:
    """uint8 [B, 3, H, W] to [-1, 1] on the engine's device, in the model's precision (ViT reference: x/127.5 - 1).

    Args:
        images: of a micro-batch.
        engine: the DeepSpeed engine.
        share: what each image keeps of itself, see :mod:`vitscale.train.mixup`.
    """
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    images = images.to(engine.device, non_blocking=True)
    return value_range(images, dtype) if share == 1 else blend(value_range(images), share).to(dtype)
