"""Sort more rows than fit into memory: scatter them over files by the top bits of their order, sort one file at a time.

The orders are hashes, so that the files are of almost equal size: with N rows, about N / 256 are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BUCKET_BITS = 8
ROWS_IN_MEMORY = 1_000_000


class Spool:
    """Tables with a uint64 column ``order`` go in; their rows come out by (order, key)."""

    def __init__(self, folder: Path, *, rows_in_memory: int = ROWS_IN_MEMORY) -> None:
        """Nothing is written below ``folder`` before there are more rows than ``rows_in_memory``."""
        self._folder = folder
        self._rows_in_memory = rows_in_memory
        self._held: list[pa.Table] = []
        self._num_held = 0

    def add(self, table: pa.Table) -> None:
        """Take rows."""
        self._held.append(table)
        self._num_held += len(table)
        if self._num_held > self._rows_in_memory:
            self._spill()

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order, in tables one after the other. The spool is empty afterwards."""
        if not self._folder.exists():
            held, self._held, self._num_held = self._held, [], 0
            if held:
                yield _sorted(pa.concat_tables(held))
            return
        self._spill()
        for bucket in range(1 << BUCKET_BITS):
            path = self._path(bucket)
            if path.exists():
                yield _sorted(_read(path))
                path.unlink()
        self._folder.rmdir()

    def _spill(self) -> None:
        if not self._held:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        table = pa.concat_tables(self._held)
        self._held, self._num_held = [], 0
        buckets = (table["order"].to_numpy() >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
        table = table.take(np.argsort(buckets, kind="stable"))
        edges = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=1 << BUCKET_BITS))])
        for bucket in np.flatnonzero(np.diff(edges)):
            rows = table.slice(edges[bucket], edges[bucket + 1] - edges[bucket])
            with self._path(int(bucket)).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(rows)

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:03d}.arrows"


def _read(path: Path) -> pa.Table:
    """The streams that were appended to one file."""
    tables = []
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables)


def _sorted(table: pa.Table) -> pa.Table:
    order = table["order"].to_numpy()
    places = np.argsort(order, kind="stable")
    ascending = order[places]
    if np.any(ascending[1:] == ascending[:-1]):
        places = pc.sort_indices(table, [("order", "ascending"), ("key", "ascending")])
    return table.take(places).combine_chunks()
