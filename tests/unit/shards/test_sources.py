"""Real image files in, rows and bytes out; everything that a folder can hold that it should not."""

import io
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitscale.errors import DataError, VitscaleError
from vitscale_shards.sources import BadImageError, Digits, ImageFolder, Row, image_key, open_source

PATH_PART = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=80)


def save(path: Path, format: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (120, len(path.name), 7)).save(path, format)
    return path.read_bytes()


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT" + bytes(13)


def test_rows_are_sorted_by_class_and_path_and_carry_labels(tmp_path: Path) -> None:
    for name in ("dog/2.jpg", "dog/1.jpg", "cat/deep/er/9.PNG", "cat/3.webp"):
        save(tmp_path / name, "JPEG" if name.endswith("jpg") else name[-3:].replace("ebp", "webp"))
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert list(source.rows()) == [
        Row("cat__3", 0, "cat/3.webp"),
        Row("cat__deep__er__9", 0, "cat/deep/er/9.PNG"),
        Row("dog__1", 1, "dog/1.jpg"),
        Row("dog__2", 1, "dog/2.jpg"),
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
        ("PNG", "called_so.jpg", "png"),
        ("MPO", "phone.jpg", "jpg"),
    ],
)
def test_bytes_pass_through_and_the_content_names_the_extension(
    tmp_path: Path, format: str, name: str, extension: str
) -> None:
    data = save(tmp_path / "c" / name, format)
    source = ImageFolder(tmp_path)
    assert source.read(next(source.rows())) == (extension, data)


def test_hidden_files_do_not_count_and_others_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    save(tmp_path / "c" / ".hidden.jpg")
    save(tmp_path / ".git" / "b.jpg")
    for name in ("c/note.txt", "c/list.txt", "c/LICENSE", "top.jpg"):
        (tmp_path / name).write_text("x")
    source = ImageFolder(tmp_path)
    assert [row.path for row in source.rows()] == ["c/a.jpg"]
    assert source.ignored == {".txt": 2, "no extension": 1, "outside a class folder": 1}


def test_a_class_without_images_keeps_its_label(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.jpg")
    (tmp_path / "a").mkdir()
    assert [row.label for row in ImageFolder(tmp_path).rows()] == [1]


def test_a_link_inside_is_followed(tmp_path: Path) -> None:
    data = save(tmp_path / "c" / "a.jpg")
    (tmp_path / "c" / "b.jpg").symlink_to("a.jpg")
    source = ImageFolder(tmp_path)
    assert [source.read(row)[1] for row in source.rows()] == [data, data]


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "c" / "a.jpg")
    save(tmp_path / "secret.jpg")
    (tmp_path / "in" / "c" / "b.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"b\.jpg: links to .*secret\.jpg, outside"):
        list(ImageFolder(tmp_path / "in").rows())


def test_links_to_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    (tmp_path / "c" / "loop").symlink_to(tmp_path / "c")
    with pytest.raises(DataError, match="only links to files are followed"):
        list(ImageFolder(tmp_path).rows())


@pytest.mark.parametrize(
    ("inside", "message"),
    [((), "holds no class folder"), (("c/a.txt",), "no image in 1 class folders; allowed are bmp")],
)
def test_a_folder_without_images_is_refused(tmp_path: Path, inside: tuple[str, ...], message: str) -> None:
    for name in inside:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        list(ImageFolder(tmp_path).rows())


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; a folder with one folder per class, or 'digits'"):
        open_source(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known image header in 0 bytes"),
        (b"not an image", "no known image header"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image header"),
        (png_header(8, 8)[:20], "image header"),
        (png_header(60_000, 60_000), "bomb"),
        (png_header(10_001, 8_000), "10001x8000 pixels; at most 80000000 are allowed"),
        (png_header(0, 5), "no known image header"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "bomb", "large", "no width"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_headers_are_told(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "bad.jpg").write_bytes(data)
    source = ImageFolder(tmp_path)
    with pytest.raises(BadImageError, match=reason):
        source.read(next(source.rows()))


def test_a_file_that_vanished_is_a_bad_image(tmp_path: Path) -> None:
    save(tmp_path / "c" / "a.jpg")
    source = ImageFolder(tmp_path)
    (row,) = source.rows()
    (tmp_path / row.path).unlink()
    with pytest.raises(BadImageError, match="cannot be read: No such file"):
        source.read(row)


@given(st.lists(PATH_PART, min_size=1, max_size=5), st.lists(PATH_PART, min_size=1, max_size=5))
def test_keys_are_safe_and_say_which_path_they_came_from(first: list[str], second: list[str]) -> None:
    paths = ["/".join(parts) + ".jpg" for parts in (first, second)]
    keys = [image_key(path) for path in paths]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys)
    # The one way to an equal key of two paths is "__" inside of a name; the planner refuses such pairs.
    if paths[0] != paths[1] and not any("_" in path for path in paths):
        assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01/n01_5.JPEG", "n01__n01_5"),
        ("a/b c.jpg", "a__b_c_"),
        ("a/b.c.jpg", "a__b_c_"),
        (f"a/{'x' * 200}.jpg", f"a__{'x' * 70}_"),
        ("a/\udcff.jpg", "a____"),
    ],
)
def test_keys_of_plain_and_of_odd_paths(path: str, key: str) -> None:
    assert image_key(path) == key if not key.endswith("_") else re.fullmatch(key + "[0-9a-f]{16}", image_key(path))


def test_digits_are_lossless_png_of_the_original_values() -> None:
    from sklearn.datasets import load_digits

    source = Digits()
    rows = list(source.rows())
    original = load_digits()
    assert len(rows) == len({row.key for row in rows}) == 1797
    assert [row.label for row in rows] == original.target.tolist()
    for row in rows[::100]:
        extension, data = source.read(row)
        with Image.open(io.BytesIO(data)) as image:
            assert (extension, image.format, image.mode, image.size) == ("png", "PNG", "L", (8, 8))
            values = np.rint(np.asarray(image) / 255 * 16)
        assert (values == original.images[int(row.path)]).all()


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VitscaleError, match=r"pip install 'vitscale\[digits\]'"):
        list(Digits().rows())
