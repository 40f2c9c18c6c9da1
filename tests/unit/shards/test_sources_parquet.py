"""Parquet files with images inside: structs of Hugging Face's kind and plain bytes, read in any order."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row
from vitscale_shards.sources.parquet import ParquetImages, has_image_bytes

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def images(count: int, first: int = 0) -> pa.Array:
    return pa.array([{"bytes": png(first + i), "path": None} for i in range(count)], IMAGE)


def write(path: Path, columns: dict[str, Any], *, names: list[str] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


@pytest.mark.parametrize("kind", [IMAGE, pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])])
@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False, "compression": "zstd"}, {"data_page_version": "2.0"}]
)
def test_a_hugging_face_file_is_read_in_any_order(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    columns = {"image": images(25).cast(kind) if kind == IMAGE else pa.array(images(25).to_pylist(), kind)}
    columns["label"] = [i % 3 for i in range(25)]
    path = write(tmp_path / "train-0.parquet", columns, names=["cat", "dog", "eel"], row_group_size=10, **options)
    source = ParquetImages(path)
    assert (source.name, source.classes, source.multi_label) == ("train-0", ("cat", "dog", "eel"), False)
    rows = list(source.rows())
    assert rows == [Row(f"train-0-{i:09d}", (i % 3,), f"train-0.parquet#{i // 10}:{i % 10}") for i in range(25)]
    order = list(enumerate(rows))
    random.Random(3).shuffle(order)
    worker = ParquetImages(path, cache_bytes=2500)
    assert [worker.read(row) for _, row in order] == [png(number) for number, _ in order]


def test_a_folder_of_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for number, name in enumerate(("b/1.parquet", "a.b.parquet", "b/0.parquet")):
        write(tmp_path / "set" / name, {"image": [png(number)], "label": [f"class {number}"]})
    for name in ("README.md", ".hidden.parquet", ".git/x.parquet", "b/list"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text("no")
    (tmp_path / "set" / "c.parquet").symlink_to("b/0.parquet")
    source = ParquetImages(tmp_path / "set")
    assert (source.name, source.classes) == ("set", ("class 0", "class 1", "class 2"))
    rows = list(source.rows())
    assert source.ignored == {".md": 1, "no extension": 1}
    files = ["a.b.parquet", "b/0.parquet", "b/1.parquet", "c.parquet"]
    assert [row.path for row in rows] == [f"{name}#0:0" for name in files]
    assert [row.labels for row in rows] == [(1,), (2,), (0,), (2,)]
    assert [source.read(row) for row in rows] == [png(i) for i in (1, 2, 0, 2)]
    assert [row.key for row in rows[1:]] == ["b__0-000000000", "b__1-000000000", "c-000000000"]
    assert re.fullmatch("a_b-000000000_[0-9a-f]{16}", rows[0].key)


def test_keys_are_unique_where_the_file_has_a_dot(tmp_path: Path) -> None:
    path = write(tmp_path / "part.0.parquet", {"image": images(30), "label": [1] * 30})
    assert len({row.key for row in ParquetImages(path).rows()}) == 30


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([[1, 0], [], [2]], None, [(1, 0), (), (2,)]),
        ([["dog", "cat"], [], ["eel"]], ("cat", "dog", "eel"), [(1, 0), (), (2,)]),
    ],
)
def test_lists_of_labels(tmp_path: Path, labels: Any, classes: Any, expected: Any) -> None:
    source = ParquetImages(write(tmp_path / "a.parquet", {"image": images(3), "labels": labels}))
    assert (source.multi_label, source.classes) == (True, classes)
    assert [row.labels for row in source.rows()] == expected


def test_columns_by_name(tmp_path: Path) -> None:
    columns = {"image": images(2), "depth": [b"d0", b"d1"], "fine_label": [5, 6], "coarse_label": ["y", "x"]}
    path = write(tmp_path / "a.parquet", columns)
    source = ParquetImages(path, image_column="depth", label_column="coarse_label", classes=["w", "x", "y"])
    assert [(row.labels, source.read(row)) for row in source.rows()] == [((2,), b"d0"), ((1,), b"d1")]
    with pytest.raises(DataError, match=r"columns image, depth all hold bytes; .*name one with --path-column COLUMN"):
        ParquetImages(path, label_column="fine_label")
    with pytest.raises(DataError, match=r"no column is called label .*'fine_label', 'coarse_label': .*--label-column"):
        ParquetImages(path, image_column="image")
    with pytest.raises(DataError, match="column 'fine_label' holds no bytes of images"):
        ParquetImages(path, image_column="fine_label", label_column="fine_label")


def test_it_is_told_whether_there_are_images_inside(tmp_path: Path) -> None:
    inside = write(tmp_path / "in" / "a.parquet", {"image": images(1), "thumbnail": [b"x"], "label": [1]})
    paths = write(tmp_path / "out" / "a.parquet", {"image": ["a.jpg"], "box": [{"x": 1}], "label": [1]})
    for path in (inside, inside.parent):
        assert has_image_bytes(path)
        assert has_image_bytes(path, "thumbnail")
        assert not has_image_bytes(path, "label")
        assert not has_image_bytes(path, "none")
    assert not has_image_bytes(paths)
    assert not has_image_bytes(paths.parent)
    (tmp_path / "b.parquet").write_bytes(b"PAR1PAR1")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        has_image_bytes(tmp_path / "b.parquet")


class CountingImages(ParquetImages):
    """Counts the row groups that are decoded."""

    decoded = 0

    def _decoded(self, name: str, group: int) -> Any:
        self.decoded += 1
        return super()._decoded(name, group)


def test_the_cache_is_bounded_and_spares_reading_again(tmp_path: Path) -> None:
    data = [bytes([i]) * 1000 for i in range(40)]
    path = write(tmp_path / "a.parquet", {"image": data, "label": [0] * 40}, row_group_size=10)  # 4 groups of 10 kB
    large = CountingImages(path)
    small = CountingImages(path, cache_bytes=22_000)  # two groups
    rows = list(large.rows())
    shuffled = random.Random(0).sample(rows, 40)
    for source, most in ((large, 4), (small, 40)):
        assert [source.read(row) for row in shuffled] == [data[rows.index(row)] for row in shuffled]
        assert 4 <= source.decoded <= most
    assert small.decoded > 10
    assert sum(images.nbytes for images in small._cache.values()) <= 22_000
    in_order = CountingImages(path, cache_bytes=11_000)
    assert [in_order.read(row) for row in rows] == data
    assert in_order.decoded == 4
    recent = CountingImages(path, cache_bytes=22_000)
    for number in (0, 10, 0, 20, 0, 30, 0):  # what is used again stays
        recent.read(rows[number])
    assert recent.decoded == 4


def test_a_row_group_that_is_too_large(tmp_path: Path) -> None:
    data = [random.Random(i).randbytes(1000) for i in range(10)]
    path = write(tmp_path / "a.parquet", {"image": data, "label": [0] * 10}, row_group_size=5)
    source = ParquetImages(path, cache_bytes=4000)
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 holds \d{4} bytes .* at most 4000 .*row_group_size"):
        next(source.rows())
    same = write(tmp_path / "b.parquet", {"image": [data[0]] * 10, "label": [0] * 10})  # once, in a dictionary
    source = ParquetImages(same, cache_bytes=4000)
    with pytest.raises(BadImageError, match="row group 0 holds"):
        source.read(next(source.rows()))


def test_images_that_are_not_there(tmp_path: Path) -> None:
    values = [{"bytes": None, "path": "a.jpg"}, None, {"bytes": png(1), "path": "b.jpg"}]
    path = write(tmp_path / "a.parquet", {"image": pa.array(values, IMAGE), "label": [0, 0, 0]})
    source = ParquetImages(path)
    first, second, third = source.rows()
    for row in (first, second):
        with pytest.raises(BadImageError, match="no bytes in this row"):
            source.read(row)
    assert source.read(third) == png(1)


@pytest.mark.parametrize(
    "place", ["a.parquet#0:7", "a.parquet#4:0", "a.parquet#x:0", "a.parquet#0", "a.parquet", "../b.parquet#0:0", ""]
)
def test_places_that_are_not_there(tmp_path: Path, place: str) -> None:
    write(tmp_path / "b.parquet", {"image": images(3), "label": [0] * 3})
    source = ParquetImages(write(tmp_path / "in" / "a.parquet", {"image": images(3), "label": [0] * 3}))
    with pytest.raises(BadImageError, match="cannot be read") as error:
        source.read(Row("k", (0,), place))
    assert "\n" not in str(error.value)


def test_damage_inside_of_an_image_page_is_a_bad_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(3), "label": [0] * 3})
    rows = list(ParquetImages(path).rows())
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page of the first column
    path.write_bytes(data)
    source = ParquetImages(path)
    with pytest.raises(BadImageError, match="cannot be read: ") as error:
        source.read(rows[0])
    assert "\n" not in str(error.value)


def test_a_file_that_goes_away_is_a_bad_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(3), "label": [0] * 3})
    source = ParquetImages(path)
    rows = list(source.rows())
    path.unlink()
    with pytest.raises(BadImageError, match=r"cannot be read: .*No such file"):
        source.read(rows[0])


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        (
            {"picture": [b"x"], "label": [0]},
            None,
            "its columns are picture, label; 'image' with images and 'label' are",
        ),
        ({"image": ["a.jpg"], "label": [0]}, None, "its columns are image, label; 'image' with images"),
        ({"image": [b"x"], "cls": [0]}, None, "its columns are image, cls"),
        ({"image": [b"x"], "label": [0]}, ["dog", "cat"], "its numbers have other class names than in a.parquet"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, columns: Any, names: Any, message: str) -> None:
    write(tmp_path / "a.parquet", {"image": images(1), "label": [0]}, names=names and names[::-1])
    write(tmp_path / "b.parquet", columns, names=names)
    with pytest.raises(DataError, match=rf"b\.parquet: {re.escape(message)}"):
        list(ParquetImages(tmp_path).rows())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], "row 2: label None is neither"),
        ([0, -1], "row 2: label -1; whole numbers from 0 to 1 are allowed"),
        ([0, 2], "row 2: label 2; whole numbers from 0 to 1 are allowed"),
    ],
)
def test_labels_that_are_not_allowed(tmp_path: Path, labels: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(2), "label": labels}, names=["cat", "dog"])
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        list(ParquetImages(path).rows())


def test_folders_without_a_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no \*.parquet file"):
        ParquetImages(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        ParquetImages(tmp_path / "none")
    write(tmp_path / "set" / "a.parquet", {"image": images(0), "label": pa.array([], pa.int64())})
    with pytest.raises(DataError, match="no label in column 'label'"):
        list(ParquetImages(tmp_path / "set").rows())


@pytest.mark.parametrize("target", ["../elsewhere/a.parquet", "../elsewhere", "a.parquet", "."])
def test_links_that_lead_to_no_file_inside(tmp_path: Path, target: str) -> None:
    write(tmp_path / "elsewhere" / "a.parquet", {"image": images(1), "label": [0]})
    write(tmp_path / "set" / "b.parquet", {"image": images(1), "label": [0]})
    (tmp_path / "set" / "link.parquet").symlink_to(target)
    with pytest.raises(DataError, match=r"link\.parquet: links to .*; only links to files inside .* are followed"):
        ParquetImages(tmp_path / "set")
