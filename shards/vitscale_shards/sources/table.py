"""A table of image paths and labels: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources.folder import read_file
from vitscale_shards.sources.labels import CellError, Labels, LabelSurvey
from vitscale_shards.sources.parquet_records import ParquetRecords
from vitscale_shards.sources.text_records import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    SIZE_COLUMNS,
    DelimitedText,
    JsonLines,
    Records,
    choose_column,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_KNOWN_FOLDERS = 1 << 16


class Table:
    """One row per image, with its path and its label or labels; the rows stay on disk.

    In CSV and TSV, several labels of an image stand in one cell with ``|`` between them; in JSON lines and Parquet they
    are a list. Text tables may be gzipped. A column ``num_bytes`` or ``size_bytes`` says how large the images are.
    """

    def __init__(
        self,
        path: Path,
        *,
        path_column: str | None = None,
        label_column: str | None = None,
        root: Path | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Read the names of the columns.

        Args:
            path_column: by default the only one with a usual name.
            label_column: likewise.
            root: folder to which the paths are relative; by default the table's.
            classes: class names in the order of their labels; by default the sorted names in the table, or none if it
                has numbers.

        Raises:
            DataError: the table or ``root`` is missing or of an unknown kind, or a column is not there or not unique.
        """
        self.root = (root or path.parent).resolve()
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder; the one to which the paths in {path} are relative is needed")
        self.name = Path(path.name.removesuffix(".gz")).stem
        self.ignored: Counter[str] = Counter()
        self._path = path
        self._records = _records(path)
        columns = self._records.columns
        self._path_column = choose_column(path, columns, path_column, PATH_COLUMNS, "--path-column")
        self._label_column = choose_column(path, columns, label_column, LABEL_COLUMNS, "--label-column")
        self._size_column = next((name for name in columns if name.lower() in SIZE_COLUMNS), None)
        self._given_classes = classes
        self._is_inside = lru_cache(_KNOWN_FOLDERS)(self._leads_inside)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names; the first access reads the column of labels."""
        return self._labels.classes

    @property
    def multi_label(self) -> bool:
        """Whether a row has several labels, or a list; the first access reads the column of labels."""
        return self._labels.multi_label

    def rows(self) -> Iterator[Row]:
        """Images in the order of the table. Whether their files are there is not looked at.

        Raises:
            DataError: no row, or one that is damaged or has a path or label that is not allowed.
        """
        labels = self._labels
        columns = [self._path_column, self._label_column, *([self._size_column] if self._size_column else [])]
        for place, cells in self._records.cells(columns):
            try:
                path = _relative_path(cells[0])
                row = Row(image_key(path), labels.of(cells[1]), path, _num_bytes(cells[2]) if len(cells) == 3 else 0)
            except CellError as error:
                raise DataError(f"{self._records.where(place)}: {error}") from None
            yield row

    def read(self, row: Row) -> bytes:
        """The file's bytes.

        Raises:
            BadImageError: the file cannot be read, is no regular file, or lies outside of the root through a link.
        """
        path = f"{self.root}/{row.path}"
        try:
            mode = os.lstat(path).st_mode
            is_link = stat.S_ISLNK(mode)
            inside = self._is_inside(posixpath.dirname(path)) and (not is_link or self._leads_inside(path))
            if is_link:
                mode = os.stat(path).st_mode  # noqa: PTH116 (as the lines around it)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        if not inside:
            raise BadImageError(f"links to {os.path.realpath(path)}, outside of {self.root}")
        if not stat.S_ISREG(mode):  # a pipe would be waited for without end
            raise BadImageError("no regular file")
        return read_file(self.root, row.path)

    @cached_property
    def _labels(self) -> Labels:
        survey = LabelSurvey(self._records.split, of=str(self._path), column=self._label_column)
        cells = self._records.cells([self._label_column])
        survey.add(((place, row[0]) for place, row in cells), self._records.where)
        return survey.labels(self._given_classes, self._records.class_names(self._label_column))

    def _leads_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)


def _records(path: Path) -> Records:
    """Open a table by its suffix."""
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else [path.suffix]
    kind = suffixes[0].lower() if suffixes else ""
    if not path.is_file():
        raise DataError(f"{path}: no such file; a table of image paths and labels is needed")
    if kind in (".csv", ".tsv"):
        return DelimitedText(path, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if kind == ".parquet" and path.suffix != ".gz":
        return ParquetRecords(path)
    raise DataError(
        f"{path}: a table of an unknown kind; allowed are {' '.join(TABLE_SUFFIXES)}, text also with .gz: "
        f"rename or convert it"
    )


def _relative_path(path: object) -> str:
    """A path as it stands in the table, without ``./`` and the like.

    Raises:
        CellError: it is not a path inside of a folder. Links are not followed here.
    """
    if path.__class__ is not str or not path:
        raise CellError(f"path {path!r}; the path of an image is needed: mend the row or take it out")
    text = str(path)
    if text[0] not in "./" and "/." not in text and "//" not in text and text.isprintable():
        return text  # as nearly all
    if _URL.match(text):
        raise CellError(f"path {text!r} is a URL; only files are read: download the images and give their paths")
    if text.startswith("/"):
        raise CellError(f"path {text!r} is absolute; paths below the folder of --root are allowed: cut that off")
    if ".." in text.split("/"):
        raise CellError(f"path {text!r} has '..' in it; paths that stay in the folder of --root are allowed: mend it")
    if "\0" in text or text.encode(errors="replace").decode() != text:
        raise CellError(f"path {text!r} is no valid file name; mend the row")
    return posixpath.normpath(text)


def _num_bytes(cell: object) -> int:
    """Size of an image, or 0 where none is given."""
    if cell is None or cell == "":
        return 0
    text = str(cell)
    if not (text.isascii() and text.isdigit()):
        raise CellError(f"size {cell!r}; a whole number of bytes, or nothing, is allowed: mend it or rename the column")
    return int(text)
