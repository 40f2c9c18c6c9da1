"""Sorting by way of files gives what sorting in memory gives, whatever comes in and however little may be held."""

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale_shards.planning.spool import Spool

SCHEMA = pa.schema(
    [("key", pa.string()), ("labels", pa.list_(pa.int32())), ("path", pa.string()), ("order", pa.uint64())]
)
# Few different orders, and the ends of their range: ties, empty and full buckets.
ORDERS = st.one_of(
    st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, (1 << 56) - 1, 1 << 56, 1 << 63, (1 << 64) - 1])
)
ROW = st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3), st.text(max_size=4), ORDERS)
CHUNKS = st.lists(st.lists(ROW, max_size=20), max_size=8)


def table(rows: list[Any]) -> pa.Table:
    return pa.table([[row[column] for row in rows] for column in range(4)], schema=SCHEMA)


def taken(spool: Spool) -> list[Any]:
    return [tuple(row.values()) for part in spool.tables() for row in part.to_pylist()]


def by_order_and_key(row: Any) -> Any:
    return row[3], row[0].encode()


@settings(deadline=None, max_examples=60)
@given(CHUNKS, st.integers(0, 60))
def test_rows_come_out_sorted_by_order_and_key(chunks: list[list[Any]], rows_in_memory: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool", rows_in_memory=rows_in_memory)
        for chunk in chunks:
            spool.add(table(chunk))
        rows = [row for chunk in chunks for row in chunk]
        found = taken(spool)
        assert [by_order_and_key(row) for row in found] == sorted(map(by_order_and_key, rows))
        assert sorted(found) == sorted(rows)
        assert not list(Path(folder).iterdir())


@settings(deadline=None, max_examples=30)
@given(CHUNKS)
def test_how_much_is_held_plays_no_part(chunks: list[list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for limit in (0, 7, 1_000_000):
            spool = Spool(Path(folder) / "spool", rows_in_memory=limit)
            for chunk in chunks:
                spool.add(table(chunk))
            results.append(taken(spool))
        assert results[0] == results[1] == results[2]


def test_equal_rows_stand_in_one_table(tmp_path: Path) -> None:
    """The planner finds equal keys within a table."""
    spool = Spool(tmp_path / "spool", rows_in_memory=2)
    for _ in range(5):
        spool.add(table([("same", [1], "x", 77), ("other", [2], "y", 77)]))
    assert [part["key"].to_pylist() for part in spool.tables()] == [["other"] * 5 + ["same"] * 5]


@pytest.mark.parametrize("limit", [2, 100])
def test_it_can_be_filled_again(tmp_path: Path, limit: int) -> None:
    spool = Spool(tmp_path / "spool", rows_in_memory=limit)
    rows = [(f"k{i}", [i], "p", i << 60) for i in range(6)]
    for _ in range(2):
        spool.add(table(rows))
        assert taken(spool) == rows
        assert taken(spool) == []
    assert not (tmp_path / "spool").exists()


def test_nothing_is_written_before_the_limit_is_passed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", rows_in_memory=100)
    for start in range(10):
        spool.add(table([(f"{start}-{i}", [i], "p", i) for i in range(10)]))
        assert not (tmp_path / "spool").exists()
    spool.add(table([("one more", [], "p", 5)]))
    assert (tmp_path / "spool").exists()
    assert len(taken(spool)) == 101


def test_a_spool_that_spilled_holds_few_rows_at_a_time(tmp_path: Path) -> None:
    """256 files: the largest has about 1/256 of evenly spread rows."""
    spool = Spool(tmp_path / "spool", rows_in_memory=1000)
    step = (1 << 64) // 10_000
    for start in range(0, 10_000, 500):
        spool.add(table([(f"k{i}", [], "p", i * step) for i in range(start, start + 500)]))
        assert spool._num_held <= 1000
    sizes = [len(part) for part in spool.tables()]
    assert sum(sizes) == 10_000
    assert max(sizes) <= 41
