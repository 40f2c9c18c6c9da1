"""Stored PNG files hold the pixels that went in and nothing that a library could do in two ways."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitscale_shards.sources.png import stored_png, stored_png_bytes


def pixels_of(height: int, width: int, channels: int) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(height * 1000 + width).integers(0, 256, shape, dtype=np.uint8)


def check(height: int, width: int, channels: int) -> None:
    pixels = pixels_of(height, width, channels)
    data = stored_png(pixels)
    assert len(data) == stored_png_bytes(height, width, channels)
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L" if channels == 1 else "RGB", (width, height))
        np.testing.assert_array_equal(np.asarray(image), pixels)


@given(height=st.integers(1, 70), width=st.integers(1, 70), channels=st.sampled_from([1, 3]))
def test_pixels_come_back(height: int, width: int, channels: int) -> None:
    check(height, width, channels)


@pytest.mark.parametrize("width", [65_533, 65_534, 65_535, 131_069, 131_070])
def test_sizes_around_the_longest_stored_block(width: int) -> None:
    check(1, width, 1)


def test_the_bytes_never_change() -> None:
    digest = hashlib.sha256(stored_png(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))).hexdigest()
    assert digest == "580c2013f1c76c8ed9e955b9c84a99de89eb720fb7dc5f718825feda46fd0e0f"
