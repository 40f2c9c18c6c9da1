"""What the first layer and the position embedding have learned (ViT paper, figure 7, left and centre).

D embed_dim, K kernel side, C channels, (Gh, Gw) patch grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.inspection.watch import Transformer
from vitscale.models.hybrid import HybridEmbed, ResNet, Stem
from vitscale.models.layers import PatchEmbed
from vitscale.models.resnet_layers import standardized
from vitscale.models.t2t import T2tVit
from vitscale.models.t2t_shapes import SPLITS, TOKEN_DIM
from vitscale.models.t2t_tokens import TokenPerformer, TokenTransformer
from vitscale.models.vit import VisionTransformer

PAPER_COMPONENTS = 28


@dataclass(frozen=True)
class FilterComponents:
    """Principal components of a model's first filters."""

    components: NDArray[np.float64]
    """[n, K, K, 3], each of length 1, its number of the largest size positive; most important first."""
    explained: NDArray[np.float64]
    """[n], share of the filters' variance."""
    of: str
    """What the filters are."""
    filters: int


@dataclass(frozen=True)
class PositionSimilarity:
    """Cosine similarity of every position's embedding to every other's."""

    similarity: NDArray[np.float64]
    """[Gh, Gw, Gh, Gw]; NaN where an embedding is zero, and so has no direction."""
    table: str
    """Which embedding, for file names: "input", or "block_03" where every block has one."""
    of: str
    """What the embedding is."""


def filter_components(model: Transformer, count: int = PAPER_COMPONENTS) -> FilterComponents:
    """Principal components over the filters of the first layer, at most ``count`` of them.

    The first layer of a hybrid is its ResNet's root; of a T2T-ViT, what makes the values of the first tokens from
    windows of the image.
    """
    kernels, of = _first_filters(model)
    return FilterComponents(*principal_components(kernels, count), of=of, filters=len(kernels))


def principal_components(kernels: Tensor, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions in which filters [D, C, K, K] differ most from their mean.

    Returns:
        Components [n, K, K, C] and their shares of the variance [n]; ``n`` is at most ``count``, and at most the
        number of directions that D filters can differ in.
    """
    flat = kernels.double().permute(0, 2, 3, 1).flatten(1).cpu().numpy()  # [D, K*K*C]
    _, sizes, directions = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    count = min(count, len(flat) - 1, flat.shape[1])
    variance = sizes**2
    directions = directions[:count]
    # A component's sign means nothing; this one makes the same picture every time.
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    side = kernels.shape[-1]
    components = (directions * np.sign(largest)).reshape(count, side, side, kernels.shape[1])
    total = variance.sum()
    return components, variance[:count] / total if total else np.zeros(count)


def _first_filters(model: Transformer) -> tuple[Tensor, str]:
    """Kernels [D, 3, K, K] and what they are."""
    if isinstance(model, T2tVit):
        return _soft_split_filters(model), "the first soft split's values (it has no patch embedding)"
    embed = model.patch_embed
    if isinstance(embed, PatchEmbed):
        return embed.proj.weight.detach(), "the patch embedding"
    assert isinstance(embed, HybridEmbed)
    root = embed.backbone.stem if isinstance(embed.backbone, ResNet) else embed.backbone
    assert isinstance(root, Stem)
    conv = root.conv
    return standardized(conv.weight.detach(), conv.kind), "the ResNet's root (a hybrid's patches are of its features)"


def _soft_split_filters(model: T2tVit) -> Tensor:
    """What the values of the first token layer are of a window's pixels, but for the norm's mean and deviation."""
    layer = model.tokens_to_token.attention1
    if isinstance(layer, TokenPerformer):
        weight = layer.kqv.weight
    else:
        assert isinstance(layer, TokenTransformer)
        weight = layer.attn.qkv.weight
    assert isinstance(layer.norm1, torch.nn.LayerNorm)
    values = weight[-TOKEN_DIM:] * layer.norm1.weight  # both orders, k q v and q k v, end with the values
    return values.detach().reshape(TOKEN_DIM, -1, SPLITS[0].kernel, SPLITS[0].kernel)


@torch.no_grad()
def position_similarities(model: Transformer) -> list[PositionSimilarity]:
    """One for every table of positions; none where a model adds no vectors (position none or relative)."""
    if isinstance(model, T2tVit):
        vectors = model.pos_embed[0, 1:]
        return [_similarity(vectors, model.shape.grids[2], "input", "fixed sines of the place in the sequence")]
    kind = {
        "learned": "learned for each place",
        "learned_2d": "learned for each row and column",
        "factorized": "learned for rows and columns, and added",
        "sincos_2d": "fixed sines of row and column",
    }.get(model.shape.position)
    if kind is None:
        return []
    return [
        _similarity(vectors[0, model.shape.num_prefix :], model.shape.grid, table, kind)
        for table, vectors in _tables(model)
    ]


def _tables(model: VisionTransformer) -> list[tuple[str, Tensor]]:
    """Names, and vectors of all tokens [1, N, D]."""
    like = next(model.parameters())
    if model.block_pos_embed is not None:
        return [(f"block_{number:02}", table(like)) for number, table in enumerate(model.block_pos_embed, start=1)]
    vectors = model.position_vectors(like)
    assert vectors is not None
    return [("input", vectors)]


def _similarity(vectors: Tensor, grid: tuple[int, int], table: str, of: str) -> PositionSimilarity:
    return PositionSimilarity(cosine_similarity(vectors, grid), table, of)


def cosine_similarity(vectors: Tensor, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Between vectors [Gh*Gw, D] of a grid: [Gh, Gw, Gh, Gw], NaN where one of them is zero."""
    values = vectors.double().cpu().numpy()
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    directions = np.divide(values, lengths, out=np.full_like(values, np.nan), where=lengths > 0)
    similarity: NDArray[np.float64] = np.clip(directions @ directions.T, -1, 1).reshape(*grid, *grid)
    return similarity
