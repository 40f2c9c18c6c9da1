"""Layers of the Vision Transformer (ViT paper, arXiv 2010.11929, section 3.1 and appendix A), timm's names.

B batch, N tokens, D embed_dim, H heads, K head dimension, M mlp_dim, P patch side, (Gh, Gw) patch grid, T packed
tokens, S packed images. Tokens [B, N, D] may also be packed ones [T, D], which come with their :class:`Pack`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.config.schema import ModelConfig
from vitscale.kernels.attention import attention, attention_varlen
from vitscale.kernels.qk_norm import QkNorm
from vitscale.kernels.reference import split_heads, statistics_dtype
from vitscale.models.families import IMAGE_CHANNELS
from vitscale.models.positions import RelativeKeys
from vitscale.models.vit_shapes import VitShape

Gelu = Literal["tanh", "erf"]
Span = Literal["full", "row", "column"]


@dataclass(frozen=True)
class Pack:
    """Which tokens are of which image."""

    cu_seqlens: Tensor
    """[S+1], where each image starts, then T."""
    max_seqlen: int
    """Tokens of the longest image, or more."""
    image: Tensor
    """[T], the number of each token's image."""

    def pad(self, x: Tensor, value: float) -> Tensor:
        """[T, ...] -> [S, max_seqlen, ...], ``value`` standing where an image has no token."""
        images, tokens = len(self.cu_seqlens) - 1, torch.arange(len(x), device=x.device)
        place = tokens - self.cu_seqlens[self.image] + self.image * self.max_seqlen
        padded = x.new_full((images * self.max_seqlen, *x.shape[1:]), value)
        # Every place is taken once, so that the order of copying is of no matter, nor is it in the backward pass.
        return padded.index_copy(0, place, x).view(images, self.max_seqlen, *x.shape[1:])


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to a token, row by row."""

    def __init__(self, embed_dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.image_shape = (IMAGE_CHANNELS, grid[0] * patch_size, grid[1] * patch_size)
        self.patch_shape = (patch_size, patch_size, IMAGE_CHANNELS)
        self.proj = nn.Conv2d(IMAGE_CHANNELS, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, Gh*P, Gw*P] -> tokens [B, Gh*Gw, D] in the weights' precision."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            needed = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {needed}] is needed")
        x: Tensor = self.proj(images.to(self.proj.weight.dtype))  # [B, D, Gh, Gw]
        return x.flatten(2).mT  # [B, Gh*Gw, D]

    def project(self, patches: Tensor) -> Tensor:
        """Patches [T, P*P*3] of any images, by row, column and channel -> tokens [T, D]."""
        numbers = self.patch_shape[0] * self.patch_shape[1] * IMAGE_CHANNELS
        if patches.ndim != 2 or patches.shape[1] != numbers:
            raise ValueError(f"patches have shape {list(patches.shape)}; [tokens, {numbers}] is needed")
        images = patches.reshape(len(patches), *self.patch_shape).permute(0, 3, 1, 2)  # [T, 3, P, P]
        x: Tensor = self.proj(images.to(self.proj.weight.dtype))  # [T, D, 1, 1]
        return x.flatten(1)


class HeadScale(nn.Module):
    """The weight that normalised queries, or keys, are multiplied with; all heads share it."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self) -> Tensor:
        """[K], of which a partitioned weight may go after this call."""
        return self.weight * 1


class SelfAttention(nn.Module):
    """Attention on a packed projection, without the projections, which differ from block to block.

    The span says who attends to whom: all tokens to each other, or patches within their row or column of the grid
    (axial attention, ViT paper, appendix D.6).
    """

    def __init__(self, config: ModelConfig, shape: VitShape, *, span: Span) -> None:
        super().__init__()
        self.num_heads, self.grid, self.span, self.backend = shape.num_heads, shape.grid, span, config.attention
        self.eps, self.centered = config.layer_norm_eps, config.qk_norm == "layer"
        self.q_norm = HeadScale(shape.head_dim) if shape.qk_norm else None
        self.k_norm = HeadScale(shape.head_dim) if shape.qk_norm else None
        length = {"full": shape.num_patches, "row": shape.grid[1], "column": shape.grid[0]}[span]
        relative = shape.position == "relative"
        self.relative_pos_embed = RelativeKeys(length, shape.num_prefix, shape.head_dim) if relative else None

    def mix(self, qkv: Tensor, pack: Pack | None) -> Tensor:
        """Projection [B, N, 3*D], or packed [T, 3*D] -> what the heads read, [B, N, D] or [T, D]."""
        width = qkv.shape[-1] // 3
        qkv = qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, width // self.num_heads)  # [B, N, 3, H, K]
        if pack is not None:
            return attention_varlen(
                qkv, pack.cu_seqlens, max_seqlen=pack.max_seqlen, backend=self.backend, norm=self.qk_norm()
            )
        if self.span == "full":
            return self._attend(qkv)
        grid = qkv.reshape(qkv.shape[0], *self.grid, *qkv.shape[2:])  # [B, Gh, Gw, 3, H, K]
        lines = grid if self.span == "row" else grid.transpose(1, 2)
        out = self._attend(lines.flatten(0, 1)).reshape(*lines.shape[:3], width)
        return (out if self.span == "row" else out.transpose(1, 2)).flatten(1, 2)

    def qk_norm(self) -> QkNorm | None:
        """What normalises the queries and keys of all heads, if anything does."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return QkNorm(self.q_norm(), self.k_norm(), eps=self.eps, centered=self.centered)

    def _attend(self, qkv: Tensor) -> Tensor:
        norm = self.qk_norm()
        if self.relative_pos_embed is None:
            return attention(qkv, backend=self.backend, norm=norm)
        q, k, v = split_heads(qkv, norm)  # [B, H, N, K]
        scale = q.shape[-1] ** -0.5
        bias: Tensor = self.relative_pos_embed(q) * scale
        if self.backend == "reference":
            dtype = statistics_dtype(qkv.dtype)
            scores = (q.to(dtype) * scale) @ k.to(dtype).mT + bias.to(dtype)  # [B, H, N, N]
            mixed = (scores.softmax(dim=-1) @ v.to(dtype)).to(qkv.dtype)  # [B, H, N, K]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out: Tensor = mixed.transpose(1, 2).flatten(2)
        return out


class Attention(SelfAttention):
    """Multi-head self-attention with one packed projection; dropout after the output, not after qkv."""

    def __init__(self, config: ModelConfig, shape: VitShape, *, span: Span) -> None:
        super().__init__(config, shape, span=span)
        self.qkv = nn.Linear(shape.embed_dim, 3 * shape.embed_dim, bias=shape.qkv_bias)
        self.proj = nn.Linear(shape.embed_dim, shape.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, pack: Pack | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        out: Tensor = self.dropout(self.proj(self.mix(self.qkv(x), pack)))
        return out


class Mlp(nn.Module):
    """Two dense layers with GELU between them, dropout after each."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, gelu: Gelu, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.act = activation(gelu)
        self.fc2 = nn.Linear(mlp_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        x = self.dropout(self.act(self.fc1(x)))  # [B, N, M]
        out: Tensor = self.dropout(self.fc2(x))
        return out


class DropPath(nn.Module):
    """Drop a residual branch per image while training; what is kept is scaled up, so the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, pack: Pack | None = None) -> Tensor:
        """Branch [B, N, D] -> the same, zero for the dropped images."""
        if not self.training or self.rate == 0:
            return x
        if pack is not None:
            kept = F.dropout(x.new_ones(len(pack.cu_seqlens) - 1, 1), self.rate)  # [S, 1]
            return x * kept[pack.image]
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.rate)

    def extra_repr(self) -> str:
        """The rate, for ``print(model)``."""
        return f"rate={self.rate:g}"


class PreLogits(nn.Module):
    """The hidden layer of the pre-training head (ViT paper, section 3.1): dense and tanh."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled tokens [B, D] -> representation [B, D]."""
        hidden: Tensor = self.fc(x)
        return hidden.tanh()


def activation(gelu: Gelu) -> nn.GELU:
    """GELU, by its tanh approximation or exactly."""
    return nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
