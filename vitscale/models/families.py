"""The families of models, and what the configuration may say of each. No torch here."""

from __future__ import annotations

import dataclasses

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError

IMAGE_CHANNELS = 3
ALWAYS_USED = frozenset({"variant", "num_classes", "head_bias"})


def refuse_unused(config: ModelConfig, *, used: frozenset[str]) -> None:
    """Refuse keys that say something a family would not listen to.

    Args:
        config: of the model.
        used: keys that its family honours, besides the variant, the number of classes and the bias of the head.

    Raises:
        ConfigError: names every such key.
    """
    idle = [
        f"model.{field.name} ({getattr(config, field.name)!r})"
        for field in dataclasses.fields(config)
        if field.name not in used | ALWAYS_USED and getattr(config, field.name) != field.default
    ]
    if idle:
        honoured = ", ".join(f"model.{name}" for name in sorted(used | ALWAYS_USED))
        raise ConfigError(
            f"model.variant {config.variant!r} has no use for {', '.join(idle)}; it listens to {honoured}; leave the "
            "others out"
        )


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Refuse a width that the heads cannot share.

    Raises:
        ConfigError: names the nearest numbers of heads that can.
    """
    if embed_dim % num_heads == 0:
        return
    divisors = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
    nearest = sorted(sorted(divisors, key=lambda heads: abs(heads - num_heads))[:2])
    raise ConfigError(
        f"model.embed_dim {embed_dim} is not divisible by model.num_heads {num_heads}; every head takes "
        f"an equal part; set model.num_heads to {' or '.join(map(str, nearest))}, or another model.embed_dim"
    )


def dense(inputs: int, outputs: int) -> int:
    """Learned numbers of a dense layer with biases."""
    return (inputs + 1) * outputs


def check_image_size(variant: str, image_hw: tuple[int, int]) -> None:
    """Refuse images without pixels, for a family that takes all other sizes.

    Args:
        variant: for the message.
        image_hw: height and width in pixels.

    Raises:
        ConfigError: a side is below 1.
    """
    height, width = image_hw
    if min(image_hw) < 1:
        raise ConfigError(
            f"data.image_size {height}x{width} has no pixels for {variant}; both sides must be at least 1; enlarge "
            f"data.image_size"
        )
