"""Rows of a source as Arrow tables, checked: a source may be the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscale.errors import DataError
from vitscale_shards.planning.plan import COLUMNS
from vitscale_shards.rows import MAX_KEY_CHARS, Row, Source

ROWS_AT_A_TIME = 1 << 16
MAX_CLASSES = 1 << 24  # where the source does not know them: images are counted by label
_KEY = f"^[A-Za-z0-9_-]{{1,{MAX_KEY_CHARS}}}$"


def row_tables(source: Source) -> Iterator[pa.Table]:
    """All rows of a source in order, in tables of ``ROWS_AT_A_TIME``.

    Raises:
        DataError: a row is not what :class:`Row` promises; names the first one.
    """
    rows = iter(source.rows())
    multi_label = source.multi_label
    num_classes = MAX_CLASSES if source.classes is None else len(source.classes)
    while chunk := list(islice(rows, ROWS_AT_A_TIME)):
        table = _table(chunk, source.name)
        _check(table, source.name, num_classes, multi_label)
        yield table


def _table(rows: list[Row], of: str) -> pa.Table:
    try:
        keys, labels, paths, sizes = zip(*rows, strict=True)
        return pa.table([keys, labels, paths, sizes], schema=COLUMNS)
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object!r}: a name that is not UTF-8; rename the file") from None
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        for row in rows if len(rows) > 1 else ():
            _table([row], of)  # raises for the one at fault
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{of}: {str(rows[0])[:300]} is no row ({reason}); a row is a key, a tuple of whole numbers, a path and a "
            f"number of bytes: mend the source"
        ) from error


def _check(table: pa.Table, of: str, num_classes: int, multi_label: bool) -> None:
    """See that the values are allowed; a missing one is not."""
    labels = table["labels"].combine_chunks()
    lengths = pc.list_value_length(labels)
    flat = pc.list_flatten(labels)
    known = pc.and_(pc.greater_equal(flat, 0), pc.less(flat, num_classes)).fill_null(False)
    unknown_at = pc.list_parent_indices(labels).filter(pc.invert(known))
    rules = [
        (
            pc.match_substring_regex(table["key"], _KEY),
            f"a key has 1 to {MAX_KEY_CHARS} characters of A-Z a-z 0-9 _ -",
        ),
        (pc.is_valid(table["path"]), "a path is needed"),
        (pc.greater_equal(table["num_bytes"], 0), "a number of bytes is at least 0"),
        (pc.is_valid(lengths) if multi_label else pc.equal(lengths, 1), "one label per image is needed"),
        (
            pc.invert(pc.is_in(pa.array(np.arange(len(table))), unknown_at)),
            f"labels are numbers from 0 to {num_classes - 1}",
        ),
    ]
    for right, rule in rules:
        right = right.fill_null(False)
        if not pc.all(right, min_count=0).as_py():
            row = table.filter(pc.invert(right)).slice(0, 1).to_pylist()[0]
            raise DataError(
                f"{of}: {row['path']} has the key {row['key']!r}, the labels {row['labels']} and {row['num_bytes']} "
                f"bytes; {rule}: mend the source"
            )
