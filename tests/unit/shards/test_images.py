"""What becomes of every kind of image: real files of all of them, and real files damaged at random."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from vitscale.data.decode import decode_image
from vitscale.errors import DataError
from vitscale_shards.images import (
    EXTENSION_OF_FORMAT,
    MAX_PIXELS,
    Treatment,
    _plain_jpeg_size,
    _plain_png_size,
    check_header,
)
from vitscale_shards.rows import BadImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def picture(width: int = 60, height: int = 40, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    """A smooth picture, which JPEG hardly changes, that looks different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    stack = np.stack([x, y, 1 - x * y, 0.3 + 0.5 * x][:channels], axis=-1)
    return (stack * np.iinfo(dtype).max).astype(dtype).squeeze()


def encoded(image: Image.Image | np.ndarray[Any, Any], format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def frames(count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(np.roll(picture(), 15 * i, axis=1)) for i in range(count)]


def animated(format: str, **options: Any) -> bytes:
    first, *more = frames()
    return encoded(first, format, save_all=True, append_images=more, duration=100, **options)


def cmyk() -> bytes:
    return encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)


def grey_of(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rgb[..., 0]


RGB = picture()
# By name: the file, the extension by content, and what of it reaches a shard when it is encoded again.
KINDS: dict[str, tuple[bytes, str, np.ndarray[Any, Any]]] = {
    "jpeg": (encoded(RGB, "JPEG", quality=95), "jpg", RGB),
    "progressive jpeg": (encoded(RGB, "JPEG", quality=95, progressive=True), "jpg", RGB),
    "jpeg to be turned": (encoded(RGB, "JPEG", quality=95, exif=exif(6)), "jpg", RGB),
    "jpeg to be mirrored": (encoded(RGB, "JPEG", quality=95, exif=exif(2)), "jpg", RGB),
    "png to be turned": (encoded(RGB, "PNG", exif=exif(8)), "png", RGB),
    "cmyk jpeg": (cmyk(), "jpg", RGB),
    "grey jpeg": (encoded(grey_of(RGB), "JPEG", quality=95), "jpg", np.stack([grey_of(RGB)] * 3, axis=-1)),
    "phone's mpo": (animated("MPO", quality=95), "jpg", RGB),
    "png": (encoded(RGB, "PNG"), "png", RGB),
    "bmp": (encoded(RGB, "BMP"), "bmp", RGB),
    "tiff": (encoded(RGB, "TIFF"), "tif", RGB),
    "webp": (encoded(RGB, "WEBP", lossless=True), "webp", RGB),
    "grey png": (encoded(grey_of(RGB), "PNG"), "png", np.stack([grey_of(RGB)] * 3, axis=-1)),
    "16-bit grey png": (
        encoded(picture(channels=1, dtype=np.uint16), "PNG"),
        "png",
        np.stack([picture(channels=1, dtype=np.uint16) >> 8] * 3, axis=-1),
    ),
    "palette png": (encoded(Image.fromarray(RGB).quantize(256), "PNG"), "png", RGB),
    "1-bit png": (
        encoded(Image.fromarray(grey_of(RGB) > 127), "PNG"),
        "png",
        np.stack([(grey_of(RGB) > 127) * 255] * 3, axis=-1),
    ),
    "png with alpha": (encoded(picture(channels=4), "PNG"), "png", RGB),
    "webp with alpha": (encoded(picture(channels=4), "WEBP", lossless=True, exact=True), "webp", RGB),
    "grey png with alpha": (
        encoded(Image.fromarray(picture(channels=4)).convert("LA"), "PNG"),
        "png",
        np.stack([np.asarray(Image.fromarray(RGB).convert("L"))] * 3, axis=-1),
    ),
    "animated gif": (animated("GIF"), "gif", RGB),
    "animated webp": (animated("WEBP", lossless=True), "webp", RGB),
    "animated png": (animated("PNG"), "png", RGB),
}
COARSE = {"palette png": 14, "animated gif": 30, "1-bit png": 12, "cmyk jpeg": 6}  # mean error of these kinds
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("treatment", [Treatment(), Treatment(check="decode"), Treatment(resize_short=40)])
def test_images_pass_through_as_they_are(kind: str, treatment: Treatment) -> None:
    data, extension, _ = KINDS[kind]
    assert treatment.apply(data) == (extension, data)


@each_kind
def test_a_resized_image_is_what_the_loader_would_see_but_smaller(kind: str) -> None:
    data, _, right = KINDS[kind]
    extension, small = Treatment(resize_short=20, quality=95).apply(data)
    with Image.open(io.BytesIO(small)) as image:
        assert (extension, image.format, image.mode, image.size) == ("jpg", "JPEG", "RGB", (30, 20))
        assert not image.getexif()
        found = np.asarray(image, np.float64)
    seen = decode_image(data, max_pixels=MAX_PIXELS)
    loader = np.asarray(seen.resize((30, 20), Image.Resampling.BICUBIC), np.float64)
    assert abs(found - loader).mean() < 4
    # And that is the picture itself: not turned, the first frame, without alpha, in its own range.
    whole = np.asarray(Image.fromarray(right.astype(np.uint8)).resize((30, 20), Image.Resampling.BICUBIC), np.float64)
    assert abs(found - whole).mean() < COARSE.get(kind, 4)


@each_kind
def test_the_header_says_what_pillow_says(kind: str) -> None:
    data, extension, _ = KINDS[kind]
    with Image.open(io.BytesIO(data)) as image:
        assert check_header(data) == (extension, image.size)


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (20, 20), (10, 3), (21, 20)])
def test_smaller_images_keep_their_bytes(size: tuple[int, int]) -> None:
    data = encoded(picture(*size), "PNG")
    assert Treatment(resize_short=20).apply(data) == ("png", data)


@pytest.mark.parametrize(
    ("size", "right"), [((60, 40), (30, 20)), ((40, 61), (20, 30)), ((41, 41), (20, 20)), ((999, 21), (951, 20))]
)
def test_the_shorter_side_gets_the_size(size: tuple[int, int], right: tuple[int, int]) -> None:
    _, data = Treatment(resize_short=20).apply(encoded(picture(*size), "PNG"))
    assert check_header(data) == ("jpg", right)


def test_the_quality_is_passed_on() -> None:
    low, high = (Treatment(resize_short=20, quality=quality).apply(KINDS["png"][0])[1] for quality in (30, 95))
    assert len(low) < len(high)
    assert Treatment(resize_short=20, quality=30).apply(KINDS["png"][0])[1] == low


def test_an_image_too_long_for_a_jpeg_is_refused() -> None:
    data = encoded(Image.new("RGB", (80_000, 11)), "PNG")
    assert Treatment(resize_short=11).apply(data) == ("png", data)
    with pytest.raises(BadImageError, match="80000x11 pixels would become 72727x10; a JPEG has 65500"):
        Treatment(resize_short=10).apply(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"check": "look"}, "check: 'look'; header and decode are allowed"),
        ({"resize_short": 0}, "resize short: 0 pixels; at least 1 is needed"),
        ({"quality": 0}, "quality: 0; 1 to 100"),
        ({"quality": 101}, "quality: 101; 1 to 100"),
    ],
)
def test_treatments_that_cannot_be_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Treatment(**values)


# Headers.


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, rest: bytes = b"\0\0\0") -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBB", width, height, depth, colour) + rest
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT" + bytes(13)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def frame(width: int, height: int, components: int = 3, depth: int = 8, marker: int = 0xC0) -> bytes:
    return segment(marker, struct.pack(">BHHB", depth, height, width, components) + bytes(3 * components))


SCAN = segment(0xDA, bytes(10))
JPEG = b"\xff\xd8"
_TINY_TIFF = Image.fromarray(np.zeros((4, 5), np.int32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known image header in 0 bytes"),
        (b"not an image", "no known image header"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image header"),
        (png_header(8, 8)[:20], "image header"),
        (png_header(60_000, 60_000), "60000x60000 pixels; at most 80000000 are allowed"),
        (png_header(10_001, 8_000), "10001x8000 pixels; at most 80000000 are allowed"),
        (JPEG + frame(65_500, 65_500) + SCAN, "65500x65500 pixels; at most 80000000"),
        (JPEG + frame(10_001, 8_000) + SCAN, "10001x8000 pixels; at most 80000000"),
        (png_header(0, 5), "no known image header"),
        (png_header(5, 5, depth=3), "no known image header"),
        (JPEG + frame(0, 5) + SCAN, "no known image header"),
        (JPEG + frame(5, 0) + SCAN, "no known image header"),
        (JPEG + SCAN, "no known image header"),
        (JPEG + frame(5, 5, depth=12) + SCAN, "no known image header"),
        (JPEG + frame(5, 5, components=2) + SCAN, "no known image header"),
        (JPEG + frame(5, 5)[:-3], "image header"),
        (JPEG + frame(5, 5) + SCAN[:-1], "image header"),
        (JPEG + frame(5, 5) + SCAN[:3], "image header"),
        (b"P6 2 2 255 " + bytes(12), "no known image header"),
        (encoded(_TINY_TIFF, "TIFF"), "pixels of mode I: 32-bit"),
        (encoded(_TINY_TIFF.convert("F"), "TIFF"), "pixels of mode F: 32-bit"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_bad_headers_are_told(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        check_header(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "WEBP"])
def test_bombs_of_other_formats_are_told_by_their_headers(format: str) -> None:
    """Real files whose header is made to say more pixels than there are: nothing may be decoded to find out."""
    data = bytearray(encoded(picture(16, 16), format))
    if format == "BMP":
        data[18:26] = struct.pack("<ii", 50_000, 50_000)
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", 50_000, 50_000)
    elif format == "TIFF":
        for tag in (256, 257):
            place = data.index(struct.pack("<HH", tag, 4 if data.find(struct.pack("<HH", tag, 4)) >= 0 else 3))
            data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 50_000)
    else:
        data[12:30] = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16_000).to_bytes(3, "little") * 2
    with pytest.raises(BadImageError, match=r"bomb|pixels; at most|image header"):
        check_header(bytes(data))


def test_a_header_check_passes_what_only_decoding_refuses() -> None:
    whole = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG", quality=95)
    cut = whole[: len(whole) // 2]
    assert Treatment().apply(cut) == ("jpg", cut)
    for treatment in (Treatment(check="decode"), Treatment(resize_short=32)):
        with pytest.raises(BadImageError, match="truncated"):
            treatment.apply(cut)


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "BMP"])
def test_cut_images_of_other_formats_are_refused_by_decoding(format: str) -> None:
    whole = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), format)
    with pytest.raises(BadImageError):
        Treatment(check="decode").apply(whole[: len(whole) // 2])


# The two quick looks against Pillow's parsers.


def by_pillow(data: bytes) -> tuple[str, tuple[int, int]] | None:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return EXTENSION_OF_FORMAT[image.format or ""], image.size
    except (UnidentifiedImageError, Exception):
        return None


def quickly(data: bytes) -> tuple[str, tuple[int, int]] | None:
    if size := _plain_jpeg_size(data):
        return "jpg", size
    size = _plain_png_size(data)
    return ("png", size) if size else None


SMALL = picture(9, 7)
HEADS = [
    encoded(SMALL, "JPEG"),
    encoded(SMALL, "JPEG", progressive=True, comment=b"a note"),
    encoded(SMALL, "JPEG", exif=exif(3), icc_profile=b"profile" * 9),
    encoded(grey_of(SMALL), "JPEG", restart_marker_blocks=1),
    encoded(Image.fromarray(SMALL).convert("CMYK"), "JPEG"),
    encoded(SMALL, "MPO", save_all=True, append_images=[Image.fromarray(SMALL)]),
    encoded(SMALL, "PNG"),
    encoded(picture(9, 7, channels=4), "PNG"),
    encoded(grey_of(SMALL) > 100, "PNG"),
    JPEG + b"\xff\xff" + segment(0xFE, b"fill bytes") + b"\xff" + frame(9, 7) + b"\xff\xff\xff" + SCAN,
]


@pytest.mark.parametrize("data", HEADS)
def test_the_quick_look_takes_the_common_files(data: bytes) -> None:
    assert quickly(data) == by_pillow(data) is not None


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(SMALL).quantize(9), "PNG"),
        encoded(SMALL, "PNG", dpi=(72, 72)),
        animated("PNG"),
        JPEG + frame(9, 7, marker=0xC9) + SCAN,
        JPEG + frame(9, 7) + frame(9, 8) + SCAN,
        JPEG + segment(0xC0, frame(9, 7)[4:] + b"more") + SCAN,
        JPEG + segment(0xC0, frame(9, 7)[4:9]) + segment(0xFE, b"") + SCAN,
        JPEG + b"\xff\xfe\0\0" + frame(9, 7) + SCAN,
        JPEG + b"\xff\x01" + frame(9, 7) + SCAN,
        JPEG + segment(0xFE, b"") + b"\0" + frame(9, 7) + SCAN,
    ],
    ids=[
        "palette",
        "chunk",
        "animated",
        "arithmetic",
        "two frames",
        "long frame",
        "short frame",
        "no length",
        "bare marker",
        "junk",
    ],
)
def test_the_quick_look_leaves_what_is_not_common_to_pillow(data: bytes) -> None:
    assert quickly(data) is None
    try:
        assert check_header(data) == by_pillow(data)
    except BadImageError:
        assert by_pillow(data) is None


# Most of the damage falls into the first bytes, where the headers are.
PLACES = st.one_of(st.integers(0, 60), st.integers(0, 700))
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("cut"), PLACES, st.just(b"")),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("remove"), PLACES, st.binary(min_size=1, max_size=6)),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for how, place, content in damage:
        if how == "cut":
            data = data[:place]
        else:
            data = (
                data[:place] + (b"" if how == "remove" else content) + data[place + (how != "insert") * len(content) :]
            )
    return data


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=600, deadline=None)
@given(st.sampled_from(HEADS), DAMAGE)
@example(HEADS[0], [("set", 0, b"\xff\xd8\xff\xda")])
def test_the_quick_look_never_contradicts_pillow(data: bytes, damage: list[tuple[str, int, bytes]]) -> None:
    """Of a JPEG it may pass over what Pillow refuses: damage within tables and notes. A PNG it takes is Pillow's."""
    data = damaged(data, damage)
    quick, slow = quickly(data), by_pillow(data)
    if quick is not None and quick[1][0] * quick[1][1] <= MAX_PIXELS:
        assert quick == slow or (slow is None and quick[0] == "jpg" and _damaged_inside(data))


def _damaged_inside(data: bytes) -> bool:
    """Whether Pillow takes the JPEG when all segments but the frame and the scan are taken out."""
    kept, place = b"\xff\xd8", 2
    while data[place + 1] != 0xDA:
        if data[place + 1] == 0xFF:
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] in (0xC0, 0xC1, 0xC2):
            kept += data[place:end]
        place = end
    return by_pillow(kept + data[place:]) is not None


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None)
@given(st.sampled_from([data for data, _, _ in KINDS.values()]), DAMAGE)
@example(b"", [])
def test_a_damaged_image_is_an_image_or_a_bad_image(data: bytes, damage: list[tuple[str, int, bytes]]) -> None:
    data = damaged(data, damage)
    for treatment in (Treatment(), Treatment(check="decode"), Treatment(resize_short=1)):
        try:
            extension, out = treatment.apply(data)
        except BadImageError as error:
            reason = str(error)
        else:
            reason = ""
            assert check_header(out)[0] == extension
        assert "\n" not in reason
