"""A 64-bit hash of what an image looks like: images that look alike have hashes that differ in few bits.

The DCT hash ("pHash") of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (thesis, Upper
Austria University of Applied Sciences, 2010), section 3.2.1: grey, 32x32 pixels, discrete cosine transform, its 8x8
lowest frequencies without the very lowest row and column; a bit is set where the coefficient is above their median.
(Its mean filter of 7x7 pixels before the scaling is replaced by a scaling that averages over all pixels.)
All arithmetic is on whole numbers, so that every machine finds the same bits in the same pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

_SIDE = 32
_SCALE = 1 << 14
# Rows 1..8 of the DCT-II of 32 values, as whole numbers.  # [8, 32]
_DCT = np.array(
    [[round(_SCALE * math.cos(math.pi * (2 * x + 1) * u / (2 * _SIDE))) for x in range(_SIDE)] for u in range(1, 9)],
    dtype=np.int64,
)
# Independent noise of one grey level in the 32x32 pixels changes a coefficient by this much (standard deviation).
_GREY_LEVEL = _SIDE // 2 * _SCALE**2
MIN_CERTAIN_BITS = 48
"""So many of the 64 coefficients must lie farther from the median than noise of one grey level would move them. In
100 photographs (ImageNet) at least 59 do, in CIFAR-10 at least 52; in flat areas, gradients and plain symbols, whose
other bits would be chance, less than 45."""


def dct_hash(image: Image.Image) -> int | None:
    """Perceptual hash of an image of any size and mode, below 2**64, or None if it is too plain to have one.

    Scale, compression, colour and small changes of brightness hardly change it; a border cut off, a mirror image or a
    rotation does.
    """
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.int64)  # [32, 32]
    coefficients = (_DCT @ pixels @ _DCT.T).ravel()  # [64]
    # Twice the distance from the median, which is the mean of the two middle values: no fraction appears.
    from_median = 2 * coefficients - np.partition(coefficients, (31, 32))[31:33].sum()
    if np.count_nonzero(np.abs(from_median) > 2 * _GREY_LEVEL) < MIN_CERTAIN_BITS:
        return None
    return int.from_bytes(np.packbits(from_median > 0).tobytes(), "big")
