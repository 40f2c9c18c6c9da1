"""The hybrids' way from pixels to tokens: a ResNet, and a projection of its features; timm's names.

Layer for layer as in the JAX reference (vit_jax/models_resnet.py, models_vit.py): activation after the convolutions,
group normalisation with eps 1e-6, weight standardisation, TensorFlow's "SAME" padding.
B batch, I input and O output channels, D embed_dim, (H, W) positions, (Gh, Gw) token grid.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.models.bit_shapes import ROOT_KERNEL, Bottleneck, bottlenecks
from vitscale.models.families import IMAGE_CHANNELS
from vitscale.models.hybrid_shapes import StemShape
from vitscale.models.init import generator_of, lecun_normal
from vitscale.models.resnet_layers import GROUPS, MaxPoolSame, Stage, StdConv2d

PREFIX = "patch_embed.backbone."

_conv = partial(StdConv2d, kind="flax", padding="same")
_norm = partial(nn.GroupNorm, GROUPS, eps=1e-6)


class HybridEmbed(nn.Module):
    """Images to tokens through a ResNet."""

    def __init__(
        self, embed_dim: int, stem: StemShape, grid: tuple[int, int], *, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        side = stem.stride * stem.patch_side
        self.image_shape = (IMAGE_CHANNELS, grid[0] * side, grid[1] * side)
        self.backbone = ResNet(stem, activation_checkpointing) if stem.blocks else Stem(stem.width)
        self.proj = nn.Conv2d(stem.channels, embed_dim, kernel_size=stem.patch_side, stride=stem.patch_side)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] of the grid's size -> tokens [B, Gh*Gw, D] in the weights' precision."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            needed = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {needed}] is needed")
        x: Tensor = self.proj(self.backbone(images))  # [B, D, Gh, Gw]
        return x.flatten(2).mT  # [B, Gh*Gw, D]

    @staticmethod
    def initial_value(name: str, shape: torch.Size, *, seed: int) -> Tensor:
        """Values of one parameter of the ResNet, in fp32 on the CPU, as flax draws them.

        The last norm of a block starts at scale zero, so that every block without a projection starts as a ReLU.

        Args:
            name: full name in the model's state dict; it begins with "patch_embed.backbone.".
            shape: of the whole parameter.
            seed: of the run.

        Raises:
            ValueError: a name that is none of the ResNet's parameters.
        """
        if name.startswith(PREFIX):
            match name.split(".")[-2:]:
                case ["conv" | "conv1" | "conv2" | "conv3", "weight"]:
                    return lecun_normal(torch.empty(shape, dtype=torch.float32, device="cpu"), generator_of(seed, name))
                case ["norm3", "weight"]:
                    return torch.zeros(shape, dtype=torch.float32, device="cpu")
                case ["norm" | "norm1" | "norm2", "weight"]:
                    return torch.ones(shape, dtype=torch.float32, device="cpu")
                case ["norm" | "norm1" | "norm2" | "norm3", "bias"]:
                    return torch.zeros(shape, dtype=torch.float32, device="cpu")
        raise ValueError(f"parameter {name!r} has no rule for its initial value; add one beside the others")


class ResNet(nn.Module):
    """Root and stages."""

    def __init__(self, shape: StemShape, activation_checkpointing: bool) -> None:
        super().__init__()
        self.stem = Stem(shape.width)
        self.stages = nn.ModuleList(
            Stage(map(Block, blocks), activation_checkpointing=activation_checkpointing)
            for blocks in bottlenecks(shape.width, shape.blocks)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, O, H / stride, W / stride]."""
        x: Tensor = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x


class Stem(nn.Module):
    """The root: 7x7 convolution, norm, ReLU, max-pooling; a quarter of the side is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(IMAGE_CHANNELS, width, ROOT_KERNEL, stride=2)
        self.norm = _norm(width)
        self.pool = MaxPoolSame()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, O, ceil(H / 4), ceil(W / 4)] in the weights' precision."""
        x = self.conv(images.to(self.conv.weight.dtype))
        out: Tensor = self.pool(F.relu(self.norm(x)))
        return out


class Block(nn.Module):
    """Bottleneck with the norm and the activation after each convolution; the stride is the 3x3's."""

    def __init__(self, shape: Bottleneck) -> None:
        super().__init__()
        self.conv1 = _conv(shape.inputs, shape.width, 1)
        self.norm1 = _norm(shape.width)
        self.conv2 = _conv(shape.width, shape.width, 3, stride=shape.stride)
        self.norm2 = _norm(shape.width)
        self.conv3 = _conv(shape.width, shape.outputs, 1)
        self.norm3 = _norm(shape.outputs)
        self.downsample = Projection(shape) if shape.projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.downsample(x) + self.norm3(self.conv3(y)))


class Projection(nn.Module):
    """Shortcut where channels or stride change."""

    def __init__(self, shape: Bottleneck) -> None:
        super().__init__()
        self.conv = _conv(shape.inputs, shape.outputs, 1, stride=shape.stride)
        self.norm = _norm(shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]."""
        out: Tensor = self.norm(self.conv(x))
        return out
