"""Layers of the Vision Transformer (ViT paper, arXiv 2010.11929, section 3.1 and appendix A), timm's names.

B batch, N tokens, D embed_dim, H heads, K head dimension, M mlp_dim, P patch side, (Gh, Gw) patch grid.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.kernels.attention import Backend, attention
from vitscale.models.shapes import IMAGE_CHANNELS

Gelu = Literal["tanh", "erf"]


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to a token, row by row."""

    def __init__(self, embed_dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.image_shape = (IMAGE_CHANNELS, grid[0] * patch_size, grid[1] * patch_size)
        self.proj = nn.Conv2d(IMAGE_CHANNELS, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, Gh*P, Gw*P] -> tokens [B, Gh*Gw, D] in the weights' precision."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            needed = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {needed}] is needed")
        x: Tensor = self.proj(images.to(self.proj.weight.dtype))  # [B, D, Gh, Gw]
        return x.flatten(2).mT  # [B, Gh*Gw, D]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection; dropout after the output, not after qkv."""

    def __init__(self, embed_dim: int, num_heads: int, *, dropout: float, backend: Backend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, K]
        x = attention(qkv, backend=self.backend)  # [B, N, D]
        out: Tensor = self.dropout(self.proj(x))
        return out


class Mlp(nn.Module):
    """Two dense layers with GELU between them, dropout after each."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, gelu: Gelu, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
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

    def forward(self, x: Tensor) -> Tensor:
        """Branch [B, N, D] -> the same, zero for the dropped images."""
        if not self.training or self.rate == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.rate)

    def extra_repr(self) -> str:
        """The rate, for ``print(model)``."""
        return f"rate={self.rate:g}"


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        layer_norm_eps: float,
        gelu: Gelu,
        dropout: float,
        drop_path: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.attn = Attention(embed_dim, num_heads, dropout=dropout, backend=backend)
        self.norm2 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu=gelu, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class PreLogits(nn.Module):
    """The hidden layer of the pre-training head (ViT paper, section 3.1): dense and tanh."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled tokens [B, D] -> representation [B, D]."""
        hidden: Tensor = self.fc(x)
        return hidden.tanh()
