"""EfficientNet (arXiv 1905.11946) as trained by Noisy Student (arXiv 1911.04252); timm's parameter names.

Source: google-research/noisystudent, efficientnet_model.py and utils.py.

B batch, (H, W) pixels, then positions; I input, M hidden, S squeezed, O output channels of a block; F features,
C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.config.schema import ModelConfig
from vitscale.models.batch_norm import BatchNorm, checkpoint_block
from vitscale.models.efficientnet_shapes import (
    STEM_KERNEL,
    STEM_STRIDE,
    BlockShape,
    EfficientNetShape,
)
from vitscale.models.families import IMAGE_CHANNELS
from vitscale.models.init import generator_of
from vitscale.models.resnet_layers import same_padding


class EfficientNet(nn.Module):
    """Images to logits. The images may have another size than the shape's.

    Built under ``torch.device("meta")`` it takes no memory. Its weights are not the reference's yet:
    :meth:`initial_value` gives them.
    """

    def __init__(self, config: ModelConfig, shape: EfficientNetShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.conv_stem = SameConv(IMAGE_CHANNELS, shape.stem_width, STEM_KERNEL, stride=STEM_STRIDE)
        self.bn1 = BatchNorm(shape.stem_width)
        rates = iter(stochastic_depth_rates(config.stochastic_depth, shape.num_blocks))
        self.blocks = nn.ModuleList(
            nn.ModuleList(_block(block, next(rates)) for block in stage) for stage in shape.stages
        )
        self.conv_head = SameConv(shape.stages[-1][-1].outputs, shape.feature_dim, 1)
        self.bn2 = BatchNorm(shape.feature_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(shape.feature_dim, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], already in the value range -> logits [B, C]. Collective while training."""
        logits: Tensor = self.head(self.dropout(self.representation(images)))
        return logits

    def representation(self, images: Tensor) -> Tensor:
        """The mean over the last feature map, before dropout: [B, 3, H, W] -> [B, F]."""
        if images.ndim != 4 or images.shape[1] != IMAGE_CHANNELS:
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {IMAGE_CHANNELS}, H, W] is needed")
        x = F.silu(self.bn1(self.conv_stem(images)))
        for stage in self.blocks:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                checkpointed = self.config.activation_checkpointing and torch.is_grad_enabled()
                x = checkpoint_block(block, x) if checkpointed else block(x)
        x = F.silu(self.bn2(self.conv_head(x)))
        return x.mean((2, 3))

    def initial_value(self, name: str, shape: torch.Size, *, seed: int) -> Tensor:
        """Values of one parameter or buffer in fp32 on the CPU, a function of the arguments alone.

        Kernels are normal with variance 2 / fan_out, not truncated (``conv_kernel_initializer``); the head is uniform
        within 1 / sqrt(C) (``dense_kernel_initializer``). A depthwise kernel's fan_out is its area: TensorFlow gives
        it the shape [area, channels, 1], and the initializer multiplies the area by the last of these.

        Args:
            name: full name in the state dict.
            shape: of the whole parameter, not of a rank's part.
            seed: of the run.

        Raises:
            ValueError: a name that is none of this model's.
        """
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        match name.split(".")[-2:]:
            case [kind, "weight"] if kind.startswith("conv_"):
                fan_out = value[0, 0].numel() * (1 if kind == "conv_dw" else shape[0])
                return value.normal_(std=math.sqrt(2 / fan_out), generator=generator_of(seed, name))
            case ["head", "weight"]:
                limit = 1 / math.sqrt(shape[0])
                return value.uniform_(-limit, limit, generator=generator_of(seed, name))
            case ["head", "bias"]:
                return value.fill_(self.config.head_bias)
            case ["bn1" | "bn2" | "bn3", "weight" | "running_var"]:
                return value.fill_(1)
            case ["bn1" | "bn2" | "bn3", "bias" | "running_mean" | "num_batches_tracked"]:
                return value.zero_()
            case ["conv_reduce" | "conv_expand", "bias"]:
                return value.zero_()
        raise ValueError(f"parameter {name!r} has no rule for its initial value; add one beside the others")


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: an output position for every ``stride`` pixels, begun or full.

    What has to be added depends on the size of the input; where it is odd, the end gets one more than the beginning.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel_size, stride=stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, I, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)] in the weights' precision."""
        x = x.to(self.weight.dtype)
        rows, columns = (same_padding(x.shape[axis], self.kernel_size[0], self.stride[0]) for axis in (2, 3))
        padding = (rows[0], columns[0])
        if padding != (rows[1], columns[1]):
            x, padding = F.pad(x, (*columns, *rows)), (0, 0)  # a copy, which the convolution's own padding saves
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, 1, self.groups)


class SqueezeExcite(nn.Module):
    """Scale every channel by what all channels say on average (arXiv 1709.01507)."""

    def __init__(self, hidden: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = SameConv(hidden, squeezed, 1, bias=True)
        self.conv_expand = SameConv(squeezed, hidden, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, M, H, W] -> the same."""
        squeezed = F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))  # [B, S, 1, 1]
        scale: Tensor = self.conv_expand(squeezed).sigmoid()  # [B, M, 1, 1]
        return x * scale


class DepthwiseSeparable(nn.Module):
    """MBConv without expansion: depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self, shape: BlockShape, drop_rate: float) -> None:
        super().__init__()
        self.residual = shape.residual
        self.drop_rate = drop_rate
        self.conv_dw = _depthwise(shape)
        self.bn1 = BatchNorm(shape.hidden)
        self.se = SqueezeExcite(shape.hidden, shape.squeezed)
        self.conv_pw = SameConv(shape.hidden, shape.outputs, 1)
        self.bn2 = BatchNorm(shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, I, H, W] -> [B, O, H / stride, W / stride]."""
        branch = F.silu(self.bn1(self.conv_dw(x)))
        branch = self.bn2(self.conv_pw(self.se(branch)))
        return x + drop_images(branch, self.drop_rate, self.training) if self.residual else branch


class InvertedResidual(nn.Module):
    """MBConv: expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self, shape: BlockShape, drop_rate: float) -> None:
        super().__init__()
        self.residual = shape.residual
        self.drop_rate = drop_rate
        self.conv_pw = SameConv(shape.inputs, shape.hidden, 1)
        self.bn1 = BatchNorm(shape.hidden)
        self.conv_dw = _depthwise(shape)
        self.bn2 = BatchNorm(shape.hidden)
        self.se = SqueezeExcite(shape.hidden, shape.squeezed)
        self.conv_pwl = SameConv(shape.hidden, shape.outputs, 1)
        self.bn3 = BatchNorm(shape.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, I, H, W] -> [B, O, H / stride, W / stride]."""
        branch = F.silu(self.bn1(self.conv_pw(x)))  # [B, M, H, W]
        branch = F.silu(self.bn2(self.conv_dw(branch)))
        branch = self.bn3(self.conv_pwl(self.se(branch)))
        return x + drop_images(branch, self.drop_rate, self.training) if self.residual else branch


def _block(shape: BlockShape, drop_rate: float) -> nn.Module:
    return (DepthwiseSeparable if shape.expansion == 1 else InvertedResidual)(shape, drop_rate)


def _depthwise(shape: BlockShape) -> SameConv:
    return SameConv(shape.hidden, shape.hidden, shape.kernel_size, stride=shape.stride, groups=shape.hidden)


def drop_images(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): zero a residual branch for some images, scale it up for the others."""
    if not training or rate == 0:
        return branch
    return branch * F.dropout(branch.new_ones(len(branch), 1, 1, 1), rate)


def stochastic_depth_rates(rate: float, num_blocks: int) -> list[float]:
    """Chance to drop each block: 0 for the first, and ``rate`` for the one that would come after the last.

    So in the reference, whose 0.2 is called a survival of 0.8 at the last block. The blocks without a skip connection
    count, but cannot be dropped.
    """
    return [rate * index / num_blocks for index in range(num_blocks)]
