"""Parquet files with the images in them, as Hugging Face's image feature has them."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources.labels import CellError, Labels, LabelSurvey, split_value
from vitscale_shards.sources.parquet_records import ParquetRecords, one_line
from vitscale_shards.sources.text_records import LABEL_COLUMNS, choose_column

CACHE_BYTES = 1 << 30
_OPEN_FILES = 32
_BATCH_IMAGES = 64


def has_image_bytes(path: Path, image_column: str | None = None) -> bool:
    """Whether a Parquet file, or the first of a folder of them, holds images themselves and not only their paths.

    Args:
        image_column: look at this column alone.

    Raises:
        DataError: there is no readable Parquet file.
    """
    first = path if path.is_file() else path / _parquet_files(path)[0][0]
    columns = _image_columns(ParquetRecords(first))
    return bool(columns) if image_column is None else image_column in columns


class ParquetImages:
    """A Parquet file, or a folder of them, with a column of encoded images and one of labels.

    Images are a binary column, or a struct with a binary field ``bytes``. ``Row.path`` is
    ``<file>#<row group>:<row in it>``. The key is the file's path and the row's number: paths that come with the
    images are often missing or not unique.

    Parquet has no access to one row: the images of a row group usually lie in one compressed page. So ``read`` decodes
    the whole row group, and keeps the last ones, up to ``cache_bytes``. In order, or where all images fit into the
    cache, each byte is read once; in shuffled order as often as a row group has rows.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        classes: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Find the files, and in the first one the columns.

        Args:
            image_column: by default the only one that holds bytes.
            label_column: by default the only one with a usual name.
            classes: class names in the order of their labels; by default those that Hugging Face's metadata give to
                the numbers, else the sorted names in the files, else none.
            cache_bytes: decoded images that a process keeps at most, and the most that one row group may have.

        Raises:
            DataError: no readable Parquet file, or a column is not there or not the only one.
        """
        self.folder = (path.parent if path.is_file() else path).resolve()
        self.name = path.stem if path.is_file() else self.folder.name
        self.ignored: Counter[str] = Counter()
        self._files: tuple[str, ...] = (path.name,)
        if not path.is_file():
            self._files, self.ignored = _parquet_files(path)
        self._known_files = frozenset(self._files)
        first = ParquetRecords(self.folder / self._files[0])
        self._label_column = choose_column(path, first.columns, label_column, LABEL_COLUMNS, "--label-column")
        self._image_column = _choose_image_column(path, first, image_column)
        self._class_names = first.class_names(self._label_column)
        self._given_classes = classes
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._opened = lru_cache(_OPEN_FILES)(self._open)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names; the first access reads the column of labels."""
        return self._labels.classes

    @property
    def multi_label(self) -> bool:
        """Whether the labels are lists; the first access reads the column of labels."""
        return self._labels.multi_label

    def rows(self) -> Iterator[Row]:
        """Rows in the order of the files' paths.

        Raises:
            DataError: a file is damaged or unlike the first one, a row group too large, or a label not valid.
        """
        labels = self._labels
        for name in self._files:
            records = self._records(name)
            self._check_row_groups(name, records)
            base = name.removesuffix(".parquet")
            places = _places(records)
            for number, (cell,) in records.cells([self._label_column]):
                try:
                    numbers = labels.of(cell)
                except CellError as error:
                    raise DataError(f"{records.where(number)}: {error}") from None
                # The dot ends the stem for image_key, which then keeps what precedes it.
                yield Row(image_key(f"{base}-{number - 1:09d}."), numbers, f"{name}#{next(places)}")

    def read(self, row: Row) -> bytes:
        """The image's bytes.

        Raises:
            BadImageError: the file or the row cannot be read, or has no bytes.
        """
        name, _, place = row.path.rpartition("#")
        group, _, index = place.partition(":")
        if name not in self._known_files:
            raise BadImageError(f"cannot be read: no file {name!r} in {self.folder}")
        try:
            data = self._row_group(name, int(group))[int(index)].as_py()
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise BadImageError(f"cannot be read: {one_line(error)}") from error
        if data is None:
            raise BadImageError("no bytes in this row; a path alone is not followed")
        return bytes(data)

    @cached_property
    def _labels(self) -> Labels:
        survey = LabelSurvey(split_value, of=str(self.folder), column=self._label_column)
        for name in self._files:
            records = self._records(name)
            survey.add(((row, cells[0]) for row, cells in records.cells([self._label_column])), records.where)
        return survey.labels(self._given_classes, self._class_names)

    def _records(self, name: str) -> ParquetRecords:
        records = ParquetRecords(self.folder / name)
        if self._label_column not in records.columns or self._image_column not in _image_columns(records):
            raise DataError(
                f"{self.folder / name}: its columns are {', '.join(records.columns)}; {self._image_column!r} with "
                f"images and {self._label_column!r} are needed as in {self._files[0]}: mend the file or take it out"
            )
        if records.class_names(self._label_column) != self._class_names:
            raise DataError(
                f"{self.folder / name}: its numbers have other class names than in {self._files[0]}; the same are "
                f"needed: shard the two as sources of their own"
            )
        return records

    def _check_row_groups(self, name: str, records: ParquetRecords) -> None:
        leaf = self._leaf(records.schema)
        for number in range(records.metadata.num_row_groups):
            group = records.metadata.row_group(number)
            chunks = (group.column(index) for index in range(group.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)
            if size > self._cache_bytes:
                raise DataError(_too_large(f"{self.folder / name}: row group {number}", size, self._cache_bytes))

    def _leaf(self, schema: Any) -> str:
        in_struct = pa.types.is_struct(schema.field(self._image_column).type)
        return f"{self._image_column}.bytes" if in_struct else self._image_column

    def _row_group(self, name: str, group: int) -> Any:
        """Decoded images of a row group, a chunked array of binary values."""
        images = self._cache.pop((name, group), None)
        if images is None:
            images = self._decoded(name, group)
            self._cached_bytes += images.nbytes
        self._cache[name, group] = images  # the last one is the one used last
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return images

    def _decoded(self, name: str, group: int) -> Any:
        file = self._opened(name)
        pieces: list[Any] = []
        size = 0
        columns = [self._leaf(file.schema_arrow)]
        for batch in file.iter_batches(_BATCH_IMAGES, row_groups=[group], columns=columns, use_threads=False):
            column = batch.column(0)
            pieces.append(column.flatten()[0] if pa.types.is_struct(column.type) else column)
            size += pieces[-1].nbytes
            if size > self._cache_bytes:  # a dictionary can hold a large image once that is there many times
                raise BadImageError(_too_large(f"row group {group}", size, self._cache_bytes))
        return pa.chunked_array(pieces)

    def _open(self, name: str) -> Any:
        return pq.ParquetFile(self.folder / name, pre_buffer=False, buffer_size=1 << 20)


def _image_columns(records: ParquetRecords) -> list[str]:
    return [field.name for field in records.schema if _holds_bytes(field.type)]


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _choose_image_column(path: Path, records: ParquetRecords, wanted: str | None) -> str:
    columns = _image_columns(records)
    fitting = [name for name in columns if wanted is None or name == wanted]
    if len(fitting) == 1:
        return fitting[0]
    fault = "no column with bytes of images" if wanted is None else f"column {wanted!r} holds no bytes of images"
    if len(fitting) > 1:
        fault = f"columns {', '.join(fitting)} all hold bytes"
    raise DataError(
        f"{path}: {fault}; one binary column, or struct with a binary field 'bytes', is needed, the columns are "
        f"{', '.join(records.columns)}: name one with --path-column COLUMN"
    )


def _places(records: ParquetRecords) -> Iterator[str]:
    for group in range(records.metadata.num_row_groups):
        for index in range(records.metadata.row_group(group).num_rows):
            yield f"{group}:{index}"


def _too_large(place: str, size: int, limit: int) -> str:
    return (
        f"{place} holds {size} bytes of images or more; at most {limit} are decoded at once: write the file again with "
        f"smaller row groups, such as pyarrow.parquet.write_table(..., row_group_size=100)"
    )


def _parquet_files(folder: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """Relative paths of the files, sorted, and how many others there are of each suffix."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such file or folder; a Parquet file or a folder of *.parquet files is needed")
    found: list[str] = []
    ignored: Counter[str] = Counter()
    for place, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place) / name for name in (*folders, *files) if not name.startswith(".")):
            if path.is_symlink():
                _check_link(path, folder)
            if path.suffix == ".parquet" and path.is_file():
                found.append(path.relative_to(folder).as_posix())
            elif not path.is_dir():
                ignored[path.suffix or "no extension"] += 1
    if not found:
        raise DataError(f"{folder}: holds no *.parquet file; at least one is needed")
    return tuple(sorted(found)), ignored


def _check_link(link: Path, folder: Path) -> None:
    target = Path(os.path.realpath(link))
    if not (target.is_file() and target.is_relative_to(folder.resolve())):
        raise DataError(
            f"{link}: links to {target}; only links to files inside {folder} are followed: copy it there instead "
            f"(files of the Hugging Face cache are links; 'hf download --local-dir' makes plain ones)"
        )


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable") from error
