"""What every loader of the comparison gets and gives, and the crop of those that decode with Pillow."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitscale.config.schema import DataConfig
from vitscale.data.order import hash64
from vitscale.data.transforms import inception_crop, train_crop

Crop = Callable[[bytes], NDArray[np.uint8]]
"""An encoded image to its random crop, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every loader."""

    image_size: int
    batch_size: int
    workers: int

    @property
    def data(self) -> DataConfig:
        """The crop law, and our own loader's settings."""
        return DataConfig(train="unused", image_size=self.image_size, workers=self.workers)


@dataclass(frozen=True)
class Contestant:
    """A loader, and what a reader must know to compare its rate with another's."""

    name: str
    pixels: str
    """Decoder, crop law and filter."""
    workers: str
    """What its workers are."""
    start: Callable[[Path, Settings], Iterator[Any]]
    """Endless batches of the images under a folder: uint8 [B, H, W, 3] or [B, 3, H, W], as a tensor or an array."""
    packages: tuple[str, ...] = ()
    """Distributions that must be installed."""
    prepare: Callable[[Path], None] | None = None
    """Brings the images under the folder into the loader's own format."""


def images_of(root: Path) -> list[Path]:
    """The encoded images, one file each, in a folder per class."""
    return sorted((root / "images").glob("*/*.jpg"))


def shards_of(root: Path) -> list[Path]:
    """The tars of the shard set with the same images."""
    return sorted((root / "shards" / "train").glob("*.tar"))


def pillow_crop(settings: Settings) -> Crop:
    """Decode the whole image with Pillow; the crop law and the filter are those of the ViT reference."""
    data, size = settings.data, (settings.image_size, settings.image_size)
    rng = random.Random()

    def crop(encoded: bytes) -> NDArray[np.uint8]:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        box = inception_crop(*image.size, rng, area=data.crop_area, aspect=data.crop_aspect)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    return crop


PILLOW = "Pillow, whole image; our crop law; bilinear with antialiasing"


def our_crop(settings: Settings) -> Crop:
    """The pixels of our own loader, for loaders that let their users decode."""
    data, draws = settings.data, count()

    def crop(encoded: bytes) -> NDArray[np.uint8]:
        pixels = np.empty((settings.image_size, settings.image_size, 3), dtype=np.uint8)
        train_crop(encoded, data, hash64(next(draws)), pixels)
        return pixels

    return crop


OURS = "ours"


def stack(crops: list[NDArray[np.uint8]]) -> torch.Tensor:
    """A batch uint8 [B, 3, H, W] whose channels lie together, like our own."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
