"""Encoded bytes of a sample to RGB pixels.

Common JPEGs are decoded by simplejpeg, which spares the way through Pillow's own image; all else by Pillow. Both leave
JPEGs to libjpeg-turbo with its exact inverse DCT and its smooth upsampling of colours, so that the pixels are the same
bits and the way they took is a matter of time only. benchmarks/decoders.py compares these two and others.
"""

from __future__ import annotations

import io
import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Named, because Pillow would also try formats that start other programs (EPS), and because its search for a format
# among all of them can miss one that another thread is just loading.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Markers of a JPEG (ITU-T T.81, table B.1): frames of common decoders, and segments that may stand before a scan.
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_FRAMES = _SEQUENTIAL | {0xC2}
_PASSED_OVER = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
# What libjpeg says, having decoded all rows of the header, of rows that are left over (to a restart or to the end).
_ROWS_LEFT_OVER = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd[0-79]")


class BadSampleError(Exception):
    """A sample cannot be used. The message is the reason that goes into quarantine.jsonl."""


class EncodedImage:
    """An image of which the header has been read: its size is known and allowed, and no pixel is decoded yet.

    Args:
        data: an image of one of ``FORMATS``.
        max_pixels: images of more pixels are refused.

    Attributes:
        width: in pixels, as stored: an EXIF orientation is ignored, as in the reference input pipelines.
        height: likewise.

    Raises:
        BadSampleError: the bytes have no header of an image, or the image has more than ``max_pixels`` pixels.
    """

    __slots__ = ("_data", "_frame", "_max_pixels", "_opened", "height", "width")

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        self._data, self._max_pixels = data, max_pixels
        self._opened: Image.Image | None = None
        self._frame = _find_frame(data)
        if self._frame is None:
            self._opened = _open(data, max_pixels)
            self.width, self.height = self._opened.size
        else:
            self.width, self.height = self._frame.width, self._frame.height
            _check_size(self.width, self.height, max_pixels)

    def rows(self, count: int) -> NDArray[np.uint8]:
        """Decode the first ``count`` rows, or more where that costs nothing: [R, width, 3], count <= R <= height.

        Pixels are those of :func:`decode_image`. As there, damage that libjpeg bridges is borne; damage below the
        rows may go unnoticed, but a file that ends too early never does.

        Raises:
            BadSampleError: the image cannot be decoded.
        """
        pixels = _decode_jpeg(self._data, self._frame, count) if self._frame else None
        if pixels is not None:
            return pixels
        # Pillow decides about the rest, and about any JPEG that was not decoded without a complaint.
        image = self._opened or _open(self._data, self._max_pixels)
        return np.array(_convert(image, self._data))  # asarray() would make it read-only


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image of one of ``FORMATS`` to 8-bit RGB by Pillow.

    Grey, palette, CMYK and alpha images are converted and of 16 bits the upper 8 are kept; an EXIF orientation is
    ignored, as in the reference input pipelines. The size is checked from the header, before pixels are decoded.

    Raises:
        BadSampleError: the bytes are not a readable image, or it has more than ``max_pixels`` pixels.
    """
    return _convert(_open(data, max_pixels), data)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise _bad_sample(error, data) from error
    _check_size(*image.size, max_pixels)
    return image


def _convert(image: Image.Image, data: bytes) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadSampleError(f"pixels of mode {image.mode}: 32-bit pixels have no common range to convert from")
    try:
        if image.mode.startswith("I;16"):
            # convert() would clip to 255.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except Exception as error:
        raise _bad_sample(error, data) from error


def _bad_sample(error: Exception, data: bytes) -> BadSampleError:
    """Pillow raises almost anything on foreign bytes (OSError, SyntaxError, struct.error, ...): each is a bad one."""
    if isinstance(error, UnidentifiedImageError):
        return BadSampleError(f"cannot decode the image: none of {', '.join(FORMATS)} in {len(data)} bytes")
    return BadSampleError(f"cannot decode the image: {error}")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSampleError(f"image of {width} x {height} pixels; at most {max_pixels} pixels are decoded")


class _Frame(NamedTuple):
    """Where the header of a common JPEG states its size, and the size."""

    place: int
    width: int
    height: int
    cut_px: int
    """The image may be cut below any multiple of so many rows (0: nowhere)."""
    margin_px: int
    """Rows above a cut of which the colours would be others: upsampling looks at the next row of chroma."""


def _find_frame(data: bytes) -> _Frame | None:
    """The frame of an 8-bit grey or three-channel JPEG that is there to its end, or None.

    Only such JPEGs are left to libjpeg-turbo alone: in four channels Pillow inverts inks, and of a truncated file
    it knows more than that there was some damage.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    frame = channels = marker = 0
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            if frame:
                return None
            frame, channels = place, data[place + 9]
        elif marker == _SCAN:
            break
        elif marker not in _PASSED_OVER:
            return None
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    # Behind the start of the scan these two bytes occur at the end of an image only.
    if marker != _SCAN or not frame or data.rfind(_END_OF_IMAGE) < place:
        return None
    length, depth, height, width = struct.unpack_from(">HBHH", data, frame + 2)
    if depth != 8 or channels not in (1, 3) or length != 8 + 3 * channels or not height or not width:
        return None
    if data[frame + 1] not in _SEQUENTIAL or data[place + 4] != channels:
        return _Frame(frame, width, height, cut_px=0, margin_px=0)  # several scans, each of the whole image
    sampling = max(data[frame + 11 + 3 * channel] & 0x0F for channel in range(channels))
    return _Frame(frame, width, height, cut_px=8 * sampling, margin_px=sampling)


def _decode_jpeg(data: bytes, frame: _Frame, count: int) -> NDArray[np.uint8] | None:
    """At least the first ``count`` rows, or None if libjpeg complained.

    To stop the decoder below them, a copy of the file claims that the image is not higher: a scan holds the rows from
    top to bottom, so these are decoded as ever, and what is left over is skipped in search of the end.
    """
    rows = frame.height
    if frame.cut_px:
        rows = min(rows, -(-(count + frame.margin_px) // frame.cut_px) * frame.cut_px)
    encoded: bytes | bytearray = data
    if rows < frame.height:
        encoded = bytearray(data)
        struct.pack_into(">H", encoded, frame.place + 5, rows)
    pixels = np.empty((rows, frame.width, 3), dtype=np.uint8)
    try:
        simplejpeg.decode_jpeg(encoded, buffer=pixels)
    except ValueError as error:
        # libjpeg tells its first complaint or, over it, the error that made it stop: here none did.
        if rows == frame.height or not _ROWS_LEFT_OVER.fullmatch(str(error)):
            return None
    return pixels
