"""Encoded bytes to RGB: every kind of image that a crawl brings along, and what is none."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from itertools import product
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.helpers.shardset import image_bytes
from vitscale.data.decode import BadSampleError, EncodedImage, decode_image

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


def jpeg(width: int, height: int, *, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """Smooth shapes with grain, of which upsampled colours and cut rows tell more than noise alone."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 20, (height, width, 3))
    picture = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
    return encode(picture.convert(mode), "JPEG", **options)


def rows_of(data: bytes, count: int) -> NDArray[np.uint8]:
    return EncodedImage(data, max_pixels=10**6).rows(count)


def outcome(data: bytes, count: int | None = None) -> NDArray[np.uint8] | str:
    """The first rows, or all by Pillow if no number is given; or why there are none."""
    try:
        return decoded(data) if count is None else rows_of(data, count)
    except BadSampleError as error:
        return str(error)


def assert_same_outcome(data: bytes, count: int) -> None:
    expected, found = outcome(data), outcome(data, count)
    if isinstance(expected, str) or isinstance(found, str):
        assert found is expected or found == expected
    else:
        np.testing.assert_array_equal(found[:count], expected[:count])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 75),
    st.integers(1, 140),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.fixed_dictionaries(
        {"subsampling": st.integers(0, 2), "quality": st.integers(5, 100), "progressive": st.booleans()},
        optional={
            "restart_marker_rows": st.integers(1, 3),
            "restart_marker_blocks": st.integers(1, 9),
            "optimize": st.just(True),
        },
    ),
    st.data(),
)
def test_rows_are_those_of_pillow(width: int, height: int, mode: str, options: dict[str, Any], data: Any) -> None:
    encoded = jpeg(width, height, mode=mode, **options)
    image = EncodedImage(encoded, max_pixels=width * height)
    assert (image.width, image.height) == (width, height)
    count = data.draw(st.integers(1, height))
    rows = image.rows(count)
    assert rows.shape[0] in range(count, height + 1)
    assert rows.shape[1:] == (width, 3)
    assert rows.dtype == np.uint8
    np.testing.assert_array_equal(rows[:count], decoded(encoded)[:count])


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_every_cut_gives_the_pixels_of_the_whole(subsampling: str) -> None:
    pixels = np.array(decode_image(jpeg(45, 70, subsampling=0, quality=100), max_pixels=10**6))
    encoded = simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling, quality=90)
    expected = decoded(encoded)
    for count in range(1, 71):
        np.testing.assert_array_equal(rows_of(encoded, count)[:count], expected[:count])


@pytest.mark.parametrize("keep_rgb", [False, True])
def test_colours_that_are_stored_as_they_are(keep_rgb: bool) -> None:
    encoded = jpeg(40, 50, keep_rgb=keep_rgb, subsampling=0)
    np.testing.assert_array_equal(rows_of(encoded, 50), decoded(encoded))


@pytest.mark.parametrize(
    ("options", "rows_decoded"),
    [
        ({"subsampling": 0}, 16),  # 9 rows and 1 of margin, in blocks of 8
        ({"subsampling": 1}, 16),
        ({"subsampling": 2}, 16),  # 9 and 2, in blocks of 16
        ({"mode": "L"}, 16),
        ({"subsampling": 2, "restart_marker_rows": 1}, 16),
        ({"subsampling": 2, "progressive": True}, 100),
    ],
)
def test_only_rows_that_are_needed_are_decoded_and_not_by_pillow(
    options: dict[str, Any], rows_decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = jpeg(30, 100, **options)
    monkeypatch.setattr(Image, "open", None)
    image = EncodedImage(encoded, max_pixels=3000)
    assert image.rows(9).shape == (rows_decoded, 30, 3)
    assert image.rows(100).shape == (100, 30, 3)
    assert image.rows(9).shape == (rows_decoded, 30, 3)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_give_the_rows_of_pillow(format: str) -> None:
    encoded = encode(Image.fromarray(GRADIENT), format)
    image = EncodedImage(encoded, max_pixels=64)
    assert (image.width, image.height) == (8, 8)
    rows = image.rows(3)
    np.testing.assert_array_equal(rows[:3], decoded(encoded)[:3])
    rows[:] = 0  # torch warns of arrays that cannot be written


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"subsampling": 0}])
def test_a_truncated_jpeg_is_bad_wherever_the_crop_is(options: dict[str, Any]) -> None:
    encoded = jpeg(40, 120, quality=90, **options)
    for share, count in product((0.3, 0.6, 0.9, 0.99), (1, 60, 120)):
        with pytest.raises(BadSampleError, match="cannot decode the image") as caught:
            rows_of(encoded[: int(share * len(encoded))], count)
        assert str(caught.value) == outcome(encoded[: int(share * len(encoded))])


def test_a_thumbnail_does_not_pass_for_the_end_of_a_truncated_jpeg() -> None:
    exif = b"Exif\0\0" + jpeg(8, 8)
    encoded = jpeg(40, 120, exif=exif)
    assert rows_of(encoded, 120).shape == (120, 40, 3)
    with pytest.raises(BadSampleError, match="cannot decode the image"):
        rows_of(encoded[: len(encoded) // 2], 8)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_what_pillow_bears_is_borne(options: dict[str, Any]) -> None:
    encoded = jpeg(40, 120, **options)
    half, end = len(encoded) // 2, len(encoded) - 2
    borne = [
        encoded + b"trailing bytes",
        encoded[:end] + bytes(9) + encoded[end:],
        encoded[:half] + bytes(40) + encoded[half + 40 :],
        encoded[:half] + encoded[half + 40 :],
        encoded[:2] + b"\xff\xff" + encoded[2:],  # fill bytes before a marker
    ]
    for data, count in product(borne, (1, 60, 120)):
        assert isinstance(outcome(data), np.ndarray)
        assert_same_outcome(data, count)


def test_frames_that_common_decoders_do_not_read() -> None:
    encoded = jpeg(16, 16)
    frame = encoded.index(b"\xff\xc0")
    twice = encoded[:frame] + encoded[frame : frame + 19] + encoded[frame:]
    for place, value in ((frame + 1, 0xC9), (frame + 1, 0xC3), (frame + 4, 12), (frame + 9, 2), (frame + 11, 0x51)):
        changed = bytearray(encoded)
        changed[place] = value  # arithmetic coding, lossless, 12 bits, two channels, sampling by five
        assert_same_outcome(bytes(changed), 16)
    assert_same_outcome(twice, 16)


@pytest.mark.parametrize("kind", ["flip", "delete", "insert", "zeros", "truncate", "header"])
def test_damage_has_the_same_outcome_as_in_pillow(kind: str) -> None:
    rng = np.random.default_rng(5)
    options = [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"restart_marker_rows": 1}]
    good = [jpeg(40, 70, quality=80, **choice) for choice in options]
    outcomes = set()
    for _ in range(250):
        data = bytearray(good[rng.integers(len(good))])
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        if kind == "flip":
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
        elif kind == "header":
            data[int(rng.integers(0, 650)) % len(data)] = rng.choice([0, 0xFF, 0xD9, rng.integers(256)])
        elif kind == "truncate":
            del data[at:]
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = bytes(rng.choice([0xFF, 0xD9, 0xD0, 0, 7], 1 + length % 8).tolist())
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
        assert_same_outcome(bytes(data), int(rng.integers(1, 71)))
        outcomes.add(isinstance(outcome(bytes(data)), str))
    assert True in outcomes
    assert False in outcomes or kind == "truncate"


def test_the_size_of_a_jpeg_is_judged_before_a_pixel_is_decoded() -> None:
    bomb = bytearray(jpeg(16, 16))
    frame = bomb.index(b"\xff\xc0")
    struct.pack_into(">HH", bomb, frame + 5, 9_000, 8_000)
    with pytest.raises(BadSampleError) as caught:
        EncodedImage(bytes(bomb), max_pixels=71_999_999)
    assert str(caught.value) == "image of 8000 x 9000 pixels; at most 71999999 pixels are decoded"
    assert EncodedImage(bytes(bomb), max_pixels=72_000_000).height == 9_000


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_the_limit_of_the_header_is_inclusive(kind: str) -> None:
    data = image_bytes(0, hw=(10, 20), kind=kind)
    assert EncodedImage(data, max_pixels=200).width == 20
    with pytest.raises(BadSampleError, match="image of 20 x 10 pixels; at most 199 pixels are decoded"):
        EncodedImage(data, max_pixels=199)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xda\xff\xd9", b"\xff\xd8" + b"\xff" * 99])
def test_bytes_without_a_header_are_bad(data: bytes) -> None:
    with pytest.raises(BadSampleError, match="cannot decode the image"):
        EncodedImage(data, max_pixels=100)
