"""The BiT ResNets (arXiv 1912.11370, section 3.1), layer for layer as in their release; timm's names.

ResNet-v2: normalisation and activation before each convolution. Unlike the hybrids' stems they have group normalisation
with eps 1e-5 and symmetric padding (bit_pytorch/models.py). B batch, F feature_dim, C classes, I input
and O output channels, (H, W) positions.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.config.schema import ModelConfig
from vitscale.models.bit_shapes import ROOT_KERNEL, BitShape, Bottleneck, bottlenecks
from vitscale.models.families import IMAGE_CHANNELS
from vitscale.models.init import generator_of, lecun_normal
from vitscale.models.resnet_layers import GROUPS, MaxPoolZeros, Stage, StdConv2d

_conv = partial(StdConv2d, kind="bit", padding="symmetric")
_norm = partial(nn.GroupNorm, GROUPS, eps=1e-5)


class Bit(nn.Module):
    """Images to logits. The head is a dense layer where the release has a 1x1 convolution, which is the same."""

    def __init__(self, config: ModelConfig, shape: BitShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.stem = Stem(shape.width)
        self.stages = nn.ModuleList(
            Stage(map(Block, blocks), activation_checkpointing=config.activation_checkpointing)
            for blocks in bottlenecks(shape.width, shape.blocks)
        )
        self.norm = _norm(shape.feature_dim)
        self.head = nn.Linear(shape.feature_dim, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], already in the value range -> logits [B, C]."""
        logits: Tensor = self.head(self.representation(images))
        return logits

    def representation(self, images: Tensor) -> Tensor:
        """What the head reads, and what the few-shot evaluation takes: [B, 3, H, W] -> [B, F]."""
        if images.ndim != 4 or images.shape[1:] != (IMAGE_CHANNELS, *self.shape.image_hw):
            needed = ", ".join(map(str, (IMAGE_CHANNELS, *self.shape.image_hw)))
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {needed}] is needed")
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return F.relu(self.norm(x)).mean(dim=(2, 3))  # [B, F]

    def initial_value(self, name: str, shape: torch.Size, *, seed: int) -> Tensor:
        """Values of one parameter in fp32 on the CPU.

        Kernels are drawn as flax does, as in big_vision models/bit.py; the scale of all but the head's is lost in
        their standardisation. The head starts at zero.

        Args:
            name: full name in the state dict.
            shape: of the whole parameter.
            seed: of the run.

        Raises:
            ValueError: a name that is none of this model's.
        """
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        match name.split("."):
            case ["head", "bias"]:
                return value.fill_(self.config.head_bias)
            case [*_, "conv" | "conv1" | "conv2" | "conv3", "weight"]:
                return lecun_normal(torch.empty(shape, dtype=torch.float32, device="cpu"), generator_of(seed, name))
            case [*_, "norm" | "norm1" | "norm2" | "norm3", "weight"]:
                return value.fill_(1)
            case ["head", "weight"] | [*_, "norm" | "norm1" | "norm2" | "norm3", "bias"]:
                return value
        raise ValueError(f"parameter {name!r} has no rule for its initial value; add one beside the others")


class Stem(nn.Module):
    """The root: 7x7 convolution and max-pooling without a norm; a quarter of the side is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(IMAGE_CHANNELS, width, ROOT_KERNEL, stride=2)
        self.pool = MaxPoolZeros()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, O, ceil(H / 4), ceil(W / 4)] in the weights' precision."""
        out: Tensor = self.pool(self.conv(images.to(self.conv.weight.dtype)))
        return out


class Block(nn.Module):
    """Bottleneck with the norm and the activation before each convolution; the stride is the 3x3's."""

    def __init__(self, shape: Bottleneck) -> None:
        super().__init__()
        self.norm1 = _norm(shape.inputs)
        self.conv1 = _conv(shape.inputs, shape.width, 1)
        self.norm2 = _norm(shape.width)
        self.conv2 = _conv(shape.width, shape.width, 3, stride=shape.stride)
        self.norm3 = _norm(shape.width)
        self.conv3 = _conv(shape.width, shape.outputs, 1)
        self.downsample = Projection(shape) if shape.projected else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.norm1(x))
        # The projection reads what was normalised and activated; a shortcut without one is the input itself.
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.norm2(y)))
        out: Tensor = shortcut + self.conv3(F.relu(self.norm3(y)))
        return out


class Projection(nn.Module):
    """Shortcut where channels or stride change."""

    def __init__(self, shape: Bottleneck) -> None:
        super().__init__()
        self.conv = _conv(shape.inputs, shape.outputs, 1, stride=shape.stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]."""
        out: Tensor = self.conv(x)
        return out
