"""Encoded bytes to RGB: every kind of image that a crawl brings along, and what is none."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.helpers.shardset import image_bytes
from vitscale.data.decode import BadSampleError, decode_image

GRADIENT = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    image = decode_image(data, max_pixels=10**6)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decoded(encode(Image.fromarray(pixels), format)), pixels)
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP", "PPM"])
def test_grey_is_repeated(format: str) -> None:
    options = {"quality": 100} if format == "JPEG" else {}
    rgb = decoded(encode(Image.fromarray(GRADIENT), format, **options))
    assert (rgb == rgb[..., :1]).all()
    assert np.abs(rgb[..., 0].astype(int) - GRADIENT).max() <= 1


def test_black_and_white() -> None:
    rgb = decoded(encode(Image.fromarray(GRADIENT > 99), "PNG"))
    np.testing.assert_array_equal(rgb[..., 0], np.where(GRADIENT > 99, 255, 0))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_gives_its_colours(format: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 200, 0, 1, 2, 3])
    expected = [[[255, 0, 0], [0, 200, 0]], [[1, 2, 3], [0, 200, 0]]]
    assert decoded(encode(image, format)).tolist() == expected
    assert decoded(encode(image, format, transparency=1)).tolist() == expected


def test_alpha_is_dropped() -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(rgba), "PNG")), rgba[..., :3])
    grey = decoded(encode(Image.fromarray(rgba[..., :2].copy(), "LA"), "PNG"))
    np.testing.assert_array_equal(grey, rgba[..., :1].repeat(3, axis=2))


def test_cmyk_jpeg_has_its_colours() -> None:
    # No ink is white, full black ink is black, full cyan has no red.
    inks = np.zeros((8, 24, 4), dtype=np.uint8)
    inks[:, 8:16, 3] = 255
    inks[:, 16:, 0] = 255
    rgb = decoded(encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)).astype(int)
    assert np.abs(rgb[4, 4] - [255, 255, 255]).max() <= 3
    assert np.abs(rgb[4, 12] - [0, 0, 0]).max() <= 3
    assert np.abs(rgb[4, 20] - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_of_16_bits_the_upper_8_are_kept(format: str, order: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    rgb = decoded(encode(Image.fromarray(values.astype(order)), format))
    np.testing.assert_array_equal(rgb, (values // 256)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_white_are_refused(dtype: type) -> None:
    with pytest.raises(BadSampleError, match="32-bit pixels have no common range"):
        decoded(encode(Image.fromarray(GRADIENT.astype(dtype)), "TIFF"))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).shape == (20, 30, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    rgb = decoded(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert rgb[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = image_bytes(1, hw=(64, 64), kind=kind)
    with pytest.raises(BadSampleError, match="cannot decode the image"):
        decoded(data[: int(share * len(data))])


@pytest.mark.parametrize("data", [b"", b"\0", b"hello", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", bytes(5000)])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(BadSampleError, match="cannot decode the image"):
        decoded(data)


def test_flipped_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(2)
    for kind in ("jpg", "png"):
        good = image_bytes(3, hw=(16, 16), kind=kind)
        for _ in range(150):
            data = bytearray(good)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(0, 256)
            with contextlib.suppress(BadSampleError):
                assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"


def test_formats_that_start_other_programs_are_refused() -> None:
    with pytest.raises(BadSampleError, match=r"cannot decode the image: none of JPEG, .* in \d+ bytes"):
        decoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadSampleError) as caught:
        decode_image(png, max_pixels=100_000_000)
    assert str(caught.value) == "image of 12000 x 10000 pixels; at most 100000000 pixels are decoded"


def test_the_limit_is_inclusive() -> None:
    data = image_bytes(0, hw=(10, 10))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(BadSampleError, match="image of 10 x 10 pixels; at most 99 pixels"):
        decode_image(data, max_pixels=99)


def test_many_threads_may_open_the_first_image_of_a_process() -> None:
    """Pillow loads most formats at first need; no thread may take a good image for a bad one meanwhile."""
    webp = encode(Image.new("RGB", (4, 4)), "WEBP")
    code = (
        "import sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from threading import Barrier\n"
        "from vitscale.data.decode import decode_image\n"
        "barrier = Barrier(16)\n"
        "sys.setswitchinterval(1e-5)\n"
        "def work(_):\n"
        "    barrier.wait()\n"
        f"    return decode_image({webp!r}, max_pixels=100).size\n"
        "print(set(ThreadPoolExecutor(16).map(work, range(16))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{(4, 4)}\n"
