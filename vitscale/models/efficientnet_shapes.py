"""Shapes of the EfficientNets as plain numbers: variants, blocks, parameters, FLOPs. No torch here.

Sources: EfficientNet paper, arXiv 1905.11946, table 1 (the blocks of B0) and section 3.3 (scaling);
google-research/noisystudent, efficientnet_builder.py (the same blocks; width, depth, image side and dropout of every
variant) and efficientnet_model.py (rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.models.families import IMAGE_CHANNELS, check_image_size, refuse_unused

STEM_WIDTH, STEM_KERNEL, STEM_STRIDE = 32, 3, 2
FEATURE_WIDTH = 1280
WIDTH_DIVISOR = 8
SQUEEZE_RATIO = 0.25
HONOURED = frozenset({"dropout", "stochastic_depth", "activation_checkpointing"})


@dataclass(frozen=True)
class Scale:
    """One row of the variant table."""

    width: float
    """Factor on the channels of B0."""
    depth: float
    """Factor on the number of blocks of each stage of B0."""
    image_px: int
    """Side of the images that the variant was made for; every other side works too."""
    dropout: float
    """Rate before the head with which it was trained, for ``model.dropout``."""


SCALES: dict[str, Scale] = {
    # For tests: every kind of block, with and without a skip connection, in some 60 thousand numbers.
    "EfficientNet-nano": Scale(0.1, 0.4, 32, 0.0),
    "EfficientNet-B0": Scale(1.0, 1.0, 224, 0.2),
    "EfficientNet-B1": Scale(1.0, 1.1, 240, 0.2),
    "EfficientNet-B2": Scale(1.1, 1.2, 260, 0.3),
    "EfficientNet-B3": Scale(1.2, 1.4, 300, 0.3),
    "EfficientNet-B4": Scale(1.4, 1.8, 380, 0.4),
    "EfficientNet-B5": Scale(1.6, 2.2, 456, 0.4),
    "EfficientNet-B6": Scale(1.8, 2.6, 528, 0.5),
    "EfficientNet-B7": Scale(2.0, 3.1, 600, 0.5),
    "EfficientNet-L2": Scale(4.3, 5.3, 800, 0.5),  # Noisy Student, arXiv 1911.04252; trained at 475 pixels
}
VARIANTS = tuple(SCALES)


@dataclass(frozen=True)
class Stage:
    """One row of table 1: blocks of one width, the first of which may halve the image."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    outputs: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class BlockShape:
    """Dimensions of one mobile inverted bottleneck (MBConv)."""

    kernel_size: int
    stride: int
    expansion: int
    inputs: int
    outputs: int

    @property
    def hidden(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expansion

    @property
    def squeezed(self) -> int:
        """Channels between the two layers of squeeze-and-excitation: a share of the block's input channels."""
        return max(1, int(self.inputs * SQUEEZE_RATIO))

    @property
    def residual(self) -> bool:
        """Whether the block adds its input to its output."""
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def num_parameters(self) -> int:
        """Learned numbers: kernels, two for every normalised channel, biases of squeeze-and-excitation."""
        expand = self.inputs * self.hidden + 2 * self.hidden if self.expansion != 1 else 0
        depthwise = self.hidden * self.kernel_size**2 + 2 * self.hidden
        excite = 2 * self.hidden * self.squeezed + self.squeezed + self.hidden
        return expand + depthwise + excite + self.hidden * self.outputs + 2 * self.outputs

    def forward_flops(self, positions_in: int, positions_out: int) -> int:
        """Two per multiply-add, for feature maps of so many positions before and after the depthwise convolution."""
        expand = positions_in * self.inputs * self.hidden if self.expansion != 1 else 0
        depthwise = positions_out * self.hidden * self.kernel_size**2
        excite = 2 * self.hidden * self.squeezed
        return 2 * (expand + depthwise + excite + positions_out * self.hidden * self.outputs)


@dataclass(frozen=True, kw_only=True)
class EfficientNetShape:
    """Every dimension of one model at one image size."""

    variant: str
    image_hw: tuple[int, int]
    """Height and width in pixels."""
    stem_width: int
    stages: tuple[tuple[BlockShape, ...], ...]
    feature_dim: int
    """Channels of the last feature map: what the head reads, averaged over the positions."""
    num_classes: int

    @property
    def blocks(self) -> Iterator[BlockShape]:
        """All blocks in order."""
        return (block for stage in self.stages for block in stage)

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(map(len, self.stages))

    @property
    def num_tokens(self) -> int:
        """Positions of the last feature map."""
        return self._positions()[-1]

    @property
    def num_parameters(self) -> int:
        """Learned numbers, head included; running statistics are none."""
        stem = IMAGE_CHANNELS * STEM_KERNEL**2 * self.stem_width + 2 * self.stem_width
        last = self._last_outputs * self.feature_dim + 2 * self.feature_dim
        head = (self.feature_dim + 1) * self.num_classes
        return stem + sum(block.num_parameters for block in self.blocks) + last + head

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-add of convolutions and the head.

        The paper's "FLOPS" count one per multiply-add. A training step takes three times as many as a forward pass.
        """
        positions = self._positions()
        stem = positions[0] * IMAGE_CHANNELS * STEM_KERNEL**2 * self.stem_width
        last = positions[-1] * self._last_outputs * self.feature_dim
        head = self.feature_dim * self.num_classes
        steps = zip(self.blocks, positions, positions[1:], strict=False)
        return 2 * (stem + last + head) + sum(block.forward_flops(before, after) for block, before, after in steps)

    @property
    def _last_outputs(self) -> int:
        return self.stages[-1][-1].outputs

    def _positions(self) -> list[int]:
        """Of the feature maps after the stem and after each block; "SAME" padding rounds every division up."""
        height, width = (-(-side // STEM_STRIDE) for side in self.image_hw)
        positions = [height * width]
        for block in self.blocks:
            height, width = -(-height // block.stride), -(-width // block.stride)
            positions.append(height * width)
        return positions


def resolve(config: ModelConfig, image_hw: tuple[int, int]) -> EfficientNetShape:
    """The variant's dimensions.

    Args:
        config: names the variant; its keys for transformers must be left alone.
        image_hw: height and width of the input in pixels.

    Raises:
        ConfigError: unknown variant, keys that this family has no use for, or images without pixels.
    """
    scale = SCALES.get(config.variant)
    if scale is None:
        raise ConfigError(
            f"model.variant {config.variant!r} is not known; {', '.join(VARIANTS)} are allowed (case matters); "
            f"did you mean {_closest_variant(config.variant)!r}?"
        )
    refuse_unused(config, used=HONOURED)
    check_image_size(config.variant, image_hw)
    return EfficientNetShape(
        variant=config.variant,
        image_hw=image_hw,
        stem_width=round_width(STEM_WIDTH, scale.width),
        stages=_scaled_stages(scale),
        feature_dim=round_width(FEATURE_WIDTH, scale.width),
        num_classes=config.num_classes,
    )


def round_width(channels: int, factor: float) -> int:
    """Scaled channels, rounded to a multiple of 8, but never down by more than a tenth (``round_filters``)."""
    scaled = channels * factor
    rounded = max(WIDTH_DIVISOR, int(scaled + WIDTH_DIVISOR / 2) // WIDTH_DIVISOR * WIDTH_DIVISOR)
    return rounded + WIDTH_DIVISOR if rounded < 0.9 * scaled else rounded


def round_depth(repeats: int, factor: float) -> int:
    """Scaled number of blocks, rounded up (``round_repeats``)."""
    return math.ceil(factor * repeats)


def _scaled_stages(scale: Scale) -> tuple[tuple[BlockShape, ...], ...]:
    stages = []
    inputs = round_width(STEM_WIDTH, scale.width)
    for stage in STAGES:
        outputs = round_width(stage.outputs, scale.width)
        first = BlockShape(stage.kernel_size, stage.stride, stage.expansion, inputs, outputs)
        others = BlockShape(stage.kernel_size, 1, stage.expansion, outputs, outputs)
        stages.append((first, *[others] * (round_depth(stage.repeats, scale.depth) - 1)))
        inputs = outputs
    return tuple(stages)


def _closest_variant(variant: str) -> str:
    written = variant.casefold().replace("_", "-")
    return max(VARIANTS, key=lambda name: SequenceMatcher(None, written, name.casefold()).ratio())
