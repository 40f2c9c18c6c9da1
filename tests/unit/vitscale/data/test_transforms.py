"""Crops: bounds, the laws of the random crop against plain rejection, and exact pixels of both crops."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from vitscale.config.schema import DataConfig
from vitscale.data.decode import BadSampleError, decode_image
from vitscale.data.loader import value_range
from vitscale.data.transforms import (
    Box,
    crop_after_resize,
    evaluation_crop,
    evaluation_pixels,
    inception_crop,
    resize,
    train_crop,
)

# As the reference calls tf.image.sample_distorted_bounding_box.
AREA, ASPECT = (0.05, 1.0), (0.75, 1.33)


def config(size: int | tuple[int, int], **fields: Any) -> DataConfig:
    return DataConfig(train="train", image_size=size, **{"crop_area": AREA, "crop_aspect": ASPECT, **fields})


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def train_pixels(data: bytes, config: DataConfig, seed: int) -> NDArray[np.uint8]:
    out = np.full((*config.image_hw, 3), 77, dtype=np.uint8)
    train_crop(data, config, seed, out)
    return out


def crops(width: int, height: int, count: int, **laws: Any) -> list[Box]:
    rng = random.Random(0)
    return [inception_crop(width, height, rng, **{"area": AREA, "aspect": ASPECT, **laws}) for _ in range(count)]


side = st.one_of(st.integers(1, 12), st.integers(1, 6000))
ordered_pair = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=400, deadline=None)
@given(side, side, ordered_pair, ordered_pair.map(lambda pair: (3 * pair[0], 3 * pair[1])), st.integers(0, 2**64))
def test_crops_are_inside_and_keep_the_area(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], seed: int
) -> None:
    box = inception_crop(width, height, random.Random(seed), area=area, aspect=aspect)
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height
    if box != (0, 0, width, height):
        crop_width, crop_height = box.right - box.left, box.bottom - box.top
        assert area[0] <= crop_width * crop_height / (width * height) <= area[1]
        # The width is the height times the ratio, rounded.
        assert aspect[0] * crop_height - 0.501 <= crop_width <= aspect[1] * crop_height + 0.501


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (2, 2), (3, 1000), (1, 2)])
def test_extreme_sizes_still_give_a_crop(width: int, height: int) -> None:
    for seed in range(20):
        assert train_pixels(encoded(noise(width, height)), config(8), seed).shape == (8, 8, 3)
    assert evaluation_pixels(noise(width, height), config(8)).shape == (8, 8, 3)


def test_the_laws_of_the_reference_are_the_default() -> None:
    defaults = DataConfig(train="train", image_size=8)
    assert (defaults.crop_area, defaults.crop_aspect) == (AREA, ASPECT)


def test_the_whole_image_when_nothing_fits() -> None:
    assert set(crops(1, 5000, 10)) == {Box(0, 0, 1, 5000)}


def rejection_sampled(width: int, height: int, count: int) -> NDArray[np.float64]:
    """Heights and widths by the law in words: the ratio uniform, then the height uniform among all that fit."""
    rng = np.random.default_rng(1)
    heights = np.arange(1, height + 1)
    drawn: list[tuple[float, float]] = []
    while len(drawn) < count:
        widths = np.rint(heights * rng.uniform(*ASPECT))
        share = widths * heights / (width * height)
        fitting = np.flatnonzero((widths <= width) & (share >= AREA[0]) & (share <= AREA[1]))
        if len(fitting):
            chosen = rng.choice(fitting)
            drawn.append((heights[chosen], widths[chosen]))
    return np.array(drawn)


def largest_gap(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Kolmogorov and Smirnov's distance of two samples."""
    points = np.unique(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("width", "height"), [(300, 200), (150, 400), (224, 224)])
def test_the_law_of_the_crop_is_that_of_plain_rejection(width: int, height: int) -> None:
    count = 8000
    boxes = np.array(crops(width, height, count))
    crop_widths, crop_heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    expected = rejection_sampled(width, height, count)
    limit = 1.95 * (2 / count) ** 0.5  # one in a thousand exceeds it, and the seeds are fixed
    assert largest_gap(crop_heights, expected[:, 0]) < limit
    assert largest_gap(crop_widths, expected[:, 1]) < limit
    assert largest_gap(crop_heights * crop_widths, expected[:, 0] * expected[:, 1]) < limit
    assert largest_gap(crop_widths / crop_heights, expected[:, 1] / expected[:, 0]) < limit + 0.01


def test_crops_lie_anywhere_with_equal_chance() -> None:
    boxes = np.array(crops(200, 200, 8000, area=(0.2, 0.3)))
    for start, end in ((0, 2), (1, 3)):
        room = 200 - (boxes[:, end] - boxes[:, start])
        share = (boxes[:, start] + 0.5) / (room + 1)
        assert largest_gap(share, np.linspace(0, 1, 8000)) < 0.025
        assert {0, 1} <= set(boxes[:, start].tolist())
        assert (boxes[:, start] == room).any()


def test_the_crop_of_a_seed_is_pinned() -> None:
    drawn = [inception_crop(500, 375, random.Random(seed), area=AREA, aspect=ASPECT) for seed in (0, 1, 2**64 - 1)]
    assert drawn == [(31, 29, 410, 335), (57, 32, 334, 366), (214, 37, 367, 237)]


def test_pixels_of_a_seed_repeat_and_those_of_seeds_differ() -> None:
    image = encoded(noise(40, 30))
    drawn = [train_pixels(image, config(16), seed).tobytes() for seed in range(30)]
    assert drawn == [train_pixels(image, config(16), seed).tobytes() for seed in range(30)]
    assert len(set(drawn)) == 30


def test_half_of_the_images_are_mirrored() -> None:
    image = encoded(Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8).repeat(2, axis=0)))
    whole = config(2, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    mirrored = [bool(train_pixels(image, whole, seed)[0, 0, 0]) for seed in range(2000)]
    assert abs(sum(mirrored) - 1000) < 3 * 2000**0.5 / 2
    still = config(2, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False)
    assert not any(train_pixels(image, still, seed)[0, 0, 0] for seed in range(50))


def test_training_pixels_are_those_of_the_box() -> None:
    # A horizontal ramp: the first and last column of the output tell where the box was.
    width, height = 200, 100
    ramp = Image.fromarray(np.arange(width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2))
    for seed in range(30):
        box = inception_crop(width, height, random.Random(seed), area=AREA, aspect=ASPECT)
        pixels = train_pixels(encoded(ramp), config((4, 8), flip=False), seed)
        centres = box.left + (np.arange(8) + 0.5) * (box.right - box.left) / 8 - 0.5
        assert pixels.shape == (4, 8, 3)
        assert np.abs(pixels[0, 1:-1, 0] - centres[1:-1]).max() <= 1


def plainly_cropped(data: bytes, config: DataConfig, seed: int) -> NDArray[np.uint8]:
    """The whole image by Pillow, then the crop, then torch's public resize, then the mirror."""
    image = np.array(decode_image(data, max_pixels=config.max_image_pixels))
    rng = random.Random(seed)
    box = inception_crop(image.shape[1], image.shape[0], rng, area=config.crop_area, aspect=config.crop_aspect)
    crop = torch.from_numpy(image[box.top : box.bottom, box.left : box.right].copy()).permute(2, 0, 1)[None]
    resized = interpolate(crop, config.image_hw, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return resized[:, ::-1] if rng.random() < 0.5 else resized


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"subsampling": 0}),
        ("JPEG", {"subsampling": 1}),
        ("JPEG", {"subsampling": 2}),
        ("JPEG", {"subsampling": 2, "restart_marker_rows": 1}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
    ],
)
@pytest.mark.parametrize("size", [8, (30, 20), 64])
def test_the_way_through_the_header_changes_no_pixel(
    format: str, options: dict[str, Any], size: int | tuple[int, int]
) -> None:
    data = encoded(noise(90, 71), format, **options)
    for seed in range(40):
        np.testing.assert_array_equal(
            train_pixels(data, config(size), seed), plainly_cropped(data, config(size), seed), f"seed {seed}"
        )


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_four_channels_are_cropped_too(mode: str) -> None:
    data = encoded(noise(40, 50).convert(mode), "JPEG")
    for seed in range(20):
        np.testing.assert_array_equal(train_pixels(data, config(16), seed), plainly_cropped(data, config(16), seed))


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 90)] * 4)
def test_resizing_is_that_of_pillow(width: int, height: int, columns: int, rows: int) -> None:
    image = noise(width, height)
    expected = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR))
    out = np.zeros((rows, columns, 3), dtype=np.uint8)
    resize(np.array(image), out)
    assert np.abs(out.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [5, 40])
def test_pixels_may_go_anywhere_in_a_batch(size: int) -> None:
    data = encoded(noise(30, 20), "JPEG")
    for seed in range(8):
        expected = train_pixels(data, config(size), seed)
        last = np.zeros((3, size, size, 3), dtype=np.uint8)
        first = np.zeros((3, 3, size, size), dtype=np.uint8)
        train_crop(data, config(size), seed, last[1])
        train_crop(data, config(size), seed, first[1].transpose(1, 2, 0))
        np.testing.assert_array_equal(last[1], expected)
        np.testing.assert_array_equal(first[1].transpose(1, 2, 0), expected)
        assert not last[[0, 2]].any()
        assert not first[[0, 2]].any()


def test_a_single_pixel_fills_the_crop() -> None:
    data = encoded(Image.new("RGB", (1, 1), (9, 8, 7)))
    assert (train_pixels(data, config(6), 0) == (9, 8, 7)).all()


def test_a_bad_image_is_refused_by_both_crops() -> None:
    data, out = encoded(noise(40, 30), "JPEG"), np.zeros((8, 8, 3), dtype=np.uint8)
    for seed in range(10):
        with pytest.raises(BadSampleError, match="cannot decode the image"):
            train_crop(data[: len(data) // 2], config(8), seed, out)
    with pytest.raises(BadSampleError, match="cannot decode the image"):
        evaluation_crop(data[: len(data) // 2], config(8), out)
    small = config(8, max_image_pixels=1199)
    for refused in (lambda: train_crop(data, small, 0, out), lambda: evaluation_crop(data, small, out)):
        with pytest.raises(BadSampleError, match="image of 40 x 30 pixels; at most 1199 pixels are decoded"):
            refused()


def test_no_thread_is_started_by_a_crop() -> None:
    """Each of the loader's threads would get as many of torch's as the machine has cores."""
    code = (
        "import io, numpy as np, psutil, torch\n"
        "from PIL import Image\n"
        "from vitscale.config.schema import DataConfig\n"
        "from vitscale.data.transforms import train_crop\n"
        "torch.set_num_threads(4)\n"
        "data = io.BytesIO()\n"
        "Image.effect_noise((600, 500), 50).convert('RGB').save(data, 'JPEG')\n"
        "config, out = DataConfig(train='train', image_size=256), np.empty((256, 256, 3), np.uint8)\n"
        "before = psutil.Process().num_threads()\n"
        "for seed in range(8):\n"
        "    train_crop(data.getvalue(), config, seed, out)\n"
        "print(psutil.Process().num_threads() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def gradient(width: int, height: int) -> NDArray[np.uint8]:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x, y, x * 0], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("image_wh", "size", "share", "rows", "columns"),
    [
        ((64, 64), 56, 0.875, slice(4, 60), slice(4, 60)),
        ((96, 64), 56, 0.875, slice(4, 60), slice(20, 76)),
        ((64, 96), 56, 0.875, slice(20, 76), slice(4, 60)),
        ((64, 64), (28, 56), 0.875, slice(18, 46), slice(4, 60)),
        ((64, 64), (56, 28), 0.875, slice(4, 60), slice(18, 46)),
        ((80, 60), (30, 40), 0.5, slice(15, 45), slice(20, 60)),
        ((50, 70), (70, 50), 1.0, slice(0, 70), slice(0, 50)),
    ],
)
def test_evaluation_without_scaling_is_an_exact_cut(
    image_wh: tuple[int, int], size: int | tuple[int, int], share: float, rows: slice, columns: slice
) -> None:
    pixels = gradient(*image_wh)
    cropped = evaluation_pixels(Image.fromarray(pixels), config(size, eval_crop_share=share))
    np.testing.assert_array_equal(cropped, pixels[rows, columns])


def test_evaluation_halves_the_short_side() -> None:
    # 112 of 128 is 0.875; the crop of the middle is half as large on both sides.
    cropped = evaluation_pixels(Image.fromarray(gradient(192, 128)), config(56))
    steps = 2 * np.arange(56) + 0.5
    assert np.abs(cropped[..., 0] - (40 + steps)[None, :]).max() <= 0.5
    assert np.abs(cropped[..., 1] - (8 + steps)[:, None]).max() <= 0.5


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 24), st.integers(1, 24), st.sampled_from([1.0, 0.875]))
@example(7, 7, 17, 17, 1.0)  # where rounding makes the crop larger than the image
@example(49, 49, 8, 8, 1.0)
def test_evaluation_takes_any_size(width: int, height: int, rows: int, columns: int, share: float) -> None:
    image = Image.new("RGB", (width, height), (9, 8, 7))
    pixels = evaluation_pixels(image, config((rows, columns), eval_crop_share=share))
    assert pixels.shape == (rows, columns, 3)
    assert (pixels == (9, 8, 7)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [8, (30, 20), 64])
def test_evaluation_from_bytes_is_evaluation_of_the_image(format: str, size: int | tuple[int, int]) -> None:
    for width, height in ((90, 71), (50, 120), (64, 64), (1, 1)):
        data = encoded(noise(width, height), format)
        out = np.zeros((*config(size).image_hw, 3), dtype=np.uint8)
        evaluation_crop(data, config(size), out)
        image = decode_image(data, max_pixels=10**5)
        np.testing.assert_array_equal(out, evaluation_pixels(image, config(size)))


def test_value_range() -> None:
    values = value_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert values.tolist() == pytest.approx([-1, 51 / 127.5 - 1, 1])
    assert value_range(torch.zeros(1, dtype=torch.uint8), torch.bfloat16).dtype is torch.bfloat16


def resized_then_cropped(image: Image.Image, config: DataConfig, seed: int) -> NDArray[np.uint8]:
    """The whole image resized by Pillow, then the crop, then the mirror."""
    rng, (rows, columns) = random.Random(seed), config.image_hw
    sides = config.crop_from if isinstance(config.crop_from, tuple) else (config.crop_from, config.crop_from)
    height, width = (int(side or 0) for side in sides)
    if config.crop == "short_side":
        scale = max(height / image.height, width / image.width)
        height, width = round(image.height * scale), round(image.width * scale)
    top = int(rng.random() * (height - rows + 1))
    left = int(rng.random() * (width - columns + 1))
    whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    crop = whole[top : top + rows, left : left + columns]
    return crop[:, ::-1] if config.flip and rng.random() < 0.5 else crop


@pytest.mark.parametrize("crop", ["square", "short_side"])
@pytest.mark.parametrize(
    ("size", "crop_from"), [(12, 16), (12, 12), (40, 50), ((20, 30), 30), ((20, 30), (24, 48)), (100, 128)]
)
@pytest.mark.parametrize("wh", [(60, 45), (45, 60), (16, 16), (31, 97), (1, 1)])
def test_crops_after_resizing_are_those_of_the_whole_resized_image(
    crop: str, size: int | tuple[int, int], crop_from: int | tuple[int, int], wh: tuple[int, int]
) -> None:
    settings = config(size, crop=crop, crop_from=crop_from)
    for seed in range(8):
        image = noise(*wh)
        expected = resized_then_cropped(image, settings, seed)
        pixels = train_pixels(encoded(image), settings, seed)
        # Pillow rounds between rows and columns, and which of them it takes first depends on the sizes.
        assert np.abs(pixels.astype(int) - expected).max() <= 2


def test_a_square_crop_ignores_the_aspect_and_a_short_side_crop_keeps_it() -> None:
    wide = Image.fromarray(gradient(200, 100))
    square = config(80, crop="square", crop_from=100, flip=False)
    kept = config(80, crop="short_side", crop_from=100, flip=False)
    for seed in range(10):
        per_column = [
            float(np.diff(train_pixels(encoded(wide), settings, seed)[40, 5:-5, 0].astype(float)).mean())
            for settings in (square, kept)
        ]
        assert per_column == pytest.approx([2, 1], abs=0.05)


@pytest.mark.parametrize("crop", ["square", "short_side"])
def test_crops_after_resizing_lie_anywhere_with_equal_chance(crop: str) -> None:
    settings = config(8, crop=crop, crop_from=10)
    rng = random.Random(0)
    places = [crop_after_resize(50, 40, rng, settings) for _ in range(9000)]
    rows, columns = (10, 10) if crop == "square" else (10, 12)
    assert {(place.height, place.width) for place in places} == {(rows, columns)}
    for drawn, room in (([p.top for p in places], rows - 8), ([p.left for p in places], columns - 8)):
        counts = np.bincount(drawn, minlength=room + 1)
        assert len(counts) == room + 1
        assert np.abs(counts - 9000 / (room + 1)).max() < 4 * (9000 / (room + 1)) ** 0.5


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 300)] * 2, *[st.integers(1, 20)] * 4, st.sampled_from(["square", "short_side"]))
def test_crops_after_resizing_take_any_size(
    width: int, height: int, rows: int, columns: int, more_rows: int, more_columns: int, crop: str
) -> None:
    laws = config((rows, columns), crop=crop, crop_from=(rows + more_rows, columns + more_columns))
    place = crop_after_resize(width, height, random.Random(1), laws)
    assert 0 <= place.top <= place.height - rows
    assert 0 <= place.left <= place.width - columns
    colour = train_pixels(encoded(Image.new("RGB", (width, height), (9, 8, 7))), laws, 1)
    assert colour.shape == (rows, columns, 3)
    assert (colour == (9, 8, 7)).all()


@pytest.mark.parametrize("wh", [(60, 45), (16, 16), (31, 97)])
@pytest.mark.parametrize("size", [12, (20, 30), 64])
def test_square_evaluation_is_the_whole_image(wh: tuple[int, int], size: int | tuple[int, int]) -> None:
    settings = config(size, eval_resize="square")
    rows, columns = settings.image_hw
    expected = np.asarray(noise(*wh).resize((columns, rows), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(evaluation_pixels(noise(*wh), settings), expected)
