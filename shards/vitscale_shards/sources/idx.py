"""The MNIST family: images and labels in two IDX files (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources.archive import ArchiveReader, file_names, list_folder, parse_place, place_of
from vitscale_shards.sources.png import stored_png, stored_png_bytes

# train-images-idx3-ubyte, t10k-images.idx3-ubyte, emnist-balanced-train-images-idx3-ubyte.gz
_IMAGES_NAME = re.compile(r"(.+)-images([-.])idx3-ubyte(\.gz)?")
_LABELS_NAME = re.compile(r"(.+)-labels([-.])idx1-ubyte(\.gz)?")
_UBYTE = 8
_MAX_UNPACKED_BYTES = 2 << 30  # a packed file is held in memory by every worker


class Idx:
    """Grey images of an IDX file as lossless PNG (:func:`~vitscale_shards.sources.png.stored_png`).

    A folder stands for its training images; the others are a source of their own, given by their file of images. Pixels
    are taken as they lie in the file: those of EMNIST have rows and columns exchanged.
    """

    multi_label = False

    def __init__(self, path: Path, classes: Sequence[str] | None = None) -> None:
        """Find the two files.

        Args:
            path: ``train-images-idx3-ubyte`` or its like, packed with gzip or not, or the folder that it lies in. The
                labels lie beside it, in ``train-labels-idx1-ubyte``.
            classes: names in the order of their labels; by default the numbers from 0 to the highest label.

        Raises:
            DataError: one of the files is missing.
        """
        if not path.exists():
            raise DataError(f"{path}: no such file; one like train-images-idx3-ubyte is needed")
        self._others: list[str] = []
        self.path = (self._training_images(path) if path.is_dir() else path).absolute()
        self._prefix, self._labels_path = _labels_beside(self.path)
        self.name = self.path.name.removesuffix(".gz")
        self.ignored: Counter[str] = Counter()
        self._given = None if classes is None else tuple(classes)
        self._reader = ArchiveReader()
        self._lock = threading.Lock()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names by label.

        Raises:
            DataError: the file of labels is damaged.
        """
        return tuple(str(label) for label in range(max(self._labels) + 1)) if self._given is None else self._given

    def rows(self) -> Iterator[Row]:
        """Images in the order of the file. Their labels are in memory, one byte each.

        Raises:
            DataError: a file is damaged or of other values than bytes, the two do not belong together, or a label has
                no name.
        """
        self.ignored.clear()
        self.ignored.update(self._others)
        count, height, width = self._shape
        if count != len(self._labels):
            raise DataError(
                f"{self.path}: {count} images, but {self._labels_path.name} has {len(self._labels)} labels; both must "
                f"be of the same set"
            )
        if max(self._labels) >= len(self.classes):
            raise DataError(
                f"{self._labels_path}: label {max(self._labels)}, but only {len(self.classes)} classes are named: name "
                f"them all"
            )
        if self._is_packed:
            _ = self._unpacked  # now, because a damaged file should stop the plan and not every single image
        size, png_bytes = height * width, stored_png_bytes(height, width, 1)
        for number, label in enumerate(self._labels):
            place = place_of(self.name, _header_bytes(3) + number * size, size)
            yield Row(image_key(f"{self._prefix}-{number:07d}.png"), (label,), place, png_bytes)

    def read(self, row: Row) -> bytes:
        """One image as PNG. The first call unpacks a packed file into memory.

        Raises:
            BadImageError: it cannot be read.
            DataError: the whole file is damaged.
        """
        _, height, width = self._shape
        _, offset, size = parse_place(row.path)
        if self._is_packed:
            data = self._unpacked[offset : offset + size]
        else:
            data = self._reader.read(str(self.path), offset, size)
        if len(data) != height * width:
            raise BadImageError(f"{row.path!r} is no image of {height}x{width} pixels: plan the source again")
        return stored_png(np.frombuffer(data, np.uint8).reshape(height, width))

    def _training_images(self, folder: Path) -> Path:
        names = [name for name in list_folder(folder) if _IMAGES_NAME.fullmatch(name)]
        training = [name for name in names if "train-images" in name]
        # Of a file that lies there packed and unpacked, the unpacked one.
        training = [name for name in training if name.removesuffix(".gz") not in training or not name.endswith(".gz")]
        if len(training) != 1:
            raise DataError(
                f"{folder}: holds {len(training)} files of training images ({', '.join(training or names)}); give the "
                f"one file of images that is meant"
            )
        self._others = [name for name in names if name not in training]
        return folder / training[0]

    @property
    def _is_packed(self) -> bool:
        return self.path.suffix == ".gz"

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        """Images, rows, columns. An unpacked file has the size that these give."""
        count, height, width = _read_shape(self.path, 3)
        if height * width == 0:
            raise DataError(f"{self.path}: images of {height}x{width} pixels; at least 1x1 is needed")
        return count, height, width

    @cached_property
    def _labels(self) -> bytes:
        (count,) = _read_shape(self._labels_path, 1)
        if not count:
            raise DataError(f"{self._labels_path}: holds no label; at least one is needed")
        return _read_all(self._labels_path, (count,))[_header_bytes(1) :]

    @property
    def _unpacked(self) -> bytes:
        with self._lock:  # threads that read at a time must not unpack it several times
            return self._unpacked_once

    @cached_property
    def _unpacked_once(self) -> bytes:
        return _read_all(self.path, self._shape)


def _header_bytes(num_dimensions: int) -> int:
    return 4 + 4 * num_dimensions


def _labels_beside(images: Path) -> tuple[str, Path]:
    """What stands before ``-images`` in the name, and the file of labels."""
    match = _IMAGES_NAME.fullmatch(images.name)
    if not match:
        raise DataError(f"{images}: is not named like a file of images; one like train-images-idx3-ubyte is needed")
    name = f"{match[1]}-labels{match[2]}idx1-ubyte"
    for candidate in (images.with_name(name), images.with_name(f"{name}.gz")):
        if candidate.is_file():
            return match[1], candidate
    raise DataError(f"{images.with_name(name)}: no such file; the labels must lie beside the images, packed or not")


def _read_shape(path: Path, num_dimensions: int) -> tuple[int, ...]:
    """The numbers in the header, after a look at the first four bytes: 0, 0, type of the values, dimensions."""
    head = _guarded_read(path, _header_bytes(num_dimensions))
    right = bytes((0, 0, _UBYTE, num_dimensions))
    if head[:4] != right or len(head) != _header_bytes(num_dimensions):
        raise DataError(
            f"{path}: begins with {head[:4].hex(' ')} where {right.hex(' ')} is right (unsigned bytes, "
            f"{num_dimensions} dimension{'s'[: num_dimensions > 1]}); download it again"
        )
    shape: tuple[int, ...] = struct.unpack_from(f">{num_dimensions}I", head, 4)
    size = _header_bytes(num_dimensions) + math.prod(shape)
    if path.suffix == ".gz":
        if size > _MAX_UNPACKED_BYTES:
            raise DataError(
                f"{path}: {size} bytes when unpacked; at most {_MAX_UNPACKED_BYTES} are held in memory: gunzip it"
            )
    elif (have := path.stat().st_size) != size:
        raise DataError(f"{path}: has {have} bytes where {size} follow from its header; download it again")
    return shape


def _read_all(path: Path, shape: Sequence[int]) -> bytes:
    size = _header_bytes(len(shape)) + math.prod(shape)
    data = _guarded_read(path, size + 1)
    if len(data) != size:
        raise DataError(f"{path}: not the {size} bytes that follow from its header; download it again")
    return data


def _guarded_read(path: Path, size: int) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def is_idx(path: Path) -> bool:
    """Whether ``path`` is named like a file of IDX images or labels, or is a folder with such files of images."""
    if path.is_dir():
        return any(_IMAGES_NAME.fullmatch(name) for name in file_names(path))
    return bool(_IMAGES_NAME.fullmatch(path.name) or _LABELS_NAME.fullmatch(path.name))
