"""T2T-ViT (arXiv 2101.11986), layer for layer as released; the release's parameter names.

B batch, N tokens (patches and the class token), D embed_dim, H heads, K head dimension, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitscale.config.schema import ModelConfig
from vitscale.kernels.attention import Backend, attention
from vitscale.models.init import generator_of
from vitscale.models.layers import DropPath, Mlp
from vitscale.models.t2t_shapes import T2tShape
from vitscale.models.t2t_tokens import LAYER_NORM_EPS, TokensToToken, run
from vitscale.models.vit import stochastic_depth_rates

KERNEL_STD = 0.02
"""Of every dense layer, the head among them, and of the class token. The release truncates at -2 and 2, a hundred
standard deviations away, which is no truncation."""


class T2tVit(nn.Module):
    """Images to logits."""

    pos_embed: Tensor
    """Sines and cosines, [1, N, D]: saved with the weights, never learned."""

    def __init__(self, config: ModelConfig, shape: T2tShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        width = shape.embed_dim
        self.tokens_to_token = TokensToToken(
            shape, backend=config.attention, checkpointing=config.activation_checkpointing
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, shape.num_tokens, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                shape.num_heads,
                shape.mlp_dim,
                dropout=config.dropout,
                drop_path=rate,
                backend=config.attention,
            )
            for rate in stochastic_depth_rates(config.stochastic_depth, shape.depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], already in the value range -> logits [B, C]."""
        logits: Tensor = self.head(self.representation(images))
        return logits

    def representation(self, images: Tensor) -> Tensor:
        """What the head reads, and what the few-shot evaluation takes: [B, 3, H, W] -> [B, D]."""
        return self.forward_features(images)[:, 0]

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm: [B, 3, H, W] -> [B, N, D]."""
        x: Tensor = self.tokens_to_token(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # [B, N, D]
        x = self.dropout(x + self.pos_embed.to(x.dtype))
        for block in self.blocks:
            x = run(block, x, checkpointing=self.config.activation_checkpointing)
        tokens: Tensor = self.norm(x)
        return tokens

    def initial_value(self, name: str, shape: torch.Size, *, seed: int) -> Tensor:
        """Values of one parameter or buffer in fp32 on the CPU, distributed as in the release.

        They are a function of the seed, the name and the shape alone.

        Args:
            name: full name in the state dict.
            shape: of the whole tensor, not of a rank's part.
            seed: of the run.

        Raises:
            ValueError: a name that is none of T2T-ViT's.
        """
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        generator = generator_of(seed, name)
        match name.split("."):
            case ["pos_embed"]:
                return sinusoid(shape[1], shape[2])
            case ["tokens_to_token", "attention1" | "attention2", "w"]:
                return random_directions(shape, generator)
            case ["head", "bias"]:
                return value.fill_(self.config.head_bias)
            case [*_, "norm" | "norm1" | "norm2", "weight"]:
                return value.fill_(1)
            case [*_, "kqv" | "qkv" | "proj" | "project" | "fc1" | "fc2" | "0" | "2" | "head", "weight"] | [
                "cls_token"
            ]:
                return value.normal_(std=KERNEL_STD, generator=generator)
            case [*_, "bias"]:
                return value
        raise ValueError(f"{name!r} has no rule for its initial value; add one beside the others")


class Attention(nn.Module):
    """Multi-head self-attention, queries, keys and values without biases."""

    def __init__(self, embed_dim: int, num_heads: int, *, dropout: float, backend: Backend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, K]
        out: Tensor = self.dropout(self.proj(attention(qkv, backend=self.backend)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block of the backbone."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_dim: int, *, dropout: float, drop_path: float, backend: Backend
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(embed_dim, num_heads, dropout=dropout, backend=backend)
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu="erf", dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, N, D]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


def sinusoid(positions: int, width: int) -> Tensor:
    """Sine (even places) and cosine (odd places) of position / 10000^(2i/width): fp32, [1, positions, width]."""
    place = torch.arange(width, dtype=torch.float64, device="cpu")
    rate = 10000 ** (-2 * (place // 2) / width)
    angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * rate
    return torch.where(place % 2 == 0, angle.sin(), angle.cos()).float()[None]


def random_directions(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Orthogonal rows of length sqrt(rows), uniformly turned: fp32, [M, T] with M <= T."""
    rows, columns = shape
    normal = torch.zeros(columns, rows, dtype=torch.float64, device="cpu").normal_(generator=generator)
    q, r = torch.linalg.qr(normal)
    # With the signs of r's diagonal the distribution is the uniform one, whatever the factorisation prefers.
    directions: Tensor = math.sqrt(rows) * (q * r.diagonal().sign()).T
    return directions.float().contiguous()
