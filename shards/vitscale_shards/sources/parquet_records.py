"""Parquet as a table: a stream of rows, without reading the columns that are not asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitscale.errors import DataError
from vitscale_shards.sources.labels import split_value

_BATCH_ROWS = 4096


class ParquetRecords:
    """The rows of one Parquet file."""

    split = staticmethod(split_value)

    def __init__(self, path: Path) -> None:
        """Read the file's footer.

        Raises:
            DataError: it cannot be read.
        """
        self._path = path
        try:
            # Buffered, a column is read piece by piece; else a row group's part of it would be held in memory at once.
            self._file: Any = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({one_line(error)}); get it anew") from None
        self.schema: Any = self._file.schema_arrow
        self.metadata: Any = self._file.metadata
        self.columns: tuple[str, ...] = tuple(self.schema.names)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names in Hugging Face's ``ClassLabel`` of a column, or of the labels in its lists.

        Raises:
            DataError: the features in the footer are damaged.
        """
        try:
            features = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            feature = features.get("info", {}).get("features", {}).get(column)
            while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
                feature = feature[0] if isinstance(feature, list) else feature["feature"]
            names = (feature or {}).get("names")
            return None if names is None else tuple(map(str, names))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise DataError(
                f"{self._path}: its 'huggingface' metadata cannot be read ({error!r}); write the file without it"
            ) from None

    def where(self, place: int) -> str:
        """The row's number, from 1."""
        return f"{self._path}: row {place}"

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        """Values as Python has them, None where they are missing.

        Raises:
            DataError: the file is damaged.
        """
        place = 0
        try:
            for batch in self._file.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
                for cells in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    place += 1
                    yield place, cells
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self._path}: cannot be read after row {place} ({one_line(error)}); get the file anew"
            ) from None


def one_line(error: Exception) -> str:
    """The first line of what Arrow says; the rest names places in its source."""
    return str(error).partition("\n")[0]
