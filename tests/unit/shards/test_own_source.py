"""The source of the README's example, taken from there, works as the README says."""

from __future__ import annotations

import io
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.shardset import read_tars
from vitscale.data.manifest import read_manifest
from vitscale_shards.cli import app

README = Path(__file__).resolve().parents[3] / "shards" / "README.md"
SPECIES = ("rose", "aster", "tulip")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_example_becomes_a_shard_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class " in block]
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 30
    (tmp_path / "flowers.py").write_text(blocks[0])
    with sqlite3.connect("flowers.sqlite") as database:
        database.execute("CREATE TABLE images (id INTEGER PRIMARY KEY, species TEXT, jpeg BLOB)")
        rows = [(number, SPECIES[number % 3], picture(number)) for number in range(30)]
        database.executemany("INSERT INTO images VALUES (?, ?, ?)", rows)
    command = ["write", "--source-class", "flowers:Flowers", "flowers.sqlite", "out"]
    result = CliRunner().invoke(app, [*command, "--samples-per-shard", "10", "--workers", "2"])
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest.classes == ("aster", "rose", "tulip")
    expected = {f"flower-{n:08d}": (manifest.classes.index(species), jpeg) for n, species, jpeg in rows}
    assert {key: (int(parts["cls"]), parts["jpg"]) for key, parts in read_tars(manifest)} == expected


@pytest.mark.parametrize("name", ["flowers", "missing_module:Flowers", "flowers:Missing"])
def test_a_source_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", "--source-class", name, "x", "out"])
    assert "write MODULE:CLASS, importable from the working directory" in str(result.exception)


def test_a_source_that_cannot_open_its_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("class Broken:\n    def __init__(self, location):\n        open(location)\n")
    result = CliRunner().invoke(app, ["plan", "--source-class", "broken:Broken", "x", "out"])
    assert "broken:Broken cannot open it (FileNotFoundError(2, 'No such file or directory'))" in str(result.exception)
