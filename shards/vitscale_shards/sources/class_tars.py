"""One tar per class, in one tar or in a folder: the form in which ImageNet is given out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vitscale.data.manifest import INDEX_NAME, Member
from vitscale.errors import DataError
from vitscale_shards.rows import Row, image_key
from vitscale_shards.sources.archive import (
    ArchiveReader,
    check_not_named_compressed,
    check_uncompressed,
    first_members,
    list_folder,
    members,
    place_of,
)
from vitscale_shards.sources.folder import IMAGE_SUFFIXES, check_classes_known


class _ClassTar(NamedTuple):
    file: Path
    inner: Member | None
    """Where it lies, if it is a member of ``file``."""


class ClassTars:
    """``ILSVRC2012_img_train.tar``, ``fall11_whole.tar`` and their like, read without unpacking.

    Either a tar of tars or a folder of tars; each ``<class>.tar`` in there holds the images of one class. Rows have the
    keys and labels that :class:`~vitscale_shards.sources.folder.ImageFolder` gives after unpacking each tar into a
    folder of its name.
    """

    multi_label = False

    def __init__(self, path: Path, classes: Sequence[str] | None = None) -> None:
        """Look at the file's first bytes; it is listed when that is needed.

        Args:
            classes: class names in the order of their labels; by default the tars' names without ``.tar``, sorted.

        Raises:
            DataError: there is nothing at ``path``, or the tar is compressed.
        """
        if not path.exists():
            raise DataError(f"{path}: no such file; a tar of class tars, or a folder of them, is needed")
        self._is_folder = path.is_dir()
        self.path = path.resolve() if self._is_folder else path.absolute()
        self.name = self.path.name.removesuffix(".tar")
        self.ignored: Counter[str] = Counter()
        self._given = None if classes is None else tuple(classes)
        self._reader = ArchiveReader()
        if not self._is_folder:
            try:
                with path.open("rb") as file:
                    check_uncompressed(file, str(path))
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from error

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the class tars, sorted, unless others were given.

        Raises:
            DataError: see :meth:`rows`.
        """
        return tuple(self._tars) if self._given is None else self._given

    def rows(self) -> Iterator[Row]:
        """Images in the order of their classes, and of the members of the class's tar.

        Raises:
            DataError: no class tar, no image at all, a class that is not among those given or has two tars, a tar that
                is compressed or damaged.
        """
        self.ignored.clear()
        labels = {name: label for label, name in enumerate(self.classes)}
        check_classes_known(self._tars, labels, of=str(self.path))
        self.ignored["outside a class tar"] += self._num_strays
        found = False
        for name, tar in self._tars.items():
            for member in members(tar.file, tar.inner):
                if self._counts(member.name):
                    found = True
                    path = f"{name}/{member.name}"
                    yield Row(image_key(path), (labels[name],), place_of(path, member.offset, member.size), member.size)
        if not found:
            allowed = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            raise DataError(f"{self.path}: no image in {len(self._tars)} class tars; allowed are {allowed}")

    def read(self, row: Row) -> bytes:
        """The member's bytes.

        Raises:
            BadImageError: they cannot be read, or the tar has changed.
        """
        file = f"{self.path}/{row.path.partition('/')[0]}.tar" if self._is_folder else str(self.path)
        return self._reader.read_member(file, row.path)

    def _counts(self, name: str) -> bool:
        if any(part.startswith(".") for part in name.split("/")):
            self.ignored["hidden"] += 1
            return False
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path per file would double the time)
        if suffix not in IMAGE_SUFFIXES:
            self.ignored[suffix or "no extension"] += 1
            return False
        return True

    @property
    def _tars(self) -> dict[str, _ClassTar]:
        """Class tars by class, sorted."""
        return self._contents[0]

    @property
    def _num_strays(self) -> int:
        return self._contents[1]

    @cached_property
    def _contents(self) -> tuple[dict[str, _ClassTar], int]:
        """Class tars, and how many other files lie beside them."""
        tars: dict[str, _ClassTar] = {}
        strays = 0
        for name, tar in self._entries():
            check_not_named_compressed(name, str(self.path))
            base, dot, suffix = name.rpartition("/")[2].rpartition(".")
            if not base or base.startswith(".") or f"{dot}{suffix}" != ".tar":
                strays += 1
            elif base in tars:
                raise DataError(f"{self.path}: holds two tars of the class {base!r}; one per class is allowed")
            else:
                tars[base] = tar
        if not tars:
            raise DataError(
                f"{self.path}: holds no class tar ({strays} other files); one CLASS.tar per class is needed; images "
                f"that are unpacked go into one folder per class"
            )
        return dict(sorted(tars.items())), strays

    def _entries(self) -> Iterator[tuple[str, _ClassTar]]:
        if self._is_folder:
            yield from ((name, _ClassTar(self.path / name, None)) for name in list_folder(self.path))
        else:
            yield from ((member.name, _ClassTar(self.path, member)) for member in members(self.path))


def is_class_tars(path: Path) -> bool:
    """Whether ``path`` looks like a tar of tars, or a folder of tars that hold images and no labels.

    Only the first members are looked at. True for a compressed tar of tars as well; to open it says what to do.
    """
    names = first_members(path)
    if not path.is_dir():
        return any(name.endswith(".tar") for name in names)
    if (path / INDEX_NAME).exists():
        return False
    return bool(names) and all(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in names)  # noqa: PTH122
