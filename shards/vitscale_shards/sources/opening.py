"""What a user names as SOURCE, and the dataset that it is."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from vitscale.errors import DataError, VitscaleError
from vitscale_shards.planning.settings import read_list
from vitscale_shards.rows import Source

_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class SourceSpec:
    """What a user says of a source: enough to open it again in another process, on another node."""

    locations: tuple[str, ...]
    """Folders, files or patterns; several are merged. ``digits`` is scikit-learn's."""

    classes: str | None = None
    """File with the class names in the order of their labels, one per line."""

    labels: str | None = None
    """Ground truth of a tar that has none in it (ImageNet's validation set)."""

    root: str | None = None
    """Folder that a table's paths start at; the table's own by default."""

    path_column: str | None = None
    label_column: str | None = None
    prefix_keys: bool = False
    """Whether keys get the name of the part that they come from in front."""

    source_class: str | None = None
    """``module:Class`` of the user's own source, called with a location."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SourceSpec:
        """What :meth:`to_json` has written."""
        return cls(**{**content, "locations": tuple(content["locations"])})

    def to_json(self) -> dict[str, Any]:
        """Plain values for the plan's file."""
        return asdict(self)

    def absolute(self) -> SourceSpec:
        """The same with paths that hold in any working directory."""
        return replace(
            self,
            locations=tuple(_absolute(text) for text in self.locations),
            classes=self.classes and _absolute(self.classes),
            labels=self.labels and _absolute(self.labels),
            root=self.root and _absolute(self.root),
        )

    def moved(self, locations: Sequence[str] | None) -> SourceSpec:
        """The same dataset at other places; itself if there are none."""
        return replace(self, locations=tuple(locations)).absolute() if locations else self

    def refuse_nested(self, folder: Path) -> None:
        """See that what is written to a folder cannot be taken for images of the source.

        Raises:
            DataError: the folder lies inside of a location.
        """
        for location in self.locations:
            if Path(location).is_dir() and folder.resolve().is_relative_to(Path(location).resolve()):
                raise DataError(
                    f"{folder}: lies inside of {location}, so that what is written there would be taken for images; "
                    f"choose another folder"
                )

    def open(self) -> Source:
        """The source.

        Raises:
            DataError: nothing is there, or it is of no known kind.
        """
        sources = [self._open_one(location) for location in self.locations]
        if self.labels is not None:
            from vitscale_shards.sources.imagenet_val import ImageNetVal

            if not any(isinstance(source, ImageNetVal) for source in sources):
                raise DataError(
                    f"{self.locations[0]}: --labels is for ImageNet's validation tar, which it is not; leave it out"
                )
        if len(sources) == 1:
            return sources[0]
        from vitscale_shards.sources.merged import Merged

        return Merged(sources, prefix_keys=self.prefix_keys)

    def _open_one(self, location: str) -> Source:
        if self.source_class is not None:
            return _own_source(self.source_class, location)
        classes = None if self.classes is None else read_list(Path(self.classes), "class names")
        return _open_location(location, self, classes)


def _absolute(location: str) -> str:
    if location == "digits" or "://" in location:
        return location
    return os.path.abspath(os.path.expanduser(location))  # noqa: PTH100, PTH111 (patterns are no paths)


def _own_source(name: str, location: str) -> Source:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        own = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"source class {name!r}: {error}; write MODULE:CLASS, importable from the working directory"
        ) from error
    finally:
        sys.path.pop(0)
    try:
        return cast(Source, own(location))
    except VitscaleError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise DataError(f"{location}: {name} cannot open it ({error!r})") from error


def _open_location(location: str, spec: SourceSpec, classes: Sequence[str] | None) -> Source:
    """The source at one location: the first kind that fits, judged by names and the first members of tars.

    Args:
        spec: the options that the user gave.
        classes: class names in the order of their labels, if the user gave them.

    Raises:
        DataError: nothing is there, it is of no known kind, or options do not fit it.
    """
    from vitscale_shards.sources.webdataset import WebDatasetTars, is_webdataset

    path = Path(location)
    if location == "digits":
        from vitscale_shards.sources.digits import Digits

        return Digits()
    if is_webdataset(location):
        return WebDatasetTars(location, classes, prefix_keys=spec.prefix_keys)
    if not path.exists():
        raise DataError(f"{location}: no such file or folder; a dataset, or 'digits', is needed")
    return _folder(path, spec, classes) if path.is_dir() else _file(path, spec, classes)


def _folder(path: Path, spec: SourceSpec, classes: Sequence[str] | None) -> Source:
    from vitscale_shards.sources.cifar import Cifar, is_cifar
    from vitscale_shards.sources.class_tars import ClassTars, is_class_tars
    from vitscale_shards.sources.folder import ImageFolder
    from vitscale_shards.sources.idx import Idx, is_idx

    if is_cifar(path):
        return Cifar(path)
    if is_idx(path):
        return Idx(path, classes)
    if is_class_tars(path):
        return ClassTars(path, classes)
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):  # as Hugging Face lays datasets out
        return _parquet(path, spec, classes)
    return ImageFolder(path, classes)


def _file(path: Path, spec: SourceSpec, classes: Sequence[str] | None) -> Source:
    from vitscale_shards.sources.cifar import Cifar, is_cifar
    from vitscale_shards.sources.class_tars import ClassTars, is_class_tars
    from vitscale_shards.sources.idx import Idx, is_idx
    from vitscale_shards.sources.imagenet_val import ImageNetVal, is_imagenet_val
    from vitscale_shards.sources.table import TABLE_SUFFIXES, Table

    if is_cifar(path):
        return Cifar(path)
    if is_idx(path):
        return Idx(path, classes)
    if path.suffix == ".parquet":
        return _parquet(path, spec, classes)
    if path.name.endswith(TABLE_SUFFIXES):
        return Table(
            path,
            path_column=spec.path_column,
            label_column=spec.label_column,
            root=None if spec.root is None else Path(spec.root),
            classes=classes,
        )
    if is_imagenet_val(path):
        if spec.labels is None:
            raise DataError(f"{path}: has no labels inside; give the devkit, or a list of them, with --labels FILE")
        return ImageNetVal(path, Path(spec.labels), classes)
    if is_class_tars(path):
        return ClassTars(path, classes)
    kinds = f"a folder of class folders, {' '.join(TABLE_SUFFIXES)} {' '.join(_TARS)}, CIFAR's or MNIST's files"
    raise DataError(f"{path}: not a dataset of a known kind; {kinds} are; or write a source of your own")


def _parquet(path: Path, spec: SourceSpec, classes: Sequence[str] | None) -> Source:
    from vitscale_shards.sources.parquet import ParquetImages, has_image_bytes
    from vitscale_shards.sources.table import Table

    if path.is_dir() or has_image_bytes(path, spec.path_column):
        return ParquetImages(path, image_column=spec.path_column, label_column=spec.label_column, classes=classes)
    root = None if spec.root is None else Path(spec.root)
    return Table(path, path_column=spec.path_column, label_column=spec.label_column, root=root, classes=classes)
