"""Random training crops and evaluation crops, from an encoded image to uint8 pixels in their place."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitscale.config.schema import DataConfig, both_sides
from vitscale.data.decode import EncodedImage
from vitscale.data.stages import StageClock

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


def train_crop(
    data: bytes, config: DataConfig, seed: int, out: NDArray[np.uint8], clock: StageClock | None = None
) -> None:
    """Decode, crop at random, resize and mirror an encoded image; see ``data.crop`` for the kinds of crops.

    The inception crop is drawn from the size in the header, so that only the rows down to its lower edge are decoded.

    Args:
        data: an encoded image.
        config: laws of the crop, and the largest image that is decoded.
        seed: decides the randomness, alone.
        out: where the pixels go, uint8 [H, W, 3]; any strides, contiguous is fastest.
        clock: is told when a stage is done.

    Raises:
        BadSampleError: the image is larger than allowed, or cannot be decoded; ``out`` is as it was.
    """
    # Only random() is used: Python promises its sequence for a given seed across versions.
    rng = random.Random(seed)
    image = EncodedImage(data, max_pixels=config.max_image_pixels)
    resized = None if config.crop == "inception" else crop_after_resize(image.width, image.height, rng, config)
    box = Box(0, 0, image.width, image.height)
    if resized is None:
        box = inception_crop(image.width, image.height, rng, area=config.crop_area, aspect=config.crop_aspect)
    mirrored = config.flip and rng.random() < 0.5
    pixels = image.rows(box.bottom)[box.top : box.bottom, box.left : box.right]
    clock = clock or StageClock()
    clock.lap("decode")
    target = np.empty(out.shape, dtype=np.uint8) if mirrored else out
    if resized is None:
        resize(pixels, target)
    else:
        target[:] = _cut_resized(Image.fromarray(pixels), resized, config.image_hw)
    if mirrored:
        for channel in range(3):  # numpy takes five times as long over all at once
            out[..., channel] = target[:, ::-1, channel]
    clock.lap("augment")


class ResizedCrop(NamedTuple):
    """A crop of a resized image: the size of that in pixels, and the crop's upper left corner."""

    width: int
    height: int
    left: int
    top: int


def crop_after_resize(width: int, height: int, rng: random.Random, config: DataConfig) -> ResizedCrop:
    """Draw the random crop of an image that is resized first (BiT; ViT paper, appendix B.1.1).

    Args:
        width: of the image, in pixels.
        height: likewise.
        rng: its next two numbers decide where the crop lies; every place has the same chance.
        config: ``crop``: square resizes to ``crop_from`` whatever the aspect, short_side so that it is just covered.
    """
    rows, columns = both_sides(config.crop_from or config.image_size)
    if config.crop == "short_side":
        scale = max(rows / height, columns / width)
        rows, columns = max(rows, round(height * scale)), max(columns, round(width * scale))
    crop_rows, crop_columns = config.image_hw
    top = int(rng.random() * (rows - crop_rows + 1))
    left = int(rng.random() * (columns - crop_columns + 1))
    return ResizedCrop(columns, rows, left, top)


def _cut_resized(image: Image.Image, place: ResizedCrop, image_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of a crop; the rest of the resized image is never made."""
    height, width = image_hw
    x, y = image.width / place.width, image.height / place.height
    box = (place.left * x, place.top * y, (place.left + width) * x, (place.top + height) * y)
    return _resized_box(image, box, width, height)


def evaluation_crop(data: bytes, config: DataConfig, out: NDArray[np.uint8], clock: StageClock | None = None) -> None:
    """Decode, then resize and crop as :func:`evaluation_pixels` does.

    Args:
        data: an encoded image.
        config: kind and share of the crop, and the largest image that is decoded.
        out: where the pixels go, uint8 [H, W, 3].
        clock: is told when a stage is done.

    Raises:
        BadSampleError: the image is larger than allowed, or cannot be decoded; ``out`` is as it was.
    """
    encoded = EncodedImage(data, max_pixels=config.max_image_pixels)
    image = Image.fromarray(encoded.rows(encoded.height))
    clock = clock or StageClock()
    clock.lap("decode")
    out[:] = evaluation_pixels(image, config)
    clock.lap("augment")


def resize(pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Resize [h, w, 3] into ``out`` [H, W, 3], bilinear, antialiased where it shrinks.

    The operator of torch is the one behind ``interpolate(mode="bilinear", antialias=True)``, called so that it writes
    in place. It has the filter of Pillow and fewer bits for its weights: some pixels differ by 1, few by 2.
    """
    # Made contiguous by numpy, as torch would start threads of its own for that. The rest are views of numpy, since
    # each operator of torch gives up the interpreter's lock and has to get it back.
    source = torch.from_numpy(np.ascontiguousarray(pixels).transpose(2, 0, 1)[None])  # [1, 3, h, w]
    target = torch.from_numpy(out.transpose(2, 0, 1)[None])  # [1, 3, H, W]
    torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[:2], False, None, None, out=target)


def evaluation_pixels(image: Image.Image, config: DataConfig) -> NDArray[np.uint8]:
    """Resize so that the centre crop covers ``eval_crop_share`` of the short side, then crop; or, if ``eval_resize`` is
    square, resize the whole image whatever its aspect. Returns [H, W, 3].
    """
    height, width = config.image_hw
    if config.eval_resize == "square":
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    share = config.eval_crop_share
    scale = max(height / image.height, width / image.width) / share
    box_height, box_width = height / scale, width / scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return _resized_box(image, (left, top, left + box_width, top + box_height), width, height)


def _resized_box(
    image: Image.Image, box: tuple[float, float, float, float], width: int, height: int
) -> NDArray[np.uint8]:
    left, top, right, bottom = box
    # Rounding may push a box as large as the image over its edge by the last bit.
    within = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=within))
