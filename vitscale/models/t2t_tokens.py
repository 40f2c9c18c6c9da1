"""From the image to T2T-ViT's tokens (T2T paper, arXiv 2101.11986, section 3.1); the release's parameter names.

Each stage cuts overlapping windows (soft split), and a narrow transformer layer mixes them before the next one.

B batch, N tokens, I numbers in a window, T token width, M random features, D embed_dim, (Gh, Gw) grid of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.kernels.attention import Backend, attention
from vitscale.models.families import IMAGE_CHANNELS
from vitscale.models.layers import Mlp
from vitscale.models.t2t_shapes import (
    FIRST_DIM,
    RANDOM_FEATURES,
    SECOND_DIM,
    SPLITS,
    TOKEN_DIM,
    SoftSplit,
    T2tShape,
)

LAYER_NORM_EPS = 1e-5
PERFORMER_DROPOUT = 0.1
"""After the projection and after the MLP of a performer, whatever the rest of the model does; its variant with full
attention has none (models/token_performer.py, token_transformer.py of the release)."""
DIVISION_EPS = 1e-8
"""Keeps the performer's denominator away from zero."""


class TokensToToken(nn.Module):
    """Three soft splits with a layer after the first and the second, and the projection to the backbone's width."""

    def __init__(self, shape: T2tShape, *, backend: Backend, checkpointing: bool) -> None:
        super().__init__()
        self.image_shape = (IMAGE_CHANNELS, *shape.image_hw)
        self.grids = shape.grids
        self.checkpointing = checkpointing
        self.attention1 = _token_layer(shape, FIRST_DIM, backend)
        self.attention2 = _token_layer(shape, SECOND_DIM, backend)
        self.project = nn.Linear(SECOND_DIM, shape.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, Gh*Gw, D], row by row, in the weights' precision."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            needed = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images have shape {list(images.shape)}; [batch, {needed}] is needed")
        x = soft_split(images.to(self.project.weight.dtype), SPLITS[0])  # [B, N, I]
        for layer, grid, split in zip((self.attention1, self.attention2), self.grids[:2], SPLITS[1:], strict=True):
            x = run(layer, x, checkpointing=self.checkpointing)  # [B, N, T]
            x = soft_split(x.mT.reshape(x.shape[0], TOKEN_DIM, *grid), split)
        tokens: Tensor = self.project(x)
        return tokens


def soft_split(x: Tensor, split: SoftSplit) -> Tensor:
    """Windows of [B, T, H, W], row by row: [B, N, I], each ordered channel, row, column."""
    return F.unfold(x, split.kernel, padding=split.padding, stride=split.stride).mT


def run(layer: nn.Module, x: Tensor, *, checkpointing: bool) -> Tensor:
    """Apply a layer; with ``checkpointing`` its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        out: Tensor = checkpoint(layer, x, use_reentrant=False)
    else:
        out = layer(x)
    return out


def _token_layer(shape: T2tShape, inputs: int, backend: Backend) -> nn.Module:
    return TokenPerformer(inputs) if shape.tokens == "performer" else TokenTransformer(inputs, backend=backend)


class TokenTransformer(nn.Module):
    """Pre-norm layer with full attention of one head, which changes the width on the way."""

    def __init__(self, inputs: int, *, backend: Backend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs, eps=LAYER_NORM_EPS)
        self.attn = TokenAttention(inputs, backend=backend)
        self.norm2 = nn.LayerNorm(TOKEN_DIM, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(TOKEN_DIM, TOKEN_DIM, gelu="erf", dropout=0)

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, N, I] -> tokens [B, N, T]."""
        x = self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TokenAttention(nn.Module):
    """One head; the input being wider than the output, the values take its place in the skip connection."""

    def __init__(self, inputs: int, *, backend: Backend) -> None:
        super().__init__()
        # The release's factor: that of the input's width, not of the head's.
        self.scale = inputs**-0.5
        self.backend = backend
        self.qkv = nn.Linear(inputs, 3 * TOKEN_DIM, bias=False)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, N, I] -> tokens [B, N, T]."""
        qkv = self.qkv(x).unflatten(-1, (3, 1, TOKEN_DIM))  # [B, N, 3, 1, T]
        mixed = attention(qkv, scale=self.scale, backend=self.backend)
        out: Tensor = qkv[:, :, 2, 0] + self.proj(mixed)
        return out


class TokenPerformer(nn.Module):
    """The same layer with attention whose cost is linear in the tokens (Performer, arXiv 2009.14794)."""

    w: Tensor
    """Directions of the random features, [M, T]: drawn once, saved with the weights, never learned."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs, eps=LAYER_NORM_EPS)
        self.kqv = nn.Linear(inputs, 3 * TOKEN_DIM)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        self.dropout = nn.Dropout(PERFORMER_DROPOUT)
        self.norm2 = nn.LayerNorm(TOKEN_DIM, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_DIM, TOKEN_DIM),
            nn.GELU(),
            nn.Linear(TOKEN_DIM, TOKEN_DIM),
            nn.Dropout(PERFORMER_DROPOUT),
        )
        self.register_buffer("w", torch.zeros(RANDOM_FEATURES, TOKEN_DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, N, I] -> tokens [B, N, T]."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # keys come first
        x = v + self.dropout(self.proj(performer_attention(q, k, v, self.w)))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def performer_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Softmax attention with exp(q.k) replaced by the product of random features of q and of k.

    Computed in at least fp32, like the release, because the features are exponentials.

    Args:
        q: queries, [B, N, T].
        k: keys, likewise.
        v: values, likewise.
        w: directions of the features, [M, T].

    Returns:
        [B, N, T] in the precision of ``v``.
    """
    precise = torch.promote_types(v.dtype, torch.float32)
    q, k = (positive_features(x.to(precise), w.to(precise)) for x in (q, k))  # [B, N, M]
    total = q @ k.sum(dim=1).unsqueeze(-1)  # [B, N, 1]
    mixed = q @ (k.mT @ v.to(precise))  # [B, N, T]
    return (mixed / (total + DIVISION_EPS)).to(v.dtype)


def positive_features(x: Tensor, w: Tensor) -> Tensor:
    """exp(w.x - |x|^2/2) / sqrt(M): [B, N, T] -> [B, N, M].

    The mean of the product of two vectors' features over standard normal ``w`` is exp(x.y).
    """
    return torch.exp(x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2) / math.sqrt(len(w))
