"""IDX files of the MNIST family in, lossless images and their labels out."""

import gzip
import io
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row
from vitscale_shards.sources.idx import Idx, is_idx

COUNT, HEIGHT, WIDTH = 25, 5, 7
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, HEIGHT, WIDTH), dtype=np.uint8)
LABELS = np.arange(COUNT, dtype=np.uint8) % 10


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def dataset(folder: Path, prefix: str = "train", images: str = "-idx3-ubyte", labels: str = "-idx1-ubyte") -> Path:
    write(folder / f"{prefix}-labels{labels}", idx_bytes(LABELS))
    return write(folder / f"{prefix}-images{images}", idx_bytes(PIXELS))


def check(source: Idx, prefix: str) -> None:
    rows = list(source.rows())
    assert [row.key for row in rows] == [f"{prefix}-{number:07d}" for number in range(COUNT)]
    assert [row.labels for row in rows] == [(int(label),) for label in LABELS]
    for row, expected in reversed(list(zip(rows, PIXELS, strict=True))):
        data = source.read(row)
        assert len(data) == row.num_bytes
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("labels", ["-idx1-ubyte", "-idx1-ubyte.gz"])
@pytest.mark.parametrize("images", ["-idx3-ubyte", "-idx3-ubyte.gz"])
@pytest.mark.parametrize("prefix", ["train", "t10k", "emnist-balanced-train"])
def test_images_and_labels_packed_or_not(tmp_path: Path, prefix: str, images: str, labels: str) -> None:
    path = dataset(tmp_path, prefix, images, labels)
    assert is_idx(path)
    source = Idx(path)
    assert (source.name, source.multi_label) == (f"{prefix}-images-idx3-ubyte", False)
    assert source.classes == tuple("0123456789")
    check(source, prefix)


def test_names_with_a_dot_and_images_of_a_packed_name_with_plain_labels(tmp_path: Path) -> None:
    check(Idx(dataset(tmp_path, "train", ".idx3-ubyte", ".idx1-ubyte")), "train")


def test_a_folder_is_its_training_images(tmp_path: Path) -> None:
    dataset(tmp_path, "t10k")
    dataset(tmp_path, "train", "-idx3-ubyte.gz")
    dataset(tmp_path, "train")
    assert is_idx(tmp_path)
    source = Idx(tmp_path)
    assert source.path.name == "train-images-idx3-ubyte"
    check(source, "train")
    assert source.ignored == {"t10k-images-idx3-ubyte": 1, "train-images-idx3-ubyte.gz": 1}
    dataset(tmp_path, "emnist-letters-train")
    with pytest.raises(
        DataError, match=r"holds 2 files of training images .* give the one file of images that is meant"
    ):
        Idx(tmp_path)


def test_given_classes_name_the_labels(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    names = [f"class {n}" for n in range(12)]
    assert Idx(path, names).classes == tuple(names)
    check(Idx(path, names), "train")
    with pytest.raises(DataError, match="label 9, but only 9 classes are named"):
        list(Idx(path, names[:9]).rows())


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx_bytes(PIXELS[:-1]), idx_bytes(LABELS), "24 images, but train-labels-idx1-ubyte.* has 25 labels"),
        (idx_bytes(LABELS), idx_bytes(LABELS), "images.*begins with 00 00 08 01 where 00 00 08 03 is right"),
        (idx_bytes(PIXELS), idx_bytes(PIXELS), r"labels.*begins with 00 00 08 03 where 00 00 08 01 .* 1 dimension\)"),
        (idx_bytes(PIXELS.astype(">f4"), 13), idx_bytes(LABELS), "begins with 00 00 0d 03"),
        (b"", idx_bytes(LABELS), "begins with  where 00 00 08 03 is right"),
        (idx_bytes(PIXELS)[:12], idx_bytes(LABELS), "begins with 00 00 08 03 where"),
        (idx_bytes(PIXELS)[:-1], idx_bytes(LABELS), "images.*(has 890 bytes where 891 follow|not the 891 bytes)"),
        (idx_bytes(PIXELS) + b"\0", idx_bytes(LABELS), "images.*(has 892 bytes where 891 follow|not the 891 bytes)"),
        (idx_bytes(PIXELS), idx_bytes(LABELS)[:-1], "labels.*(has 32 bytes where 33 follow|not the 33 bytes)"),
        (idx_bytes(PIXELS[:, :0]), idx_bytes(LABELS), "images of 0x7 pixels; at least 1x1 is needed"),
        (idx_bytes(PIXELS[:0]), idx_bytes(LABELS[:0]), "holds no label; at least one is needed"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, images: bytes, labels: bytes, message: str, packed: str) -> None:
    write(tmp_path / f"train-labels-idx1-ubyte{packed}", labels)
    path = write(tmp_path / f"train-images-idx3-ubyte{packed}", images)
    with pytest.raises(DataError, match=message):
        list(Idx(path).rows())


def test_every_cut_of_a_packed_file_is_told(tmp_path: Path) -> None:
    path = dataset(tmp_path, "train", "-idx3-ubyte.gz")
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: .*; download it again"):
            list(Idx(path).rows())
    path.write_bytes(b"no gzip at all" * 9)
    with pytest.raises(DataError, match=r"cannot be read \(Not a gzipped file"):
        list(Idx(path).rows())


def test_a_packed_file_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    write(tmp_path / "train-labels-idx1-ubyte", idx_bytes(LABELS))
    head = bytes((0, 0, 8, 3)) + struct.pack(">3I", 1 << 20, 1 << 10, 1 << 10)
    path = write(tmp_path / "train-images-idx3-ubyte.gz", head + bytes(1000))
    with pytest.raises(DataError, match=rf"{(1 << 40) + 16} bytes when unpacked; .* gunzip it"):
        list(Idx(path).rows())


def test_missing_and_wrongly_named_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such file; one like train-images-idx3-ubyte is needed"):
        Idx(tmp_path / "none")
    images = write(tmp_path / "train-images-idx3-ubyte.gz", idx_bytes(PIXELS))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte: no such file; the labels must lie beside the images"):
        Idx(images)
    labels = write(tmp_path / "train-labels-idx1-ubyte", idx_bytes(LABELS))
    assert is_idx(labels)
    with pytest.raises(DataError, match="train-labels-idx1-ubyte: is not named like a file of images"):
        Idx(labels)
    assert not is_idx(tmp_path / "x.bin")
    images.unlink()
    with pytest.raises(DataError, match="holds 0 files of training images"):
        Idx(tmp_path)
    assert not is_idx(tmp_path)


@pytest.mark.parametrize("images", ["-idx3-ubyte", "-idx3-ubyte.gz"])
def test_threads_read_at_a_time_and_wrong_places_are_bad_images(tmp_path: Path, images: str) -> None:
    path = dataset(tmp_path, "train", images)
    rows = list(Idx(path).rows())
    expected = [Idx(path).read(row) for row in rows]
    worker = Idx(path)
    results: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: results.append([worker.read(row) for row in rows])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6
    for place in ("", "x@16+34", "x@99999+35", "x@880+35"):
        with pytest.raises(BadImageError):
            worker.read(Row("k", (0,), place))
