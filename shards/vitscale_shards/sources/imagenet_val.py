"""ImageNet's validation images, whose labels come in another file."""

from __future__ import annotations

import importlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vitscale.errors import DataError, VitscaleError
from vitscale_shards.rows import Row, image_key
from vitscale_shards.sources.archive import UNREADABLE, ArchiveReader, first_members, members, open_tar, place_of
from vitscale_shards.sources.folder import IMAGE_SUFFIXES, check_classes_known

_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_LABEL_BYTES = 64 << 20  # the real files have less than 2 MiB
_CURE = "give ILSVRC2012_devkit_t12.tar.gz, or a text file with one WNID per line or with 'FILE.JPEG WNID' pairs"


@dataclass(frozen=True)
class GroundTruth:
    """The class of every image."""

    wnids: tuple[str, ...]
    images: tuple[str, ...] | None
    """File names without extension that ``wnids`` belong to; None if they follow the sorted file names."""

    classes: tuple[str, ...]
    """All classes, sorted."""


class ImageNetVal:
    """``ILSVRC2012_img_val.tar`` with its ground truth; labels mean what they mean for the training images.

    Labels count the classes in the order of their sorted WNIDs, as class folders and class tars do. The numbers in
    the devkit (``ILSVRC2012_ID``) are in another order and are translated.
    """

    multi_label = False

    def __init__(self, tar: Path, labels: Path, classes: Sequence[str] | None = None) -> None:
        """Nothing is read yet.

        Args:
            tar: the images.
            labels: the devkit ``ILSVRC2012_devkit_t12.tar.gz`` or the folder that it unpacks to; or a text file with
                one WNID per line in the order of the images' names, or with an image's name and a WNID on each line.
            classes: WNIDs in the order of their labels; by default the classes of ``labels``, sorted.

        Raises:
            DataError: one of the files is missing.
        """
        for path, what in ((tar, "tar of images"), (labels, "ground truth")):
            if not path.exists():
                raise DataError(f"{path}: no such file; the {what} of the validation set is needed")
        self.tar = tar.absolute()
        self.labels = labels
        self.name = self.tar.name.removesuffix(".tar")
        self.ignored: Counter[str] = Counter()
        self._given = None if classes is None else tuple(classes)
        self._reader = ArchiveReader()

    @property
    def classes(self) -> tuple[str, ...]:
        """WNIDs by label.

        Raises:
            DataError: see :func:`read_ground_truth`.
        """
        return self._truth.classes if self._given is None else self._given

    def rows(self) -> Iterator[Row]:
        """Images in the order of their names. All of their names are in memory: 50,000 of them.

        Raises:
            DataError: the tar or the ground truth is damaged, they do not belong together, or a class is not among
                those given.
        """
        self.ignored.clear()
        labels = {wnid: label for label, wnid in enumerate(self.classes)}
        check_classes_known(self._truth.wnids, labels, of=str(self.labels))
        images = sorted(self._images())
        if len(images) != len(self._truth.wnids):
            raise DataError(
                f"{self.labels}: has labels of {len(self._truth.wnids)} images, but {self.tar} holds {len(images)}; "
                f"both must be complete and of the same set"
            )
        stems = [name.rpartition(".")[0] for name, _, _ in images]
        for (name, offset, size), wnid in zip(images, self._in_order(stems), strict=True):
            yield Row(image_key(name), (labels[wnid],), place_of(name, offset, size), size)

    def read(self, row: Row) -> bytes:
        """The member's bytes.

        Raises:
            BadImageError: they cannot be read, or the tar has changed.
        """
        return self._reader.read_member(str(self.tar), row.path)

    def _images(self) -> Iterator[tuple[str, int, int]]:
        for member in members(self.tar):
            name = member.name.rpartition("/")[2]
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if name.startswith("."):
                self.ignored["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                yield name, member.offset, member.size
            else:
                self.ignored[suffix or "no extension"] += 1

    def _in_order(self, stems: list[str]) -> Sequence[str]:
        if self._truth.images is None:
            return self._truth.wnids
        wnids = dict(zip(self._truth.images, self._truth.wnids, strict=True))
        if missing := [stem for stem in stems if stem not in wnids]:
            raise DataError(
                f"{self.labels}: has no label of {missing[0]} ({len(missing)} of {len(stems)} images are missing); "
                f"every image of {self.tar} needs a line"
            )
        return [wnids[stem] for stem in stems]

    @cached_property
    def _truth(self) -> GroundTruth:
        return read_ground_truth(self.labels, self._given)


def read_ground_truth(path: Path, classes: Sequence[str] | None = None) -> GroundTruth:
    """Read one of the forms that :class:`ImageNetVal` takes.

    Args:
        classes: known names, so that numbers among them are no mistake.

    Raises:
        DataError: the file is of none of the forms, or damaged.
        VitscaleError: the devkit is given, and scipy is not installed.
    """
    try:
        if path.is_dir():
            return _from_devkit(_small_file(path / _META), _small_file(path / _TRUTH), path)
        try:
            tar = open_tar(path)
        except tarfile.ReadError:
            return _from_text(_small_file(path).decode(), path, classes)
        with tar:
            return _from_devkit(*_devkit_files(tar, path), path)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as ground truth ({error}); {_CURE}") from error


def _small_file(path: Path) -> bytes:
    if (size := path.stat().st_size) > _MAX_LABEL_BYTES:
        raise DataError(f"{path}: {size} bytes are too many for labels; at most {_MAX_LABEL_BYTES} are read: {_CURE}")
    return path.read_bytes()


def _devkit_files(tar: tarfile.TarFile, path: Path) -> tuple[bytes, bytes]:
    """``meta.mat`` and the ground truth out of the devkit's tar."""
    found: dict[str, bytes] = {}
    for info in tar:
        name = "/".join(info.name.split("/")[-2:])
        if name in (_META, _TRUTH) and info.size <= _MAX_LABEL_BYTES and (file := tar.extractfile(info)):
            found[name] = file.read()
    if missing := [name for name in (_META, _TRUTH) if name not in found]:
        raise DataError(f"{path}: holds no {missing[0]}, so it is not the devkit; {_CURE}")
    return found[_META], found[_TRUTH]


def _from_devkit(meta: bytes, truth: bytes, path: Path) -> GroundTruth:
    wnids = _leaf_wnids(meta, path)
    lines = truth.decode("ascii", "replace").split()
    if wrong := [place for place, line in enumerate(lines) if not line.isdecimal() or int(line) not in wnids]:
        raise DataError(
            f"{path}: line {wrong[0] + 1} of {_TRUTH} is {lines[wrong[0]][:40]!r}; the ILSVRC2012_ID of one of the "
            f"{len(wnids)} classes of meta.mat is needed: download the devkit again"
        )
    return GroundTruth(tuple(wnids[int(line)] for line in lines), None, tuple(sorted(wnids.values())))


def _leaf_wnids(meta: bytes, path: Path) -> dict[int, str]:
    """WNID by ILSVRC2012_ID of the synsets without children: inner nodes of the hierarchy are no classes."""
    try:
        scipy_io: Any = importlib.import_module("scipy.io")
    except ImportError as error:
        raise VitscaleError(f"{path}: meta.mat is read with scipy ({error}): pip install scipy") from error
    try:
        synsets = scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        columns = (synsets[name].reshape(-1) for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        leaves = [(int(number), str(wnid)) for number, wnid, children in zip(*columns, strict=True) if children == 0]
    except Exception as error:  # a damaged file makes the parser raise anything
        raise DataError(f"{path}: {_META} cannot be read ({error}); download the devkit again") from error
    wnids = dict(leaves)
    if not leaves or len(wnids) != len(leaves) or len(set(wnids.values())) != len(leaves):
        raise DataError(
            f"{path}: {_META} names {len(leaves)} classes, {len(wnids)} numbers and {len(set(wnids.values()))} WNIDs; "
            f"they must be as many and at least one: download the devkit again"
        )
    return wnids


def _from_text(text: str, path: Path, classes: Sequence[str] | None) -> GroundTruth:
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: is empty; {_CURE}")
    num_words = len(lines[0][1])
    for number, words in lines:
        if len(words) != num_words or num_words > 2:
            raise DataError(f"{path}:{number}: {' '.join(words)[:80]!r}; one form for all lines is needed: {_CURE}")
    wnids = tuple(words[-1] for _, words in lines)
    if classes is None and all(re.fullmatch(r"\d+", wnid) for wnid in wnids):
        raise DataError(f"{path}: names classes by number ({wnids[0]}), in an order that it does not tell; {_CURE}")
    images = None if num_words == 1 else tuple(_stem(words[0]) for _, words in lines)
    if images is not None and len(set(images)) != len(images):
        twice = next(image for image, count in Counter(images).items() if count > 1)
        raise DataError(f"{path}: names {twice} more than once; one label per image is allowed")
    return GroundTruth(wnids, images, tuple(sorted(set(wnids))))


def _stem(image: str) -> str:
    base = image.rpartition("/")[2]
    return base.rpartition(".")[0] or base


def is_imagenet_val(path: Path) -> bool:
    """Whether ``path`` is a tar, perhaps compressed, that begins with ``ILSVRC2012_val_00000001.JPEG`` or its like."""
    names = first_members(path, 8) if path.is_file() else []
    return any(re.fullmatch(r"(.*/)?ILSVRC2012_val_\d{8}\.JPEG", name) for name in names)
