"""What a user types as SOURCE is taken for what it is."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitscale.errors import DataError
from vitscale_shards.sources import SourceSpec


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(path: Path) -> Path:
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_bytes(jpeg())
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def table(path: Path) -> Path:
    folder(path.parent)
    path.write_text("path,label\ncat/1.jpg,cat\ndog/2.jpg,dog\n")
    return path


def parquet_of_paths(path: Path) -> Path:
    folder(path.parent)
    pq.write_table(pa.table({"path": ["cat/1.jpg", "dog/2.jpg"], "label": ["cat", "dog"]}), path)
    return path


def parquet_of_images(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [jpeg(), jpeg(1)], "label": [0, 1]}), path)
    return path


def idx(path: Path) -> Path:
    path.mkdir()
    images = path / "train-images-idx3-ubyte"
    images.write_bytes(struct.pack(">IIII", 0x803, 2, 4, 4) + bytes(32))
    (path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 2) + bytes([0, 1]))
    return images


def cifar(path: Path) -> Path:
    path.mkdir()
    for number in range(1, 6):
        (path / f"data_batch_{number}.bin").write_bytes(bytes(3073))
    (path / "test_batch.bin").write_bytes(bytes(3073))
    (path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    return path


def class_tars(path: Path) -> Path:
    inner = {name: tar(path.parent / name, {f"{name[0]}_1.JPEG": jpeg()}).read_bytes() for name in ("a.tar", "b.tar")}
    return tar(path, inner)


def webdataset(path: Path) -> Path:
    return tar(path, {"1.jpg": jpeg(), "1.cls": b"0", "2.jpg": jpeg(1), "2.cls": b"1"})


KINDS: dict[str, tuple[Callable[[Path], Path], str, int]] = {
    "images": (folder, "ImageFolder", 2),
    "table.csv": (table, "Table", 2),
    "paths.parquet": (parquet_of_paths, "Table", 2),
    "images.parquet": (parquet_of_images, "ParquetImages", 2),
    "mnist": (idx, "Idx", 2),
    "cifar-10-batches-bin": (cifar, "Cifar", 5),
    "train.tar": (class_tars, "ClassTars", 2),
    "000.tar": (webdataset, "WebDatasetTars", 2),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_told_apart(tmp_path: Path, name: str) -> None:
    make, kind, images = KINDS[name]
    source = SourceSpec((str(make(tmp_path / "in" / name if "." in name else tmp_path / name)),)).open()
    assert type(source).__name__ == kind
    rows = list(source.rows())
    assert len(rows) == images
    assert all(source.read(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("a/000.tar", webdataset, "WebDatasetTars"),
        ("b/x.parquet", parquet_of_images, "ParquetImages"),
        ("c/data/x.parquet", parquet_of_images, "ParquetImages"),
        ("d/n01440764.tar", lambda path: tar(path, {"n01440764_1.JPEG": jpeg()}), "ClassTars"),
        ("e/train-images-idx3-ubyte", lambda path: idx(path.parent), "Idx"),
    ],
)
def test_folders_of_files_are_told_apart(tmp_path: Path, name: str, make: Callable[[Path], Path], kind: str) -> None:
    make(tmp_path / name)
    assert type(SourceSpec((str(tmp_path / name.partition("/")[0]),)).open()).__name__ == kind


def test_several_locations_are_merged(tmp_path: Path) -> None:
    paths = str(folder(tmp_path / "one")), str(folder(tmp_path / "two"))
    rows = list(SourceSpec(paths, prefix_keys=True).open().rows())
    assert len({row.key for row in rows}) == 4


def test_class_names_of_a_file_decide_the_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\nowl\ncat\n")
    source = SourceSpec((str(folder(tmp_path / "images")),), classes=str(tmp_path / "classes.txt")).open()
    assert source.classes == ("dog", "owl", "cat")
    assert [row.labels for row in source.rows()] == [(2,), (0,)]


def test_a_spec_survives_the_plan_and_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = SourceSpec(("images", "digits", "s3://x/y", "set/{0..9}.tar"), classes="c.txt").absolute()
    assert spec.locations == (str(tmp_path / "images"), "digits", "s3://x/y", str(tmp_path / "set/{0..9}.tar"))
    assert spec.classes == str(tmp_path / "c.txt")
    assert SourceSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "no such file or folder; a dataset, or 'digits', is needed"),
        (lambda path: Path(str(path / "x.doc")), "no such file"),
        (lambda path: tar(path / "val.tar", {"ILSVRC2012_val_00000001.JPEG": jpeg()}), "--labels FILE"),
        (lambda path: tar(path / "x.tar", {"readme.txt": b""}), "not a dataset of a known kind"),
    ],
)
def test_what_is_no_dataset_is_told(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SourceSpec((str(make(tmp_path)),)).open()


def test_a_file_of_unknown_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.doc").write_text("words")
    with pytest.raises(DataError, match=r"x\.doc: not a dataset of a known kind; a folder of class folders"):
        SourceSpec((str(tmp_path / "x.doc"),)).open()


def test_labels_for_what_has_its_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\n")
    with pytest.raises(DataError, match="--labels is for ImageNet's validation tar"):
        SourceSpec((str(folder(tmp_path / "images")),), labels=str(tmp_path / "labels.txt")).open()
