"""The Vision Transformer (arXiv 2010.11929), layer for layer as in its JAX reference; timm's parameter names.

B batch, N tokens (patches, plus the class token where there is one), D embed_dim, C classes, (H, W) pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.config.schema import ModelConfig
from vitscale.models.layers import Block, PatchEmbed, PreLogits
from vitscale.models.shapes import VitShape, resolve_shape


class VisionTransformer(nn.Module):
    """Images to logits.

    The class token has its slot in the position embedding, and the final norm comes before either kind of
    pooling: both as in the JAX reference.
    """

    def __init__(self, config: ModelConfig, shape: VitShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        width = shape.embed_dim
        self.patch_embed = PatchEmbed(width, shape.patch_size, shape.grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if shape.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.num_tokens, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                shape.num_heads,
                shape.mlp_dim,
                layer_norm_eps=config.layer_norm_eps,
                gelu=config.gelu,
                dropout=config.dropout,
                drop_path=rate,
                backend=config.attention,
            )
            for rate in stochastic_depth_rates(config.stochastic_depth, shape.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pre_logits = PreLogits(width) if shape.representation_layer else nn.Identity()
        self.head = nn.Linear(width, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], already in the value range -> logits [B, C]."""
        logits: Tensor = self.head(self.representation(images))
        return logits

    def representation(self, images: Tensor) -> Tensor:
        """What the head reads, and what the few-shot evaluation takes: [B, 3, H, W] -> [B, D]."""
        tokens = self.forward_features(images)
        pooled = tokens[:, 0] if self.shape.class_token else tokens.mean(dim=1)  # [B, D]
        hidden: Tensor = self.pre_logits(pooled)
        return hidden

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm: [B, 3, H, W] -> [B, N, D]."""
        x: Tensor = self.dropout(self._embed(images))
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        tokens: Tensor = self.norm(x)
        return tokens

    def _embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  # [B, N, D]
        return x + self.pos_embed


def stochastic_depth_rates(rate: float, depth: int) -> list[float]:
    """Chance to drop each block: from 0 at the first to ``rate`` at the last (AugReg, arXiv 2106.10270)."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def build_vit(config: ModelConfig, image_hw: tuple[int, int]) -> VisionTransformer:
    """The model for images of one size. Built under ``torch.device("meta")`` it takes no memory.

    Its weights are not the paper's yet: :func:`vitscale.models.init.initialize` sets them.

    Raises:
        ConfigError: unknown variant, or dimensions that do not fit each other.
    """
    return VisionTransformer(config, resolve_shape(config, image_hw))
