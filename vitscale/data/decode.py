"""Encoded bytes of a sample to an RGB image."""

from __future__ import annotations

import io

from PIL import Image


class BadSampleError(Exception):
    """A sample cannot be used. The message is the reason that goes into quarantine.jsonl."""


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode any format that Pillow reads to 8-bit RGB.

    Grey, palette, CMYK and alpha images are converted; an EXIF orientation is ignored, as in the reference
    input pipelines. The size is checked from the header, before pixels are decoded.

    Raises:
        BadSampleError: the bytes are not a readable image, or it has more than ``max_pixels`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise BadSampleError(f"image of {width} x {height} pixels; at most {max_pixels} pixels are decoded")
        return image.convert("RGB")
    except BadSampleError:
        raise
    # Decoders raise almost anything on foreign bytes (OSError, SyntaxError, struct.error, ...): each is a bad sample.
    except Exception as error:
        raise BadSampleError(f"cannot decode the image: {error}") from error
