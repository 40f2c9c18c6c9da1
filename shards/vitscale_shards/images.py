"""What is done with an image on its way into a shard: checked, and copied as it is or encoded again."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, UnidentifiedImageError

from vitscale.config.schema import DataConfig
from vitscale.data.decode import BadSampleError, decode_image
from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError

MAX_PIXELS = DataConfig.max_image_pixels  # what the loader would refuse by default is not written either
# By what the file is, not by what it is called. MPO is a JPEG with further pictures behind it.
EXTENSION_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_MAX_JPEG_SIDE = 65_500  # what libjpeg writes

# Markers of a JPEG (ITU-T T.81, table B.1): frames that the common decoders read, and segments that may stand between.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_PASSED_OVER = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
_SCAN = 0xDA
# The head of a PNG (ISO/IEC 15948): signature, length and name of its first chunk; depths by kind of colour.
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 4: (8, 16), 6: (8, 16)}

Check = Literal["header", "decode"]


@dataclass(frozen=True)
class Treatment:
    """How images go into the shards. The default copies their bytes after a look at the header.

    With ``resize_short`` an image whose shorter side is longer than that is decoded to 8-bit RGB exactly as the
    training loader does it (:func:`vitscale.data.decode.decode_image`), shrunk by Pillow's antialiased bicubic filter
    so that the shorter side has that many pixels, and stored as JPEG. Smaller images keep their bytes.
    """

    check: Check = "header"
    resize_short: int | None = None
    quality: int = 95

    def __post_init__(self) -> None:
        """See that the values are allowed.

        Raises:
            DataError: one is not.
        """
        if self.check not in get_args(Check):
            raise DataError(f"check: {self.check!r}; {' and '.join(get_args(Check))} are allowed")
        if self.resize_short is not None and self.resize_short < 1:
            raise DataError(f"resize short: {self.resize_short} pixels; at least 1 is needed")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality: {self.quality}; 1 to 100 are allowed")

    def apply(self, data: bytes) -> tuple[str, bytes]:
        """Extension and bytes of the member that an encoded image becomes.

        Raises:
            BadImageError: not an image of a known format, too large to be decoded safely, or not decodable (where
                its pixels are looked at).
        """
        extension, size = check_header(data)
        if self.resize_short is not None and min(size) > self.resize_short:
            return "jpg", _shrunk(_decoded(data), self.resize_short, self.quality)
        if self.check == "decode":
            _decoded(data)
        return extension, data


def check_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Extension and size in pixels of an encoded image, judged by its header; no pixel is decoded.

    Raises:
        BadImageError: not an image of a known format, too large to be decoded safely, or of 32-bit pixels, which the
            loader refuses.
    """
    # Pillow takes ten times as long, which is most of the time that a small image takes on its way into a shard.
    if size := _plain_jpeg_size(data):
        extension = "jpg"
    elif size := _plain_png_size(data):
        extension = "png"
    else:
        extension, size = _any_header(data)
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels; at most {MAX_PIXELS} are allowed")
    return extension, size


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Size of a JPEG whose segments up to the first scan are whole and of common kinds, or None.

    What lies within the tables is not looked at, nor the scan: only decoding tells whether they are sound.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    size, place = None, 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker == 0xFF:  # a marker may be preceded by any number of these
            place += 1
            continue
        if marker in _FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            if size or depth != 8 or components not in (1, 3, 4) or length != 8 + 3 * components:
                return None
            size = (width, height)
        elif marker not in _PASSED_OVER and marker != _SCAN:
            return None
        place += 2 + length
        if marker == _SCAN:
            return size if size and all(size) and place <= len(data) else None
    return None


def _plain_png_size(data: bytes) -> tuple[int, int] | None:
    """Size of a PNG without palette whose pixels follow its header at once, or None."""
    if not data.startswith(_PNG) or data[37:41] != b"IDAT":
        return None
    width, height, depth, colour, compression, filtering, interlacing, checksum = struct.unpack_from(
        ">IIBBBBBI", data, len(_PNG)
    )
    plain = depth in _PNG_DEPTHS.get(colour, ()) and compression == filtering == 0 and interlacing <= 1
    return (width, height) if plain and width and height and zlib.crc32(data[12:29]) == checksum else None


def _any_header(data: bytes) -> tuple[str, tuple[int, int]]:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            mode, size = image.mode, image.size
            extension = EXTENSION_OF_FORMAT[image.format or ""]
    except UnidentifiedImageError:
        raise BadImageError(f"no known image header in {len(data)} bytes") from None
    except Exception as error:  # a damaged header makes Pillow's parsers raise anything
        raise BadImageError(f"bad image header: {error}") from None
    if mode in ("I", "F"):
        raise BadImageError(f"pixels of mode {mode}: 32-bit pixels have no common range to convert from")
    return extension, size


def _decoded(data: bytes) -> Image.Image:
    try:
        return decode_image(data, max_pixels=MAX_PIXELS)
    except BadSampleError as error:
        raise BadImageError(str(error)) from error


def _shrunk(image: Image.Image, short: int, quality: int) -> bytes:
    width, height = image.size
    scale = short / min(width, height)
    size = (max(short, round(width * scale)), max(short, round(height * scale)))
    if max(size) > _MAX_JPEG_SIDE:
        raise BadImageError(f"{width}x{height} pixels would become {size[0]}x{size[1]}; a JPEG has {_MAX_JPEG_SIDE}")
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
