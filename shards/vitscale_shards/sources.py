"""Where images come from: a source names its images cheaply (rows) and reads one at a time (its bytes)."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vitscale.config.schema import DataConfig
from vitscale.errors import DataError, VitscaleError

MAX_PIXELS = DataConfig.max_image_pixels  # what the loader would refuse by default is not written either
MAX_KEY_CHARS = 90  # a USTAR name holds 100 bytes: key, dot, extension
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
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


class BadImageError(Exception):
    """One image cannot go into a shard; the message is the reason. The writer has a budget of these."""


class Row(NamedTuple):
    """One image: its key in the tar, its class, and where the source finds it."""

    key: str
    label: int
    path: str


class Source(Protocol):
    """What the planner and the writer need to know about a dataset."""

    @property
    def name(self) -> str:
        """Short description that goes into the index; the same on every machine."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in this tuple."""

    @property
    def ignored(self) -> Counter[str]:
        """Kinds of files that are no images and how many of each; complete when ``rows`` has ended."""

    def rows(self) -> Iterator[Row]:
        """Every image once, always in the same order, without opening it."""

    def read(self, row: Row) -> tuple[str, bytes]:
        """Extension and bytes of one image.

        Raises:
            BadImageError: the image cannot be read or its header is wrong.
        """


def open_source(text: str) -> Source:
    """The source that a user named: ``digits``, or a folder with one folder per class.

    Raises:
        DataError: no such folder, or no class in it.
        VitscaleError: a package that the source needs is missing.
    """
    return Digits() if text == "digits" else ImageFolder(Path(text))


def image_key(path: str) -> str:
    """Key of the image at ``path`` (relative, with forward slashes): no dot, no slash, at most 90 characters.

    A path that cannot be kept as it is gets a piece of its hash, so that two of them do not fall together.
    """
    raw = "__".join(path.rpartition(".")[0].split("/"))
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", raw)
    if safe == raw and len(raw) <= MAX_KEY_CHARS:
        return raw
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{safe[: MAX_KEY_CHARS - 17]}_{digest}"


def check_header(data: bytes) -> str:
    """Extension for an encoded image, judged by its header; no pixel is decoded.

    Raises:
        BadImageError: not an image of a known format, or too large to be decoded safely.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")) as image:
            width, height = image.size
            extension = EXTENSION_OF_FORMAT[image.format or ""]
    except UnidentifiedImageError:
        raise BadImageError(f"no known image header in {len(data)} bytes") from None
    except Exception as error:  # a damaged header makes Pillow's parsers raise anything
        raise BadImageError(f"bad image header: {error}") from None
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width}x{height} pixels; at most {MAX_PIXELS} are allowed")
    return extension


class ImageFolder:
    """``folder/class/name.jpg``; folders below a class belong to it; hidden files do not count."""

    def __init__(self, folder: Path) -> None:
        """Look at the class folders.

        Raises:
            DataError: the folder is missing or holds no class folder.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; a folder with one folder per class, or 'digits', is needed")
        self.folder = folder.resolve()
        self.name = self.folder.name
        self.ignored: Counter[str] = Counter()
        self.classes = tuple(entry.name for entry in self._entries(self.folder) if entry.is_dir())
        if not self.classes:
            raise DataError(
                f"{folder}: holds no class folder; images must lie in folder/class/name.jpg; "
                f"put them in one folder per class"
            )

    def rows(self) -> Iterator[Row]:
        """Images in the order of their classes and paths.

        Raises:
            DataError: no image at all, a link that leaves the folder, or a linked folder.
        """
        self.ignored.clear()
        self.ignored["outside a class folder"] += sum(not e.is_dir() for e in self._entries(self.folder))
        found = False
        for label, name in enumerate(self.classes):
            for path in self._images(self.folder / name, name):
                found = True
                yield Row(image_key(path), label, path)
        if not found:
            allowed = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            raise DataError(f"{self.folder}: no image in {len(self.classes)} class folders; allowed are {allowed}")

    def read(self, row: Row) -> tuple[str, bytes]:
        """Extension by content, and the file's bytes as they are.

        Raises:
            BadImageError: the file cannot be read or its header is wrong.
        """
        try:
            data = (self.folder / row.path).read_bytes()
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return check_header(data), data

    def _images(self, folder: Path, relative: str) -> Iterator[str]:
        for entry in self._entries(folder):
            path = f"{relative}/{entry.name}"
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (a Path per file would double the time)
            if entry.is_dir():
                yield from self._images(folder / entry.name, path)
            elif not (entry.is_file() or entry.is_symlink()):
                self.ignored["no regular file"] += 1  # a pipe would be waited for without end
            elif suffix in IMAGE_SUFFIXES:
                yield path
            else:
                self.ignored[suffix or "no extension"] += 1

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
        for entry in visible:
            if entry.is_symlink():
                self._check_link(Path(entry.path))
        return visible

    def _check_link(self, link: Path) -> None:
        target = Path(os.path.realpath(link))  # unlike Path.resolve, bears links that lead in a circle
        if not target.is_relative_to(self.folder):
            raise DataError(f"{link}: links to {target}, outside of {self.folder}; copy or hard-link the file instead")
        if target.is_dir():
            raise DataError(f"{link}: links to the folder {target}; only links to files are followed; copy it instead")


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8x8 grey images with values 0..16, as lossless 8-bit PNG.

    A value v becomes (v * 255 + 8) // 16, the nearest of 0..255; 16 * pixel / 255, rounded, gives v back.
    """

    name = "digits"
    classes = tuple("0123456789")

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()

    def rows(self) -> Iterator[Row]:
        """The images in the package's order.

        Raises:
            VitscaleError: scikit-learn is not installed.
        """
        for index, label in enumerate(self._data.target):
            yield Row(f"digit-{index:04d}", int(label), str(index))

    def read(self, row: Row) -> tuple[str, bytes]:
        """One image as PNG; stored, not deflated, so that every version of zlib gives the same bytes."""
        from PIL import Image

        values = self._data.images[int(row.path)].astype(int)
        buffer = io.BytesIO()
        Image.fromarray(((values * 255 + 8) // 16).astype("uint8")).save(buffer, "PNG", compress_level=0)
        return "png", buffer.getvalue()

    @cached_property
    def _data(self) -> Any:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise VitscaleError(f"digits need scikit-learn ({error}): pip install 'vitscale[digits]'") from error
        return load_digits()
