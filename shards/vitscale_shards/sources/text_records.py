"""Text tables as a stream of rows: CSV, TSV and JSON lines, plain or gzipped; and how their columns are found."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from vitscale.errors import DataError
from vitscale_shards.sources.labels import Split, split_text, split_value

PATH_COLUMNS = ("path", "file_path", "filepath", "image_path", "file", "file_name", "filename", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "cls", "target", "category")
SIZE_COLUMNS = ("num_bytes", "size_bytes")
_MAX_LINE_BYTES = 1 << 24


class Records(Protocol):
    """A table, read from the front as often as asked for, in memory that does not grow with its rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""

    @property
    def split(self) -> Split:
        """Takes a cell of labels apart."""

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names that the table gives the numbers in a column of labels, if it does."""

    def where(self, place: int) -> str:
        """What a user reads as the place of a row."""

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        """Every row: its place, and its cells in the asked columns.

        Raises:
            DataError: the table is damaged; with the place.
        """


def choose_column(path: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], option: str) -> str:
    """The column that the user wants, or the only one with a usual name in small or capital letters.

    Args:
        option: the command-line option that names the column.

    Raises:
        DataError: there is none, or more than one.
    """
    fitting = [name for name in columns if (name.lower() in usual if wanted is None else name == wanted)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
    if wanted is not None:
        fault = f"column {wanted!r} is there {len(fitting)} times, where once is needed"
    elif fitting:
        fault = f"columns {', '.join(map(repr, fitting))} could all be meant, where one is needed"
    else:
        fault = f"no column is called {' or '.join(usual)}"
    raise DataError(f"{path}: {fault}; the columns are {listed}: name one with {option} COLUMN")


class DelimitedText:
    """CSV or TSV as RFC 4180 has it: the first line names the columns, quotes are doubled in quoted cells."""

    split = staticmethod(split_text)

    def __init__(self, path: Path, delimiter: str) -> None:
        """Read the names of the columns.

        Raises:
            DataError: there is no first line.
        """
        self._path = path
        self._delimiter = delimiter
        header: list[str] = next((row for _, row in self._rows()), [])
        self.columns = tuple(name.strip() for name in header)
        if not header:
            raise DataError(f"{path}: empty; a first line with the names of the columns is needed, then one per image")

    def class_names(self, column: str) -> None:
        """None: text has no room for them."""

    def where(self, place: int) -> str:
        """The line on which a row ends."""
        return f"{self._path}: line {place}"

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        """Cells as text; empty lines are skipped.

        Raises:
            DataError: a row has more or fewer cells than there are columns, or the text is damaged.
        """
        wanted = [self.columns.index(name) for name in columns]
        width = len(self.columns)
        rows = self._rows()
        next(rows, None)
        for line, row in rows:
            if len(row) != width:
                raise DataError(
                    f"{self.where(line)}: {len(row)} cells where the first line names {width} columns; "
                    f"mend the row (a cell that holds {self._delimiter!r} must be quoted)"
                )
            yield line, [row[index] for index in wanted]

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(_lines(self._path), delimiter=self._delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{self.where(reader.line_num)}: not a row of a table ({error}); mend it") from None


class JsonLines:
    """One JSON object per line; the first one names the columns, blank lines are skipped."""

    split = staticmethod(split_value)

    def __init__(self, path: Path) -> None:
        """Read the names of the columns.

        Raises:
            DataError: there is no first object.
        """
        self._path = path
        self.columns = next((tuple(row) for _, row in self._rows()), ())
        if not self.columns:
            raise DataError(f"{path}: empty; one JSON object per image and line is needed")

    def class_names(self, column: str) -> None:
        """None: text has no room for them."""

    def where(self, place: int) -> str:
        """The line of a row."""
        return f"{self._path}: line {place}"

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        """Values as JSON has them, None where a key is missing.

        Raises:
            DataError: a line is not a JSON object.
        """
        for line, row in self._rows():
            yield line, [row.get(name) for name in columns]

    def _rows(self) -> Iterator[tuple[int, dict[str, object]]]:
        for number, line in enumerate(_lines(self._path), 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.where(number)}: not JSON ({error}); mend the line") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{self.where(number)}: {line[:40]!r}; a JSON object such as {{...}} is needed on a line"
                )
            yield number, row


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, decoded one by one, so that every fault has its line number."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(partial(file.readline, _MAX_LINE_BYTES), b""), 1):
                if len(line) == _MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}: line {number}: longer than {_MAX_LINE_BYTES} bytes; one row per line is needed: "
                        f"write the table so"
                    )
                yield line.decode() if number > 1 else line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number}: not UTF-8 ({error.reason}); save the table as UTF-8 text") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read after line {number} ({error}); make it readable, or make it anew if it is damaged"
        ) from None


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
