"""Which weights of a checkpoint may be asked for, and in what form. No torch: options of commands are made of these."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vitscale.checkpoint.format import AVERAGE, MASTER, Checkpoint
from vitscale.errors import CheckpointError
from vitscale.weights.choices import WeightFormat


class Weights(StrEnum):
    """What evaluations and exports may take."""

    RAW = "raw"
    """The fp32 master weights, with which training goes on."""
    EMA = "ema"
    """Their exponential moving average."""


class Precision(StrEnum):
    """Of the numbers that an export writes."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True)
class Choice:
    """What is exported, and how."""

    weights: Weights = Weights.RAW
    format: WeightFormat = WeightFormat.SAFETENSORS
    precision: Precision = Precision.FP32


def weights_kind(checkpoint: Checkpoint, weights: Weights) -> str:
    """The kind of a checkpoint's tensors that ``weights`` stands for.

    Raises:
        CheckpointError: the checkpoint has no average.
    """
    if weights is Weights.RAW:
        return MASTER
    if AVERAGE not in checkpoint.content["digests"]:
        raise CheckpointError(
            f"{checkpoint.shown}: holds no averaged weights, since the run was trained without optim.ema_decay; "
            f"take --weights {Weights.RAW}"
        )
    return AVERAGE
