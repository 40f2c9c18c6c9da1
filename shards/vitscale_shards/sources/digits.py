"""scikit-learn's handwritten digits: real images that everyone has."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from vitscale.errors import VitscaleError
from vitscale_shards.rows import Row


class Digits:
    """1,797 grey images of 8x8 pixels with values 0..16, as lossless 8-bit PNG.

    A value v becomes (v * 255 + 8) // 16, the nearest of 0..255; 16 * pixel / 255, rounded, gives v back.
    """

    name = "digits"
    classes = tuple("0123456789")
    multi_label = False

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()

    def rows(self) -> Iterator[Row]:
        """The images in the package's order.

        Raises:
            VitscaleError: scikit-learn is not installed.
        """
        for index, label in enumerate(self._data.target):
            yield Row(f"digit-{index:04d}", (int(label),), str(index))

    def read(self, row: Row) -> bytes:
        """One image as PNG; stored, not deflated, so that every version of zlib gives the same bytes."""
        from PIL import Image

        values = self._data.images[int(row.path)].astype(int)
        buffer = io.BytesIO()
        Image.fromarray(((values * 255 + 8) // 16).astype("uint8")).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    @cached_property
    def _data(self) -> Any:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise VitscaleError(f"digits need scikit-learn ({error}): pip install 'vitscale[digits]'") from error
        return load_digits()
