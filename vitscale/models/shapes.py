"""Shapes of the Vision Transformers as plain numbers: variants, token grid, parameters, FLOPs.

The run plan prints these, so this file does not import torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError

IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Size:
    """One row of the variant table."""

    embed_dim: int
    depth: int
    mlp_dim: int
    num_heads: int


# Sources: [VP] ViT paper, arXiv 2010.11929, table 1; [AR] AugReg, arXiv 2106.10270, table 1;
# [SV] Scaling ViT, arXiv 2106.04560, table 2; [SO] SoViT, arXiv 2305.13035; [BV] big_vision models/vit.py.
SIZES: dict[str, Size] = {
    "mu": Size(32, 1, 128, 2),  # [BV], for tests
    "Ti": Size(192, 12, 768, 3),  # [AR]
    "s": Size(256, 6, 1024, 8),  # [SV]
    "S": Size(384, 12, 1536, 6),  # [AR]
    "M": Size(512, 12, 2048, 8),  # [BV]
    "B": Size(768, 12, 3072, 12),  # [VP]
    "L": Size(1024, 24, 4096, 16),  # [VP]
    "So400m": Size(1152, 27, 4304, 16),  # [SO]
    "H": Size(1280, 32, 5120, 16),  # [VP]
    "g": Size(1408, 40, 6144, 16),  # [SV]
    "g-opt": Size(1536, 40, 6144, 16),  # [BV]
    "G": Size(1664, 48, 8192, 16),  # [SV]
    "G-opt": Size(1536, 48, 8192, 16),  # [BV]
    "e": Size(1792, 56, 15360, 16),  # [BV]
    # ViT-22B, arXiv 2302.05442, table 1: the shape only, in the plain sequential block of the ViT paper.
    "22B": Size(6144, 48, 24576, 48),
}


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """Every dimension of one model at one image size."""

    variant: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    grid: tuple[int, int]
    """Patches down and across."""
    class_token: bool
    representation_layer: bool
    num_classes: int

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: the patches and, where there is one, the class token."""
        return self.num_patches + self.class_token

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return IMAGE_CHANNELS * self.patch_size**2

    @property
    def num_parameters(self) -> int:
        """Learned numbers, head included."""
        width = self.embed_dim
        embedding = _dense(self.patch_dim, width) + (self.num_tokens + self.class_token) * width
        attention = _dense(width, 3 * width) + _dense(width, width)
        mlp = _dense(width, self.mlp_dim) + _dense(self.mlp_dim, width)
        norm = 2 * width
        representation = _dense(width, width) if self.representation_layer else 0
        head = representation + _dense(width, self.num_classes)
        return embedding + self.depth * (2 * norm + attention + mlp) + norm + head

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-add of a matrix product.

        The convention of Scaling ViT, arXiv 2106.04560, table 2. A training step takes three times as many.
        """
        width, tokens = self.embed_dim, self.num_tokens
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width
        mlp = 2 * tokens * width * self.mlp_dim
        head = width**2 * self.representation_layer + width * self.num_classes
        return 2 * (self.num_patches * self.patch_dim * width + self.depth * (attention + mlp) + head)


def _dense(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def resolve_shape(config: ModelConfig, image_hw: tuple[int, int]) -> VitShape:
    """The variant's dimensions with the configuration's own ones in their place.

    Args:
        config: names the variant and overrides parts of it.
        image_hw: height and width of the input in pixels.

    Raises:
        ConfigError: unknown variant, or dimensions that do not fit each other.
    """
    size, patch_size = _parse_variant(config.variant)
    embed_dim = config.embed_dim or size.embed_dim
    num_heads = config.num_heads or size.num_heads
    _check_heads(embed_dim, num_heads)
    return VitShape(
        variant=config.variant,
        embed_dim=embed_dim,
        depth=config.depth or size.depth,
        num_heads=num_heads,
        mlp_dim=config.mlp_dim or size.mlp_dim,
        patch_size=patch_size,
        grid=_patch_grid(image_hw, patch_size, config.variant),
        class_token=config.pool == "token",
        representation_layer=config.representation_layer,
        num_classes=config.num_classes,
    )


def _parse_variant(variant: str) -> tuple[Size, int]:
    match = re.fullmatch(r"ViT-([\w-]+)/([1-9][0-9]*)", variant, re.ASCII)
    if match and match[1] in SIZES:
        return SIZES[match[1]], int(match[2])
    raise ConfigError(
        f"model.variant {variant!r} is not known; ViT-SIZE/PATCH is allowed, SIZE being one of "
        f"{', '.join(SIZES)} (case matters) and PATCH a side in pixels; "
        f"did you mean {_closest_variant(variant)!r}?"
    )


def _closest_variant(variant: str) -> str:
    patch = re.search(r"(?<![0-9])[1-9][0-9]?$", variant)
    candidates = [f"ViT-{name}/{patch[0] if patch else 16}" for name in SIZES]

    def likeness(candidate: str) -> tuple[int, float, float]:
        folded = variant.casefold().replace("_", "-"), candidate.casefold()
        # The beginning counts first, so that "ViT-Base" is closest to "ViT-B"; case only breaks ties.
        beginning = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*folded, strict=False)))
        exact = SequenceMatcher(None, variant, candidate).ratio()
        return beginning, SequenceMatcher(None, *folded).ratio(), exact

    return max(candidates, key=likeness)


def _check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads == 0:
        return
    divisors = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
    nearest = sorted(sorted(divisors, key=lambda heads: abs(heads - num_heads))[:2])
    raise ConfigError(
        f"model.embed_dim {embed_dim} is not divisible by model.num_heads {num_heads}; every head takes "
        f"an equal part; set model.num_heads to {' or '.join(map(str, nearest))}, or another model.embed_dim"
    )


def _patch_grid(image_hw: tuple[int, int], patch_size: int, variant: str) -> tuple[int, int]:
    height, width = image_hw
    if min(image_hw) < patch_size:
        raise ConfigError(
            f"data.image_size {height}x{width} is smaller than one patch of {variant}; both sides must be "
            f"at least {patch_size}; enlarge data.image_size or take a model.variant with smaller patches"
        )
    if height % patch_size or width % patch_size:
        below = [side // patch_size * patch_size for side in image_hw]
        above = [-(-side // patch_size) * patch_size for side in image_hw]
        raise ConfigError(
            f"data.image_size {height}x{width} cannot be cut into the patches of {variant}; both sides "
            f"must be multiples of {patch_size}; set data.image_size to {below} or {above}"
        )
    return height // patch_size, width // patch_size
