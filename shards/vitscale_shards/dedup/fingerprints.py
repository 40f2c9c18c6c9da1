"""What is compared of an image: digests of its bytes and pixels, and a perceptual hash."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from PIL import features

from vitscale.data.decode import BadSampleError, decode_image
from vitscale_shards.dedup.perceptual import dct_hash
from vitscale_shards.images import MAX_PIXELS
from vitscale_shards.rows import BadImageError, Row, Source

VERSION = 1
"""Of the fingerprints' meaning; those of another version are computed again."""

_DECODERS = {"pillow": "pil", "libjpeg-turbo": "libjpeg_turbo", "libjpeg": "jpg", "libwebp": "webp"}


class Fingerprint(NamedTuple):
    """What is compared of an image. All is None but the reason if the image cannot be used."""

    bytes_sha256: bytes | None
    """Of the encoded image."""

    pixels_sha256: bytes | None
    """Of its size and its pixels as 8-bit RGB; None if it was not to be decoded."""

    dct_hash: int | None
    """Of what it looks like; None if it was not to be decoded or is too plain for that."""

    reason: str | None
    """Why it cannot be read or decoded."""


def decoder_versions() -> dict[str, str | None]:
    """Versions of what decodes images: another one may give other pixels."""
    return {name: features.version(feature) for name, feature in _DECODERS.items()}


def fingerprint(source: Source, row: Row, *, decode: bool) -> Fingerprint:
    """Fingerprint of one image. An EXIF orientation is ignored, as in training."""
    try:
        data = source.read(row)
        if row.num_bytes and len(data) != row.num_bytes:
            raise BadImageError(f"has {len(data)} bytes, {row.num_bytes} when it was listed: the source has changed")
        bytes_sha256 = hashlib.sha256(data).digest()
        if not decode:
            return Fingerprint(bytes_sha256, None, None, None)
        image = decode_image(data, max_pixels=MAX_PIXELS)
    except (BadImageError, BadSampleError) as error:
        return Fingerprint(None, None, None, str(error).encode("utf-8", "backslashreplace").decode())
    pixels = hashlib.sha256(f"{image.width}x{image.height} RGB ".encode())
    pixels.update(image.tobytes())
    return Fingerprint(bytes_sha256, pixels.digest(), dct_hash(image), None)
