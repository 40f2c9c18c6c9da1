"""Real image files in, rows and bytes out; everything that a folder can hold that it should not."""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale.errors import DataError, VitscaleError
from vitscale_shards.images import check_header
from vitscale_shards.rows import MAX_IMAGE_BYTES, BadImageError, Row
from vitscale_shards.sources.digits import Digits
from vitscale_shards.sources.folder import ImageFolder

NO_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def save(path: Path, format: str = "JPEG") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (120, len(path.name), 7)).save(path, format)
    return path.read_bytes()


def paths(source: ImageFolder) -> list[str]:
    return [row.path for row in source.rows()]


def test_rows_are_sorted_by_class_and_path_and_carry_labels_and_sizes(tmp_path: Path) -> None:
    size = {
        name: len(save(tmp_path / name, {"jpg": "JPEG", "PNG": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]))
        for name in ("dog/2.jpg", "dog/1.jpg", "cat/deep/er/9.PNG", "cat/3.webp", "cat/deep.jpg")
    }
    source = ImageFolder(tmp_path)
    assert (source.name, source.classes, source.multi_label) == (tmp_path.name, ("cat", "dog"), False)
    assert list(source.rows()) == [
        Row("cat__3", (0,), "cat/3.webp", size["cat/3.webp"]),
        Row("cat__deep__er__9", (0,), "cat/deep/er/9.PNG", size["cat/deep/er/9.PNG"]),
        Row("cat__deep", (0,), "cat/deep.jpg", size["cat/deep.jpg"]),
        Row("dog__1", (1,), "dog/1.jpg", size["dog/1.jpg"]),
        Row("dog__2", (1,), "dog/2.jpg", size["dog/2.jpg"]),
    ]
    assert list(source.rows()) == list(ImageFolder(tmp_path).rows())


@pytest.mark.parametrize(
    ("format", "name", "extension"),
    [
        ("JPEG", "a.jpg", "jpg"),
        ("JPEG", "a.JPEG", "jpg"),
        ("PNG", "a.png", "png"),
        ("WEBP", "a.webp", "webp"),
        ("BMP", "a.bmp", "bmp"),
        ("GIF", "a.gif", "gif"),
        ("TIFF", "a.tiff", "tif"),
        ("TIFF", "a.TIF", "tif"),
        ("PNG", "called_so.jpg", "png"),
        ("MPO", "phone.jpg", "jpg"),
    ],
)
def test_bytes_pass_through_and_the_content_names_the_extension(
    tmp_path: Path, format: str, name: str, extension: str
) -> None:
    data = save(tmp_path / "c" / name, format)
    source = ImageFolder(tmp_path)
    (row,) = source.rows()
    assert source.read(row) == data
    assert check_header(data)[0] == extension


def test_a_file_of_any_size_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    data = np.random.default_rng(0).bytes(3 << 20)
    for size in (0, 1, 511, 3 << 20):
        (tmp_path / "c" / "a.jpg").write_bytes(data[:size])
        source = ImageFolder(tmp_path)
        (row,) = source.rows()
        assert row.num_bytes == size
        assert source.read(row) == data[:size]


def test_hidden_files_do_not_count_and_others_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    save(tmp_path / "c" / ".hidden.jpg")
    save(tmp_path / "c" / ".cache" / "b.jpg")
    save(tmp_path / ".git" / "b.jpg")
    for name in ("c/note.txt", "c/list.txt", "c/LICENSE", "top.jpg"):
        (tmp_path / name).write_text("x")
    source = ImageFolder(tmp_path)
    for _ in range(2):
        assert paths(source) == ["c/a.jpg"]
        assert source.ignored == {".txt": 2, "no extension": 1, "outside a class folder": 1}


def test_a_class_without_images_keeps_its_label(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.jpg")
    (tmp_path / "a").mkdir()
    source = ImageFolder(tmp_path)
    assert source.classes == ("a", "b")
    assert [row.labels for row in source.rows()] == [(1,)]


@pytest.mark.parametrize("classes", [("dog", "wolf", "cat"), ["dog", "wolf", "cat"]])
def test_given_classes_give_the_labels(tmp_path: Path, classes: Sequence[str]) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / name / "1.jpg")
    source = ImageFolder(tmp_path, classes)
    assert source.classes == ("dog", "wolf", "cat")
    assert [(row.path, row.labels) for row in source.rows()] == [("cat/1.jpg", (2,)), ("dog/1.jpg", (0,))]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["dog"], r"class 'cat' is unknown \(1 of 2 are\); 1 classes are allowed, such as 'dog'"),
        (["wolf"], r"class 'cat' is unknown \(2 of 2 are\); 1 classes"),
        (["cat", "dog", "cat"], "class 'cat' is twice in the list of classes"),
    ],
)
def test_classes_that_do_not_fit_are_told(tmp_path: Path, classes: list[str], message: str) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / name / "1.jpg")
    with pytest.raises(DataError, match=message):
        ImageFolder(tmp_path, classes)


# Links, and what is no file.


def test_a_link_inside_is_followed(tmp_path: Path) -> None:
    data = save(tmp_path / "c" / "a.jpg")
    (tmp_path / "c" / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "c" / "c.jpg").symlink_to(tmp_path / "c" / "b.jpg")
    source = ImageFolder(tmp_path)
    assert [(row.num_bytes, source.read(row)) for row in source.rows()] == [(len(data), data)] * 3


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    data = save(tmp_path / "real" / "c" / "a.jpg")
    (tmp_path / "linked").symlink_to("real")
    source = ImageFolder(tmp_path / "linked")
    assert [source.read(row) for row in source.rows()] == [data]
    assert source.name == "real"


@pytest.mark.parametrize("target", ["../../secret.jpg", "../../in2/b.jpg", "/etc/passwd", "../../nothing.jpg"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    save(tmp_path / "in" / "c" / "a.jpg")
    save(tmp_path / "in2" / "b.jpg")
    save(tmp_path / "secret.jpg")
    (tmp_path / "in" / "c" / "b.jpg").symlink_to(target)
    with pytest.raises(DataError, match=r"b\.jpg: links to .*, outside of .*in; copy or hard-link"):
        paths(ImageFolder(tmp_path / "in"))


def test_a_linked_class_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "c" / "a.jpg")
    save(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "in" / "d").symlink_to("../elsewhere")
    with pytest.raises(DataError, match=r"in/d: links to .*elsewhere, outside"):
        ImageFolder(tmp_path / "in")


@pytest.mark.parametrize("target", [".", "..", "../c"])
def test_links_to_folders_and_their_loops_are_refused(tmp_path: Path, target: str) -> None:
    save(tmp_path / "c" / "a.jpg")
    (tmp_path / "c" / "loop").symlink_to(target)
    with pytest.raises(DataError, match=r"loop: links to the folder .*only links to files are followed"):
        paths(ImageFolder(tmp_path))


@pytest.mark.parametrize("place", ["c/x.jpg", "x"])
def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path, place: str) -> None:
    save(tmp_path / "c" / "a.jpg")
    (tmp_path / place).symlink_to(Path("y"))
    (tmp_path / place).with_name("y").symlink_to((tmp_path / place).name)
    with pytest.raises(DataError, match=r"/[xy](\.jpg)?: links in a circle; remove it"):
        paths(ImageFolder(tmp_path))


def test_a_link_to_nothing_is_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jpg").symlink_to("gone.jpg")
    source = ImageFolder(tmp_path)
    (row,) = source.rows()
    assert row.num_bytes == 0
    with pytest.raises(BadImageError, match="cannot be read: No such file"):
        source.read(row)


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    os.mkfifo(tmp_path / "c" / "pipe.jpg")
    (tmp_path / "c" / "to_pipe.jpg").symlink_to("pipe.jpg")
    source = ImageFolder(tmp_path)
    assert paths(source) == ["c/a.jpg", "c/to_pipe.jpg"]
    assert source.ignored["no regular file"] == 1
    for path in ("c/pipe.jpg", "c/to_pipe.jpg", "c"):
        with pytest.raises(BadImageError, match="no regular file"):
            source.read(Row("k", (0,), path))


@pytest.mark.parametrize("path", ["../secret.jpg", "c/../../secret.jpg", ".."])
def test_a_plan_cannot_lead_out_of_the_folder(tmp_path: Path, path: str) -> None:
    save(tmp_path / "in" / "c" / "a.jpg")
    save(tmp_path / "secret.jpg")
    source = ImageFolder(tmp_path / "in")
    with pytest.raises(BadImageError, match="leads out of its folder"):
        source.read(Row("k", (0,), path))
    with pytest.raises(BadImageError, match="cannot be read"):
        source.read(Row("k", (0,), str(tmp_path / "secret.jpg")))


# What cannot be read.


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ((), "holds no class folder; images must lie in folder/class/name.jpg"),
        (("a.jpg",), "holds no class folder"),
        (("c/a.txt",), "no image in 1 class folders; allowed are bmp gif jpeg jpg"),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path: Path, inside: tuple[str, ...], message: str) -> None:
    for name in inside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        paths(ImageFolder(tmp_path))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(DataError, match=f"{name}: no such folder; a folder with one folder per class is needed"):
            ImageFolder(tmp_path / name)


@NO_ROOT
def test_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c" / "deep" / "a.jpg")
    source = ImageFolder(tmp_path)
    (tmp_path / "c" / "deep").chmod(0)
    try:
        with pytest.raises(DataError, match=r"deep: cannot be listed \(Permission denied\); make it readable"):
            paths(source)
    finally:
        (tmp_path / "c" / "deep").chmod(0o755)


def test_a_folder_that_vanishes_while_it_is_listed_is_told(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    save(tmp_path / "d" / "a.jpg")
    rows = ImageFolder(tmp_path).rows()
    assert next(rows).path == "c/a.jpg"
    (tmp_path / "d" / "a.jpg").unlink()
    (tmp_path / "d").rmdir()
    with pytest.raises(DataError, match=r"d: cannot be listed \(No such file or directory\)"):
        next(rows)


def test_a_file_that_vanished_is_a_bad_image(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    source = ImageFolder(tmp_path)
    (row,) = source.rows()
    (tmp_path / row.path).unlink()
    with pytest.raises(BadImageError, match="cannot be read: No such file"):
        source.read(row)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    os.truncate(tmp_path / "c" / "a.jpg", MAX_IMAGE_BYTES + 1)  # takes no room on the disk
    source = ImageFolder(tmp_path)
    (row,) = source.rows()
    with pytest.raises(BadImageError, match="has 1073741825 bytes; at most 1073741824 are allowed"):
        source.read(row)


# Digits.


def test_digits_are_lossless_png_of_the_original_values() -> None:
    from sklearn.datasets import load_digits

    source = Digits()
    rows = list(source.rows())
    original = load_digits()
    assert (source.name, source.classes, source.multi_label) == ("digits", tuple("0123456789"), False)
    assert len(rows) == len({row.key for row in rows}) == 1797
    assert [row.labels for row in rows] == [(label,) for label in original.target.tolist()]
    for row in rows[::100]:
        data = source.read(row)
        assert check_header(data) == ("png", (8, 8))
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            values = np.rint(np.asarray(image) / 255 * 16)
        assert (values == original.images[int(row.path)]).all()


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VitscaleError, match=r"pip install 'vitscale\[digits\]'"):
        list(Digits().rows())
