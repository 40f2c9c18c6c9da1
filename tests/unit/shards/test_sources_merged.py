"""Several real sources as one."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale_shards.rows import MAX_KEY_CHARS, Row
from vitscale_shards.sources.folder import ImageFolder
from vitscale_shards.sources.merged import Merged
from vitscale_shards.sources.table import Table


def table(folder: Path, name: str, rows: list[tuple[str, str]]) -> Table:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    path.write_text("path,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    for image, _ in rows:
        (folder / image).write_text(f"{name} {image}")
    return Table(path)


def test_rows_and_bytes_of_all_sources_in_turn(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "dog/b.jpg", "dog/note.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(f"folder {name}")
    parts = [
        ImageFolder(tmp_path / "folder"),
        table(tmp_path / "t", "more", [("b.jpg", "dog"), ("c:1.jpg", "cat|dog")]),
        Merged([table(tmp_path / "u", "rest", [("z.jpg", "dog"), ("y.jpg", "cat")])]),
    ]
    source = Merged(parts)
    assert (source.name, source.classes, source.multi_label) == ("folder+more+rest", ("cat", "dog"), True)
    rows = list(source.rows())
    assert source.ignored == {".txt": 1}
    assert [(row.path, row.labels) for row in rows] == [
        ("0:cat/a.jpg", (0,)),
        ("0:dog/b.jpg", (1,)),
        ("1:b.jpg", (1,)),
        ("1:c:1.jpg", (0, 1)),
        ("2:0:z.jpg", (1,)),
        ("2:0:y.jpg", (0,)),
    ]
    assert [row.key for row in rows] == [row.key for part in parts for row in part.rows()]
    assert [row.num_bytes for row in rows[:3]] == [16, 16, 0]
    read = [source.read(row).decode() for row in reversed(rows)]
    assert read == ["rest y.jpg", "rest z.jpg", "more c:1.jpg", "more b.jpg", "folder dog/b.jpg", "folder cat/a.jpg"]


def test_prefixed_keys_are_unique_and_short(tmp_path: Path) -> None:
    names = ["a.jpg", "1_a.jpg", f"{'x' * 86}.jpg", f"{'x' * 88}.jpg", f"{'x' * 90}.jpg", f"{'x' * 91}.jpg"]
    parts = [table(tmp_path / str(i), "t", [(name, "c") for name in names]) for i in range(12)]
    plain = [row.key for row in Merged(parts).rows()]
    assert len(set(plain)) == len(names)
    keys = [row.key for row in Merged(parts, prefix_keys=True).rows()]
    assert len(set(keys)) == len(keys) == 12 * len(names)
    assert max(map(len, keys)) <= MAX_KEY_CHARS
    assert keys[:2] == ["0_a", "0_1_a"]
    assert keys[-6] == "11_a"


class Keys:
    """A source of keys alone."""

    name, classes, multi_label, ignored = "keys", None, False, {}

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def rows(self) -> list[Row]:
        return [Row(key, (0,), key) for key in self._keys]


KEY = st.from_regex(r"[A-Za-z0-9_-]{1,90}", fullmatch=True) | st.sampled_from(["x" * 90, "1_x", "0", "_", "0_0"])


@given(st.lists(st.lists(KEY, unique=True, max_size=4), min_size=1, max_size=4))
def test_any_unique_keys_stay_unique(parts: list[list[str]]) -> None:
    keys = [row.key for row in Merged([Keys(keys) for keys in parts], prefix_keys=True).rows()]
    assert len(set(keys)) == len(keys) == sum(map(len, parts))
    assert all(len(key) <= MAX_KEY_CHARS for key in keys)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["cat", "dog"], ["cat", "eel"], "class 1 is 'dog' in one (2 classes), 'eel' in the other (2 classes)"),
        (["cat", "dog"], ["cat"], "class 1 is 'dog' in one (2 classes), missing in the other (1 classes)"),
        (["cat"], ["cat", "dog"], "class 1 is missing in one (1 classes), 'dog' in the other (2 classes)"),
        (["cat"], ["0"], "only the first has names for its numbers"),
        (["0"], ["cat"], "only the second has names for its numbers"),
    ],
)
def test_sources_with_other_classes(tmp_path: Path, first: list[str], second: list[str], message: str) -> None:
    parts = [
        table(tmp_path / name, name, [(f"{i}.jpg", label) for i, label in enumerate(labels)])
        for name, labels in (("first", first), ("second", second))
    ]
    source = Merged([parts[0], parts[0], parts[1]])
    expected = f"source 1 (first) and source 3 (second) do not have the same classes: {message}; "
    with pytest.raises(DataError, match=re.escape(expected) + ".*list them all with --classes FILE"):
        list(source.rows())
    with pytest.raises(DataError, match=re.escape(expected)):
        _ = source.classes


def test_sources_of_numbers_alone_have_no_names(tmp_path: Path) -> None:
    source = Merged([table(tmp_path / n, n, [("a.jpg", label)]) for n, label in (("a", "3"), ("b", "5"))])
    assert (source.classes, source.multi_label) == (None, False)
    assert [row.labels for row in source.rows()] == [(3,), (5,)]


def test_nothing_to_merge() -> None:
    with pytest.raises(DataError, match="no source to merge"):
        Merged([])
