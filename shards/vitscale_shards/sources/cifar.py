"""CIFAR-10 and CIFAR-100 in their binary version (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row
from vitscale_shards.sources.archive import ArchiveReader, file_names, first_members, list_folder, parse_place, place_of
from vitscale_shards.sources.png import stored_png, stored_png_bytes

_SIDE = 32
_IMAGE_BYTES = 3 * _SIDE * _SIDE
_PNG_BYTES = stored_png_bytes(_SIDE, _SIDE, 3)
_RECORDS_AT_A_TIME = 1024


class _Kind(NamedTuple):
    name: str
    num_label_bytes: int
    """Labels before the pixels; the last one, the fine label of CIFAR-100, counts."""

    class_names: str
    train: re.Pattern[str]
    test: re.Pattern[str]
    pickled: frozenset[str]
    """Files by which the Python version is known."""

    @property
    def record_bytes(self) -> int:
        """One image with its labels."""
        return self.num_label_bytes + _IMAGE_BYTES


_KINDS = (
    _Kind(
        "cifar-10",
        1,
        "batches.meta.txt",
        re.compile(r"data_batch_\d\.bin"),
        re.compile(r"test_batch\.bin"),
        frozenset({"batches.meta", "data_batch_1"}),
    ),
    _Kind(
        "cifar-100",
        2,
        "fine_label_names.txt",
        re.compile(r"train\.bin"),
        re.compile(r"test\.bin"),
        frozenset({"meta", "train"}),
    ),
)


class Cifar:
    """Images of 32x32 pixels as lossless PNG (:func:`~vitscale_shards.sources.png.stored_png`).

    A folder stands for its training batches; the test batch is a source of its own, given by its file.
    """

    multi_label = False

    def __init__(self, path: Path) -> None:
        """Look at the folder's file names.

        Args:
            path: the unpacked folder ``cifar-10-batches-bin`` or ``cifar-100-binary``, or one ``.bin`` file in it.

        Raises:
            DataError: it is neither: an archive, the pickled version, or something else.
        """
        if not path.exists():
            raise DataError(f"{path}: no such file; a folder cifar-10-batches-bin or cifar-100-binary is needed")
        path = path.absolute()
        if path.is_file() and (folder := _archived(path)):
            _check_not_pickled(folder.endswith(("-py", "-python")), path)
            raise DataError(
                f"{path}: is an archive, and its images are read one by one; unpack it: tar -xf {path.name}"
            )
        self.folder = path if path.is_dir() else path.parent
        names = list_folder(path) if path.is_dir() else [path.name]
        _check_not_pickled(_is_pickled(names), path)
        kind = _kind_of(names)
        if kind is None:
            raise DataError(
                f"{path}: holds no file of CIFAR; data_batch_1.bin ... test_batch.bin (CIFAR-10) or train.bin and "
                f"test.bin (CIFAR-100) are needed: unpack cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"
            )
        self._kind = kind
        is_folder = path.is_dir()
        self._files = [name for name in names if kind.train.fullmatch(name)] if is_folder else names
        self._others = [name for name in names if kind.test.fullmatch(name)] if is_folder else []
        if not self._files:
            raise DataError(f"{path}: holds no training images; give the file {path / self._others[0]} itself")
        self.name = kind.name
        self.ignored: Counter[str] = Counter()
        self._reader = ArchiveReader()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names from the file that lies beside the images; of CIFAR-100 those of the 100 fine labels.

        Raises:
            DataError: the file is missing or empty.
        """
        path = self.folder / self._kind.class_names
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); unpack the whole archive of {self.name}") from error
        names = tuple(line.strip() for line in lines if line.strip())
        if not names:
            raise DataError(f"{path}: names no class; unpack the archive of {self.name} again")
        return names

    def rows(self) -> Iterator[Row]:
        """Images in the order of the files.

        Raises:
            DataError: a file is not a whole number of records, or has a label without a name.
        """
        self.ignored.clear()
        self.ignored.update(self._others)
        for name in self._files:
            for number, label in enumerate(self._labels(name)):
                offset = number * self._kind.record_bytes + self._kind.num_label_bytes
                key = f"{name.removesuffix('.bin')}-{number:05d}"
                yield Row(key, (label,), place_of(name, offset, _IMAGE_BYTES), _PNG_BYTES)

    def read(self, row: Row) -> bytes:
        """One image as PNG.

        Raises:
            BadImageError: it cannot be read.
        """
        name, offset, size = parse_place(row.path)
        if size != _IMAGE_BYTES or name not in self._files:
            raise BadImageError(f"{row.path!r} is no image of {', '.join(self._files)}: plan the source again")
        planes = np.frombuffer(self._reader.read(f"{self.folder}/{name}", offset, size), np.uint8)
        return stored_png(planes.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))

    def _labels(self, name: str) -> Iterator[int]:
        path, record = self.folder / name, self._kind.record_bytes
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size % record or not size:
                    raise DataError(
                        f"{path}: has {size} bytes; a multiple of {record}, one record of {self.name}, is needed: "
                        f"unpack the archive again"
                    )
                while data := file.read(_RECORDS_AT_A_TIME * record):
                    labels = np.frombuffer(data, np.uint8)[self._kind.num_label_bytes - 1 :: record]
                    self._check_labels(labels.max(), path)
                    yield from labels.tolist()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}); check the file and its disk"
            ) from error

    def _check_labels(self, highest: int, path: Path) -> None:
        if highest >= len(self.classes):
            raise DataError(
                f"{path}: label {highest}, but {self._kind.class_names} names {len(self.classes)} classes; both must "
                f"be of {self.name}: unpack the archive again"
            )


def _kind_of(names: list[str]) -> _Kind | None:
    return next((k for k in _KINDS if any(k.train.fullmatch(n) or k.test.fullmatch(n) for n in names)), None)


def _is_pickled(names: list[str]) -> bool:
    """Whether there are files of the Python version and none of the binary one."""
    return _kind_of(names) is None and any(kind.pickled.issubset(names) for kind in _KINDS)


def _archived(path: Path) -> str:
    """The folder of CIFAR that a tar holds; empty if it holds none."""
    folders = {name.partition("/")[0] for name in first_members(path, 8)}
    known = {"cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python"}
    return next(iter(folders & known), "")


def _check_not_pickled(is_pickled: bool, path: Path) -> None:
    if is_pickled:
        raise DataError(
            f"{path}: is the pickled version of CIFAR, and loading a pickle can run any code; vitscale never does: "
            f"download the binary version, cifar-10-binary.tar.gz or cifar-100-binary.tar.gz"
        )


def is_cifar(path: Path) -> bool:
    """Whether ``path`` looks like CIFAR of any form; to open a form that cannot be read says what to do."""
    names = file_names(path) if path.is_dir() else [path.name]
    if path.is_file() and _archived(path):
        return True
    return _kind_of(names) is not None or _is_pickled(names)
