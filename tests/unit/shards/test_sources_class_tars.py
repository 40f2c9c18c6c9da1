"""Class tars give exactly the rows and bytes that unpacking them and reading the folder gives."""

import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.errors import DataError
from vitscale_shards.rows import BadImageError, Row, Source
from vitscale_shards.sources.archive import ArchiveReader
from vitscale_shards.sources.class_tars import ClassTars, is_class_tars
from vitscale_shards.sources.folder import ImageFolder

Tree = dict[str, bytes]

TREE: Tree = {
    "n01440764/n01440764_10026.JPEG": b"tench" * 700,
    "n01440764/n01440764_18.JPEG": b"x" * 512,
    "n01440764/notes.txt": b"not an image",
    "n01440764/.hidden.JPEG": b"hidden",
    "n01440764/LICENSE": b"",
    "n01443537/n01443537_2.JPEG": b"",
    "n01443537/deep/er/3.png": b"y" * 513,
    "a class/b.c.d.Jpg": b"dots and space",
    f"a class/{'long' * 40}.webp": b"a name that no USTAR header holds",
    "\u00e9tang/\u00e9.jpg": b"not ASCII",
}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_bytes(files: Tree, format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def class_tars(tree: Tree, format: int = tarfile.GNU_FORMAT, start: str = "") -> Tree:
    classes = dict.fromkeys(path.partition("/")[0] for path in tree)
    return {
        f"{name}.tar": tar_bytes(
            {start + path.partition("/")[2]: data for path, data in tree.items() if path.startswith(f"{name}/")}, format
        )
        for name in classes
    }


def write_outer(path: Path, tree: Tree, format: int = tarfile.GNU_FORMAT, start: str = "") -> Path:
    path.write_bytes(tar_bytes(class_tars(tree, format, start), format))
    return path


def write_folder(path: Path, tree: Tree, format: int = tarfile.GNU_FORMAT, start: str = "") -> Path:
    path.mkdir()
    for name, data in class_tars(tree, format, start).items():
        (path / name).write_bytes(data)
    return path


def unpack(folder: Path, tree: Tree) -> Path:
    for path, data in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def content(source: Source) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    rows = list(source.rows())
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: (row.labels, row.num_bytes, source.read(row)) for row in rows}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("start", ["", "./"])
@pytest.mark.parametrize("write", [write_outer, write_folder])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_rows_are_those_of_the_unpacked_folder(
    tmp_path: Path, write: Callable[..., Path], format: int, start: str
) -> None:
    source = ClassTars(write(tmp_path / "train.tar", TREE, format, start))
    folder = ImageFolder(unpack(tmp_path / "train", TREE))
    assert source.classes == folder.classes == ("a class", "n01440764", "n01443537", "\u00e9tang")
    assert content(source) == content(folder)
    assert source.name == "train"
    assert source.ignored == {".txt": 1, "no extension": 1, "hidden": 1, "outside a class tar": 0}
    assert list(source.rows()) == list(source.rows())
    assert source.ignored[".txt"] == 1


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("format", ["v7", "ustar", "gnu", "pax"])
def test_tars_of_the_tar_command(tmp_path: Path, format: str) -> None:
    tree = {path: data for path, data in TREE.items() if len(path) < 100}
    folder = unpack(tmp_path / "train", tree)
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in [path.name for path in folder.iterdir()]:
        command = ["tar", f"--format={format}", "-cf", str(tars / f"{name}.tar"), "-C", str(folder / name), "."]
        subprocess.run(command, check=True)
    outer = tmp_path / "outer.tar"
    subprocess.run(["tar", f"--format={format}", "-cf", str(outer), "-C", str(tars), "."], check=True)
    assert content(ClassTars(outer)) == content(ClassTars(tars)) == content(ImageFolder(folder))


PART = st.text(st.sampled_from("ab01_-. \u00e9"), min_size=1, max_size=8).filter(lambda text: text.strip("."))
TREES = st.dictionaries(
    st.builds(
        lambda parts, end: "/".join(parts) + end,
        st.lists(PART, min_size=2, max_size=3),
        st.sampled_from([".jpg", ".PNG", ".txt"]),
    ),
    st.binary(max_size=1100),
    min_size=1,
    max_size=12,
)


@given(tree=TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_gives_the_rows_of_its_folder(tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> None:
    tree = {path: data for path, data in tree.items() if not path.startswith(".")}
    tree = {p: d for p, d in tree.items() if not any(other.startswith(f"{p}/") for other in tree)}
    tree["z/z.jpg"] = b"one image at least"
    here = tmp_path_factory.mktemp("tree")
    folder = ImageFolder(unpack(here / "train", tree))
    source = ClassTars(write_outer(here / "train.tar", tree, tarfile.PAX_FORMAT))
    assert source.classes == folder.classes
    assert sorted(map(row_without_path, source.rows())) == sorted(map(row_without_path, folder.rows()))
    assert sorted(source.read(row) for row in source.rows()) == sorted(folder.read(row) for row in folder.rows())


def row_without_path(row: Row) -> Row:
    return row._replace(path="")


def test_a_path_says_where_the_bytes_lie(tmp_path: Path) -> None:
    path = write_outer(tmp_path / "train.tar", TREE)
    data = path.read_bytes()
    for row in ClassTars(path).rows():
        name, offset, size = re.fullmatch(r"(.*)@(\d+)\+(\d+)", row.path).groups()  # type: ignore[union-attr]
        assert data[int(offset) : int(offset) + int(size)] == TREE[name]


def test_a_new_source_reads_without_listing(tmp_path: Path) -> None:
    path = write_outer(tmp_path / "train.tar", TREE)
    rows = list(ClassTars(path).rows())
    data = bytearray(path.read_bytes())
    data[:100] = bytes(100)  # now it cannot be listed
    path.write_bytes(data)
    reader = ClassTars(path)
    assert reader.read(rows[-1]) == TREE["\u00e9tang/\u00e9.jpg"]
    with pytest.raises(DataError):
        list(reader.rows())


@pytest.mark.parametrize("write", [write_outer, write_folder])
def test_an_empty_class_tar_keeps_its_label(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "t.tar", {"b/1.jpg": b"1", "a/": b""})
    tars = class_tars({"b/1.jpg": b"1"}) | {"a.tar": tar_bytes({})}
    if path.is_dir():
        (path / "a.tar").write_bytes(tars["a.tar"])
    else:
        path.write_bytes(tar_bytes(tars))
    assert [row.labels for row in ClassTars(path).rows()] == [(1,)]


def test_given_classes_order_the_labels(tmp_path: Path) -> None:
    path = write_outer(tmp_path / "t.tar", {"a/1.jpg": b"1", "b/2.jpg": b"2"})
    source = ClassTars(path, ["c", "b", "a"])
    assert source.classes == ("c", "b", "a")
    assert {row.key: row.labels for row in source.rows()} == {"a__1": (2,), "b__2": (1,)}
    with pytest.raises(DataError, match=r"t\.tar: class 'b' is unknown \(1 of 2 are\)"):
        list(ClassTars(path, ["a"]).rows())


def test_listing_reads_headers_only_and_offsets_pass_4_gib(tmp_path: Path) -> None:
    hole = 5 << 30
    path = tmp_path / "sparse.tar"
    with path.open("wb") as file:
        for name in ("a.tar", "b.tar"):
            image = tarfile.TarInfo("1.jpg")
            image.size = hole
            outer = tarfile.TarInfo(name)
            outer.size = 512 + hole + 512 + 512 + 1024
            last = tarfile.TarInfo("2.jpg")
            last.size = 7
            file.write(outer.tobuf() + image.tobuf())
            file.seek(hole, os.SEEK_CUR)
            file.write(last.tobuf() + b"the end".ljust(512, b"\0") + bytes(1024))
        file.write(bytes(1024))
    source = ClassTars(path)
    rows = list(source.rows())
    assert [row.num_bytes for row in rows] == [hole, 7, hole, 7]
    assert source.read(rows[3]) == b"the end"
    with pytest.raises(BadImageError, match="has 5368709632 bytes; at most 1073741824 are allowed"):
        source.read(rows[0])


def test_every_cut_is_told_with_file_and_byte(tmp_path: Path) -> None:
    whole = write_outer(tmp_path / "t.tar", {"a/1.jpg": b"1" * 700, "b/2.jpg": b"2"}).read_bytes()
    end = tarfile.open(tmp_path / "t.tar").getmembers()[-1]  # noqa: SIM115
    last = end.offset_data + end.size
    cut = tmp_path / "cut.tar"
    for size in (*range(0, last + 512, 512), 1, 600, 1300, last - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tar: damaged at byte \d+: .*; copy or download it again"):
            list(ClassTars(cut).rows())


def test_damage_inside_an_inner_tar_is_told_with_its_place_in_the_outer_one(tmp_path: Path) -> None:
    path = write_outer(tmp_path / "t.tar", {"a/1.jpg": b"1" * 700, "a/2.jpg": b"2"})
    row = list(ClassTars(path).rows())[1]
    offset = int(re.findall(r"@(\d+)", row.path)[0]) - 512
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"t\.tar: a\.tar: damaged at byte {offset}: no tar header"):
        list(ClassTars(path).rows())


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_changed_bytes_give_the_images_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tree = {"a/1.jpg": b"1" * 700, f"a/{'l' * 120}.jpg": b"2", "b/3.jpg": b"3"}
    path = write_outer(tmp_path_factory.mktemp("t") / "t.tar", tree, data.draw(st.sampled_from([1, 2])))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    is_class_tars(path)
    try:
        source = ClassTars(path)
        rows = list(source.rows())
    except DataError:
        return
    for row in rows:
        with contextlib.suppress(BadImageError):
            assert len(source.read(row)) == row.num_bytes


@pytest.mark.parametrize(
    ("pack", "command"), [(gzip.compress, "gzip.*gunzip"), (lzma.compress, "xz.*unxz")], ids=["gzip", "xz"]
)
@pytest.mark.parametrize("name", ["train.tar", "train.tar.gz"])
def test_a_compressed_tar_is_refused_whatever_its_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], command: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(tar_bytes(class_tars(TREE))))
    assert is_class_tars(path)
    with pytest.raises(DataError, match=f"train.tar.*: is compressed with {command}"):
        ClassTars(path)


def test_a_tar_may_begin_with_a_name_that_looks_compressed(tmp_path: Path) -> None:
    path = write_outer(tmp_path / "t.tar", {"BZh91AY/BZh.jpg": b"1"})
    assert content(ClassTars(path)) == {"BZh91AY__BZh": ((0,), 1, b"1")}


@pytest.mark.parametrize("inner", ["b.tar", "b.tar.gz"])
def test_a_compressed_class_tar_is_refused(tmp_path: Path, inner: str) -> None:
    tars = class_tars({"a/1.jpg": b"1"}) | {inner: gzip.compress(tar_bytes({"2.jpg": b"2"}))}
    (tmp_path / "t.tar").write_bytes(tar_bytes(tars))
    folder = tmp_path / "t"
    folder.mkdir()
    for name, data in tars.items():
        (folder / name).write_bytes(data)
    for path in (tmp_path / "t.tar", folder):
        with pytest.raises(DataError, match=r"b\.tar.*is compressed"):
            list(ClassTars(path).rows())


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ({"1.jpg": b"1"}, r"holds no class tar \(1 other files\); one CLASS.tar per class is needed"),
        ({"a.tar": tar_bytes({}), "sub/a.tar": tar_bytes({})}, "holds two tars of the class 'a'"),
        ({"a.tar": tar_bytes({"x.txt": b""})}, "no image in 1 class tars; allowed are bmp"),
        ({"a.tar": b""}, r"a\.tar: damaged at byte 512: the tar ends after 0 bytes"),
        ({"a.tar": b"text" * 400}, r"a\.tar: damaged at byte 512: damaged tar: invalid header"),
    ],
    ids=["flat", "twice", "no image", "no bytes", "no tar"],
)
def test_what_is_no_tar_of_class_tars_is_refused(tmp_path: Path, tars: Tree, message: str) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes(tars))
    with pytest.raises(DataError, match=message):
        list(ClassTars(tmp_path / "t.tar").rows())


def test_a_missing_file_and_a_link_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such file; a tar of class tars"):
        ClassTars(tmp_path / "nothing")
    write_folder(tmp_path / "tars", {"a/1.jpg": b"1"})
    (tmp_path / "secret.tar").write_bytes(tar_bytes({"2.jpg": b"2"}))
    (tmp_path / "tars" / "b.tar").symlink_to("../secret.tar")
    with pytest.raises(DataError, match=r"b\.tar: links to .*secret\.tar, outside"):
        list(ClassTars(tmp_path / "tars").rows())


def change_size(path: Path) -> None:
    path.write_bytes(tar_bytes(class_tars({"a/1.jpg": b"1" * 100, "a/2.jpg": b"2"})))


def change_name(path: Path) -> None:
    path.write_bytes(tar_bytes(class_tars({"a/1.jpg": b"1" * 700, "a/3.jpg": b"2"})))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2560])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_size, r"holds no 2\.jpg of 1 bytes at byte \d+: it has changed since it was listed"),
        (change_name, r"holds no 2\.jpg of 1 bytes"),
        (cut, "has 2560 bytes, but the image ends at .*: it is truncated or has changed"),
        (Path.unlink, "cannot be read: No such file"),
    ],
)
def test_a_tar_that_changed_gives_no_other_bytes(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = write_outer(tmp_path / "t.tar", {"a/1.jpg": b"1" * 700, "a/2.jpg": b"2"})
    row = list(ClassTars(path).rows())[1]
    reader = ClassTars(path)
    damage(path)
    with pytest.raises(BadImageError, match=message):
        reader.read(row)


@pytest.mark.parametrize("place", ["", "a/1.jpg", "a/1.jpg@-5+3", "a/1.jpg@9+1", f"a/1.jpg@600+{10**17}", "\0@600+1"])
def test_a_place_that_is_none_is_a_bad_image(tmp_path: Path, place: str) -> None:
    for path in (write_outer(tmp_path / "t.tar", TREE), write_folder(tmp_path / "t", TREE)):
        with pytest.raises(BadImageError):
            ClassTars(path).read(Row("k", (0,), place))


def test_few_files_stay_open_and_threads_and_forks_read_rightly(tmp_path: Path) -> None:
    tree = {f"c{i:02d}/{j}.jpg": f"{i} {j} ".encode() * 50 for i in range(40) for j in range(3)}
    source = ClassTars(write_folder(tmp_path / "t", tree))
    rows = list(source.rows())
    before = open_descriptors()
    source._reader = ArchiveReader(max_open=3)
    wrong: list[Row] = []

    def read_all(shift: int) -> None:
        for row in rows[shift:] + rows[:shift]:
            if source.read(row) != tree[row.path.partition("@")[0]]:
                wrong.append(row)

    threads = [threading.Thread(target=read_all, args=(13 * shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_descriptors() == before + 3
    children = []
    for shift in range(3):
        if (child := os.fork()) == 0:
            read_all(17 * shift)
            os._exit(len(wrong) and 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    del source._reader
    assert open_descriptors() == before


def test_the_opener_tells_class_tars_from_others(tmp_path: Path) -> None:
    assert is_class_tars(write_outer(tmp_path / "t.tar", TREE))
    assert is_class_tars(write_folder(tmp_path / "tars", {"b/1.jpg": b"1", "b/2.jpg": b"2"}))
    (tmp_path / "tars" / "a.tar").write_bytes(tar_bytes({}))  # an empty class comes first
    assert is_class_tars(tmp_path / "tars")
    for name, files in {
        "flat.tar": {"1.jpg": b"1"},
        "samples.tar": {"1.jpg": b"1", "1.cls": b"0"},
        "empty.tar": {},
    }.items():
        (tmp_path / name).write_bytes(tar_bytes(files))
        assert not is_class_tars(tmp_path / name)
    (tmp_path / "samples").mkdir()
    shutil.copy(tmp_path / "samples.tar", tmp_path / "samples")
    (tmp_path / "text.tar").write_text("no tar")
    for name in ("samples", "text.tar", "nothing"):
        assert not is_class_tars(tmp_path / name)
