"""Shapes of the BiT ResNets as plain numbers, and what they share with the hybrids' stems. This imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.models.families import IMAGE_CHANNELS, check_image_size, refuse_unused

ROOT_WIDTH = 64
"""Channels of the first convolution at width factor 1."""
ROOT_KERNEL = 7
ROOT_STRIDE = 4
"""Pixels per position after the root: a convolution and a max-pooling of stride 2 each."""
EXPANSION = 4
"""A bottleneck's outputs per channel of its 3x3 convolution."""

# Bottlenecks in each stage. Sources: BiT, arXiv 1912.11370, section 3 and its release (50, 101, 152);
# big_vision models/bit.py (26, 200).
BLOCKS: dict[int, tuple[int, ...]] = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
WIDTHS = (1, 2, 3, 4)

VARIANTS: tuple[str, ...] = tuple(f"BiT-R{depth}x{width}" for depth in BLOCKS for width in WIDTHS)


@dataclass(frozen=True)
class Convolution:
    """One square convolution without bias."""

    kernel: int
    inputs: int
    outputs: int
    stride: int
    """Pixels of the image per position of its output."""

    @property
    def num_parameters(self) -> int:
        """Numbers in its kernel."""
        return self.kernel**2 * self.inputs * self.outputs

    def flops(self, image_hw: tuple[int, int]) -> int:
        """Floating-point operations for one image: two per multiply-add, padding included."""
        rows, columns = feature_hw(image_hw, self.stride)
        return 2 * rows * columns * self.num_parameters


@dataclass(frozen=True)
class Bottleneck:
    """The channels of one residual block, the same before (BiT) and after activation (hybrids)."""

    inputs: int
    width: int
    stride: int
    """Of its 3x3 convolution and of its projection."""
    projected: bool
    """Whether the shortcut is a convolution: where the channels or the stride change, so in each stage's first."""

    @property
    def outputs(self) -> int:
        """Channels that leave the block."""
        return EXPANSION * self.width


def bottlenecks(width: int, blocks: tuple[int, ...]) -> list[list[Bottleneck]]:
    """The blocks of each stage; every stage has twice the channels of the one before, and half the side.

    Args:
        width: channels of the root.
        blocks: how many each stage has.
    """
    stages, inputs = [], width
    for stage, count in enumerate(blocks):
        first = Bottleneck(inputs, width << stage, stride=1 if stage == 0 else 2, projected=True)
        rest = Bottleneck(first.outputs, first.width, stride=1, projected=False)
        stages.append([first, *[rest] * (count - 1)])
        inputs = first.outputs
    return stages


def convolutions(width: int, blocks: tuple[int, ...]) -> Iterator[Convolution]:
    """Every convolution of a bottleneck ResNet: the root's, then those of each block."""
    yield Convolution(ROOT_KERNEL, IMAGE_CHANNELS, width, ROOT_STRIDE // 2)
    before = ROOT_STRIDE
    for stage in bottlenecks(width, blocks):
        for block in stage:
            after = before * block.stride
            if block.projected:
                yield Convolution(1, block.inputs, block.outputs, after)
            yield Convolution(1, block.inputs, block.width, before)
            yield Convolution(3, block.width, block.width, after)
            yield Convolution(1, block.width, block.outputs, after)
            before = after


def feature_hw(image_hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """Positions down and across: each halving rounds up, with BiT's padding as with TensorFlow's "SAME"."""
    return -(-image_hw[0] // stride), -(-image_hw[1] // stride)


@dataclass(frozen=True, kw_only=True)
class BitShape:
    """Every dimension of one ResNet at one image size."""

    variant: str
    width: int
    """Channels of the root: 64 times the width factor."""
    blocks: tuple[int, ...]
    """Bottlenecks in each stage."""
    num_classes: int
    image_hw: tuple[int, int]

    @property
    def feature_dim(self) -> int:
        """Channels that the head reads."""
        return EXPANSION * self.width << (len(self.blocks) - 1)

    @property
    def stride(self) -> int:
        """Pixels per position of the last feature map."""
        return ROOT_STRIDE << (len(self.blocks) - 1)

    @property
    def num_tokens(self) -> int:
        """Positions of the last feature map."""
        rows, columns = feature_hw(self.image_hw, self.stride)
        return rows * columns

    @property
    def num_parameters(self) -> int:
        """Learned numbers, head included."""
        kernels = sum(conv.num_parameters for conv in convolutions(self.width, self.blocks))
        stages = bottlenecks(self.width, self.blocks)
        normed = sum(block.inputs + 2 * block.width for stage in stages for block in stage) + self.feature_dim
        return kernels + 2 * normed + (self.feature_dim + 1) * self.num_classes

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-add of convolutions and head."""
        convolved = sum(conv.flops(self.image_hw) for conv in convolutions(self.width, self.blocks))
        return convolved + 2 * self.feature_dim * self.num_classes


def resolve(config: ModelConfig, image_hw: tuple[int, int]) -> BitShape:
    """The dimensions of a variant. Images of any size fit.

    Args:
        config: names the variant.
        image_hw: height and width of the input in pixels.

    Raises:
        ConfigError: unknown variant, a key that means nothing to a ResNet, or images without pixels.
    """
    if config.variant not in VARIANTS:
        close = max(VARIANTS, key=lambda known: SequenceMatcher(None, config.variant, known).ratio())
        raise ConfigError(
            f"model.variant {config.variant!r} is not known; of the BiT ResNets, {', '.join(VARIANTS)} are allowed "
            f"(case matters); did you mean {close!r}?"
        )
    refuse_unused(config, used=frozenset({"activation_checkpointing"}))
    check_image_size(config.variant, image_hw)
    depth, factor = map(int, re.findall("[0-9]+", config.variant))
    return BitShape(
        variant=config.variant,
        width=ROOT_WIDTH * factor,
        blocks=BLOCKS[depth],
        num_classes=config.num_classes,
        image_hw=image_hw,
    )
