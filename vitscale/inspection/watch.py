"""The attention of every block while a model runs: projections are looked at where they are made, nothing is changed.

B batch, N tokens (class token and registers, then patches), D embed_dim, H heads, K head dimension, M numbers beside
the projection, (Gh, Gw) patch grid, P patches, R lines of a grid, L tokens of a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vitscale.kernels.attention import attention_statistics
from vitscale.kernels.qk_norm import QkNorm
from vitscale.kernels.reference import split_heads, statistics_dtype
from vitscale.models import t2t
from vitscale.models.blocks import ParallelBlock
from vitscale.models.layers import SelfAttention, Span
from vitscale.models.t2t import T2tVit
from vitscale.models.t2t_shapes import STRIDE, T2tShape
from vitscale.models.vit import VisionTransformer
from vitscale.models.vit_shapes import VitShape

Transformer = VisionTransformer | T2tVit
Visit = Callable[["AttentionLayer", Tensor], None]
"""Is told a layer and its projection [B, N, 3*D], in the order of the layers."""


@dataclass(frozen=True)
class Tokens:
    """How a model's tokens lie in the image."""

    grid: tuple[int, int]
    """Patches down and across."""
    prefix: int
    """Class token and registers, which come first and lie nowhere."""
    pitch_px: int
    """Pixels from one patch to the next."""

    @property
    def patches(self) -> int:
        """Tokens that lie in the image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of a model's backbone."""

    number: int
    """From 0, in the order of the forward pass; an axial block has two."""
    label: str
    """For pictures: number of the block from 1, and what it attends to if not to everything."""
    module: SelfAttention | t2t.Attention
    tokens: Tokens

    @property
    def span(self) -> Span:
        """Which tokens attend to each other."""
        return self.module.span if isinstance(self.module, SelfAttention) else "full"

    def distance_and_entropy(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Of each query: mean distance in patches to what it attends to, and entropy in nats.

        From the fused kernel's statistics; where a bias is added to the scores, of which that knows nothing, from the
        weights themselves.

        Args:
            qkv: [B, N, 3*D].

        Returns:
            Two of [B, H, N]. Weights on tokens that are no patches count as distance 0.
        """
        if self._relative is not None:
            return weighted_distance_and_entropy(self.weights(qkv), self.tokens)
        found = attention_statistics(self._lines(qkv), grid=self._line_grid, norm=self._norm)
        return self._from_lines(found.distance), self._from_lines(found.entropy)

    def weights(self, qkv: Tensor) -> Tensor:
        """Attention of every token to every token, by plain arithmetic: [B, N, 3*D] -> [B, H, N, N], rows sum to 1."""
        lines = self._lines(qkv)
        q, k, _ = split_heads(lines, self._norm)  # [B*R, H, L, K]
        dtype, scale = statistics_dtype(q.dtype), q.shape[-1] ** -0.5
        scores = (q.to(dtype) * scale) @ k.to(dtype).mT
        if self._relative is not None:
            scores = scores + self._relative(q).to(dtype) * scale
        found: Tensor = scores.softmax(dim=-1)  # [B*R, H, L, L]
        if self.span == "full":
            return found
        rows, columns = self.tokens.grid
        number = rows if self.span == "row" else columns
        found = found.reshape(-1, number, *found.shape[1:]).transpose(1, 2)  # [B, H, R, L, L]
        # Between tokens of different lines there is no attention.
        apart = torch.eye(number, dtype=dtype, device=found.device)
        whole: Tensor = torch.einsum("bhrij,rs->bhrisj", found, apart)  # [B, H, R, L, R, L]
        if self.span == "column":
            whole = whole.permute(0, 1, 3, 2, 5, 4)
        return whole.flatten(4, 5).flatten(2, 3)

    @property
    def _norm(self) -> QkNorm | None:
        return self.module.qk_norm() if isinstance(self.module, SelfAttention) else None

    @property
    def _relative(self) -> nn.Module | None:
        return self.module.relative_pos_embed if isinstance(self.module, SelfAttention) else None

    @property
    def _line_grid(self) -> tuple[int, int]:
        rows, columns = self.tokens.grid
        return {"full": (rows, columns), "row": (1, columns), "column": (rows, 1)}[self.span]

    def _lines(self, qkv: Tensor) -> Tensor:
        """[B, N, 3*D] -> the sequences that attend to themselves, [B*R, L, 3, H, K]."""
        heads = qkv.reshape(*qkv.shape[:-1], 3, self.module.num_heads, -1)  # [B, N, 3, H, K]
        if self.span == "full":
            return heads
        grid = heads.reshape(len(heads), *self.tokens.grid, *heads.shape[2:])  # [B, Gh, Gw, 3, H, K]
        return (grid if self.span == "row" else grid.transpose(1, 2)).flatten(0, 1)

    def _from_lines(self, values: Tensor) -> Tensor:
        """[B*R, H, L] -> [B, H, N]."""
        if self.span == "full":
            return values
        rows, columns = self.tokens.grid
        number = rows if self.span == "row" else columns
        lines = values.reshape(-1, number, *values.shape[1:]).transpose(1, 2)  # [B, H, R, L]
        return (lines if self.span == "row" else lines.transpose(2, 3)).flatten(2)


def tokens_of(shape: VitShape | T2tShape) -> Tokens:
    """Where the tokens of the backbone lie: a hybrid's and a T2T-ViT's as far apart as all their strides together."""
    if isinstance(shape, T2tShape):
        return Tokens(shape.grids[2], prefix=1, pitch_px=STRIDE)
    return Tokens(shape.grid, prefix=shape.num_prefix, pitch_px=shape.patch_size)


def attention_layers(model: Transformer) -> list[AttentionLayer]:
    """The attentions of the backbone, in the order of the forward pass.

    Those that T2T-ViT makes its tokens with are not among them: a performer has no weights to look at.
    """
    tokens = tokens_of(model.shape)
    layers: list[AttentionLayer] = []
    for number, block in enumerate(model.blocks, start=1):
        for module in block.modules():
            if isinstance(module, SelfAttention | t2t.Attention):
                span = module.span if isinstance(module, SelfAttention) else "full"
                label = {"full": f"{number}", "row": f"{number} rows", "column": f"{number} columns"}[span]
                layers.append(AttentionLayer(len(layers), label, module, tokens))
    return layers


@contextmanager
def watching(layers: list[AttentionLayer], visit: Visit) -> Iterator[None]:
    """Call ``visit`` with every layer and its projection, whenever the model runs within the block.

    Args:
        layers: of :func:`attention_layers`.
        visit: must not change the projection.
    """

    def look(layer: AttentionLayer, skipped: int, _module: nn.Module, _inputs: object, projected: Tensor) -> None:
        visit(layer, projected[..., skipped:].detach())

    handles = []
    for layer in layers:
        # A parallel block projects to its MLP's hidden layer and to queries, keys and values at once.
        parallel = isinstance(layer.module, ParallelBlock)
        projection = layer.module.in_proj if isinstance(layer.module, ParallelBlock) else layer.module.qkv
        assert isinstance(projection, nn.Linear)
        skipped = projection.out_features - 3 * projection.in_features if parallel else 0
        handles.append(projection.register_forward_hook(partial(look, layer, skipped)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patch_distances(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Distance between every two patches, in patches: fp64, [P, P]."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64, device=device) for side in grid))
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def weighted_distance_and_entropy(weights: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Mean distance in patches and entropy in nats of attention weights: [B, H, N, N] -> two of [B, H, N]."""
    distances = weights.new_zeros(weights.shape[-2:])
    distances[tokens.prefix :, tokens.prefix :] = patch_distances(tokens.grid, weights.device)
    return (weights * distances).sum(-1), torch.special.entr(weights).sum(-1)
