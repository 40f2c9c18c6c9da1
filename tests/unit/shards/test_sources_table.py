"""Tables of paths and labels: real files of every kind in, rows and bytes out, and one clear line for each fault."""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, image_key
from vitscale_shards.sources import labels as labels_module
from vitscale_shards.sources.table import Table

KINDS = ("csv", "csv.gz", "tsv", "jsonl", "ndjson.gz", "parquet")


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """A table of the kind that the name says. A list in a text table is joined by ``|``."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
        return path
    if ".csv" in path.name or ".tsv" in path.name:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerow(columns)
        for row in rows:
            writer.writerow(["|".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row])
        content = text.getvalue()
    else:
        content = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def text_table(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_rows(path: Path, **options: Any) -> list[Row]:
    return list(Table(path, **options).rows())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_classes_and_bytes(tmp_path: Path, kind: str) -> None:
    names = [("img/dog, big/1.jpg", "dog"), ("img/2.jpg", "cat"), ("3.jpg", "dog")]
    for number, (name, _) in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 2, 3)).save(tmp_path / name)
    source = Table(write(tmp_path / f"train.{kind}", ["path", "label"], names))
    assert source.name == "train"
    assert (source.classes, source.multi_label, source.ignored) == (("cat", "dog"), False, {})
    rows = list(source.rows())
    assert rows == [Row(image_key(path), (int(label == "dog"),), path) for path, label in names]
    assert [source.read(row) for row in rows] == [(tmp_path / path).read_bytes() for path, _ in names]
    assert list(source.rows()) == rows
    worker = Table(tmp_path / f"train.{kind}")
    (tmp_path / f"train.{kind}").write_bytes(b"reading an image needs no look at the rows")
    assert worker.read(rows[2]) == (tmp_path / "3.jpg").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_jft_kind_has_any_number_of_labels_per_image(tmp_path: Path, kind: str) -> None:
    """JFT has 1.26 labels per image on average (Sun et al. 2017); some images have none here."""
    rng = np.random.default_rng(7)
    counts = rng.choice([0, 1, 2, 3], size=500, p=[0.1, 0.61, 0.22, 0.07])
    sets = [sorted(rng.choice(30, size=count, replace=False).tolist()) for count in counts]
    assert 1.2 < np.mean(counts) < 1.32
    assert min(counts) == 0
    table = [(f"{i:03d}.jpg", [f"class {c:02d}" for c in found]) for i, found in enumerate(sets)]
    source = Table(write(tmp_path / f"jft.{kind}", ["file_name", "labels"], table))
    assert source.multi_label
    assert source.classes == tuple(f"class {c:02d}" for c in range(30))
    assert [list(row.labels) for row in source.rows()] == sets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [None, ["a", "b", "c"]])
def test_numbers_are_labels_as_they_are(tmp_path: Path, kind: str, classes: list[str] | None) -> None:
    path = write(tmp_path / f"t.{kind}", ["path", "label"], [("a.jpg", 2), ("b.jpg", 0)])
    source = Table(path, classes=classes)
    assert source.classes == (None if classes is None else tuple(classes))
    assert [row.labels for row in source.rows()] == [(2,), (0,)]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_from_the_user_give_the_order_and_may_be_more(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"t.{kind}", ["path", "label"], [("a.jpg", "cat"), ("b.jpg", "dog")])
    source = Table(path, classes=["zebra", "dog", "cat"])
    assert source.classes == ("zebra", "dog", "cat")
    assert [row.labels for row in source.rows()] == [(2,), (1,)]


@pytest.mark.parametrize(
    ("cells", "classes", "expected_classes", "expected"),
    [
        (["10", "9"], None, None, [10, 9]),
        (["007", "100"], None, ("007", "100"), [0, 1]),  # a leading zero makes names of all
        (["007", "cat"], None, ("007", "cat"), [0, 1]),
        (["3", "1"], ["1", "2", "3"], ("1", "2", "3"), [2, 0]),  # names, because the list has them
        (["3", "cat"], ["cat", "3"], ("cat", "3"), [1, 0]),
        (["3mm", "-x"], None, ("-x", "3mm"), [1, 0]),
        ([" cat", "cat "], None, ("cat",), [0, 0]),
        (["٣", "4a"], None, ("4a", "٣"), [1, 0]),  # digits of another script are no number
    ],
)
def test_what_counts_as_a_number_in_text(
    tmp_path: Path, cells: list[str], classes: list[str] | None, expected_classes: Any, expected: list[int]
) -> None:
    rows = [(f"{i}.jpg", cell) for i, cell in enumerate(cells)]
    source = Table(write(tmp_path / "t.csv", ["path", "label"], rows), classes=classes)
    assert source.classes == expected_classes
    assert [row.labels for row in source.rows()] == [(label,) for label in expected]


def test_a_text_in_json_is_a_name_even_if_it_looks_like_a_number(tmp_path: Path) -> None:
    source = Table(write(tmp_path / "t.jsonl", ["path", "label"], [("a.jpg", "10"), ("b.jpg", "9")]))
    assert source.classes == ("10", "9")


@pytest.mark.parametrize(
    ("labels", "classes", "line", "message"),
    [
        (["1", "-1"], None, 3, r"label '-1'; whole numbers from 0 are allowed"),
        (["1", "2.0"], None, 3, r"label '2\.0'; whole numbers from 0"),
        (["1", "cat"], None, 3, r"'cat' is a name, but '1' is a number \(.*line 2\)"),
        (["cat", "-1"], None, 2, r"'cat' is a name, but '-1' is a number"),
        (["1", "01", "cat"], None, 3, r"'01' is a name, but '1' is a number"),
        (["cat", "cow", "dog"], ["cat", "dog"], 3, r"'cow' is unknown \(1 of 3 are\); 2 classes are allowed"),
        (["0", "2"], ["cat", "dog"], 3, "label 2; whole numbers from 0 to 1 are allowed"),
        (["0", "1000000"], None, 3, "label 1000000; whole numbers from 0 to 999999 are allowed"),
        (["0", "9" * 5000], None, 3, "label 9{40}; whole numbers"),
        (["cat", ""], None, 3, "no label; one per image is needed"),
        (["cat", "cat||dog"], None, 3, "have nothing on one side of a '|'"),
        (["cat", "|"], None, 3, "have nothing on one side"),
    ],
)
def test_labels_that_are_not_allowed_in_text(
    tmp_path: Path, labels: list[str], classes: list[str] | None, line: int, message: str
) -> None:
    path = write(tmp_path / "t.csv", ["path", "label"], [(f"{i}.jpg", label) for i, label in enumerate(labels)])
    with pytest.raises(DataError, match=rf"t\.csv: line {line}: .*{message.replace('|', '[|]')}") as error:
        all_rows(path, classes=classes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, -1], "label -1; whole numbers from 0 to 999999"),
        ([0.5, 1.5], "label 0.5 is neither a name nor a whole number"),
        ([True, False], "label True is neither"),
        (["cat", None], "label None is neither"),
        (["cat", ""], "label '' is neither"),
        ([["cat"], ["dog", None]], "label None is neither"),
        ([[1], None], "label None is neither"),
        ([[], []], "no label in column 'label'; at least one"),
    ],
)
def test_labels_that_are_not_allowed_in_typed_tables(
    tmp_path: Path, kind: str, labels: list[Any], message: str
) -> None:
    path = write(tmp_path / f"t.{kind}", ["path", "label"], [(f"{i}.jpg", label) for i, label in enumerate(labels)])
    with pytest.raises(DataError, match=re.escape(message)):
        all_rows(path)


def test_names_and_numbers_do_not_mix_in_json(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["path", "label"], [("a.jpg", 1), ("b.jpg", "cat")])
    with pytest.raises(DataError, match=r"line 2: label 'cat' is a name, but 1 is a number \(.*line 1\)"):
        all_rows(path)


@pytest.mark.parametrize("label", [True, 1.0])
def test_what_equals_a_number_in_python_is_none_yet(tmp_path: Path, label: Any) -> None:
    path = write(tmp_path / "t.jsonl", ["path", "label"], [("a.jpg", 1), ("b.jpg", label)])
    with pytest.raises(DataError, match=f"line 2: label {label} is neither"):
        all_rows(path)


def test_a_lone_surrogate_is_no_label_and_no_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: label .* is no valid text"):
        all_rows(text_table(tmp_path, '{"path": "a.jpg", "label": "\\ud800"}\n', "a.jsonl"))
    with pytest.raises(DataError, match=r"line 1: path .* is no valid file name"):
        all_rows(text_table(tmp_path, '{"path": "\\ud800.jpg", "label": 1}\n', "b.jsonl"))


def test_a_class_that_is_listed_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ["path", "label"], [("a.jpg", "cat")])
    with pytest.raises(DataError, match="class 'cat' is twice"):
        all_rows(path, classes=["cat", "cat", "dog"])


def test_a_repeated_label_counts_once(tmp_path: Path) -> None:
    path = text_table(tmp_path, "path,label\na.jpg,dog|cat|dog\n")
    assert [row.labels for row in Table(path).rows()] == [(1, 0)]


def test_a_column_with_too_many_different_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "MAX_CLASSES", 5)
    path = write(tmp_path / "t.csv", ["path", "label"], [(f"{i}.jpg", f"n{i}") for i in range(6)])
    with pytest.raises(DataError, match="more than 5 different labels in column 'label'"):
        all_rows(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "is absolute; paths below the folder of --root"),
        ("../a.jpg", "has '..' in it"),
        ("a/../../b.jpg", "has '..' in it"),
        ("a/..", "has '..' in it"),
        ("..", "has '..' in it"),
        ("http://x.org/a.jpg", "is a URL; only files are read: download"),
        ("s3://bucket/a.jpg", "is a URL"),
        ("a\0.jpg", "is no valid file name"),
        ("", "the path of an image is needed"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_paths_that_are_not_allowed(tmp_path: Path, kind: str, path: str, message: str) -> None:
    table = write(tmp_path / f"t.{kind}", ["path", "label"], [("ok.jpg", "cat"), (path, "cat")])
    with pytest.raises(DataError, match=rf"t\.{kind}: (line|row) [23]: .*{re.escape(message)}"):
        all_rows(table)


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("./a/b.jpg", "a/b.jpg"),
        ("a//b.jpg", "a/b.jpg"),
        ("a/./b.jpg", "a/b.jpg"),
        (".a/..b.jpg", ".a/..b.jpg"),
        ("a b/ü.jpg", "a b/ü.jpg"),
        ("a\u00a0.jpg", "a\u00a0.jpg"),
        ("~/a.jpg", "~/a.jpg"),
    ],
)
def test_one_file_has_one_path(tmp_path: Path, path: str, normal: str) -> None:
    (row,) = all_rows(write(tmp_path / "t.jsonl", ["path", "label"], [(path, "cat")]))
    assert (row.path, row.key) == (normal, image_key(normal))


def test_reading_stays_in_the_root(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "in").mkdir(parents=True)
    for name in ("images/in/a.jpg", "secret.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (root / "link.jpg").symlink_to("in/a.jpg")
    (root / "out.jpg").symlink_to("../secret.jpg")
    (root / "up").symlink_to("..")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "broken.jpg").symlink_to("in/none.jpg")
    os.mkfifo(root / "pipe.jpg")
    names = ["in/a.jpg", "link.jpg", "out.jpg", "up/secret.jpg", "loop.jpg", "broken.jpg", "pipe.jpg", "in", "no.jpg"]
    source = Table(write(tmp_path / "t.csv", ["path", "label"], [(name, "cat") for name in names]), root=root)
    rows = {row.path: row for row in source.rows()}
    assert source.read(rows["in/a.jpg"]) == source.read(rows["link.jpg"]) == b"images/in/a.jpg"
    messages = {
        "out.jpg": "links to .*/secret.jpg, outside of ",
        "up/secret.jpg": "links to .*/secret.jpg, outside of ",
        "loop.jpg": "cannot be read: ",
        "broken.jpg": "cannot be read: No such file",
        "pipe.jpg": "no regular file",
        "in": "no regular file",
        "no.jpg": "cannot be read: No such file",
    }
    for name, message in messages.items():
        with pytest.raises(BadImageError, match=message):
            source.read(rows[name])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_taken_from_the_table(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"t.{kind}", ["num_bytes", "path", "label"], [(17, "a.jpg", "x"), (0, "b.jpg", "x")])
    assert [row.num_bytes for row in Table(path).rows()] == [17, 0]


@pytest.mark.parametrize("size", ["-1", "1.5", "big"])
def test_a_size_that_is_no_number(tmp_path: Path, size: str) -> None:
    path = write(tmp_path / "t.csv", ["path", "label", "size_bytes"], [("a.jpg", "x", ""), ("b.jpg", "x", size)])
    with pytest.raises(DataError, match=f"line 3: size '{size}'; a whole number of bytes"):
        all_rows(path)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["x", "label"], {}, "no column is called path or .*the columns are 'x', 'label': name one with --path-column"),
        (["path", "y"], {}, "no column is called label or .*--label-column"),
        (["path", "Class", "label"], {}, "columns 'Class', 'label' could all be meant.*--label-column"),
        (["path", "path", "label"], {}, "columns 'path', 'path' could all be meant.*--path-column"),
        (["path", "label"], {"label_column": "y"}, "column 'y' is there 0 times"),
        (["p", "label", "p"], {"path_column": "p"}, "column 'p' is there 2 times"),
    ],
)
def test_columns_that_are_not_found(tmp_path: Path, columns: list[str], options: Any, message: str) -> None:
    path = write(tmp_path / "t.csv", columns, [["a.jpg"] * len(columns)])
    with pytest.raises(DataError, match=message):
        Table(path, **options)


def test_columns_are_named_or_found_in_any_case(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ["Class", "n", " Path", "label"], [("cat", "5", "a.jpg", "dog")])
    assert all_rows(path, label_column="n") == [Row("a", (5,), "a.jpg")]
    assert all_rows(path, label_column="Class", path_column="label") == [Row("dog", (0,), "dog")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "empty; a first line with the names"),
        ("t.csv", "path,label\n", "no label in column 'label'; at least one row"),
        ("t.csv", "path,label\na.jpg,1\nb.jpg\n", r"line 3: 1 cells where the first line names 2"),
        ("t.csv", "path,label\na.jpg,1,2\n", r"line 2: 3 cells"),
        ("t.csv", 'path,label\n"a.jpg,1\n', "line 2: not a row of a table"),
        ("t.csv", 'path,label\n"a"b,1\n', "line 2: not a row of a table"),
        ("t.csv", "path,label\n" + "a" * 200_000 + ",1\n", "line 2: not a row of a table .*limit"),
        ("t.csv", b"path,label\na.jpg,1\nb\xff.jpg,1\n", "line 3: not UTF-8"),
        ("t.csv", "path,label\na.jpg,1\n".encode("utf-16"), "line 1: not UTF-8"),
        ("t.csv.gz", b"path,label\na.jpg,1\n", "cannot be read after line 0"),
        ("t.csv.gz", gzip.compress(b"path,label\na.jpg,1\n" * 9, mtime=0)[:-9], "cannot be read after line"),
        ("t.jsonl", "", "empty; one JSON object per image"),
        ("t.jsonl", "\n\n", "empty; one JSON object per image"),
        ("t.jsonl", '{"path": "a.jpg", "label": 1}\n{"path": \n', "line 2: not JSON"),
        ("t.jsonl", '{"path": "a.jpg", "label": 1}\n[1]\n', r"line 2: '\[1\]\\n'; a JSON object"),
        ("t.jsonl", '{"path": "a.jpg", "label": 1}\n{"path": "b.jpg"}\n', "line 2: label None is neither"),
        ("t.jsonl", '{"path": "a.jpg", "label": 1}\n\n{"label": 1}\n', "line 3: path None; the path"),
        ("t.jsonl", '{"path": "a.jpg", "label": ' + "[" * 9999 + "]" * 9999 + "}", "line 1: not JSON"),
        ("t.jsonl", b'{"path": "a.jpg", "label": 1}\n{"path": "\xff"}\n', "line 2: not UTF-8"),
        ("t.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("t.parquet", b"", "not a readable Parquet file"),
        ("t.xlsx", b"", "unknown kind; allowed are .csv .tsv .jsonl"),
        ("t.parquet.gz", b"", "unknown kind"),
        ("t", b"", "unknown kind"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        all_rows(text_table(tmp_path, content, name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = text_table(tmp_path, b'{"path": "a.jpg", "label": 1}\n"' + b"x" * (1 << 24), "t.jsonl")
    with pytest.raises(DataError, match="line 2: longer than 16777216 bytes"):
        all_rows(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.csv: no such file"):
        Table(tmp_path / "no.csv")
    with pytest.raises(DataError, match="elsewhere: no such folder"):
        Table(text_table(tmp_path, "path,label\n"), root=tmp_path / "elsewhere")


def test_a_table_that_changes_between_its_passes(tmp_path: Path) -> None:
    path = text_table(tmp_path, "path,label\na.jpg,cat\n")
    source = Table(path)
    assert source.classes == ("cat",)
    text_table(tmp_path, "path,label\na.jpg,dog\n")
    with pytest.raises(DataError, match="line 2: label 'dog' was not there a moment ago"):
        list(source.rows())


@pytest.mark.parametrize(
    "content",
    [
        "path,label\na.jpg,cat\nb.jpg,dog\n".encode("utf-8-sig"),
        b"path,label\r\na.jpg,cat\r\nb.jpg,dog",
        b'"path","label"\n\n"a.jpg","cat"\n\nb.jpg,"dog"\n\n',
        b'path,"la\nbel",label\na.jpg,"x\n\ny",cat\nb.jpg,,dog\n',
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, content: bytes) -> None:
    assert all_rows(text_table(tmp_path, content)) == [Row("a", (0,), "a.jpg"), Row("b", (1,), "b.jpg")]


def test_hugging_face_class_names_in_parquet(tmp_path: Path) -> None:
    table = pa.table({"path": ["a.jpg", "b.jpg"], "label": [2, 0]})
    feature = {"_type": "ClassLabel", "names": ["cat", "dog", "eel"]}
    for features in ({"label": feature}, {"label": {"_type": "Sequence", "feature": feature}}, {"label": [feature]}):
        info = json.dumps({"info": {"features": features}})
        pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / "t.parquet")
        source = Table(tmp_path / "t.parquet")
        assert source.classes == ("cat", "dog", "eel")
        assert [row.labels for row in source.rows()] == [(2,), (0,)]
        reordered = Table(tmp_path / "t.parquet", classes=["eel", "dog", "cat"])
        assert [row.labels for row in reordered.rows()] == [(0,), (2,)]
    with pytest.raises(DataError, match="row 1: class 'eel' is unknown"):
        all_rows(tmp_path / "t.parquet", classes=["cat", "dog"])


@pytest.mark.parametrize("metadata", ["{", "[1]", '{"info": 3}', '{"info": {"features": {"label": []}}}'])
def test_damaged_hugging_face_metadata(tmp_path: Path, metadata: str) -> None:
    table = pa.table({"path": ["a.jpg"], "label": [2]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: its 'huggingface' metadata cannot be read"):
        all_rows(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint16(), pa.int64(), pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint8(), 1)],
)
def test_integers_of_any_width_in_parquet(tmp_path: Path, kind: Any) -> None:
    nested = pa.types.is_nested(kind)
    values = pa.array([[1], [0]] if nested else [1, 0], kind)
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg"], "label": values}), tmp_path / "t.parquet")
    source = Table(tmp_path / "t.parquet")
    assert (source.multi_label, source.classes) == (nested, None)
    assert [row.labels for row in source.rows()] == [(1,), (0,)]


def test_dictionary_columns_and_many_row_groups_in_parquet(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(5000)]
    labels = pa.array(["cat", "dog"] * 2500).dictionary_encode()
    table = pa.table({"path": pa.array(names).dictionary_encode(), "label": labels, "junk": [b"x" * 99] * 5000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=37)
    assert all_rows(tmp_path / "t.parquet") == [Row(str(i), (i % 2,), name) for i, name in enumerate(names)]


def test_a_parquet_table_that_is_damaged_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", ["path", "label"], [(f"{i}.jpg", f"c{i % 7}") for i in range(3000)])
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read after row 0") as error:
        all_rows(path)
    assert "\n" not in str(error.value)


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    names = pa.array([b"a.jpg", b"\xff.jpg"]).view(pa.string())
    pq.write_table(pa.table({"path": names, "label": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read after row 0 \('utf-8' codec"):
        all_rows(tmp_path / "t.parquet")


NAME = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
CLASS = NAME.map(lambda name: f"c{name.replace('|', '')}".strip())
PATH = st.lists(NAME.filter(lambda part: "/" not in part and part not in (".", "..")), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@given(table=st.lists(st.tuples(PATH.map("/".join), st.lists(CLASS, max_size=3, unique=True)), min_size=1, max_size=8))
def test_round_trip_against_an_oracle(
    kind: str, table: list[tuple[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    table.append(("last.jpg", ["c one", "c two"]))  # so that there are several in one cell
    path = tmp_path_factory.mktemp("t") / f"t.{kind}"
    source = Table(write(path, ["path", "labels"], table))
    classes = sorted({name for _, names in table for name in names})
    expected = [Row(image_key(p), tuple(classes.index(name) for name in names), p) for p, names in table]
    assert source.classes == tuple(classes)
    assert list(source.rows()) == expected


PREFIXES = {
    "csv": b"path,label\na.jpg,1\n",
    "csv.gz": gzip.compress(b"path,label\na.jpg,1\n", mtime=0),
    "jsonl": b'{"path": "a", "label": 1}\n',
    "parquet": b"PAR1",
}


@given(content=st.binary(max_size=200), kind=st.sampled_from(sorted(PREFIXES)))
def test_garbage_is_refused_in_one_line_or_read(
    content: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("t") / f"t.{kind}"
    path.write_bytes(PREFIXES[kind] + content)
    refused = ""
    try:
        rows = all_rows(path)
    except DataError as error:
        refused = str(error)
    assert "\n" not in refused
    assert refused or rows[0].path in ("a", "a.jpg")
