"""Where a model looks: mean attention distance (ViT paper, figures 7 and 11) and attention rollout (figures 6 and 14).

B batch, N tokens (class token and registers, then patches), D embed_dim, H heads, L layers, (Gh, Gw) patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitscale.inspection.watch import AttentionLayer, Tokens, Transformer, attention_layers, patch_distances, watching
from vitscale.kernels.reference import statistics_dtype
from vitscale.models.vit import VisionTransformer


@dataclass(frozen=True)
class AttentionDistance:
    """Of every head of every layer, the mean over all patches of all images."""

    distance_px: NDArray[np.float64]
    """[L, H]: how far away what a patch attends to lies. Attention to class token and registers counts as 0."""
    entropy_nats: NDArray[np.float64]
    """[L, H]: 0 where a patch attends to one token, ln N where to all alike."""
    layers: tuple[str, ...]
    uniform_px: float | None
    """The distance of a head that attends to all tokens alike; None where rows and columns attend to themselves."""
    images: int


@dataclass(frozen=True)
class Rollout:
    """How much of every patch arrives where the head reads (Abnar & Zuidema, arXiv 2005.00928)."""

    maps: NDArray[np.float64]
    """[images, Gh, Gw]; what is missing to a sum of 1 comes from class token and registers."""
    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    """[images, height, width, 3], as the model saw them."""
    read_by: str
    """Whose attention it is: of the class token, of the mean over the patches, or of the attention pooling."""


@dataclass(frozen=True)
class ImageBatch:
    """Some images and what they are called."""

    names: list[str]
    images: Tensor
    """uint8 [B, 3, H, W]."""


class AttentionWatch:
    """Sums what is asked of the attention over batches of images.

    Args:
        model: in evaluation mode.
        overlays: of so many images, evenly spread, the rollout is computed, too; it takes N*N numbers of memory for
            each of a batch.
        images: that will come.
    """

    def __init__(self, model: Transformer, *, overlays: int, images: int) -> None:
        self._model = model
        self._layers = attention_layers(model)
        self._tokens = self._layers[0].tokens
        self._overlays, self._expected = min(overlays, images), images
        heads = self._layers[0].module.num_heads
        self._sums = torch.zeros(2, len(self._layers), heads, dtype=torch.float64)
        self._images = 0
        self._maps: list[Tensor] = []
        self._names: list[str] = []
        self._pixels: list[Tensor] = []

    @torch.inference_mode()
    def add(self, batch: ImageBatch, values: Tensor) -> None:
        """Run the model on a batch.

        Args:
            batch: for the names and the pixels of the overlays.
            values: its images as the model takes them, [B, 3, H, W], on the model's device.
        """
        wanted = self._wanted(len(batch.names))
        total: Tensor | None = None
        pooling: list[Tensor] = []

        def visit(layer: AttentionLayer, qkv: Tensor) -> None:
            nonlocal total
            for index, found in enumerate(layer.distance_and_entropy(qkv)):
                of_patches = found[:, :, self._tokens.prefix :].double().mean(-1)  # [B, H]
                self._sums[index, layer.number] += of_patches.sum(0).cpu()
            if wanted:
                total = roll_on(total, layer.weights(qkv[wanted]))

        with watching(self._layers, visit), _watching_pool(self._model, pooling):
            self._model(values)
        self._images += len(batch.names)
        if total is not None:
            reading = _reading(self._model, self._tokens, [weights[wanted] for weights in pooling], total)
            self._maps.append(read_patches(total, reading, self._tokens).cpu())
            self._names += [batch.names[place] for place in wanted]
            self._pixels.append(batch.images[wanted].permute(0, 2, 3, 1))

    def _wanted(self, count: int) -> list[int]:
        """Places of the next batch whose images are overlaid."""
        wanted: list[int] = []
        for place in range(count):
            due = (self._images + place) * self._overlays // self._expected + 1
            if len(self._names) + len(wanted) < min(due, self._overlays):
                wanted.append(place)
        return wanted

    def distance(self) -> AttentionDistance:
        """The means so far; there must have been an image."""
        patches, pitch = self._tokens.patches, self._tokens.pitch_px
        distance, entropy = (self._sums / self._images).numpy()
        whole = all(layer.span == "full" for layer in self._layers)
        to_a_patch = patches / (patches + self._tokens.prefix)
        return AttentionDistance(
            distance_px=distance * pitch,
            entropy_nats=entropy,
            layers=tuple(layer.label for layer in self._layers),
            uniform_px=float(patch_distances(self._tokens.grid).mean()) * pitch * to_a_patch if whole else None,
            images=self._images,
        )

    def rollout(self) -> Rollout:
        """Of the first images; there must have been one."""
        return Rollout(
            maps=torch.cat(self._maps).double().numpy(),
            names=tuple(self._names),
            pixels=torch.cat(self._pixels).numpy(),
            read_by=reader(self._model),
        )


def with_residual(weights: Tensor) -> Tensor:
    """What a layer makes of its tokens: attention averaged over heads, half of it and half of the token itself.

    Args:
        weights: [B, H, N, N], rows sum to 1.

    Returns:
        [B, N, N], rows sum to 1.
    """
    mean = weights.mean(dim=1)
    mixing = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return mixing / mixing.sum(dim=-1, keepdim=True)


def roll_on(total: Tensor | None, weights: Tensor) -> Tensor:
    """Share of every input token in every output token of the layers so far and one more: [B, N, N].

    Args:
        total: of the layers before, [B, N, N]; None before the first.
        weights: of the next layer, [B, H, N, N].
    """
    mixing = with_residual(weights)
    return mixing if total is None else mixing @ total


def read_patches(total: Tensor, reading: Tensor, tokens: Tokens) -> Tensor:
    """Shares of the patches in what the head reads.

    Args:
        total: [B, N, N], of :func:`roll_on`.
        reading: [B, N], how much of each output token the head reads.
        tokens: how they lie.

    Returns:
        [B, Gh, Gw].
    """
    shares = (reading[:, None] @ total)[:, 0, tokens.prefix :]
    return shares.reshape(-1, *tokens.grid)


def reader(model: Transformer) -> str:
    """What the head reads of the tokens: ``"class token"``, ``"mean over patches"`` or ``"attention pooling"``.

    A head that reads every patch for itself counts as reading their mean.
    """
    if not isinstance(model, VisionTransformer):
        return "class token"
    if model.shape.map_pool:
        return "attention pooling"
    return "class token" if model.shape.class_token and not model.shape.masked_patches else "mean over patches"


def _reading(model: Transformer, tokens: Tokens, pooling: list[Tensor], total: Tensor) -> Tensor:
    """How much of each output token the head reads, [B, N], for the images of ``total`` [B, N, N]."""
    reading = total.new_zeros(total.shape[:2])
    kind = reader(model)
    if kind == "class token":
        reading[:, 0] = 1
    else:
        reading[:, tokens.prefix :] = pooling[0] if kind == "attention pooling" else 1 / tokens.patches
    return reading


@contextmanager
def _watching_pool(model: Transformer, found: list[Tensor]) -> Iterator[None]:
    """Keep the weights of the attention pooling, averaged over heads: [B, patches] for each run of the model."""
    pool = model.attn_pool if isinstance(model, VisionTransformer) else None
    if pool is None:
        yield
        return

    def look(_module: object, _inputs: object, keys_values: Tensor) -> None:
        query = pool.q(pool.latent).reshape(pool.num_heads, -1)  # [H, K]
        keys = keys_values.reshape(*keys_values.shape[:-1], 2, pool.num_heads, -1)[:, :, 0]  # [B, P, H, K]
        dtype = statistics_dtype(keys.dtype)
        scores = torch.einsum("hk,bphk->bhp", query.to(dtype) * query.shape[-1] ** -0.5, keys.to(dtype))
        found.append(scores.softmax(dim=-1).mean(dim=1))

    handle = pool.kv.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
