"""Encoded bytes of a sample to an RGB image."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# Named, because Pillow would also try formats that start other programs (EPS), and because its search for a format
# among all of them can miss one that another thread is just loading.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class BadSampleError(Exception):
    """A sample cannot be used. The message is the reason that goes into quarantine.jsonl."""


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image of one of ``FORMATS`` to 8-bit RGB.

    Grey, palette, CMYK and alpha images are converted and of 16 bits the upper 8 are kept; an EXIF orientation is
    ignored, as in the reference input pipelines. The size is checked from the header, before pixels are decoded.

    Raises:
        BadSampleError: the bytes are not a readable image, or it has more than ``max_pixels`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadSampleError(f"image of {width} x {height} pixels; at most {max_pixels} pixels are decoded")
        if image.mode in ("I", "F"):
            raise BadSampleError(f"pixels of mode {image.mode}: 32-bit pixels have no common range to convert from")
        if image.mode.startswith("I;16"):
            # convert() would clip to 255.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except BadSampleError:
        raise
    except UnidentifiedImageError as error:
        raise BadSampleError(f"cannot decode the image: none of {', '.join(FORMATS)} in {len(data)} bytes") from error
    # Decoders raise almost anything on foreign bytes (OSError, SyntaxError, struct.error, ...): each is a bad sample.
    except Exception as error:
        raise BadSampleError(f"cannot decode the image: {error}") from error
