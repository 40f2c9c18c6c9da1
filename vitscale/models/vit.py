"""The Vision Transformer (arXiv 2010.11929), layer for layer as in its JAX reference; timm's parameter names.

B batch, N tokens (class token and registers, where there are any, then patches), D embed_dim, C classes, (H, W) pixels,
P patch side, T packed tokens, S packed images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale.config.schema import ModelConfig
from vitscale.models.blocks import build_block
from vitscale.models.hybrid import HybridEmbed
from vitscale.models.init import initial_value
from vitscale.models.layers import Pack, PatchEmbed, PreLogits
from vitscale.models.masked_patches import MaskedPatches, corrupt, draw_corruption, patch_colours
from vitscale.models.pooling import AttentionPool, mean_pool
from vitscale.models.positions import Places, insert_zeros, positions
from vitscale.models.vit_options import check_packable
from vitscale.models.vit_shapes import VitShape, resolve

BACKBONE = "patch_embed.backbone."


class VisionTransformer(nn.Module):
    """Images to logits.

    The class token has its slot in a learned position embedding, and the final norm comes before every kind of
    pooling: both as in the JAX reference. Registers come after the class token, have no position, and are read by
    nobody at the end.
    """

    def __init__(self, config: ModelConfig, shape: VitShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        width = shape.embed_dim
        self.patch_embed = _patch_embed(shape, activation_checkpointing=config.activation_checkpointing)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if shape.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, width)) if shape.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if shape.masked_patches else None
        own = shape.position_at == "every_block"
        self.pos_embed = None if own else _position_embedding(shape)
        self.block_pos_embed = _block_position_embeddings(shape) if own else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            build_block(config, shape, drop_path=rate)
            for rate in stochastic_depth_rates(config.stochastic_depth, shape.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn_pool = AttentionPool(config, shape) if shape.map_pool else None
        self.pre_logits = PreLogits(width) if shape.representation_layer else nn.Identity()
        self.head = nn.Linear(width, shape.num_classes)

    def forward(self, images: Tensor) -> Tensor | MaskedPatches:
        """Images [B, 3, H, W], already in the value range -> logits [B, C].

        With ``head: masked_patches`` the patches are corrupted in training, and logits come with their labels;
        otherwise logits are those of the patches as they are, [B, Gh*Gw, C].
        """
        if self.mask_token is not None:
            return self._forward_patches(images, self.mask_token)
        logits: Tensor = self.head(self.representation(images))
        return logits

    def representation(self, images: Tensor) -> Tensor:
        """What the head reads, and what the few-shot evaluation takes: [B, 3, H, W] -> [B, D]."""
        hidden: Tensor = self.pre_logits(self._pool(self.forward_features(images)))
        return hidden

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens after the final norm, registers included: [B, 3, H, W] -> [B, N, D]."""
        return self._encode(self._prefixed(self.patch_embed(images)))

    def forward_packed(
        self, patches: Tensor, rows: Tensor, columns: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Images of different sizes, one after another (NaViT, arXiv 2307.06304) -> logits [S, C].

        What an image gets does not depend on the others: on a CPU bit for bit, for one number of tokens and of images,
        which packs are filled up to; matrix products with another number of rows may round differently.

        Args:
            patches: [T, P*P*3], each by row, column and channel, already in the value range.
            rows: [T], where each patch lies in its image, from 0 at the top; within the model's grid where positions
                are learned.
            columns: [T], likewise, from 0 at the left.
            cu_seqlens: [S+1], int32 or int64: where each image starts, then T. One without patches is allowed.
            max_seqlen: patches of the largest image, or more.

        Raises:
            ConfigError: the model has options that know one grid only.
            ValueError: patches of another size than the model's, or ``cu_seqlens`` does not fit them.
        """
        check_packable(self.config)
        assert isinstance(self.patch_embed, PatchEmbed)
        ends = cu_seqlens[1:].contiguous()
        image = torch.searchsorted(ends, torch.arange(len(patches), device=ends.device, dtype=ends.dtype), right=True)
        pack = Pack(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, image=image)
        tokens = self._encode(self.patch_embed.project(patches), Places(rows=rows, columns=columns), pack)
        logits: Tensor = self.head(self.pre_logits(self._pool(tokens, pack)))
        return logits

    def position_vectors(self, like: Tensor, places: Places | None = None) -> Tensor | None:
        """What is added to all tokens once, or the same in every block: [1, N, D], or [T, D] of ``places``.

        Args:
            like: vectors that are computed take its type and its device.
            places: of packed tokens.
        """
        if self.pos_embed is None:
            return None
        if isinstance(self.pos_embed, nn.Parameter):
            return insert_zeros(self.pos_embed, int(self.shape.class_token), self.shape.registers)
        position: Tensor = self.pos_embed(like, places)
        return position

    def initial_value(self, name: str, shape: torch.Size, *, seed: int) -> Tensor:
        """Values of one parameter in fp32 on the CPU, a function of the seed, the name and the shape alone.

        Args:
            name: full name in the state dict.
            shape: of the whole parameter, not of a rank's part.
            seed: of the run.

        Raises:
            ValueError: a name that is none of this model's kind.
        """
        if name.startswith(BACKBONE):
            return HybridEmbed.initial_value(name, shape, seed=seed)
        return initial_value(name, shape, seed=seed, head_bias=self.config.head_bias)

    def _forward_patches(self, images: Tensor, mask_token: Tensor) -> Tensor | MaskedPatches:
        x: Tensor = self.patch_embed(images)  # [B, Gh*Gw, D]
        if not self.training:
            return self._patch_logits(x)
        corruption = draw_corruption(x.shape[0], x.shape[1], x.device)
        labels = corruption.labels(patch_colours(images, self.shape.patch_size))
        return MaskedPatches(self._patch_logits(corrupt(x, mask_token, corruption)), labels)

    def _patch_logits(self, x: Tensor) -> Tensor:
        """Embedded patches [B, Gh*Gw, D] -> logits of each, [B, Gh*Gw, C]."""
        tokens = self._encode(self._prefixed(x))[:, self.shape.num_prefix :]
        logits: Tensor = self.head(self.pre_logits(tokens))
        return logits

    def _prefixed(self, x: Tensor) -> Tensor:
        """Embedded patches [B, Gh*Gw, D] -> tokens [B, N, D]."""
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat((*prefix, x), dim=1) if prefix else x

    def _encode(self, x: Tensor, places: Places | None = None, pack: Pack | None = None) -> Tensor:
        """Embedded tokens -> tokens after the final norm, both [B, N, D] or packed [T, D]."""
        position = self.position_vectors(x, places)
        shared = self.shape.position_at == "every_block_shared"
        if position is not None and not shared:
            x = x + position
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            if position is not None and shared:
                x = x + position
            elif self.block_pos_embed is not None:
                x = x + self.block_pos_embed[index](x, places)
            x = self._run(block, x, pack)
        tokens: Tensor = self.norm(x)
        return tokens

    def _run(self, block: nn.Module, x: Tensor, pack: Pack | None) -> Tensor:
        inputs = (x,) if pack is None else (x, pack)
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        else:
            out = block(*inputs)
        return out

    def _pool(self, tokens: Tensor, pack: Pack | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D]; packed [T, D] -> [S, D]."""
        if self.shape.class_token:
            return tokens[:, 0]
        patches = tokens if self.reg_token is None else tokens[:, self.shape.num_prefix :]
        if self.attn_pool is None:
            return mean_pool(patches, pack)
        pooled: Tensor = self.attn_pool(patches, pack)
        return pooled


def _patch_embed(shape: VitShape, *, activation_checkpointing: bool) -> PatchEmbed | HybridEmbed:
    if shape.stem is not None:
        return HybridEmbed(shape.embed_dim, shape.stem, shape.grid, activation_checkpointing=activation_checkpointing)
    return PatchEmbed(shape.embed_dim, shape.patch_size, shape.grid)


def _position_embedding(shape: VitShape) -> nn.Parameter | nn.Module | None:
    if shape.position == "learned":
        # Under the name, and so in the place, that public weights have it in.
        return nn.Parameter(torch.zeros(1, shape.num_patches + shape.class_token, shape.embed_dim))
    return positions(shape)


def _block_position_embeddings(shape: VitShape) -> nn.ModuleList:
    tables = (positions(shape) for _ in range(shape.depth))
    return nn.ModuleList(table for table in tables if table is not None)


def stochastic_depth_rates(rate: float, depth: int) -> list[float]:
    """Chance to drop each block: from 0 at the first to ``rate`` at the last (AugReg, arXiv 2106.10270)."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def build_vit(config: ModelConfig, image_hw: tuple[int, int]) -> VisionTransformer:
    """The model for images of one size. Built under ``torch.device("meta")`` it takes no memory.

    Its weights are not the paper's yet: :func:`vitscale.models.init.initialize` sets them.

    Raises:
        ConfigError: unknown variant, or dimensions that do not fit each other.
    """
    return VisionTransformer(config, resolve(config, image_hw))
