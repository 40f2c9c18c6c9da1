"""Labels of the validation images mean what those of the training images mean, from every form of the ground truth."""

import builtins
import io
import random
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscale.errors import DataError, VitscaleError
from vitscale_shards.rows import BadImageError
from vitscale_shards.sources.class_tars import is_class_tars
from vitscale_shards.sources.imagenet_val import ImageNetVal, is_imagenet_val

savemat = pytest.importorskip("scipy.io").savemat

# As in the real devkit, ILSVRC2012_ID does not follow the order of the WNIDs.
WNID_OF_ID = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n03995372", 5: "n01751748"}
INNER_NODES = {6: "n00001740", 7: "n01503061"}
SORTED = tuple(sorted(WNID_OF_ID.values()))
TRUTH = [4, 5, 1, 3, 3, 2, 4, 1]
DATA = "ILSVRC2012_devkit_t12/data"


def image_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    numbers = list(range(1, len(TRUTH) + 1))
    random.Random(0).shuffle(numbers)  # the order in the tar is not that of the names
    files = {image_name(number): f"image {number}".encode() * 100 for number in numbers}
    return write_tar(tmp_path / "ILSVRC2012_img_val.tar", files)


def meta_mat(leaves: dict[int, str] = WNID_OF_ID, inner: dict[int, str] = INNER_NODES) -> bytes:
    """``meta.mat`` with the fields, types and shapes of the real one."""
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synsets = np.zeros((len(leaves) + len(inner), 1), [(name, object) for name in fields])
    for place, (number, wnid) in enumerate([*leaves.items(), *inner.items()]):
        children = [] if place < len(leaves) else [1, 2]
        row = (
            float(number),
            wnid,
            f"word {number}",
            "a gloss",
            float(len(children)),
            np.array(children, float),
            1.0,
            1300.0,
        )
        synsets[place, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def ids(truth: list[int]) -> bytes:
    return "".join(f"{number}\n" for number in truth).encode()


def devkit(path: Path, truth: bytes | None = None, meta: bytes | None = None) -> Path:
    files = {
        f"{DATA}/meta.mat": meta_mat() if meta is None else meta,
        f"{DATA}/ILSVRC2012_validation_ground_truth.txt": ids(TRUTH) if truth is None else truth,
        "ILSVRC2012_devkit_t12/readme.txt": b"-",
    }
    return write_tar(path, files)


def labels_file(tmp_path: Path, form: str) -> Path:
    wnids = [WNID_OF_ID[number] for number in TRUTH]
    numbered = list(enumerate(wnids, 1))
    texts = {
        "wnids": "\n".join(wnids),
        "wnids with blank lines": "\n".join(wnids) + "\r\n\n",
        "pairs": "\n".join(f"{image_name(number)} {wnid}" for number, wnid in reversed(numbered)),
        "pairs with folders": "\n".join(f"val/{image_name(number)[:-5]}\t{wnid}" for number, wnid in numbered),
    }
    if form in texts:
        path = tmp_path / "labels.txt"
        path.write_text(texts[form])
        return path
    path = devkit(tmp_path / ("devkit.tar" if form == "devkit.tar" else "ILSVRC2012_devkit_t12.tar.gz"))
    if form != "unpacked":
        return path
    shutil.unpack_archive(path, tmp_path)
    return tmp_path / "ILSVRC2012_devkit_t12"


FORMS = ["devkit.tar.gz", "devkit.tar", "unpacked", "wnids", "wnids with blank lines", "pairs", "pairs with folders"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_ground_truth_gives_the_same_rows(tmp_path: Path, images: Path, form: str) -> None:
    source = ImageNetVal(images, labels_file(tmp_path, form))
    rows = list(source.rows())
    assert source.classes == SORTED
    assert source.name == "ILSVRC2012_img_val"
    assert [row.key for row in rows] == [image_name(number)[:-5] for number in range(1, len(TRUTH) + 1)]
    assert [SORTED[row.labels[0]] for row in rows] == [WNID_OF_ID[number] for number in TRUTH]
    assert [source.read(row) for row in rows] == [f"image {i}".encode() * 100 for i in range(1, len(TRUTH) + 1)]
    assert [row.num_bytes for row in rows] == [len(source.read(row)) for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_given_classes_order_the_labels(tmp_path: Path, images: Path, form: str) -> None:
    classes = ["n09999999", *WNID_OF_ID.values()]
    source = ImageNetVal(images, labels_file(tmp_path, form), classes)
    assert source.classes == tuple(classes)
    assert [row.labels for row in source.rows()] == [(number,) for number in TRUTH]
    with pytest.raises(DataError, match=r"class 'n01751748' is unknown \(1 of 5 are\); 4 classes are allowed"):
        list(ImageNetVal(images, labels_file(tmp_path, form), [wnid for wnid in SORTED if wnid != "n01751748"]).rows())


def test_a_class_without_images_keeps_its_label(tmp_path: Path, images: Path) -> None:
    source = ImageNetVal(images, devkit(tmp_path / "d.tar.gz", ids([4] * len(TRUTH))))
    assert source.classes == SORTED
    assert {row.labels for row in source.rows()} == {(SORTED.index("n03995372"),)}


def test_other_members_are_counted_and_folders_do_not_matter(tmp_path: Path) -> None:
    names = {
        "val/" + image_name(1): b"1",
        "val/._" + image_name(1): b"",
        "val/readme.txt": b"",
        "x/" + image_name(2): b"2",
    }
    path = write_tar(tmp_path / "val.tar", names)
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    source = ImageNetVal(path, labels)
    assert [(row.key[-1], row.labels) for row in source.rows()] == [("1", (0,)), ("2", (1,))]
    assert source.ignored == {"hidden": 1, ".txt": 1}


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("form", ["devkit", "pairs"])
def test_other_numbers_of_images_and_labels_are_told(tmp_path: Path, images: Path, change: int, form: str) -> None:
    truth = [*TRUTH, 1][: len(TRUTH) + change]
    labels = tmp_path / "labels"
    if form == "devkit":
        devkit(labels, ids(truth))
    else:
        labels.write_text("\n".join(f"{image_name(i)} {WNID_OF_ID[n]}" for i, n in enumerate(truth, 1)))
    message = f"labels: has labels of {len(truth)} images, but .*ILSVRC2012_img_val.tar holds {len(TRUTH)}"
    with pytest.raises(DataError, match=message):
        list(ImageNetVal(images, labels).rows())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.txt: is empty; give ILSVRC2012_devkit_t12\.tar\.gz, or a text file"),
        ("490\n361\n", r"names classes by number \(490\), in an order that it does not tell; give"),
        (f"{image_name(1)} 65\n", r"names classes by number \(65\)"),
        ("n1\nn2 n3\n", r"labels\.txt:2: 'n2 n3'; one form for all lines is needed"),
        ("a b c\n", r"labels\.txt:1: 'a b c'"),
        (f"{image_name(1)} a\n{image_name(1)} b\n", "names ILSVRC2012_val_00000001 more than once"),
        ("".join(f"{image_name(i)} n1\n" for i in range(2, 10)), r"has no label of ILSVRC2012_val_00000001 \(1 of 8"),
    ],
)
def test_a_wrong_list_is_told(tmp_path: Path, images: Path, text: str, message: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(text)
    with pytest.raises(DataError, match=message):
        list(ImageNetVal(images, labels).rows())


@pytest.mark.parametrize(
    ("truth", "meta", "message"),
    [
        (
            b"4\n6\n",
            None,
            "line 2 of data/ILSVRC2012_validation_ground_truth.txt is '6'; the ILSVRC2012_ID of one of the 5",
        ),
        (b"x", None, "is 'x'"),
        (None, b"", "data/meta.mat cannot be read"),
        (None, meta_mat()[:-400], "data/meta.mat cannot be read"),
        (None, meta_mat({1: "n1", 2: "n1"}), "names 2 classes, 2 numbers and 1 WNIDs"),
        (None, meta_mat({}), "names 0 classes"),
    ],
)
def test_a_damaged_devkit_is_told(
    tmp_path: Path, images: Path, truth: bytes | None, meta: bytes | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        list(ImageNetVal(images, devkit(tmp_path / "d.tar.gz", truth, meta)).rows())


def test_files_that_are_no_ground_truth_are_told(tmp_path: Path, images: Path) -> None:
    whole = devkit(tmp_path / "d.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    with (tmp_path / "large").open("wb") as file:
        file.write(b"text")
        file.truncate(1 << 30)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "cut.tar.gz": "cannot be read as ground truth",
        "bytes": "cannot be read as ground truth",
        "large": "1073741824 bytes are too many",
        "empty": "cannot be read as ground truth .*No such file",
        images.name: "holds no data/meta.mat, so it is not the devkit",
    }.items():
        with pytest.raises(DataError, match=re.escape(name) + f".*{message}"):
            list(ImageNetVal(images, tmp_path / name).rows())
    for tar, labels in ((images, tmp_path / "none"), (tmp_path / "none", images)):
        with pytest.raises(DataError, match=r"none: no such file; the .* of the validation set is needed"):
            ImageNetVal(tar, labels)


def test_without_scipy_the_cure_is_told(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(VitscaleError, match="pip install scipy"):
        list(ImageNetVal(images, devkit(tmp_path / "d.tar.gz")).rows())
    assert list(ImageNetVal(images, labels_file(tmp_path, "wnids")).rows())


def test_a_worker_reads_without_the_ground_truth(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(ImageNetVal(images, labels_file(tmp_path, "wnids")).rows())
    worker = ImageNetVal(images, tmp_path)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a file was opened to be listed")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    assert [worker.read(row) for row in rows[:2]] == [b"image 1" * 100, b"image 2" * 100]
    with pytest.raises(BadImageError, match="it has changed"):
        worker.read(rows[0]._replace(path=rows[0].path.replace("00000001", "00000002")))


def test_the_opener_tells_the_validation_tar_from_others(tmp_path: Path, images: Path) -> None:
    assert is_imagenet_val(images)
    assert is_imagenet_val(write_tar(tmp_path / "v.tar.gz", {"val/" + image_name(7): b"7"}))
    assert not is_class_tars(images)
    assert not is_imagenet_val(write_tar(tmp_path / "other.tar", {"n01440764/n01440764_1.JPEG": b"1"}))
    assert not is_imagenet_val(devkit(tmp_path / "devkit.tar.gz"))
    assert not is_imagenet_val(tmp_path)
