from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.studies.tables import Score, Table

TABLE = Table(
    "Transfer", ("", "ViT-B/16", "a|b"), (("CIFAR-10", "98.95 ± 0.05", "97.1"), ('"x", y', "1", "2")), ("Two.",)
)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5))
def test_score(values: list[float]) -> None:
    score = Score(tuple(values))
    assert score.mean == pytest.approx(sum(values) / len(values))
    assert score.deviation == statistics.stdev(values)


def test_score_is_written_as_in_the_paper() -> None:
    assert str(Score((99.44, 99.50, 99.56))) == "99.50 ± 0.06"
    assert str(Score((99.444,))) == "99.44"


def test_csv_reads_back() -> None:
    assert list(csv.reader(io.StringIO(TABLE.to_csv()))) == [list(TABLE.columns), *map(list, TABLE.rows)]


def test_markdown() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "**Transfer**",
        "",
        "|  | ViT-B/16 | a\\|b |",
        "| --- | ---: | ---: |",
        "| CIFAR-10 | 98.95 ± 0.05 | 97.1 |",
        '| "x", y | 1 | 2 |',
        "",
        "Two.",
    ]


def test_files_and_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = TABLE.write(tmp_path, "table")
    assert [path.name for path in paths] == ["table.csv", "table.md"]
    TABLE.print()
    shown = capsys.readouterr().out
    assert all(cell in shown for row in TABLE.rows for cell in row)
    assert "Two." in shown
