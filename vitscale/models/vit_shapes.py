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
from vitscale.models.families import IMAGE_CHANNELS, check_heads, dense
from vitscale.models.hybrid_shapes import StemShape, parse_hybrid
from vitscale.models.vit_options import check_axial, check_masked_patches, check_position


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
    # ViT-22B, arXiv 2302.05442, table 1: the shape only; its block takes model.block, qk_norm, qkv_bias and pool.
    "22B": Size(6144, 48, 24576, 48),
}
# Those of the papers; any other side of a patch is allowed.
_PUBLISHED = "Ti/16 s/28 s/16 S/32 S/16 B/32 B/28 B/16 B/8 L/32 L/16 So400m/14 H/14 g/14 G/14 e/14 22B/14"
VARIANTS: tuple[str, ...] = tuple(f"ViT-{name}" for name in _PUBLISHED.split())

# What may be meant for one of them: a size's name alone, too.
_LIKE_VIT = re.compile(rf"vit|deit|(?:{'|'.join(map(re.escape, SIZES))})[/-]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """Every dimension of one model at one image size."""

    variant: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    """Side of what one token sees, in pixels; a hybrid's is that of its ResNet and its patch together."""
    grid: tuple[int, int]
    """Patches down and across."""
    class_token: bool
    representation_layer: bool
    num_classes: int
    stem: StemShape | None = None
    """Of a hybrid: what cuts its feature map, instead of the image, into patches."""
    map_pool: bool = False
    registers: int = 0
    position: str = "learned"
    position_at: str = "input"
    axial: bool = False
    parallel: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    masked_patches: bool = False
    """The head reads every patch, and a learned embedding stands for those that it must not see."""

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: the class token, then the registers."""
        return self.class_token + self.registers

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: the patches and, where there are any, the class token and the registers."""
        return self.num_patches + self.num_prefix

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def feature_dim(self) -> int:
        """Width of what the head reads."""
        return self.embed_dim

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch, of the image or of a hybrid's feature map."""
        if self.stem is None:
            return IMAGE_CHANNELS * self.patch_size**2
        return self.stem.channels * (self.patch_size // self.stem.stride) ** 2

    @property
    def spans(self) -> tuple[int, ...]:
        """Patches that attend to one another, for each attention of one of ``depth`` blocks."""
        return (self.grid[1], self.grid[0]) if self.axial else (self.num_patches,)

    @property
    def num_parameters(self) -> int:
        """Learned numbers, head included."""
        width = self.embed_dim
        embedding = dense(self.patch_dim, width) + self.num_prefix * width
        embedding += self.stem.num_parameters if self.stem is not None else 0
        embedding += width * self.masked_patches
        positions = self._position_parameters * (self.depth if self.position_at == "every_block" else 1)
        blocks = self.depth * sum(self._block_parameters(span) for span in self.spans)
        representation = dense(width, width) if self.representation_layer else 0
        head = self._pool_parameters + representation + dense(width, self.num_classes)
        return embedding + positions + blocks + 2 * width + head

    @property
    def _position_parameters(self) -> int:
        """Of one table that is added to the tokens."""
        match self.position:
            case "learned":
                return (self.num_patches + self.class_token) * self.embed_dim
            case "learned_2d":
                return sum(self.grid) * self.embed_dim // 2
            case "factorized":
                return sum(self.grid) * self.embed_dim
        return 0

    def _block_parameters(self, span: int) -> int:
        width = self.embed_dim
        attention = dense(width, 3 * width) + dense(width, width) - (0 if self.qkv_bias else 3 * width)
        attention += 2 * self.head_dim * self.qk_norm
        attention += (2 * span - 1) * self.head_dim if self.position == "relative" else 0
        norms = 2 * width * (1 if self.parallel else 2)
        return norms + attention + self._mlp_parameters

    @property
    def _mlp_parameters(self) -> int:
        return dense(self.embed_dim, self.mlp_dim) + dense(self.mlp_dim, self.embed_dim)

    @property
    def _pool_parameters(self) -> int:
        width = self.embed_dim
        # The query; its projection, that of keys and values, that of the output; the norm; the MLP.
        attention = width + 2 * dense(width, width) + dense(width, 2 * width) + 2 * width
        return attention + self._mlp_parameters if self.map_pool else 0

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-add of a matrix product.

        The convention of Scaling ViT, arXiv 2106.04560, table 2. A training step takes three times as many.
        """
        width = self.embed_dim
        embedding = self.num_patches * self.patch_dim * width
        blocks = self.depth * sum(self._block_products(span) for span in self.spans)
        # The head reads one token, or every patch.
        read = self.num_patches if self.masked_patches else 1
        head = self._pool_products + read * width * (width * self.representation_layer + self.num_classes)
        stem = self.stem.forward_flops(self.image_hw) if self.stem is not None else 0
        return 2 * (embedding + blocks + head) + stem

    def _block_products(self, span: int) -> int:
        """Multiply-adds."""
        width, tokens = self.embed_dim, self.num_tokens
        attention = 4 * tokens * width**2 + 2 * tokens * (span + self.num_prefix) * width
        offsets = self.num_patches * (2 * span - 1) * width if self.position == "relative" else 0
        return attention + offsets + 2 * tokens * width * self.mlp_dim

    @property
    def _pool_products(self) -> int:
        """Multiply-adds: projections of the query, of keys and values, of the output; attention; MLP."""
        width, patches = self.embed_dim, self.num_patches
        products = 2 * (1 + patches) * width**2 + 2 * patches * width + 2 * width * self.mlp_dim
        return products if self.map_pool else 0


def resolve(config: ModelConfig, image_hw: tuple[int, int]) -> VitShape:
    """The variant's dimensions with the configuration's own ones in their place.

    Args:
        config: names the variant and overrides parts of it.
        image_hw: height and width of the input in pixels.

    Raises:
        ConfigError: unknown variant, dimensions that do not fit each other, or options that exclude each other.
    """
    size, patch_size, stem = _parse_variant(config.variant)
    embed_dim = config.embed_dim or size.embed_dim
    num_heads = config.num_heads or size.num_heads
    check_heads(embed_dim, num_heads)
    check_position(config, embed_dim)
    check_axial(config)
    grid = _patch_grid(image_hw, patch_size, config.variant)
    check_masked_patches(config, grid[0] * grid[1])
    return VitShape(
        variant=config.variant,
        embed_dim=embed_dim,
        depth=config.depth or size.depth,
        num_heads=num_heads,
        mlp_dim=config.mlp_dim or size.mlp_dim,
        patch_size=patch_size,
        grid=grid,
        class_token=config.pool == "token",
        representation_layer=config.representation_layer,
        num_classes=config.num_classes,
        stem=stem,
        map_pool=config.pool == "map",
        registers=config.registers,
        position=config.position,
        position_at=config.position_at,
        axial=config.attention_span == "axial",
        parallel=config.block == "parallel",
        qk_norm=config.qk_norm != "none",
        qkv_bias=config.qkv_bias,
        masked_patches=config.head == "masked_patches",
    )


def _parse_variant(variant: str) -> tuple[Size, int, StemShape | None]:
    """The size, the side of what a token sees in pixels, and the ResNet of a hybrid."""
    hybrid = parse_hybrid(variant)
    if hybrid is not None and hybrid[1] in SIZES:
        stem, size, cells = hybrid
        return SIZES[size], stem.stride * cells, stem
    match = re.fullmatch(r"ViT-([\w-]+)/([1-9][0-9]*)", variant, re.ASCII)
    if match and match[1] in SIZES:
        return SIZES[match[1]], int(match[2]), None
    resnet, _, transformer = variant.rpartition("+")
    closest = None
    if hybrid is not None:
        closest = f"{resnet}+{_closest_variant(transformer)}"
    elif _LIKE_VIT.match(variant):
        closest = _closest_variant(variant)
    raise ConfigError(
        f"model.variant {variant!r} is not known; ViT-SIZE/PATCH is allowed, SIZE being one of "
        f"{', '.join(SIZES)} (case matters) and PATCH a side in pixels; "
        f"other families: R50+ViT-B/16, T2T-ViT-14, BiT-R50x1, EfficientNet-B0"
        f"{f'; did you mean {closest!r}?' if closest is not None else '; take one of these'}"
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
