"""Random training crop and central evaluation crop, from a decoded image to uint8 pixels."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitscale.config.schema import DataConfig

CROP_ATTEMPTS = 100


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def inception_crop(
    width: int, height: int, rng: random.Random, *, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """Draw the random crop of the ViT reference pipeline.

    The law is that of ``tf.image.sample_distorted_bounding_box`` as the JAX ViT code calls it: the aspect ratio is
    uniform in ``aspect`` (not log-uniform), then the *height* is uniform among those that keep the area within
    ``area``, so small crops are more frequent than with an area drawn uniformly. After 100 failures the whole image.
    """
    for _ in range(CROP_ATTEMPTS):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        smallest = round(math.sqrt(area[0] * width * height / ratio))
        largest = min(round(math.sqrt(area[1] * width * height / ratio)), height, int((width + 0.5) / ratio))
        crop_height = smallest + int(rng.random() * (largest - smallest + 1)) if smallest < largest else largest
        crop_width = round(crop_height * ratio)
        share = crop_width * crop_height / (width * height)
        if not (crop_height and 0 < crop_width <= width and area[0] <= share <= area[1]):
            continue
        top = int(rng.random() * (height - crop_height + 1))
        left = int(rng.random() * (width - crop_width + 1))
        return Box(left, top, left + crop_width, top + crop_height)
    return Box(0, 0, width, height)


def train_pixels(image: Image.Image, config: DataConfig, seed: int) -> NDArray[np.uint8]:
    """Random crop, resize and mirror. ``seed`` alone decides the randomness. Returns [H, W, 3]."""
    # Only random() is used: Python promises its sequence for a given seed across versions.
    rng = random.Random(seed)
    height, width = config.image_hw
    box = inception_crop(*image.size, rng, area=config.crop_area, aspect=config.crop_aspect)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
    if config.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


def evaluation_pixels(image: Image.Image, config: DataConfig) -> NDArray[np.uint8]:
    """Resize so that the centre crop covers ``eval_crop_share`` of the short side, then crop. Returns [H, W, 3]."""
    height, width = config.image_hw
    share = config.eval_crop_share
    scale = max(height / image.height, width / image.width) / share
    box_height, box_width = height / scale, width / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    # Rounding may push a box as large as the image over its edge by the last bit.
    box = (max(left, 0), max(top, 0), min(left + box_width, image.width), min(top + box_height, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
