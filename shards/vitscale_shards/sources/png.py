"""PNG files whose pixels are not compressed: the same to the byte with every version of Pillow and zlib.

Of the PNG specification (W3C, third edition) the least that is needed: one IDAT chunk, no filter, a zlib stream
(RFC 1950) of stored blocks (RFC 1951, section 3.2.4).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_STORED_BLOCK = 65_535
_GREY, _RGB = 0, 2


def stored_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of 8-bit pixels, grey ``[H, W]`` or RGB ``[H, W, 3]``."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels.size // height), np.uint8)  # a line begins with its filter: 0, none
    lines[:, 1:] = pixels.reshape(height, -1)
    raw = lines.tobytes()
    blocks = []
    for start in range(0, len(raw), _STORED_BLOCK):
        piece = raw[start : start + _STORED_BLOCK]
        is_last = start + _STORED_BLOCK >= len(raw)
        blocks.append(struct.pack("<BHH", is_last, len(piece), len(piece) ^ 0xFFFF) + piece)
    head = struct.pack(">IIBBBBB", width, height, 8, _RGB if pixels.ndim == 3 else _GREY, 0, 0, 0)
    data = b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(raw))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def stored_png_bytes(height: int, width: int, channels: int) -> int:
    """Length of what :func:`stored_png` gives."""
    raw = height * (1 + width * channels)
    return 8 + 3 * 12 + 13 + 2 + raw + 5 * -(-raw // _STORED_BLOCK) + 4


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
