"""Shapes of the T2T-ViTs as plain numbers: variants, token grids, parameters, FLOPs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Literal

from vitscale.config.schema import ModelConfig
from vitscale.errors import ConfigError
from vitscale.models.families import IMAGE_CHANNELS, check_heads, dense, refuse_unused

Tokens = Literal["performer", "transformer"]
Grid = tuple[int, int]
"""Positions down and across."""

TOKEN_DIM = 64
"""Width of a token between two soft splits (models/t2t_vit.py of the release)."""
RANDOM_FEATURES = 32
"""Features of the performer's kernel: half of the token's width (models/token_performer.py of the release)."""
USED = frozenset(
    {
        "depth",
        "embed_dim",
        "num_heads",
        "mlp_dim",
        "dropout",
        "stochastic_depth",
        "activation_checkpointing",
        "attention",
    }
)
"""Keys of the configuration that mean something here; GELU (erf) and the norms' epsilon (1e-5) are the release's."""


@dataclass(frozen=True)
class SoftSplit:
    """Overlapping square windows, zero-padded (T2T paper, arXiv 2101.11986, section 3.1)."""

    kernel: int
    stride: int
    padding: int

    def grid(self, size: Grid) -> Grid:
        """Windows down and across of an input of this height and width."""
        down, across = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in size)
        return down, across


# T2T paper, section 3.1: kernels 7, 3, 3, overlaps 3, 1, 1.
SPLITS = (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))
STRIDE = prod(split.stride for split in SPLITS)
FIRST_DIM = IMAGE_CHANNELS * SPLITS[0].kernel ** 2
"""Numbers in a window of the image."""
SECOND_DIM = TOKEN_DIM * SPLITS[1].kernel ** 2
"""Numbers in a window of tokens; the second and the third split have the same kernel."""


@dataclass(frozen=True)
class Size:
    """One row of the variant table."""

    embed_dim: int
    depth: int
    mlp_dim: int
    num_heads: int
    tokens: Tokens


# T2T paper, tables 1 and 4, and models/t2t_vit.py of the release. Table 1 gives T2T-ViT-7 eight
# blocks, the release and the measured model have seven.
SIZES: dict[str, Size] = {
    "T2T-ViT-7": Size(256, 7, 512, 4, "performer"),
    "T2T-ViT-10": Size(256, 10, 512, 4, "performer"),
    "T2T-ViT-12": Size(256, 12, 512, 4, "performer"),
    "T2T-ViT-14": Size(384, 14, 1152, 6, "performer"),
    "T2T-ViT-19": Size(448, 19, 1344, 7, "performer"),
    "T2T-ViT-24": Size(512, 24, 1536, 8, "performer"),
    "T2T-ViT_t-14": Size(384, 14, 1152, 6, "transformer"),
    "T2T-ViT_t-19": Size(448, 19, 1344, 7, "transformer"),
    "T2T-ViT_t-24": Size(512, 24, 1536, 8, "transformer"),
    "T2T-ViT-14-wide": Size(768, 4, 2304, 12, "performer"),  # table 7: d768-4
    "T2T-ViT-14-resnext": Size(384, 14, 1152, 32, "performer"),  # more and narrower heads
}
VARIANTS: tuple[str, ...] = tuple(SIZES)


@dataclass(frozen=True, kw_only=True)
class T2tShape:
    """Every dimension of one model at one image size."""

    variant: str
    tokens: Tokens
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    image_hw: Grid
    """Height and width in pixels."""
    num_classes: int

    @property
    def grids(self) -> tuple[Grid, Grid, Grid]:
        """Windows down and across after each soft split; the last ones are the backbone's tokens."""
        first = SPLITS[0].grid(self.image_hw)
        second = SPLITS[1].grid(first)
        return first, second, SPLITS[2].grid(second)

    @property
    def num_patches(self) -> int:
        """Tokens that the backbone gets from the image."""
        return prod(self.grids[2])

    @property
    def num_tokens(self) -> int:
        """Length of the backbone's sequence: the patches and the class token."""
        return self.num_patches + 1

    @property
    def feature_dim(self) -> int:
        """Width of what the head reads."""
        return self.embed_dim

    @property
    def num_parameters(self) -> int:
        """Learned numbers, head included."""
        width = self.embed_dim
        tokens_to_token = self._token_layer(FIRST_DIM) + self._token_layer(SECOND_DIM) + dense(SECOND_DIM, width)
        attention = width * 3 * width + dense(width, width)
        mlp = dense(width, self.mlp_dim) + dense(self.mlp_dim, width)
        norm = 2 * width
        class_token = width
        blocks = self.depth * (2 * norm + attention + mlp)
        return tokens_to_token + class_token + blocks + norm + dense(width, self.num_classes)

    @property
    def num_fixed(self) -> int:
        """Numbers that are saved with the weights but not learned: positions and the performers' features.

        The release counts them among the parameters.
        """
        features = 2 * RANDOM_FEATURES * TOKEN_DIM if self.tokens == "performer" else 0
        return self.num_tokens * self.embed_dim + features

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-add of a matrix product."""
        first, second, _ = (prod(grid) for grid in self.grids)
        width, tokens = self.embed_dim, self.num_tokens
        embedding = self._token_layer_products(first, FIRST_DIM) + self._token_layer_products(second, SECOND_DIM)
        embedding += self.num_patches * SECOND_DIM * width
        attention = 4 * tokens * width**2 + 2 * tokens**2 * width
        mlp = 2 * tokens * width * self.mlp_dim
        return 2 * (embedding + self.depth * (attention + mlp) + width * self.num_classes)

    def _token_layer(self, inputs: int) -> int:
        """Learned numbers of one layer between two soft splits."""
        bias = 3 * TOKEN_DIM if self.tokens == "performer" else 0
        norms = 2 * inputs + 2 * TOKEN_DIM
        return norms + inputs * 3 * TOKEN_DIM + bias + 3 * dense(TOKEN_DIM, TOKEN_DIM)

    def _token_layer_products(self, tokens: int, inputs: int) -> int:
        """Multiply-adds of one layer between two soft splits."""
        if self.tokens == "performer":
            # Features of keys and queries, keys by values, the sum and the mix of each query.
            mixing = tokens * RANDOM_FEATURES * (4 * TOKEN_DIM + 1)
        else:
            mixing = 2 * tokens**2 * TOKEN_DIM
        return tokens * (inputs * 3 * TOKEN_DIM + 3 * TOKEN_DIM**2) + mixing


def resolve(config: ModelConfig, image_hw: tuple[int, int]) -> T2tShape:
    """The variant's dimensions with the configuration's own ones in their place.

    Args:
        config: names the variant and overrides parts of it.
        image_hw: height and width of the input in pixels.

    Raises:
        ConfigError: unknown variant, a key that means nothing here, or dimensions that do not fit each other.
    """
    size = _parse_variant(config.variant)
    refuse_unused(config, used=USED)
    embed_dim = config.embed_dim or size.embed_dim
    num_heads = config.num_heads or size.num_heads
    check_heads(embed_dim, num_heads)
    _check_image(image_hw, config.variant)
    return T2tShape(
        variant=config.variant,
        tokens=size.tokens,
        embed_dim=embed_dim,
        depth=config.depth or size.depth,
        num_heads=num_heads,
        mlp_dim=config.mlp_dim or size.mlp_dim,
        image_hw=image_hw,
        num_classes=config.num_classes,
    )


def _parse_variant(variant: str) -> Size:
    if variant in SIZES:
        return SIZES[variant]
    folded = {_folded(name): name for name in VARIANTS}
    closest = folded[get_close_matches(_folded(variant), folded, n=1, cutoff=0)[0]]
    raise ConfigError(
        f"model.variant {variant!r} is not known; one of {', '.join(VARIANTS)} is allowed; did you mean {closest!r}?"
    )


def _folded(variant: str) -> str:
    return variant.casefold().replace("_", "-")


def _check_image(image_hw: tuple[int, int], variant: str) -> None:
    """Other sizes would leave the last pixels out of all windows, or unlike the release's number of positions."""
    height, width = image_hw
    if height >= STRIDE and width >= STRIDE and height % STRIDE == width % STRIDE == 0:
        return
    below = [max(side // STRIDE, 1) * STRIDE for side in image_hw]
    above = [-(-side // STRIDE) * STRIDE for side in image_hw]
    fitting = " or ".join(dict.fromkeys(map(str, (below, above))))
    raise ConfigError(
        f"data.image_size {height}x{width} does not suit the soft splits of {variant}, whose strides are 4, 2 and 2; "
        f"both sides must be multiples of {STRIDE}; set data.image_size to {fitting}"
    )
